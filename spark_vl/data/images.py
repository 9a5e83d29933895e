"""The one loader of images. Rows of datasets are untrusted, and so are their images.

Image libraries disagree on orientation, alpha, 16-bit grey and frames; here each has one meaning, and everything that
cannot be given one is refused with a reason. Nothing is decoded before its header has been checked.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from spark_vl.records import ImageRef

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is read; of GIF, TIFF and the animated variants of PNG and WEBP, single images only."""

MAX_BYTES = 64 * 2**20
"""Largest encoded image file."""

MAX_PIXELS = 64_000_000
"""Largest width × height; below the size at which Pillow warns of a decompression bomb (89 million)."""

MAX_ASPECT = 200
"""Largest ratio of the longer to the shorter side: what the resizing of the Qwen-VL family accepts."""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "I;16", "I;16B", "I;16L")
"""Pillow modes that convert to 8-bit RGB; 32-bit integers and floats have no defined range."""


class ImageError(ValueError):
    """An image cannot be used; the message says why. Callers add which record it belongs to (`BadRecordError`)."""


def image_path(ref: ImageRef) -> Path:
    """The file of `ref`, symbolic links resolved.

    Raises:
        ImageError: the path is absolute, a URL, climbs with `..` or through a symbolic link out of the root, is no
            regular file, or the file is larger than `MAX_BYTES`.
    """
    path, shown = ref.path, repr(ref.path)
    if re.match(r"[A-Za-z][\w+.-]*:/|data:", path):
        raise ImageError(f"path {shown} is a URL; only files below the media root are read")
    if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
        raise ImageError(f"path {shown} must be relative to the media root, without '..', '\\' or NUL")
    root = Path(ref.root).resolve()
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise ImageError(f"path {shown} leads out of the media root {str(root)!r}")
        if not file.is_file():
            raise ImageError(f"path {shown} is no file below the media root {str(root)!r}")
        size = file.stat().st_size
    except (OSError, RuntimeError) as error:  # a name that is too long, a loop of links
        raise ImageError(f"path {shown} cannot be followed: {error}") from error
    _check_bytes(size)
    return file


def load_image(ref: ImageRef) -> Image.Image:
    """The pixels of `ref`: mode RGB, upright, [width, height] as displayed, without metadata.

    EXIF orientation is applied, alpha (also of palettes and colour keys) is composited over white, 16-bit grey is
    scaled to 8 bits, everything else is converted to RGB. Colour profiles are ignored.

    Raises:
        ImageError: the file cannot be reached (`image_path`), is not one whole single image in one of `FORMATS`, or is
            larger than `MAX_BYTES`, `MAX_PIXELS` or `MAX_ASPECT` allow.
    """
    data = image_path(ref).read_bytes() if ref.data is None else ref.data
    _check_bytes(len(data))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_header(image)
            return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"not an image in one of the formats {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # Pillow's decoders meet broken bytes with almost any type of exception
        raise ImageError(f"broken image: {error or type(error).__name__}") from error


def _check_bytes(size: int) -> None:
    if not 0 < size <= MAX_BYTES:
        raise ImageError(f"the file has {size} bytes; 1 to {MAX_BYTES} are allowed")


def _check_header(image: Image.Image) -> None:
    """Everything that is known before pixels are decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}×{height} is more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"the sides {width}×{height} are in a ratio of more than {MAX_ASPECT}")
    if image.mode not in _MODES:
        raise ImageError(f"pixel mode {image.mode!r} does not convert to RGB; allowed are {', '.join(_MODES)}")
    try:
        image.seek(1)
    except EOFError:
        return
    raise ImageError("more than one frame; a single image is allowed")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        grey = (values * 255 + 32767) // 65535
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        orientation = image.getexif().get(0x0112, 1)
        image = Image.fromarray(grey.astype(np.uint8))
        image.getexif()[0x0112] = orientation
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info.clear()
    return image
