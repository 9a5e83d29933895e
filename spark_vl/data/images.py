"""The only loader of images, and the only encoder. Rows of datasets are untrusted, and so are their images.

Image libraries disagree on orientation, alpha, 16-bit gray and frames; here each has one meaning, and everything that
cannot be given one is refused with a reason. Nothing is decoded before its header has been checked.

What is published is encoded anew, so that nothing but pixels gets out: no position of a camera, no thumbnail of what
was cropped away, nothing behind the end of the file. `check_encoded` proves that of any file.
"""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from spark_vl.records import ImageRef

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""What is read; of animated PNG and WEBP files, single images only. GIF and TIFF, which datasets seldom hold, are
refused: a small file of either can cost minutes, or decode to other pixels than it shows.

Of a JPEG with other images behind it (MPO), which are previews, gain maps or second views, the first is read.
"""

MAX_BYTES = 64 * 2**20
"""Largest encoded image file."""

MAX_PIXELS = 64_000_000
"""Largest width × height; below the size at which Pillow warns of a decompression bomb (89 million)."""

MAX_ASPECT = 200
"""Largest ratio of the longer to the shorter side that processors resize."""

MAX_SCANS = 100
"""Most passes over the pixels of a JPEG. A progressive one has about ten; each costs as much as decoding the image."""

MAX_PARTS = 1000
"""Most segments of a JPEG, padding included, and most chunks of a PNG besides those with pixels. Photographs have about
twenty, panoramas with depth maps some hundreds; Pillow takes time for each, and more for each than for the last."""

MAX_PIXEL_CHUNKS = 100_000
"""Most chunks with pixels in a PNG. A writer that makes them small gives each some kilobytes."""

MAX_METADATA_BYTES = 16 * 2**20
"""Most bytes besides the pixels in a JPEG, before them, and in a PNG."""

MAX_EXIF_BYTES = 2**16
"""Most bytes of EXIF, what one segment of a JPEG holds. Each of its entries may stand for all of them, and Pillow makes
a copy for each."""


class ImageError(ValueError):
    """An image cannot be used; the message says why. Callers add which record it belongs to (`BadRecordError`)."""


def image_path(ref: ImageRef) -> Path:
    """The file of `ref`, which has a path; symbolic links resolved.

    Raises:
        ImageError: the path is absolute, a URL, climbs with `..` or through a symbolic link out of the root, is not a
            regular file, or the file is larger than `MAX_BYTES`.
    """
    path, shown = str(ref.path), f"{ref.path!r:.100}"
    if re.match(r"[A-Za-z][\w+.-]*:/|data:", path):
        raise ImageError(f"path {shown} is a URL; only files below the media root are read")
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ImageError(f"path {shown} must be relative to the media root, without '..', '\\' or NUL")
    root = Path(str(ref.root)).resolve()
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise ImageError(f"path {shown} leads out of the media root {str(root)!r}")
        if not file.is_file():
            raise ImageError(f"path {shown} is not a file below the media root {str(root)!r}")
        size = file.stat().st_size
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        raise ImageError(f"path {shown} cannot be followed: {_reason(error)}") from error
    _check_bytes(size)
    return file


def image_in_text(text: str) -> bytes | None:
    """The encoded image that `text` holds: a data URL, or base64 (also URL-safe, in lines, or without padding) that
    begins as an image file does. None: it holds none, and is a path.

    Raises:
        ImageError: it is a data URL that does not hold base64, or too long for a path.
    """
    start = text[:200].lstrip()
    if is_url := start[:5].lower() == "data:":
        header, comma, encoded = text.partition(",")
        if not comma or not header.rstrip().lower().endswith(";base64"):
            raise ImageError(f"{start!r:.60} is a data URL without base64, which alone is read")
        encoded = unquote(encoded)
    elif len(text) >= _SHORTEST and _BEGINNINGS.match(start):
        encoded = text
    elif len(text) > _LONGEST_PATH:
        raise ImageError(
            f"{start!r:.60} has {len(text)} characters, and is neither a path nor the base64 of an image "
            f"({', '.join(FORMATS)})"
        )
    else:
        return None
    encoded = "".join(encoded.split()).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError as error:  # characters that are not of its alphabet, or that are not ASCII
        if not is_url and len(text) <= _LONGEST_PATH:  # a path that begins like one
            return None
        raise ImageError(f"{start!r:.60} is not base64: {error}") from error


_BEGINNINGS = re.compile(r"iVBORw0KGgo|/9j/|UklGR.{6}XRUJQ|Qk[0-3].{5}AAAA|R0lGOD|SUkqA|TU0AK", re.DOTALL)
"""In base64: PNG, JPEG, WebP and BMP; and GIF and TIFF, which are refused by name."""
_URL_SAFE = str.maketrans("-_", "+/")
_LONGEST_PATH = 4096
_SHORTEST = 48
"""Characters of the smallest GIF; shorter texts are paths, however they begin."""


def encode_pixels(image: Image.Image) -> bytes:
    """An image that Pillow has opened or made, as a PNG of the same pixels, upright.

    Raises:
        ImageError: its file is broken or has several frames, or it is larger than `MAX_PIXELS` or `MAX_ASPECT` allow.
    """
    _check_size(*image.size)
    _check_single(image)
    buffer = io.BytesIO()
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("I;16" if upright.mode == "I" else "RGB")
        upright.save(buffer, "PNG", compress_level=1)
    except Exception as error:  # Pillow opens files late, and its decoders raise almost anything
        raise ImageError(f"broken image: {error or type(error).__name__}") from error
    return buffer.getvalue()


_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def load_image(ref: ImageRef) -> Image.Image:
    """The pixels of `ref`: mode RGB, upright, [width, height] as displayed, without metadata.

    EXIF orientation is applied, alpha (also of palettes and color keys) is composited over white, 16-bit gray is scaled
    to 8 bits, everything else is converted to RGB. Color profiles, EXIF that cannot be read, and the alpha of a BMP
    that is 0 everywhere are ignored.

    Raises:
        ImageError: the file cannot be reached (`image_path`) or read, is not one whole single image in one of
            `FORMATS`, is larger than `MAX_BYTES`, `MAX_PIXELS` or `MAX_ASPECT` allow, has more scans, parts, chunks,
            metadata or EXIF than the other limits of this module allow, or is a BMP with run lengths.
    """
    return _load(ref)[0]


def count_pixels(ref: ImageRef) -> int:
    """Width × height of `ref`, from its header; nothing is decoded.

    Raises:
        ImageError: see `load_image`, as far as the header shows it.
    """
    with _opened(ref) as image:
        return image.width * image.height


def encode_image(ref: ImageRef) -> bytes:
    """The pixels of `load_image` as a new file: JPEG (quality 95, color at full resolution) of a JPEG, else PNG.

    Raises:
        ImageError: see `load_image`; or the new file has more than `MAX_BYTES`.
    """
    image, format = _load(ref)
    buffer = io.BytesIO()
    if format == "JPEG":
        image.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    else:
        image.save(buffer, "PNG")
    _check_bytes(buffer.tell())
    return buffer.getvalue()


def check_encoded(data: bytes) -> None:
    """Check that `data` has the form of what `encode_image` writes: a file that holds pixels, and little room besides.

    Only the form is checked, because the bytes depend on the versions of libraries. The compressed data of a JPEG are
    not compared with its pixels: what somebody hid among them stays.

    Raises:
        ImageError: it has another form; the message names the foreign part.
    """
    image, format = _load(ImageRef(data=data))
    if format == "PNG":
        _check_png(data, *image.size)
    elif format == "JPEG":
        _check_jpeg(data)
    else:
        raise ImageError(f"the format is {format}; PNG and JPEG are allowed")


def _load(ref: ImageRef) -> tuple[Image.Image, str]:
    """The pixels, and the format of the file that they are from."""
    with _opened(ref) as image:
        # A JPEG with other images behind it is an MPO to Pillow. An image from a file always has a format.
        return _to_rgb(image), "JPEG" if image.format == "MPO" else str(image.format)


@contextmanager
def _opened(ref: ImageRef) -> Iterator[Image.Image]:
    """The image, of which the header alone has been read and checked. Whatever the block raises is an ImageError."""
    data = _read(ref) if ref.data is None else ref.data
    _check_bytes(len(data))
    _check_cost(data)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        if data.startswith(_PNG_SIGNATURE):
            for _ in _png_chunks(data):  # says where the first broken one is
                pass
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}; convert it to one") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders meet broken bytes with almost any type of exception
        raise ImageError(f"broken image: {error or type(error).__name__}") from error


def _read(ref: ImageRef) -> bytes:
    file = image_path(ref)
    try:
        return file.read_bytes()
    except OSError as error:  # no permission, or gone since
        raise ImageError(f"path {ref.path!r:.100} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Without the path, which has been said."""
    return str(error.strerror if isinstance(error, OSError) else error)


def _check_bytes(size: int) -> None:
    if not 0 < size <= MAX_BYTES:
        raise ImageError(f"the file has {size} bytes; 1 to {MAX_BYTES} are allowed")


def _check_cost(data: bytes) -> None:
    """Refuse a file that the other limits allow and that would keep Pillow busy for seconds or hours. Nothing of it has
    been read yet; these checks take linear time, and stop at a limit."""
    if data[:2] == b"\xff\xd8":
        _check_jpeg_cost(data)
    elif data.startswith(_PNG_SIGNATURE):
        _check_png_cost(data)


_JPEG_PART = re.compile(rb"\xff(?:[\0\xc8\xd0-\xd9\xf0-\xfd]|(?=\xff)|(?P<marker>[^\xff]))")
"""Before the first pixels, as Pillow reads it: a marker without a length, a byte of padding, or a segment's marker."""
_JPEG_MARKER = re.compile(rb"\xff([^\0\x01\xd0-\xd8\xff])")
"""Of a segment with a length, behind the first pixels. What else follows an 0xFF there is padding, stands alone, or
belongs to the pixels."""


def _check_jpeg_cost(data: bytes) -> None:
    place, parts, exif = 2, 0, 0
    while (part := _JPEG_PART.search(data, place)) and part["marker"] != b"\xda":
        parts += 1 + part.start() - place  # Pillow skips other bytes one by one
        place = part.end()
        if part["marker"]:
            exif += (part["marker"] == b"\xe1" and data[place + 2 : place + 6] == b"Exif") and _length(data, place)
            place += _length(data, place)
        _check_metadata("JPEG", parts, place, exif)
    metadata, scans = place, 0
    while (found := _JPEG_MARKER.search(data, place)) and found[1] != b"\xd9":
        place = found.end() + _length(data, found.end())
        scans += found[1] == b"\xda"
        if scans > MAX_SCANS:
            raise ImageError(f"the JPEG has more than {MAX_SCANS} scans")
        parts += 1
        _check_metadata("JPEG", parts, metadata, exif)


def _length(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 2])


def _check_png_cost(data: bytes) -> None:
    place, parts, pixels, metadata, exif, profiles = len(_PNG_SIGNATURE), 0, 0, 0, 0, 0
    while place < len(data) and (name := data[place + 4 : place + 8]) != b"IEND":
        size = int.from_bytes(data[place : place + 4])
        place += 12 + size
        if name == b"IDAT":
            pixels += 1
        else:
            parts, metadata = parts + 1, metadata + size
            exif += size if name == b"eXIf" else 0
            profiles += name == b"iCCP"
        _check_metadata("PNG", parts, metadata, exif)
        if pixels > MAX_PIXEL_CHUNKS:
            raise ImageError(f"the PNG has more than {MAX_PIXEL_CHUNKS} chunks of pixels")
        if profiles > 1:  # Pillow expands each
            raise ImageError("the PNG has more than one color profile")


def _check_metadata(format: str, parts: int, size: int, exif: int) -> None:
    if parts > MAX_PARTS:
        raise ImageError(f"the {format} has more than {MAX_PARTS} parts besides its pixels")
    if size > MAX_METADATA_BYTES:
        raise ImageError(f"the {format} has {size} bytes or more besides its pixels; {MAX_METADATA_BYTES} are allowed")
    _check_exif(exif)


def _check_exif(size: int) -> None:
    if size > MAX_EXIF_BYTES:
        raise ImageError(f"the image has {size} bytes of EXIF; {MAX_EXIF_BYTES} are allowed")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}×{height} is more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the sides {width}×{height} are in a ratio of more than {MAX_ASPECT}")


def _check_header(image: Image.Image) -> None:
    """Everything that is known before pixels are decoded."""
    _check_size(*image.size)
    if image.format == "BMP" and image.tile[0].codec_name == "bmp_rle":  # type: ignore[attr-defined]  # of an ImageFile
        # Pillow expands them in Python: a file of three kilobytes takes ten seconds.
        raise ImageError("a BMP with run lengths is not supported; convert it to PNG")
    if image.format == "MPO":  # the first frame is the photograph, and nothing else is read
        return
    _check_single(image)


def _check_single(image: Image.Image) -> None:
    try:
        image.seek(1)
    except EOFError:
        return
    raise ImageError("more than one frame; a single image is allowed")


def _to_rgb(image: Image.Image) -> Image.Image:
    """`image`, just opened, as `load_image` returns it. All modes of `FORMATS` but `I;16` convert to 8-bit RGB."""
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _color_key(image)
    image.load()  # in a PNG EXIF may follow the pixels
    # As text, after three lines, in hexadecimal digits, is how ImageMagick once wrote it.
    _check_exif(len(image.info.get("exif", b"")) or len(image.info.get("Raw profile type exif", "")) // 2)
    with suppress(SyntaxError):  # EXIF that cannot be read tells no orientation; from here on Pillow takes it for empty
        image.getexif()
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        image = image.convert("RGB")  # an alpha that is 0 everywhere was not meant
    if image.mode == "I;16":  # 16-bit gray, which Pillow would clip
        values = np.asarray(image).astype(np.uint32)
        gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
        if "transparency" in image.info:
            gray[values == image.info["transparency"]] = 255
        orientation = image.getexif().get(0x0112, 1)
        image = Image.fromarray(gray)
        image.getexif()[0x0112] = orientation
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()
    return image


def _color_key(image: Image.Image) -> int | bytes | tuple[int, ...]:
    """The key of a PNG that is not decoded yet, scaled as its samples will be; Pillow leaves it as it is stored."""
    key, stored = image.info["transparency"], image.tile[0].args  # type: ignore[attr-defined]  # of an ImageFile
    if stored == "RGB;16B":  # decoding drops the lower bytes, so neighboring colors would match the key
        raise ImageError("a color key of 16-bit RGB is not supported")
    if image.mode == "RGB":
        return tuple(sample & 0xFF for sample in key)
    if image.mode == "L":
        top = {"L;2": 3, "L;4": 15, "L": 255}[stored]
        return (key & top) * 255 // top  # bits above those of a sample do not count
    return key


# ── proof that a file holds nothing but pixels ──

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_HEADERS = {
    0xE0: rb"JFIF\0\x01\x01\0\0\x01\0\x01\0\0",  # version 1.1, no unit, density 1×1, no thumbnail
    0xC0: rb"\x08.{4}\x03(?:.\x11.){3}",  # baseline, 8 bits, three components at full resolution
    0xDD: rb"..",  # restart interval
    0xDA: rb"\x03.{6}\0\x3f\0",  # the only scan, of all components and coefficients
}
"""Marker (ISO/IEC 10918-1, table B.1) → what its segment is."""
_JPEG_TABLES = {0xDB: (0, 1, 2, 3), 0xC4: (0x00, 0x01, 0x10, 0x11)}
"""Marker of quantization and of Huffman tables → their names."""


def _check_png(data: bytes, width: int, height: int) -> None:
    chunks = list(_png_chunks(data))
    names = [name for name, _ in chunks]
    if names != [b"IHDR", *[b"IDAT"] * (len(names) - 2), b"IEND"]:
        shown = ", ".join(dict.fromkeys(name.decode("latin-1") for name in names))
        raise ImageError(f"the PNG has the chunks {shown}; IHDR, IDAT and IEND are allowed")
    if chunks[0][1] != struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0):
        raise ImageError("the PNG is not one of 8-bit RGB without interlacing")
    if chunks[-1][1]:
        raise ImageError(f"the PNG's IEND holds {len(chunks[-1][1])} bytes; none are allowed")
    size = height * (1 + 3 * width)
    stream = zlib.decompressobj()
    try:
        pixels = stream.decompress(b"".join(body for _, body in chunks[1:-1]), size + 1)
    except zlib.error as error:
        raise ImageError(f"the PNG's pixels do not decompress: {error}") from error
    if len(pixels) != size or not stream.eof or stream.unused_data:
        raise ImageError("the PNG's IDAT holds something besides the pixels")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each chunk."""
    place = len(_PNG_SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        end = place + 12 + length
        name, body = data[place + 4 : place + 8], data[place + 8 : end - 4]
        if end > len(data) or data[end - 4 : end] != struct.pack(">I", zlib.crc32(name + body)):
            raise ImageError(f"there is no PNG chunk with a right checksum at byte {place} of {len(data)}")
        yield name, body
        place = end


def _check_jpeg(data: bytes) -> None:
    found: list[tuple[int, int]] = []  # markers, and names of tables
    for marker, body in _jpeg_segments(data):
        if marker in _JPEG_TABLES:
            found += ((marker, name) for name in _jpeg_tables(marker, body))
        elif re.fullmatch(_JPEG_HEADERS.get(marker, b"(?!)"), body, re.DOTALL):
            found.append((marker, 0))
        else:
            raise ImageError(
                f"the JPEG has a segment {marker:02X} with {body[:20]!r}; those of a baseline JFIF file "
                "with color at full resolution are allowed"
            )
    if len(set(found)) != len(found) or (0xE0, 0) not in found:
        raise ImageError("the JPEG lacks the JFIF header, or has a header or table twice")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and content of each segment; the one with the pixels is the last."""
    place, marker, escaped = 2, 0, rb"\xff\0"
    while marker != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4])
        if data[place : place + 1] != b"\xff" or length < 2:
            raise ImageError(f"there is no JPEG segment at byte {place} of {len(data)}")
        marker = data[place + 1]
        if marker == 0xDD:
            escaped = rb"\xff[\0\xd0-\xd7]"  # there are restart markers among the pixels
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length
    pixels = re.compile(rb"(?:[^\xff]|" + escaped + rb")*+").match(data, place)
    end = pixels.end() if pixels else place
    if data[end:] != b"\xff\xd9":
        raise ImageError(f"the JPEG's pixels end at byte {end} of {len(data)}; an end marker alone may follow")


def _jpeg_tables(marker: int, body: bytes) -> Iterator[int]:
    """The names of the tables in a segment."""
    place = 0
    while place < len(body):
        if body[place] not in _JPEG_TABLES[marker]:
            raise ImageError(f"the JPEG has a table {body[place]:02X} in a segment {marker:02X}")
        yield body[place]
        # 64 steps; or how many codes there are of 1 to 16 bits, and their values
        place += 1 + (64 if marker == 0xDB else 16 + sum(body[place + 1 : place + 17]))
    if place != len(body):
        raise ImageError(f"the JPEG's tables do not end with their segment {marker:02X}")
