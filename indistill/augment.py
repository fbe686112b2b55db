"""Augmentation as a pure function of (seed, epoch, sample id).

The same sample gets the same crop and flip in a given epoch whatever worker, rank or world size computes it, so a view
can be computed elsewhere, or again.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tv

from indistill.config import Augment
from indistill.decode import BadImage, Box, cut, decode, decode_crop

__all__ = ["BadImage", "decode", "eval_view", "train_view", "uniforms"]

_RESIZED_CROP_TRIES = 10  # of 2 draws each; as many as torchvision's
DRAWS = 5 + 2 * _RESIZED_CROP_TRIES  # uniform numbers per sample and epoch, as many as the recipes use


def uniforms(seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) that depend on their counters alone: float64 [len(ids), DRAWS].

    Counter-based (the SplitMix64 finaliser over seed, epoch, id and position), since seeding a generator per sample
    would cost more than a small image's crop.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed))
        state = _mix(state ^ np.uint64(epoch))
        state = _mix(state ^ np.asarray(ids, dtype=np.uint64))[:, None]  # [B, 1]
        bits = _mix(state ^ np.arange(DRAWS, dtype=np.uint64))  # [B, DRAWS]
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.uint64 | np.ndarray) -> np.uint64 | np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_view(
    image: np.ndarray | bytes, draws: np.ndarray, recipe: Augment, size: int, where: str = "image"
) -> np.ndarray:
    """An image and its draws [DRAWS] to an augmented uint8 [size, size, 3].

    The image is uint8 [H, W, 3], or a file, of which only what the view shows is decoded. Raises BadImage, naming
    `where` the file came from, if that fails.
    """
    if recipe.recipe == "random_resized_crop":

        def box(shape: tuple[int, int]) -> Box:
            return _resized_crop_box(shape, draws[3:], recipe)

        image = decode_crop(image, where, box) if isinstance(image, bytes) else cut(image, box(image.shape[:2]))
        image = _resize(image, [size, size])
    else:
        image = decode(image, where) if isinstance(image, bytes) else image
        if recipe.recipe == "pad_crop":
            image = _pad_crop(image, draws[0], draws[1], recipe.padding, size)
        else:
            image = eval_view(image, size, crop=1.0)
    return image[:, ::-1] if recipe.flip and draws[2] < 0.5 else image


def eval_view(image: np.ndarray | bytes, size: int, crop: float, where: str = "image") -> np.ndarray:
    """Resize the shorter side to size / crop, cut the centre: uint8 [H, W, 3], or a file, to uint8 [size, size, 3].

    Pixel for pixel torchvision's Resize and CenterCrop, with timm's rounding of size / crop. Raises BadImage, naming
    `where` the file came from, if it cannot be decoded.
    """
    image = decode(image, where) if isinstance(image, bytes) else image
    image = _resize(image, [int(size / crop)])
    top, left = (round((side - size) / 2) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _pad_crop(image: np.ndarray, u: float, v: float, padding: int, size: int) -> np.ndarray:
    """A random size x size window of the image with a black border of `padding` pixels (CIFAR's augmentation)."""
    height, width = image.shape[:2]
    top = int(u * (height + 2 * padding - size + 1)) - padding
    left = int(v * (width + 2 * padding - size + 1)) - padding
    window = np.zeros((size, size, 3), dtype=np.uint8)
    inside = image[max(top, 0) : top + size, max(left, 0) : left + size]
    y, x = max(-top, 0), max(-left, 0)
    window[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return window


def _resized_crop_box(shape: tuple[int, int], draws: np.ndarray, recipe: Augment) -> Box:
    """Top, left, height, width of a crop of random area and aspect ratio; the centre if no try fits (Inception)."""
    height, width = shape
    log_ratio = np.log(recipe.ratio)
    for u, v in draws[2 : 2 + 2 * _RESIZED_CROP_TRIES].reshape(-1, 2):
        area = height * width * (recipe.scale[0] + u * (recipe.scale[1] - recipe.scale[0]))
        ratio = math.exp(log_ratio[0] + v * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
    w = min(width, round(height * recipe.ratio[1]))
    h = min(height, round(width / recipe.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: np.ndarray, size: list[int]) -> np.ndarray:
    """To [height, width], or the shorter side to [length]."""
    chw = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return tv.resize(chw, size, antialias=True).permute(1, 2, 0).numpy()
