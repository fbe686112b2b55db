"""Decode image files, only as many rows as a crop needs.

Most of the time goes into a JPEG's entropy-coded stream, which can be left early but not entered late. For a
crop, the height in the header is therefore changed so that the image ends just below it (timings:
benchmarks/README.md). Pillow decodes anything but an ordinary JPEG.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from indistill.config import UserError, in_one_line, limits

Image.MAX_IMAGE_PIXELS = None  # `_check_pixels` decides, by data.max_image_pixels

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

# Upsampling reads one row of chroma, at most 2 rows of pixels, below: with them the pixels of the crop are
# the same.
_ROWS_BELOW = 2
# Markers of a JPEG.
_BASELINE = 0xC0  # frames with Huffman coding
_EXTENDED = 0xC1
_PROGRESSIVE = 0xC2
_OTHER_FRAMES = {
    0xC3,
    *range(0xC5, 0xC8),
    *range(0xC9, 0xCC),
    *range(0xCD, 0xD0),
}  # lossless, arithmetic, ...
_SCAN = 0xDA
_APP1 = 0xE1
_SCAN_MARKER = b"\xff\xda"  # it cannot occur within a scan's data
_END = b"\xff\xd9"
# The formats that are decoded, whatever a file is called. Pillow knows more; for EPS it starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_MOST_PIXELS = 2**26  # a larger size may be due to a damaged header: Pillow decides
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> the operation that makes the image upright


class BadImage(UserError):
    """An image that cannot be decoded; its message names it."""

    found_by_one_rank = True


def decode(image: bytes, where: str, max_pixels: int = limits.MAX_IMAGE_PIXELS) -> np.ndarray:
    """Decode an image file to uint8 [H, W, 3], upright. Raises BadImage like `decode_crop`."""
    return np.array(decode_whole(image, where, max_pixels))


def decode_whole(image: bytes, where: str, max_pixels: int = limits.MAX_IMAGE_PIXELS) -> Image.Image:
    """Decode an image file to an upright RGB image. Raises BadImage like `decode_crop`."""
    return decode_crop(image, where, lambda shape: (0, 0, *shape), max_pixels)


def decode_crop(
    image: bytes,
    where: str,
    choose: Callable[[tuple[int, int]], Box],
    max_pixels: int = limits.MAX_IMAGE_PIXELS,
) -> Image.Image:
    """Decode the box that `choose` returns for the (height, width) of the upright image, to an RGB image.

    The pixels are those of the whole image, bit for bit. Raises BadImage, naming `where` the image came from,
    if it cannot be decoded or has more than `max_pixels`. Damage below the box of a JPEG may go undetected,
    but a file that was cut off is always detected.
    """
    jpeg = _ordinary_jpeg(image)
    if jpeg is not None:
        size = jpeg.width, jpeg.height
        _check_pixels(size, where, max_pixels)
        if jpeg.height_at is None:  # else it has a single scan
            _check_scans(image, size, where)
        box = choose((jpeg.height, jpeg.width))
        rows = box[0] + box[2] + _ROWS_BELOW
        file = image
        ends_early = jpeg.height_at is not None and rows < jpeg.height
        if jpeg.height_at is not None and ends_early:
            file = b"".join((image[: jpeg.height_at], rows.to_bytes(2, "big"), image[jpeg.height_at + 2 :]))
        try:
            # An image that ends early has data left over, which is an error in strict mode.
            pixels = simplejpeg.decode_jpeg(file, "RGBX", strict=not ends_early)
        except ValueError:
            pass  # Pillow accepts some damaged files, and has better error messages
        else:
            return _rgb_image(pixels, box)
    whole = _decode_with_pillow(image, where, max_pixels)
    top, left, height, width = choose((whole.height, whole.width))
    return whole.crop((left, top, left + width, top + height))


def _rgb_image(pixels: np.ndarray, box: Box) -> Image.Image:
    """Copy a box of RGBX pixels, uint8 [H, W, 4], once: Pillow keeps RGB in four bytes, too."""
    row_bytes = pixels.strides[0]
    top, left, height, width = box
    begin = top * row_bytes + 4 * left
    return Image.frombytes("RGB", (width, height), pixels.reshape(-1)[begin:], "raw", "RGBX", row_bytes)


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """Crop a box from an image [H, W, 3]; returns a view of its memory."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _check_pixels(size: tuple[int, int], where: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise BadImage(
            f"{where}: {width} x {height} pixels are more than data.max_image_pixels ({max_pixels})"
        )


def _check_scans(image: bytes, size: tuple[int, int], where: str) -> None:
    """Raise BadImage for a JPEG with more scans than any encoder writes: each takes as long as an image."""
    scans = image.count(_SCAN_MARKER) if image.startswith(b"\xff\xd8") else 0
    width, height = size
    for name, found in (("MAX_JPEG_SCANS", scans), ("MAX_SCANNED_PIXELS", scans * width * height)):
        if found > (most := getattr(limits, name)):
            what = f"{scans} scans of {width} x {height} pixels"
            raise BadImage(f"{where}: not a readable image: a JPEG of {what}, more than {most} ({name})")


def _decode_with_pillow(image: bytes, where: str, max_pixels: int) -> Image.Image:
    try:
        opened: Image.Image = Image.open(io.BytesIO(image), formats=FORMATS)
        _check_pixels(opened.size, where, max_pixels)
        _check_scans(image, opened.size, where)
        orientation = _orientation(opened)
        if opened.mode.startswith("I"):  # 16-bit grey: Pillow would clip values above 255, not scale them
            opened = Image.fromarray(_upper_bytes(np.asarray(opened)))
        if opened.mode == "F":  # nothing says which value is white
            raise ValueError("its pixels are floating-point numbers: write it with 8 or 16 bits")
        opened = opened.convert("RGB")
        if orientation in _TRANSPOSITIONS:
            opened = opened.transpose(_TRANSPOSITIONS[orientation])
        return opened
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"{where}: not a readable image: none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise all kinds of errors for damaged files
        raise BadImage(f"{where}: not a readable image: {in_one_line(error)}") from None


def _upper_bytes(grey: np.ndarray) -> np.ndarray:
    """16-bit pixels [H, W], perhaps stored in 32 bits, as uint8. Raises ValueError for other values."""
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise ValueError(
            f"its pixels are integers from {grey.min()} to {grey.max()}: write it with 8 or 16 bits"
        )
    return (grey >> 8).astype(np.uint8)


def _orientation(opened: Image.Image) -> int:
    """The orientation from EXIF or XMP data: 1 (upright) to 8."""
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data is ignored: the image may still be readable
        return 1


class _Jpeg(NamedTuple):
    height: int  # pixels
    width: int
    height_at: int | None  # offset of the height in the file; None if the image cannot end early


def _ordinary_jpeg(image: bytes) -> _Jpeg | None:
    """Parse the header of a complete, upright 8-bit JPEG in grey or three colours; None for anything else."""
    if not (image.startswith(b"\xff\xd8\xff") and image.endswith(_END)):
        return None
    frame: tuple[int, int] | None = None  # its marker, and the offset of the height
    components = None
    oriented = False
    at = 2
    try:
        while True:
            if image[at] != 0xFF:
                return None
            marker = image[at + 1]
            length = int.from_bytes(image[at + 2 : at + 4], "big")
            if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
                precision = image[at + 4]
                components = image[at + 9]
                frame = (marker, at + 5)
                height, width = (int.from_bytes(image[at + k : at + k + 2], "big") for k in (5, 7))
                if precision != 8 or components not in (1, 3) or not 0 < height * width <= _MOST_PIXELS:
                    return None
            elif marker == _SCAN:
                if frame is None or (
                    oriented and _orientation(Image.open(io.BytesIO(image), formats=FORMATS)) != 1
                ):
                    return None
                # The top of the image comes first in the file only if one scan contains all components.
                ends_early = frame[0] != _PROGRESSIVE and image[at + 4] == components
                return _Jpeg(height, width, frame[1] if ends_early else None)
            elif marker in _OTHER_FRAMES or marker == 0xFF or length < 2:
                return None
            oriented = oriented or marker == _APP1
            at += 2 + length
    except (IndexError, OSError):
        return None
