"""Image files to pixels, only as far down as a crop needs them.

Most of the time goes into a JPEG's entropy-coded stream, which can be left early but not entered late. So for a crop
the header is told that the image ends just below it (figures: benchmarks/README.md). Anything but an ordinary JPEG is
left to Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from indistill.config import UserError, in_one_line

Box = tuple[int, int, int, int]  # top, left, height, width, in pixels

# Upsampling chroma looks one chroma row, so at most 2 rows, further: with them the crop is pixel for pixel the same.
_ROWS_BELOW = 2
_BASELINE, _EXTENDED, _PROGRESSIVE = 0xC0, 0xC1, 0xC2  # kinds of frames, each with Huffman coding
_OTHER_FRAMES = {
    0xC3,
    *range(0xC5, 0xC8),
    *range(0xC9, 0xCC),
    *range(0xCD, 0xD0),
}  # lossless, hierarchical, arithmetic
_MOST_PIXELS = 2**26  # a header may be damaged: whether to believe in a larger image is for Pillow to say
_SCAN, _APP1, _END = 0xDA, 0xE1, b"\xff\xd9"
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation to what makes the image upright


class BadImage(UserError):
    """An image that cannot be decoded; its message names it."""

    found_by_one_rank = True


def decode(image: bytes, where: str) -> np.ndarray:
    """Image file to uint8 [H, W, 3], upright. Raises BadImage, naming `where` it came from, if it cannot be decoded."""
    return decode_crop(image, where, lambda shape: (0, 0, *shape))


def decode_crop(image: bytes, where: str, choose: Callable[[tuple[int, int]], Box]) -> np.ndarray:
    """The box that `choose` picks, given the image's (height, width): uint8 [height of the box, its width, 3].

    The pixels are those of `decode`, bit for bit. Raises BadImage, naming `where` the image came from, if it cannot be
    decoded. In a JPEG, damage below the box may go unnoticed; a file that was cut off does not.
    """
    jpeg = _ordinary_jpeg(image)
    if jpeg is not None:
        box = choose((jpeg.height, jpeg.width))
        rows = box[0] + box[2] + _ROWS_BELOW
        ends_early = jpeg.height_at is not None and rows < jpeg.height
        if ends_early:
            shorter = b"".join(
                (image[: jpeg.height_at], rows.to_bytes(2, "big"), image[jpeg.height_at + 2 :])
            )
        try:
            # What is left over of an image that ends early is nothing to be strict about.
            return cut(simplejpeg.decode_jpeg(shorter if ends_early else image, strict=not ends_early), box)
        except ValueError:
            pass  # Pillow knows what is bearable, and says what is not
    pixels = _decode_with_pillow(image, where)
    return cut(pixels, choose(pixels.shape[:2]))


def cut(image: np.ndarray, box: Box) -> np.ndarray:
    """A box of an image [H, W, 3], as a view."""
    top, left, height, width = box
    return image[top : top + height, left : left + width]


def _decode_with_pillow(image: bytes, where: str) -> np.ndarray:
    try:
        opened = Image.open(io.BytesIO(image))
        orientation = _orientation(opened)
        if opened.mode.startswith("I"):  # 16 bits of grey: Pillow would cut what is above 255, not scale
            opened = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
        opened = opened.convert("RGB")
        if orientation in _TRANSPOSITIONS:
            opened = opened.transpose(_TRANSPOSITIONS[orientation])
        return np.array(opened)
    except UnidentifiedImageError:
        raise BadImage(f"{where}: not a readable image: of no known format") from None
    except Exception as error:  # damaged files make Pillow's readers raise anything
        raise BadImage(f"{where}: not a readable image: {in_one_line(error)}") from None


def _orientation(opened: Image.Image) -> int:
    """As EXIF, or XMP, tells it: 1, upright, to 8."""
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what is damaged tells nothing, and the image may still be read
        return 1


class _Jpeg(NamedTuple):
    height: int  # pixels
    width: int
    height_at: int | None  # where the file states its height; None if the image cannot end early


def _ordinary_jpeg(image: bytes) -> _Jpeg | None:
    """The header of a complete, upright 8-bit JPEG in grey or three colours; None for anything else."""
    if not (image.startswith(b"\xff\xd8\xff") and image.endswith(_END)):
        return None
    frame = components = None
    oriented = False
    at = 2
    try:
        while True:
            if image[at] != 0xFF:
                return None
            marker, length = image[at + 1], int.from_bytes(image[at + 2 : at + 4], "big")
            if marker in (_BASELINE, _EXTENDED, _PROGRESSIVE):
                precision, components = image[at + 4], image[at + 9]
                frame = marker, at + 5
                height, width = (int.from_bytes(image[at + k : at + k + 2], "big") for k in (5, 7))
                if precision != 8 or components not in (1, 3) or not 0 < height * width <= _MOST_PIXELS:
                    return None
            elif marker == _SCAN:
                if frame is None or (oriented and _orientation(Image.open(io.BytesIO(image))) != 1):
                    return None
                # Only where one scan holds all components is the top of the image at the front of the file.
                ends_early = frame[0] != _PROGRESSIVE and image[at + 4] == components
                return _Jpeg(height, width, frame[1] if ends_early else None)
            elif marker in _OTHER_FRAMES or marker == 0xFF or length < 2:
                return None
            oriented = oriented or marker == _APP1
            at += 2 + length
    except (IndexError, OSError):
        return None
