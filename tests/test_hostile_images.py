"""Small files that kept the loader busy for seconds, or took gigabytes: refused before they cost anything."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable

import pytest
from PIL import Image

from spark_vl.data import images
from spark_vl.data.images import ImageError, load_image
from spark_vl.records import ImageRef

SIZE = (48, 32)


def encode(format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, "red").save(buffer, format, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes = b"") -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def jpeg(parts: bytes) -> bytes:
    """A JPEG with `parts` behind its JFIF header."""
    data = encode("JPEG")
    return data[:20] + parts + data[20:]


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(chunks: bytes, end: int = 33) -> bytes:
    """A PNG with `chunks` behind its header, or before the byte `end`."""
    data = encode("PNG")
    return data[:end] + chunks + data[end:]


def webp(exif: bytes) -> bytes:
    return encode("WEBP", exif=exif)


def exif(size: int, entries: int) -> bytes:
    """`size` bytes of EXIF, whose entries all stand for its second half."""
    table = b"".join(struct.pack("<HHII", 0x8000 + i, 7, size // 2, size // 2) for i in range(entries))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + table).ljust(size, b"\0")


def rle_bmp() -> bytes:
    """64 megapixels in three kilobytes: each row ends after its first pixel."""
    rows = b"\1\1\0\0" * 1000 + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, 64_000, 1000, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(rows), 0, 0, 54 + 1024) + header + bytes(1024) + rows


def apng() -> bytes:
    return encode("PNG", save_all=True, append_images=[Image.new("RGB", SIZE, "blue")])


MANY = images.MAX_PARTS + 1
ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "jpeg-app1": (lambda: jpeg(segment(0xE1) * MANY), "1000 parts"),
    "jpeg-many-exif": (lambda: jpeg(segment(0xE1, b"Exif\0\0") * MANY), "1000 parts"),
    "jpeg-app2": (lambda: jpeg(segment(0xE2, b"MPF\0xxxx") * MANY), "1000 parts"),
    "jpeg-comments": (lambda: jpeg(segment(0xFE, b"x") * MANY), "1000 parts"),
    "jpeg-tables": (lambda: jpeg(segment(0xDB, b"\0" + b"\1" * 64) * MANY), "1000 parts"),
    "jpeg-frames": (lambda: jpeg(segment(0xC0, b"\x08\0\x20\0\x30\1\1\x11\0") * MANY), "1000 parts"),
    "jpeg-padding": (lambda: jpeg(b"\xff" * MANY), "1000 parts"),
    "jpeg-escapes": (lambda: jpeg(b"\xff\0" * MANY), "1000 parts"),
    "jpeg-bare-markers": (lambda: jpeg(b"\xff\xd0\xff\xf0\xff\xd9\xff\xc8" * MANY), "1000 parts"),
    "jpeg-junk": (lambda: jpeg(b"\0" * MANY), "1000 parts"),
    "jpeg-junk-then-exif": (lambda: jpeg(b"\0" + segment(0xE1, b"Exif\0\0" + exif(40_000, 10)) * 2), "bytes of EXIF"),
    "jpeg-behind-the-pixels": (lambda: encode("JPEG")[:-2] + segment(0xFE, b"x") * MANY + b"\xff\xd9", "1000 parts"),
    "jpeg-exif-in-parts": (lambda: jpeg(segment(0xE1, b"Exif\0\0" + exif(40_000, 10)) * 2), "bytes of EXIF"),
    "jpeg-profile-in-parts": (lambda: jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(65_000)) * 260), "besides its"),
    "png-text": (lambda: png(chunk(b"tEXt", b"k\0v") * MANY), "1000 parts"),
    "png-unknown": (lambda: png(chunk(b"prIv") * MANY), "1000 parts"),
    "png-behind-the-pixels": (lambda: png(chunk(b"tEXt", b"k\0v") * MANY, -12), "1000 parts"),
    "png-empty-pixel-chunks": (lambda: png(chunk(b"IDAT") * 100_001), "100000 chunks"),
    "png-profiles": (lambda: png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(900_000))) * 2), "one color profile"),
    "png-large-text": (lambda: png(chunk(b"prIv", bytes(16 * 2**20 + 1))), "besides its pixels"),
    "png-exif": (lambda: png(chunk(b"eXIf", exif(2**16 + 2, 2000))), "bytes of EXIF"),
    "png-exif-behind-the-pixels": (lambda: png(chunk(b"eXIf", exif(2**16 + 2, 2000)), -12), "bytes of EXIF"),
    "png-exif-as-text": (
        lambda: png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + b"00" * 70_000))),
        "bytes of EXIF",
    ),
    "webp-exif": (lambda: webp(exif(2**16 + 2, 2000)), "bytes of EXIF"),
    "bmp-run-lengths": (rle_bmp, "run lengths"),
    "animated-png": (apng, "more than one frame"),
    "animated-webp": (
        lambda: encode("WEBP", save_all=True, append_images=[Image.new("RGB", SIZE, "blue")] * 500),
        "more than one frame",
    ),
    "avif": (lambda: encode("AVIF"), "not an image in one of the formats"),
    "jpeg-2000": (lambda: encode("JPEG2000"), "not an image in one of the formats"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_at_once(name: str) -> None:
    make, reason = ATTACKS[name]
    data = make()
    start = time.process_time()
    with pytest.raises(ImageError, match=reason):
        load_image(ImageRef(data=data))
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    "data",
    [
        jpeg(segment(0xE1, b"Exif\0\0" + exif(60_000, 20)) + segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 250),
        jpeg(segment(0xFE, b"x") * 900),
        png(chunk(b"tEXt", b"k\0v") * 900 + chunk(b"eXIf", exif(60_000, 20))),
        png(chunk(b"IDAT") * 50_000),
        webp(exif(60_000, 20)),
    ],
    ids=["jpeg-large", "jpeg-many", "png-metadata", "png-pixel-chunks", "webp-exif"],
)
def test_what_is_large_and_below_the_limits_is_read(data: bytes) -> None:
    assert load_image(ImageRef(data=data)).size == SIZE
