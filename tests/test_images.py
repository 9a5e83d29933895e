"""A zoo of generated files: each gives the right pixels, or is refused for the right reason."""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from spark_vl.data import images
from spark_vl.data.images import ImageError, check_encoded, count_pixels, encode_image, load_image
from spark_vl.records import ImageRef

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
ORIENTATION = 0x0112


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = load_image(ImageRef(data=data))
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, without Pillow."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body)) for tag, body in parts
    )


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """uint8 [5, 7, 3]: no two pixels, rows or columns alike."""
    return np.random.default_rng(0).permutation(105).reshape(5, 7, 3).astype(np.uint8) * 2


# ── right pixels ──


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_lossless_formats_come_back_exactly(format: str, photo: np.ndarray) -> None:
    assert (pixels(encode(Image.fromarray(photo), format)) == photo).all()


def test_lossless_webp_comes_back_exactly(photo: np.ndarray) -> None:
    assert (pixels(encode(Image.fromarray(photo), "WEBP", lossless=True)) == photo).all()


def test_jpeg_comes_back_closely() -> None:
    smooth = np.add.outer(np.arange(32), np.arange(24)).astype(np.uint8)[..., None].repeat(3, 2) * 4
    assert abs(pixels(encode(Image.fromarray(smooth), "JPEG", quality=95)).astype(int) - smooth).max() <= 4


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}
"""EXIF orientation → how the stored array is shown upright (EXIF 2.3, tag 274)."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_applied_once(format: str, orientation: int, photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.fromarray(photo), format, exif=exif, **options)
    assert (pixels(data) == UPRIGHT[orientation](photo)).all()


def test_exif_orientation_of_a_jpeg_swaps_the_sides() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = Image.new("RGB", (40, 20), RED)
    image.paste(BLUE, (0, 0, 40, 8))  # the stored top is shown on the right
    shown = pixels(encode(image, "JPEG", exif=exif, quality=95))
    assert shown.shape == (40, 20, 3)
    assert shown[20, 17, 2] > 200 > shown[20, 3, 2]


@pytest.mark.parametrize("orientation", [1, 6])
def test_16_bit_gray_is_scaled_not_clipped(orientation: int) -> None:
    gray = np.array([[0, 128, 129, 257], [1000, 30000, 65407, 65535]], np.uint16)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    expected = UPRIGHT[orientation](np.array([[0, 0, 1, 1], [4, 117, 255, 255]]))  # v · 255/65535, rounded
    shown = pixels(encode(Image.fromarray(gray), "PNG", exif=exif))
    assert (shown == expected[..., None]).all()


def test_16_bit_color_is_scaled() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)  # 32896 = 128 · 257
    assert pixels(png(2, 1, 16, 2, row)).tolist() == [[[255, 0, 128], [0, 255, 1]]]


def test_rgba_is_composited_over_white() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*RED, alpha))
    row = pixels(encode(image, "PNG"))[0]
    assert row[0].tolist() == list(WHITE)
    assert abs(row[1].astype(int) - (255, 127, 127)).max() <= 1
    assert row[2].tolist() == list(RED)


def test_gray_with_alpha_is_composited_over_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (0, 0))
    image.putpixel((1, 0), (0, 255))
    assert pixels(encode(image, "PNG"))[0].tolist() == [[255] * 3, [0] * 3]


def test_alpha_of_webp_is_composited_over_white() -> None:
    assert pixels(encode(Image.new("RGBA", (2, 2), (*RED, 0)), "WEBP", lossless=True)).min() == 255


def test_transparent_palette_entry_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert pixels(encode(image, "PNG", transparency=0))[0].tolist() == [list(WHITE), list(BLUE)]


def test_palette_with_an_alpha_for_each_entry_is_composited() -> None:
    data = png(2, 1, 8, 3, b"\0\0\1", (b"PLTE", bytes([*RED, *BLUE])), (b"tRNS", bytes([0, 255])))
    assert pixels(data)[0].tolist() == [list(WHITE), list(BLUE)]


def test_opaque_palette_keeps_its_colors() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    assert pixels(encode(image, "PNG"))[0].tolist() == [list(RED), list(BLUE)]


def test_color_key_is_white() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert pixels(encode(image, "PNG", transparency=RED))[0].tolist() == [list(WHITE), list(BLUE)]


@pytest.mark.parametrize(("depth", "row"), [(8, b"\0\x05\xc8"), (16, b"\0\0\x05\xc8\xc8")])
def test_gray_key_is_white(depth: int, row: bytes) -> None:
    shown = pixels(png(2, 1, depth, 0, row, (b"tRNS", b"\0\x05")))
    assert shown[0].tolist() == [[255] * 3, [200] * 3]


def test_bilevel_is_black_and_white() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(encode(image, "PNG"))[0].tolist() == [[0] * 3, [255] * 3]


def test_cmyk_becomes_rgb() -> None:
    shown = pixels(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert abs(shown.astype(int) - RED).max() <= 3


def test_metadata_stays_behind() -> None:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    for image in (Image.new("RGB", (4, 4)), Image.new("L", (4, 4)), Image.new("RGBA", (4, 4))):
        shown = load_image(ImageRef(data=encode(image, "PNG", exif=exif, dpi=(300, 300))))
        assert shown.info == {}
        assert not shown.getexif()


# ── refused, with the reason ──


def refused(reason: str, data: bytes) -> None:
    with pytest.raises(ImageError, match=reason):
        load_image(ImageRef(data=data))


@pytest.mark.parametrize("format", ["WEBP", "PNG"])
def test_more_than_one_frame_is_refused(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    refused("more than one frame", encode(frames[0], format, save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    data = encode(Image.fromarray(noise), format)
    refused("broken image|not an image", data[: int(len(data) * share)])


def test_wrong_checksum_is_refused() -> None:
    data = bytearray(encode(Image.new("RGB", (8, 8)), "PNG"))
    data[data.index(b"IDAT") + 6] ^= 0xFF
    refused("broken image", bytes(data))


@pytest.mark.parametrize(
    "data", [b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"\x89PNG\r\n\x1a\n"]
)
def test_other_bytes_are_refused(data: bytes) -> None:
    refused("not an image in one of the formats|broken image", data)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "ICO", "PPM", "TGA", "PCX", "EPS", "JPEG2000"])
def test_other_formats_are_refused(format: str) -> None:
    refused(
        "not an image in one of the formats PNG, JPEG, WEBP, BMP; convert it to one",
        encode(Image.new("RGB", (16, 16)), format),
    )


def test_no_bytes_are_refused() -> None:
    refused("0 bytes", b"")


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (8, 8)), "BMP")
    monkeypatch.setattr(images, "MAX_BYTES", len(data))
    assert pixels(data).shape == (8, 8, 3)
    monkeypatch.setattr(images, "MAX_BYTES", len(data) - 1)
    refused(f"{len(data)} bytes", data)


@pytest.mark.parametrize("side", [8001, 10_000, 60_000])  # above our limit, Pillow's warning, Pillow's error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    refused("64000000 pixels", png(side, side, 8, 2, b""))  # decoding it would say "broken"


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_where_warnings_are_errors() -> None:
    refused("64000000 pixels", png(10_000, 10_000, 8, 2, b""))


def test_the_aspect_ratio_ends_at_200() -> None:
    assert pixels(encode(Image.new("RGB", (200, 1)), "PNG")).shape == (1, 200, 3)
    refused("ratio of more than 200", encode(Image.new("RGB", (1, 201)), "PNG"))


@settings(max_examples=150, deadline=None)
@given(
    format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_damage_gives_an_image_or_an_image_error(format: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encode(Image.linear_gradient("L").resize((16, 16)), format))
    for position, value in changes:
        data[position % len(data)] = value
    try:
        shown = load_image(ImageRef(data=bytes(data)))
    except ImageError:
        return
    assert shown.mode == "RGB"


# ── paths ──


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with a picture, next to a picture that it does not hold."""
    (tmp_path / "media" / "sub").mkdir(parents=True)
    for folder, color in ((tmp_path, BLUE), (tmp_path / "media" / "sub", RED)):
        (folder / "picture.png").write_bytes(encode(Image.new("RGB", (4, 4), color), "PNG"))
    return tmp_path / "media"


@pytest.mark.parametrize(
    "path", ["sub/picture.png", "./sub/picture.png", "sub//picture.png", "link.png", "folder/picture.png"]
)
def test_files_below_the_root_are_read(root: Path, path: str) -> None:
    (root / "link.png").symlink_to("sub/picture.png")
    (root / "folder").symlink_to(root / "sub")
    assert load_image(ImageRef(path=path, root=str(root))).getpixel((0, 0)) == RED


def test_the_root_may_be_a_link_or_relative(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "alias").symlink_to(root)
    monkeypatch.chdir(root.parent)
    for name in ("alias", "media", str(root.parent / "alias")):
        assert load_image(ImageRef(path="sub/picture.png", root=name)).getpixel((0, 0)) == RED


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/etc/hostname", "must be relative"),
        ("../picture.png", "must be relative"),
        ("sub/../../picture.png", "must be relative"),
        ("sub/../sub/picture.png", "must be relative"),
        ("..\\picture.png", "must be relative"),
        ("C:\\picture.png", "must be relative"),
        ("sub/picture.png\0.txt", "must be relative"),
        ("http://127.0.0.1/picture.png", "is a URL"),
        ("https://example.org/picture.png", "is a URL"),
        ("file:///etc/hostname", "is a URL"),
        ("file:/etc/hostname", "is a URL"),
        ("s3://bucket/picture.png", "is a URL"),
        ("data:image/png;base64,iVBORw0KGgo=", "is a URL"),
        ("outside.png", "leads out"),
        ("outside/picture.png", "leads out"),
        ("outside", "leads out"),
        ("loop", "cannot be followed|not a file"),
        ("sub", "not a file"),
        ("", "not a file"),
        ("%2e%2e/picture.png", "not a file"),
        ("~/picture.png", "not a file"),
        ("missing.png", "not a file"),
        ("pipe", "not a file"),
        ("x" * 5000, "cannot be followed|not a file"),
    ],
)
def test_other_paths_are_refused(root: Path, path: str, reason: str) -> None:
    (root / "outside.png").symlink_to(root.parent / "picture.png")
    (root / "outside").symlink_to("..")
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "pipe")  # opening it would wait for ever
    with pytest.raises(ImageError, match=reason):
        load_image(ImageRef(path=path, root=str(root)))


def test_a_root_with_the_same_beginning_is_another_root(root: Path) -> None:
    neighbour = root.parent / "media2"
    neighbour.mkdir()
    (neighbour / "picture.png").write_bytes(encode(Image.new("RGB", (4, 4)), "PNG"))
    (root / "link.png").symlink_to(neighbour / "picture.png")
    with pytest.raises(ImageError, match="leads out"):
        load_image(ImageRef(path="link.png", root=str(root)))


def test_a_huge_file_is_not_read(root: Path) -> None:
    with (root / "huge.png").open("wb") as file:
        file.truncate(images.MAX_BYTES + 1)
    with pytest.raises(ImageError, match="bytes"):
        images.image_path(ImageRef(path="huge.png", root=str(root)))


# ── encoded anew: only pixels remain ──


def encoded(data: bytes) -> bytes:
    new = encode_image(ImageRef(data=data))
    check_encoded(new)
    return new


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP"])
def test_other_formats_than_jpeg_become_a_png_with_equal_pixels(format: str, photo: np.ndarray) -> None:
    data = encode(Image.fromarray(photo), format, **({"lossless": True} if format == "WEBP" else {}))
    new = encoded(data)
    with Image.open(io.BytesIO(new)) as image:  # by Pillow alone
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
        assert (np.asarray(image) == photo).all()
    assert encoded(new) == new


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_becomes_a_jpeg_of_nearly_the_same_pixels(mode: str) -> None:
    smooth = np.add.outer(np.arange(32), np.arange(24)).astype(np.uint8)[..., None].repeat(3, 2) * 4
    data = encode(Image.fromarray(smooth).convert(mode), "JPEG", quality=90)
    new = encoded(data)
    assert abs(pixels(new).astype(int) - pixels(data)).max() <= 4
    with Image.open(io.BytesIO(new)) as image:
        assert (image.format, image.mode, image.layers) == ("JPEG", "RGB", 3)
        assert {component[1:3] for component in image.layer} == {(1, 1)}  # no chroma subsampling


def location() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif.get_ifd(0x8825)[1] = "N"  # GPS latitude, north
    return exif


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_metadata_never_survive(format: str) -> None:
    text = PngInfo()
    text.add_text("Comment", "my password")
    extra = {
        "PNG": {"pnginfo": text, "dpi": (300, 300), "icc_profile": b"a profile" * 20},
        "JPEG": {"comment": b"my password", "dpi": (300, 300), "icc_profile": b"a profile" * 20},
        "WEBP": {"xmp": b"my password", "icc_profile": b"a profile" * 20},
    }
    image = Image.new("RGB", (16, 16), RED)
    data = encode(image, format, exif=location(), **extra[format]) + b"PK\3\4 a zip of secrets"
    assert b"a camera" in data
    assert b"my password" in data
    new = encoded(data)
    for secret in (
        b"a camera",
        b"my password",
        b"a profile",
        b"PK",
        b"Exif",
        b"eXIf",
        b"ICC",
        b"iCCP",
        b"pHYs",
        b"XMP",
    ):
        assert secret not in new
    with pytest.raises(ImageError):
        check_encoded(data)


def test_of_an_mpo_the_first_image_becomes_a_jpeg_and_nothing_else_survives() -> None:
    second = Image.new("RGB", (40, 40), BLUE)
    data = encode(NOISE, "MPO", save_all=True, append_images=[second], exif=location())
    place = data.index(b"\xff\xd8", 2) + 2
    data = data[:place] + segment(0xFE, b"my password") + data[place:]
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    new = encoded(data)
    assert new == encode_image(ImageRef(data=encode(NOISE, "JPEG")))
    assert len([*re.finditer(b"\xff\xd8", new)]) == 1
    with pytest.raises(ImageError, match="a segment E1 with b'Exif"):
        check_encoded(data)
    bare = encode(NOISE, "MPO", save_all=True, append_images=[second], quality=95, subsampling=0)
    with pytest.raises(ImageError, match="a segment E2 with b'MPF"):
        check_encoded(bare)


def test_turned_and_clear_pixels_are_encoded_as_they_are_shown(photo: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert (pixels(encoded(encode(Image.fromarray(photo), "PNG", exif=exif))) == UPRIGHT[6](photo)).all()
    assert pixels(encoded(encode(Image.new("RGBA", (2, 2), (*RED, 0)), "PNG"))).min() == 255


def test_what_cannot_be_loaded_cannot_be_encoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "link.png").symlink_to("/etc/hostname")
    for path, reason in (("link.png", "leads out"), ("../picture.png", "must be relative"), ("file:///x", "is a URL")):
        with pytest.raises(ImageError, match=reason):
            encode_image(ImageRef(path=path, root=str(root)))
    assert encode_image(ImageRef(path="sub/picture.png", root=str(root)))[:4] == b"\x89PNG"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    data = encode(noise, "WEBP", quality=1)
    monkeypatch.setattr(images, "MAX_BYTES", 2 * len(data))
    with pytest.raises(ImageError, match="bytes; 1 to"):  # it would be refused when it is read again
        encode_image(ImageRef(data=data))


# ── the proof ──


def case_name(value: bytes | str) -> str:
    """Names of parametrized tests, in place of the bytes."""
    return value if isinstance(value, str) else "image"


def chunk(tag: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


CLEAN_PNG = png(2, 1, 8, 2, b"\0" + bytes(6))
"""Two black pixels."""
HEADER, END = 33, len(CLEAN_PNG) - 12
"""Where IHDR ends and IEND begins."""


def with_pixels(compressed: bytes) -> bytes:
    return CLEAN_PNG[:HEADER] + chunk(b"IDAT", compressed) + CLEAN_PNG[END:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (CLEAN_PNG[:END] + chunk(b"tEXt", b"Comment\0secret") + CLEAN_PNG[END:], "chunks IHDR, IDAT, tEXt, IEND; IHDR"),
        (CLEAN_PNG[:HEADER] + chunk(b"tIME", bytes(7)) + CLEAN_PNG[HEADER:], "chunks IHDR, tIME, IDAT, IEND"),
        (CLEAN_PNG[:HEADER] + chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0") + CLEAN_PNG[HEADER:], "chunks IHDR, eXIf"),
        (CLEAN_PNG[:HEADER] + chunk(b"prVt", b"secret") + CLEAN_PNG[HEADER:], "chunks IHDR, prVt"),
        (CLEAN_PNG + b"PK\3\4secret", "no PNG chunk with a right checksum"),
        (CLEAN_PNG + b"\0", "no PNG chunk with a right checksum"),
        (CLEAN_PNG + chunk(b"IDAT", b"secret"), "chunks IHDR, IDAT, IEND"),
        (CLEAN_PNG[:END] + chunk(b"IEND", b"secret"), "IEND holds 6 bytes"),
        (CLEAN_PNG[:-1] + b"\0", "no PNG chunk with a right checksum"),
        (with_pixels(zlib.compress(b"\0" + bytes(6)) + b"secret"), "IDAT holds something besides the pixels"),
        (with_pixels(zlib.compress(b"\0" + bytes(6) + b"secret")), "IDAT holds something besides the pixels"),
        (with_pixels(zlib.compress(b"\0" + bytes(6) + b"!")), "IDAT holds something besides the pixels"),
        (with_pixels(zlib.compress(b"\0" + bytes(6))[:-1] + b"\0"), "do not decompress|broken image"),
        (png(2, 1, 8, 0, b"\0\0\0"), "8-bit RGB"),
        (png(2, 1, 8, 6, bytes(9)), "8-bit RGB"),
        (png(2, 1, 16, 2, bytes(13)), "8-bit RGB"),
        (png(2, 1, 8, 3, b"\0\0\0", (b"PLTE", bytes(3))), "chunks IHDR, PLTE"),
        (encode(Image.new("RGB", (4, 4)), "WEBP"), "the format is WEBP; PNG and JPEG"),
        (encode(Image.new("RGB", (4, 4)), "BMP"), "the format is BMP"),
        (b"hello", "not an image"),
        (CLEAN_PNG[:END], "broken image|IHDR, IDAT and IEND"),
    ],
    ids=case_name,
)
@pytest.mark.filterwarnings("ignore")
def test_a_png_with_anything_besides_pixels_is_refused(data: bytes, reason: str) -> None:
    check_encoded(CLEAN_PNG)
    with pytest.raises(ImageError, match=reason):
        check_encoded(data)


def test_pixels_may_be_in_several_idats() -> None:
    compressed = zlib.compress(b"\0" + bytes(6))
    check_encoded(
        CLEAN_PNG[:HEADER] + chunk(b"IDAT", compressed[:5]) + chunk(b"IDAT", compressed[5:]) + CLEAN_PNG[END:]
    )


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8))


def jpeg(**options) -> bytes:
    return encode(NOISE, "JPEG", **({"quality": 95, "subsampling": 0} | options))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def find(data: bytes, marker: int) -> int:
    """Where the first segment of that kind begins."""
    return data.index(bytes([0xFF, marker]))


def insert(data: bytes, marker: int, extra: bytes) -> bytes:
    """`data` with `extra` before the first segment of that kind."""
    place = find(data, marker)
    return data[:place] + extra + data[place:]


CLEAN_JPEG = jpeg()
QUANTISATION = segment(0xDB, b"\0" + bytes(range(1, 65)))


@pytest.mark.parametrize(
    "data",
    [
        CLEAN_JPEG,
        jpeg(quality=60),
        jpeg(optimize=True),  # other Huffman tables
        jpeg(restart_marker_blocks=2),
    ],
    ids=["clean", "quality", "optimized", "restarts"],
)
def test_a_jpeg_of_any_encoder_of_pixels_is_accepted(data: bytes) -> None:
    check_encoded(data)


def test_tables_may_share_a_segment() -> None:
    first, second = (m.start() for m in re.finditer(b"\xff\xdb", CLEAN_JPEG[:200]))
    assert (first, second) == (20, 20 + 69)
    merged = segment(0xDB, CLEAN_JPEG[first + 4 : first + 69] + CLEAN_JPEG[second + 4 : second + 69])
    check_encoded(CLEAN_JPEG[:first] + merged + CLEAN_JPEG[second + 69 :])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (CLEAN_JPEG + b"PK\3\4secret", "an end marker alone may follow"),
        (CLEAN_JPEG + b"\0", "an end marker alone may follow"),
        (CLEAN_JPEG + CLEAN_JPEG, "an end marker alone may follow"),
        (CLEAN_JPEG[:-2] + segment(0xFE, b"secret") + CLEAN_JPEG[-2:], "an end marker alone may follow"),
        (jpeg(comment=b"secret"), "a segment FE with b'secret'"),
        (jpeg(exif=location()), "a segment E1 with b'Exif"),
        (jpeg(icc_profile=b"profile"), "a segment E2 with b'ICC_PROFILE"),
        (jpeg(xmp=b"secret"), "a segment E1"),
        (jpeg(dpi=(300, 300)), "a segment E0 with b'JFIF"),
        (insert(CLEAN_JPEG, 0xDB, segment(0xED, b"Photoshop 3.0\0")), "a segment ED"),
        (insert(CLEAN_JPEG, 0xDB, segment(0xE0, b"JFXX\0\x13\1\1\0\0\0")), "a segment E0 with b'JFXX"),
        (insert(CLEAN_JPEG, 0xDB, CLEAN_JPEG[2:20]), "lacks the JFIF header, or has a header or table twice"),
        (CLEAN_JPEG[:2] + CLEAN_JPEG[20:], "lacks the JFIF header"),
        (insert(CLEAN_JPEG, 0xDB, QUANTISATION), "has a header or table twice"),
        (insert(CLEAN_JPEG, 0xC4, segment(0xDB, b"\x12" + bytes(64) + bytes(64))), "a table 12 in a segment DB"),
        (jpeg(progressive=True), "a segment C2"),
        (jpeg(subsampling=2), "a segment C0"),
        (encode(Image.new("L", (8, 8)), "JPEG"), "a segment C0"),
        (encode(Image.new("CMYK", (8, 8)), "JPEG"), "a segment EE|a segment C0|lacks the JFIF"),
    ],
    ids=case_name,
)
@pytest.mark.filterwarnings("ignore")
def test_a_jpeg_with_anything_besides_pixels_is_refused(data: bytes, reason: str) -> None:
    assert pixels(data).size, "a reader of images is content with it"
    with pytest.raises(ImageError, match=reason):
        check_encoded(data)


@settings(max_examples=200, deadline=None)
@given(
    clean=st.sampled_from([CLEAN_PNG, CLEAN_JPEG]),
    place=st.integers(2, 10**6),
    extra=st.binary(min_size=1, max_size=40),
    length=st.integers(0, 4),
)
@pytest.mark.filterwarnings("ignore")
def test_the_proof_survives_any_damage(clean: bytes, place: int, extra: bytes, length: int) -> None:
    place %= len(clean)
    with contextlib.suppress(ImageError):
        check_encoded(clean[:place] + extra + clean[place + length :])


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP"])
def test_pixels_are_counted_without_decoding_any(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (30, 7)), format)

    def refuse(*args: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Image.Image, "convert", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert count_pixels(ImageRef(data=data)) == 210


def test_what_the_header_shows_is_refused_before_pixels_are_counted() -> None:
    for data in (b"GIF89a", b"x", encode(Image.new("L", (1000, 2)), "PNG")):
        with pytest.raises(ImageError):
            count_pixels(ImageRef(data=data))
