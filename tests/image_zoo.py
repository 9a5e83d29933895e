"""Image files that are bad or odd, each with what must come of it: its pixels, or the reason that it is refused for.

What is expected follows from the standards of the formats and from the rules in the comments, not from Pillow.
`tests/test_images.py` has the plain cases and those of paths.
"""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.test_images import BLUE, ORIENTATION, RED, WHITE, chunk, encode, find, insert, png, segment

GREEN, BLACK, GRAY, YELLOW = (0, 255, 0), (0, 0, 0), (128, 128, 128), (255, 255, 0)
Color = tuple[int, int, int]

NO_IMAGE = "not an image in one of the formats"
BROKEN = "broken image"
CHUNK = "no PNG chunk with a right checksum at byte"
FRAMES = "more than one frame"
PIXELS = "64000000 pixels"
RATIO = "ratio of more than 200"


@dataclass(frozen=True)
class Specimen:
    """A file, and what must come of it: a `refused` reason, or an image of `size` with the `colors` of some points."""

    name: str
    data: bytes
    refused: str | None = None
    size: tuple[int, int] | None = None
    colors: tuple[tuple[tuple[int, int], Color], ...] = ()
    within: int = 0
    """How far a channel may be from what is expected; lossy compression only."""


def bad(name: str, data: bytes, reason: str) -> Specimen:
    return Specimen(name, data, refused=reason)


def shows(name: str, data: bytes, *rows: Iterable[Color], within: int = 0) -> Specimen:
    """An image of exactly these rows."""
    pixels = [list(row) for row in rows]
    points = tuple(((x, y), color) for y, row in enumerate(pixels) for x, color in enumerate(row))
    return Specimen(name, data, size=(len(pixels[0]), len(pixels)), colors=points, within=within)


def plain(name: str, data: bytes, size: tuple[int, int], color: Color, within: int = 0) -> Specimen:
    """An image of one color."""
    corners = tuple(((x, y), color) for x in (0, size[0] - 1) for y in (0, size[1] - 1))
    return Specimen(name, data, size=size, colors=corners, within=within)


@cache
def zoo() -> tuple[Specimen, ...]:
    found = (*bombs(), *damaged(), *strangers(), *shapes(), *depths(), *alphas(), *jpegs(), *turned(), *animated())
    found += (*pngs(), *bmps(), *polyglots())
    assert len({specimen.name for specimen in found}) == len(found)
    return found


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


# ── small files that ask for much ──


def bombs() -> Iterable[Specimen]:
    """Sizes count by the header, whatever the file holds: claims and real bombs end alike, and nothing is decoded."""
    yield bad("png-claim", png(60_000, 60_000, 8, 2, b""), PIXELS)
    yield bad("png-real", encode(Image.new("1", (9_000, 9_000)), "PNG"), PIXELS)
    yield bad("png-negative", png(2**31 - 1, 2**31 - 1, 8, 2, b""), PIXELS)
    yield bad("webp-claim", huge_webp(), PIXELS)
    yield bad("bmp-claim", bmp(60_000, 60_000, 24, b""), PIXELS)
    jpeg = bytearray(encode(noise(), "JPEG"))
    frame = find(jpeg, 0xC0)
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"  # height and width
    yield bad("jpeg-claim", bytes(jpeg), PIXELS)
    # Each scan of a progressive JPEG goes over all pixels again: 100 bytes cost as much as decoding the image once.
    jpeg = encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    yield bad("jpeg-1000-scans", jpeg[:-2] + 1000 * last + jpeg[-2:], "more than 100 scans")
    # What only looks like a scan is none: a thumbnail in a segment, or what stands behind the end.
    odd = insert(encode(Image.new("RGB", (16, 16), GRAY), "JPEG"), 0xDB, segment(0xEF, 200 * b"\xff\xda"))
    yield plain("jpeg-no-scans", odd + 200 * b"\xff\xda\0\2", (16, 16), GRAY, within=1)
    # Text and profiles that inflate to more than 1 MiB; no picture has such.
    text = zlib.compress(bytes(50_000_000))
    small = png(2, 1, 8, 0, b"\0\0\0")
    for tag in (b"zTXt", b"iCCP"):
        body = chunk(tag, b"name\0\0" + text)
        yield bad(f"png-{tag.decode()}-bomb", small[:33] + body + small[33:], "too large|too much|broken")
    # Pixels that inflate to far more than the header says: the rest is not wanted, and not inflated.
    rows = png(2, 1, 8, 0, b"\0\0\xff" + bytes(50_000_000))
    yield shows("png-idat-longer-than-image", rows, [BLACK, WHITE])


def huge_webp() -> bytes:
    """16383×16383 by its header, the most that the format knows."""
    data = bytearray(encode(Image.new("RGB", (16, 16), RED), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9  # 14 bits of width - 1, 14 of height - 1
    bits = int.from_bytes(data[place : place + 4], "little") & ~0xFFFFFFF
    data[place : place + 4] = (bits | 0x3FFE | 0x3FFE << 14).to_bytes(4, "little")
    return bytes(data)


# ── files that end too early, or are not whole ──


def damaged() -> Iterable[Specimen]:
    """A picture of which a part is missing shows something else than its question asks about: refused."""
    whole = encode(noise(), "PNG")
    for end in (7, 8, 20, 33, 50, len(whole) // 2, len(whole) - 40):
        yield bad(f"png-first-{end}", whole[:end], f"{NO_IMAGE}|{CHUNK}|{BROKEN}")
    corners = tuple(((x, y), noise().getpixel((x, y))) for x in (0, 39) for y in (0, 29))
    for missing in (4, 12, 13, 20):  # from IEND and checksums only: every pixel is there
        yield Specimen(f"png-without-its-last-{missing}", whole[:-missing], size=(40, 30), colors=corners)
    for format in ("JPEG", "WEBP", "BMP"):
        data = encode(noise(), format)
        for share in (0.02, 0.5, 0.97):
            yield bad(f"{format.lower()}-first-{share:.0%}", data[: int(len(data) * share)], f"{NO_IMAGE}|{BROKEN}")
    # Whether the data of a JPEG are all there is not known without its end, which an encoder writes right behind them.
    yield bad("jpeg-without-its-last-2", whole_jpeg()[:-2], BROKEN)
    yield bad("no-bytes", b"", "the file has 0 bytes")
    yield bad("one-byte", b"\x89", NO_IMAGE)
    yield bad("zeros", bytes(1000), NO_IMAGE)
    place = whole.index(b"IDAT")
    yield bad("png-wrong-checksum", whole[:29] + b"\0\0\0\0" + whole[33:], f"{CHUNK} 8 of")
    text = whole[:33] + chunk(b"tEXt", b"Comment\0a word") + whole[33:]
    yield bad("png-wrong-text-checksum", flipped(text, 33 + 8 + 14), f"{CHUNK} 33 of")
    yield bad("png-wrong-idat-checksum", flipped(whole, place + 60), BROKEN)
    yield bad("png-broken-zlib", png_of(chunk(b"IDAT", b"\x78\x9c" + 30 * b"\xff")), BROKEN)
    yield bad("png-without-idat", png_of(), BROKEN)
    yield bad("png-idat-too-short", png(20, 20, 8, 0, bytes(30)), BROKEN)
    yield bad(
        "jpeg-without-scan", whole_jpeg()[: whole_jpeg().index(b"\xff\xda")] + b"\xff\xd9", f"{NO_IMAGE}|{BROKEN}"
    )


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def png_of(*chunks: bytes) -> bytes:
    """A PNG of 4×4 RGB pixels, with these chunks between its first and its last."""
    empty = png(4, 4, 8, 2, b"")
    return empty[:33] + b"".join(chunks) + empty[-12:]


def whole_jpeg() -> bytes:
    return encode(noise(), "JPEG", quality=95)


# ── other kinds of files ──


def strangers() -> Iterable[Specimen]:
    """The content decides, never the name; formats that are not listed are refused, whatever Pillow could read."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("picture.png", encode(Image.new("RGB", (4, 4)), "PNG"))
    svg = b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><image href='file:///etc/passwd'/></svg>"
    for name, data in {
        "text": b"not found\n",
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "zip": archive.getvalue(),
        "pdf": b"%PDF-1.7\n1 0 obj <</Type/Catalog>> endobj\n%%EOF",
        "svg": svg,
        "svgz": gzip.compress(svg, mtime=0),
        "ico": encode(Image.new("RGB", (16, 16)), "ICO"),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 16, 16, 8, 3) + bytes(12),
        "gif": encode(Image.new("RGB", (16, 16)), "GIF"),
        "tiff": encode(Image.new("RGB", (16, 16)), "TIFF"),
        "tiff-big-endian": b"MM\0*" + bytes(4) + bytes(64),
        "tiff-big": encode(Image.new("RGB", (16, 16)), "TIFF", big_tiff=True),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "heic": struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(64),
        "avif": struct.pack(">I", 24) + b"ftypavif\0\0\0\0mif1avif" + bytes(64),
        "jpeg2000": encode(Image.new("RGB", (16, 16)), "JPEG2000"),
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "pickle": b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85R.",
    }.items():
        yield bad(name, data, NO_IMAGE)
    yield plain("webp-called-png", encode(Image.new("RGB", (4, 4), RED), "WEBP", lossless=True), (4, 4), RED)


def polyglots() -> Iterable[Specimen]:
    """What stands behind an image does not count; what stands before it makes the file none."""
    yield bad("text-before-a-png", b"\n" + encode(Image.new("RGB", (4, 4)), "PNG"), NO_IMAGE)
    yield plain("png-and-zip", encode(Image.new("RGB", (4, 4), BLUE), "PNG") + b"PK\3\4", (4, 4), BLUE)


# ── shapes ──


def shapes() -> Iterable[Specimen]:
    yield bad("1x10000", encode(Image.new("RGB", (1, 10_000)), "PNG"), RATIO)
    yield bad("10000x1", encode(Image.new("RGB", (10_000, 1)), "PNG"), RATIO)
    yield bad("png-0xn", png(0, 5, 8, 2, b""), f"{NO_IMAGE}|{BROKEN}|{RATIO}")
    yield bad("png-nx0", png(5, 0, 8, 2, b""), f"{NO_IMAGE}|{BROKEN}|{RATIO}")
    yield bad("bmp-0x5", bmp(0, 5, 24, b""), f"{NO_IMAGE}|{BROKEN}|{RATIO}")
    yield shows("1x1", encode(Image.new("RGB", (1, 1), GREEN), "PNG"), [GREEN])


# ── depths of pixels ──


def gray(*values: int) -> list[Color]:
    return [(v, v, v) for v in values]


def depths() -> Iterable[Specimen]:
    """Gray of 16 bits is scaled by its whole range and rounded. Color of 16 bits keeps its upper 8."""
    yield shows("png-16-gray", png(4, 1, 16, 0, b"\0" + struct.pack(">4H", 0, 257, 32896, 65535)), gray(0, 1, 128, 255))
    rgb = struct.pack(">6H", 65535, 0, 0, 0, 32896, 65535)
    yield shows("png-16-rgb", png(2, 1, 16, 2, b"\0" + rgb), [RED, (0, 128, 255)])
    rgba = struct.pack(">8H", 65535, 0, 0, 65535, 65535, 0, 0, 0)
    yield shows("png-16-rgba", png(2, 1, 16, 6, b"\0" + rgba), [RED, WHITE])
    yield shows("png-16-la", png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 0, 65535, 0, 0)), [BLACK, WHITE])
    yield shows("png-1", png(8, 1, 1, 0, b"\0\x55"), 4 * [BLACK, WHITE])
    yield shows("png-2", png(4, 1, 2, 0, b"\0\x1b"), gray(0, 85, 170, 255))  # 0, 1, 2, 3 of 3
    yield shows("png-4", png(2, 1, 4, 0, b"\0\x0f"), [BLACK, WHITE])
    # The color key is in samples as they are stored, whose other bits do not count (PNG, tRNS).
    for key in (b"\0\1", b"\xff\xfd"):
        yield shows(f"png-2-key-{key.hex()}", png(4, 1, 2, 0, b"\0\x1b", (b"tRNS", key)), gray(0, 255, 170, 255))
    yield shows("png-4-key", png(4, 1, 4, 0, b"\0\x10\x2f", (b"tRNS", b"\0\1")), gray(255, 0, 34, 255))
    yield shows("png-8-key", png(3, 1, 8, 0, b"\0\0\1\2", (b"tRNS", b"\1\1")), gray(0, 255, 2))
    key = struct.pack(">3H", 0x1FF, 0, 0)
    yield shows("png-8-rgb-key", png(2, 1, 8, 2, b"\0" + bytes([*RED, *BLUE]), (b"tRNS", key)), [WHITE, BLUE])
    # Of two colors that differ in a lower byte only one is the key, and after decoding they are the same.
    key = struct.pack(">3H", 0x1234, 0, 0)
    data = png(2, 1, 16, 2, b"\0" + key + struct.pack(">3H", 0x1235, 0, 0), (b"tRNS", key))
    yield bad("png-16-rgb-key", data, "a color key of 16-bit RGB is not supported")


# ── alpha: over white ──


def alphas() -> Iterable[Specimen]:
    palette = (b"PLTE", bytes([*RED, *BLUE, *GREEN]))
    row = b"\0\0\1\2"
    yield shows("palette", png(3, 1, 8, 3, row, palette), [RED, BLUE, GREEN])
    # Alphas that are not given are opaque (PNG, tRNS).
    yield shows("palette-trns", png(3, 1, 8, 3, row, palette, (b"tRNS", b"\xff\0")), [RED, WHITE, GREEN])
    yield shows("palette-1-bit", png(2, 1, 1, 3, b"\0\x40", palette), [RED, BLUE])
    yield shows("palette-all-clear", png(3, 1, 8, 3, row, palette, (b"tRNS", bytes(3))), [WHITE] * 3)
    yield shows("la", png(3, 1, 8, 4, b"\0\0\xff\0\0\x80\xff"), [BLACK, WHITE, GRAY])
    rgba = bytes([*RED, 255, *RED, 0, *BLACK, 51])  # a fifth of black over white: 204
    yield shows("rgba", png(3, 1, 8, 6, b"\0" + rgba), [RED, WHITE, (204, 204, 204)], within=1)
    yield plain("webp-clear", encode(Image.new("RGBA", (4, 4), (*RED, 0)), "WEBP", lossless=True), (4, 4), WHITE)


# ── JPEG ──


def jpegs() -> Iterable[Specimen]:
    red = Image.new("RGB", (16, 16), RED)
    yield plain("jpeg-gray", encode(Image.new("L", (16, 16), 200), "JPEG"), (16, 16), (200,) * 3, within=1)
    yield plain("jpeg-progressive", encode(red, "JPEG", progressive=True), (16, 16), RED, within=2)
    yield plain("jpeg-rgb", encode(red, "JPEG", keep_rgb=True), (16, 16), RED, within=2)
    yield plain("jpeg-restarts", encode(red, "JPEG", restart_marker_blocks=1), (16, 16), RED, within=2)
    # Adobe's CMYK is stored inverted, and every reader turns it back; there is no other in practice.
    ink = encode(Image.new("CMYK", (16, 16), (100, 120, 140, 0)), "JPEG", quality=100)
    adobe = ink.index(b"Adobe")
    yield plain("jpeg-cmyk-adobe", ink, (16, 16), (155, 135, 115), within=1)
    bare = ink[: adobe - 4] + ink[adobe + 12 :]
    yield plain("jpeg-cmyk-without-adobe", bare, (16, 16), (155, 135, 115), within=1)
    # The same file called YCCK: of its 155, 135, 115 as Y, Cb, Cr, R = 155 + 1.402·(115 - 128) = 137, G = 162, B = 167
    # (ITU-T T.871), stored as 255 minus them; inverted back they are inks.
    ycck = ink[: adobe + 11] + b"\2" + ink[adobe + 12 :]
    yield plain("jpeg-ycck", ycck, (16, 16), (255 - 137, 255 - 162, 255 - 167), within=1)
    # Arithmetic coding, by hand: a gray block whose bits say "no difference, no coefficients".
    block = (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes([1]) * 64)
        + segment(0xC9, struct.pack(">BHHB", 8, 8, 8, 1) + b"\1\x11\0")
        + segment(0xDA, b"\1\1\0\0\x3f\0")
    )
    yield plain("jpeg-arithmetic", block + b"\0\0\xff\xd9", (8, 8), GRAY)
    yield bad("jpeg-12-bit", flip_depth(encode(red, "JPEG")), f"{NO_IMAGE}|{BROKEN}")
    yield plain("jpeg-trailing-data", encode(red, "JPEG") + b"ftypmp42 a film" + bytes(5000), (16, 16), RED, within=2)
    thumbnail = segment(0xE0, b"JFXX\0\x10" + encode(Image.new("RGB", (8, 8), BLUE), "JPEG"))
    yield plain("jpeg-thumbnail", insert(encode(red, "JPEG"), 0xDB, thumbnail), (16, 16), RED, within=2)
    profile = b"a wide gamut" * 50  # profiles are not applied, not even read
    for format, options, within in (("JPEG", {}, 2), ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0)):
        data = encode(red, format, icc_profile=profile, **options)
        yield plain(f"{format.lower()}-profile", data, (16, 16), RED, within)


def flip_depth(data: bytes) -> bytes:
    """A JPEG that says that it has 12 bits."""
    place = find(data, 0xC0) + 4
    return data[:place] + b"\x0c" + data[place + 1 :]


# ── EXIF ──

LETTERS: dict[str, Color] = {"A": RED, "B": GREEN, "C": BLUE, "D": BLACK, "E": WHITE, "F": YELLOW}
UPRIGHT = {
    1: "ABC DEF",
    2: "CBA FED",
    3: "FED CBA",
    4: "DEF ABC",
    5: "AD BE CF",
    6: "DA EB FC",
    7: "FC EB DA",
    8: "CF BE AD",
}
"""How ABC over DEF is shown under each orientation, by hand from EXIF 2.3: which edges row 0 and column 0 are."""


def turned() -> Iterable[Specimen]:
    stored = Image.new("RGB", (3, 2))
    for i, color in enumerate(LETTERS.values()):
        stored.putpixel((i % 3, i // 3), color)
    upright = [[LETTERS[letter] for letter in row] for row in ("ABC", "DEF")]
    for orientation, rows in UPRIGHT.items():
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        shown = [[LETTERS[letter] for letter in row] for row in rows.split()]
        yield shows(f"exif-{orientation}", encode(stored, "PNG", exif=exif), *shown)
        big = stored.resize((48, 32), Image.Resampling.NEAREST)  # in blocks of 16, which a JPEG keeps apart
        size = (16 * len(shown[0]), 16 * len(shown))
        points = tuple(((16 * x + 8, 16 * y + 8), color) for y, row in enumerate(shown) for x, color in enumerate(row))
        data = encode(big, "JPEG", exif=exif, quality=95, subsampling=0)
        yield Specimen(f"jpeg-exif-{orientation}", data, size=size, colors=points, within=3)
    # Orientations that there are not, and EXIF that is none, say nothing: the image is shown as it is stored.
    for value in (0, 9, 65535):
        exif = Image.Exif()
        exif[ORIENTATION] = value
        yield shows(f"exif-{value}", encode(stored, "PNG", exif=exif), *upright)
    for name, garbage in (
        ("words", b"Exif\0\0not a TIFF"),
        ("nothing", b"Exif\0\0"),
        ("far-directory", b"Exif\0\0II*\0\xff\xff\xff\x7f"),
        ("directory-of-nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + 80 * b"\xfe"),
        ("orientation-as-text", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\2\x36\0\0\0\0\0\0\0"),
    ):
        yield shows(f"png-exif-{name}", encode(stored, "PNG", exif=garbage), *upright)
        yield shows(f"webp-exif-{name}", encode(stored, "WEBP", lossless=True, exif=garbage), *upright)
        data = encode(Image.new("RGB", (16, 8), RED), "JPEG", exif=garbage)
        yield plain(f"jpeg-exif-{name}", data, (16, 8), RED, within=2)


# ── animation and pages: which frame a question is about is not known ──


def animated() -> Iterable[Specimen]:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE, GREEN)]
    for format in ("PNG", "WEBP"):
        yield bad(
            f"{format.lower()}-frames", encode(frames[0], format, save_all=True, append_images=frames[1:]), FRAMES
        )
    # A JPEG with another behind it is one photograph: the other is its preview, its gain map or the view of an eye.
    red, blue = (Image.new("RGB", (16, 8), color) for color in (RED, BLUE))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    photo = encode(red, "MPO", save_all=True, append_images=[blue], exif=exif)
    yield plain("mpo", encode(red, "MPO", save_all=True, append_images=[blue]), (16, 8), RED, within=2)
    yield plain("mpo-exif-6", photo, (8, 16), RED, within=2)
    second = photo.index(b"\xff\xd8", 2)
    yield plain("mpo-without-its-second", photo[:second], (8, 16), RED, within=2)
    yield bad("mpo-cut", photo[: second // 2 + 100], f"{NO_IMAGE}|{BROKEN}")
    # An animation of one frame is an image.
    single = png(
        1,
        1,
        8,
        2,
        b"\0" + bytes(RED),
        (b"acTL", struct.pack(">II", 1, 0)),
        (b"fcTL", struct.pack(">IIIIIHHBB", 0, 1, 1, 0, 0, 1, 1, 0, 0)),
    )
    yield shows("png-one-frame", single, [RED])


# ── PNG ──


def pngs() -> Iterable[Specimen]:
    # Adam7, by hand: 2×2 pixels are in passes 1 (0, 0), 6 (1, 0) and 7 (the second row).
    rows = b"".join(b"\0" + bytes(part) for part in (RED, BLUE, (*GREEN, *WHITE)))
    interlaced = bytearray(png(2, 2, 8, 2, rows))
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    yield shows("png-interlaced", bytes(interlaced), [RED, BLUE], [GREEN, WHITE])
    one = png(1, 1, 8, 2, b"\0" + bytes(RED))
    yield shows("png-gamma", one[:33] + chunk(b"gAMA", struct.pack(">I", 100_000)) + one[33:], [RED])  # not applied
    yield shows("png-unknown-chunk", one[:33] + chunk(b"prVt", bytes(9)) + one[33:], [RED])
    text = PngInfo()
    text.add_text("Comment", "x" * 5000, zip=True)
    yield plain("png-text", encode(Image.new("RGB", (4, 4), RED), "PNG", pnginfo=text), (4, 4), RED)
    yield bad("png-depth-3", png(1, 1, 3, 2, b"\0" + bytes(RED)), f"{NO_IMAGE}|{BROKEN}")
    yield bad("png-color-type-5", png(1, 1, 8, 5, b"\0" + bytes(RED)), f"{NO_IMAGE}|{BROKEN}")
    yield bad("png-filter-9", png(1, 1, 8, 2, b"\x09" + bytes(RED)), BROKEN)


# ── BMP ──


def bmp(width: int, height: int, bits: int, rows: bytes, compression: int = 0, palette: bytes = b"") -> bytes:
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


def bmp_with_alpha(width: int, height: int, rows: bytes) -> bytes:
    """Version 5 of the header, with a mask for each channel of BGRA."""
    masks = struct.pack("<4I", 0xFF << 16, 0xFF << 8, 0xFF, 0xFF << 24)
    header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, len(rows), 0, 0, 0, 0) + masks
    return b"BM" + struct.pack("<IHHI", 138 + len(rows), 0, 0, 138) + header.ljust(124, b"\0") + rows


def bmps() -> Iterable[Specimen]:
    """Rows go from the bottom up unless the height is negative; colors are BGR; rows are padded to 4 bytes."""
    red, blue = b"\0\0\xff", b"\xff\0\0"
    yield shows("bmp-bottom-up", bmp(1, 2, 24, blue + b"\0" + red + b"\0"), [RED], [BLUE])
    yield shows("bmp-top-down", bmp(1, -2, 24, red + b"\0" + blue + b"\0"), [RED], [BLUE])
    yield shows("bmp-16", bmp(2, 1, 16, struct.pack("<HH", 31 << 10, 31)), [RED, BLUE])  # 5 bits each
    yield shows("bmp-32", bmp(2, 1, 32, red + b"\0" + blue + b"\0"), [RED, BLUE])  # the fourth byte means nothing
    # Masks say that it is alpha; but where all of it is 0, the writer meant none.
    for name, alpha, shown in (("0", b"\0", BLUE), ("255", b"\xff", BLUE), ("some", b"\0", WHITE)):
        rows = red + (b"\xff" if name == "some" else alpha) + blue + alpha
        yield shows(f"bmp-alpha-{name}", bmp_with_alpha(2, 1, rows), [RED, shown])
    palette = red + b"\0" + blue + b"\0"
    yield bad("bmp-rle", bmp(4, 1, 8, b"\3\0\1\1\0\1", 1, palette), "run lengths")  # three 0, one 1, the end
    yield shows("bmp-palette-1", bmp(2, 1, 1, b"\x40\0\0\0", 0, palette), [RED, BLUE])
    yield bad("bmp-unknown-compression", bmp(2, 1, 24, bytes(8), 77), f"{NO_IMAGE}|{BROKEN}")
