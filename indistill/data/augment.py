"""Augmentation as a pure function of (seed, view, sample id), where each epoch has its view, if nothing else is asked.

The same sample gets the same view in a given epoch whatever worker, rank or world size computes it, so a view can be
computed elsewhere, or again. The recipes are those of timm and torchvision, with every parameter drawn here. Images are
resized by Pillow, as theirs are: torch's own resizing of uint8 is faster, and up to 20 levels off, by the processor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.v2 import functional as tv

from indistill.config import MAX_RAND_AUGMENT_OPS, Augment, ColorJitter, RandAugment, RandomErasing
from indistill.data.decode import Box, cut, decode, decode_crop
from indistill.models.views import EvalView

_TRIES = 10  # to find a rectangle that fits; of 2 draws each; as many as torchvision's and timm's
# Uniform numbers per sample and epoch. Each part has its own, so that switching one on leaves the others as they are.
_PLACE, _FLIP = slice(0, 2), 2
_CROP = slice(3, 5 + 2 * _TRIES)
_JITTER = slice(_CROP.stop, _CROP.stop + 8)
_RAND_AUGMENT = slice(_JITTER.stop, _JITTER.stop + 4 * MAX_RAND_AUGMENT_OPS)
_ERASING = slice(_RAND_AUGMENT.stop, _RAND_AUGMENT.stop + 4 + 2 * _TRIES)
_RESAMPLE = slice(
    _ERASING.stop, _ERASING.stop + 1 + MAX_RAND_AUGMENT_OPS
)  # of the crop, then of each operation
DRAWS = _RESAMPLE.stop

_MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
# 256 equally likely values of noise that is standard normal once normalised: uint8 [channel, 256].
_NOISE = np.array(
    [
        [NormalDist(255 * mean, 255 * std).inv_cdf((i + 0.5) / 256) for i in range(256)]
        for mean, std in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    ]
)
_NOISE = _NOISE.round().clip(0, 255).astype(np.uint8)


def view_of(recipe: Augment, epoch: int) -> int:
    """Which view of its samples an epoch shows, as `uniforms` takes it."""
    return epoch if recipe.views is None else epoch % recipe.views


def uniforms(seed: int, view: int, ids: np.ndarray) -> np.ndarray:
    """Random numbers in [0, 1) that depend on their counters alone: float64 [len(ids), DRAWS].

    Counter-based (the SplitMix64 finaliser over seed, view, id and position), since seeding a generator per sample
    would cost more than a small image's crop.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed))
        state = _mix(state ^ np.uint64(view))
        state = _mix(state ^ np.asarray(ids, dtype=np.uint64))[:, None]  # [B, 1]
        bits = _mix(state ^ np.arange(DRAWS, dtype=np.uint64))  # [B, DRAWS]
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: np.uint64 | np.ndarray) -> np.uint64 | np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_view(
    image: np.ndarray | bytes,
    draws: np.ndarray,
    recipe: Augment,
    size: int,
    where: str = "image",
    interpolation: str = "bilinear",
) -> np.ndarray:
    """An image and its draws [DRAWS] to an augmented uint8 [size, size, 3].

    The image is uint8 [H, W, 3], or a file, of which only what the view shows is decoded. `interpolation` is bilinear,
    bicubic or random (one of both), with timm's meaning. Raises BadImage, naming `where` the file came from, if it
    cannot be decoded.
    """
    resamples = _resamples(draws[_RESAMPLE], interpolation)
    if recipe.recipe == "random_resized_crop":

        def box(shape: tuple[int, int]) -> Box:
            return _resized_crop_box(shape, draws[_CROP], recipe)

        image = (
            decode_crop(image, where, box) if isinstance(image, bytes) else cut(image, box(image.shape[:2]))
        )
        image = _resize(image, size, resamples[0])
    else:
        image = decode(image, where) if isinstance(image, bytes) else image
        if recipe.recipe == "pad_crop":
            image = _pad_crops(image[None], draws[None], recipe.padding, size)[0].transpose(1, 2, 0)
        else:
            image = eval_view(
                image, size, EvalView(interpolation.replace("random", "bilinear"), 1.0)
            )  # as in timm
    if recipe.flip and draws[_FLIP] < 0.5:
        image = image[:, ::-1]
    if recipe.rand_augment or recipe.color_jitter:
        picture = Image.fromarray(np.ascontiguousarray(image))
        if recipe.rand_augment:
            picture = _rand_augment(picture, draws[_RAND_AUGMENT], recipe.rand_augment, resamples[1:])
        if recipe.color_jitter:
            picture = _color_jitter(picture, draws[_JITTER], recipe.color_jitter)
        image = np.asarray(picture)
    return _erase(image, draws[_ERASING], recipe.random_erasing) if recipe.random_erasing else image


def train_views(
    images: np.ndarray, draws: np.ndarray, recipe: Augment, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """`train_view` of many images of one size: uint8 [B, H, W, 3] and draws [B, DRAWS] to uint8 [B, 3, size, size].

    Small images are padded, cropped and flipped all at once: one by one, numpy's calls cost more than the pixels.
    """
    if recipe.recipe != "pad_crop" or recipe.rand_augment or recipe.color_jitter or recipe.random_erasing:
        views = [train_view(*pair, recipe, size, interpolation=interpolation) for pair in zip(images, draws)]
        return np.ascontiguousarray(np.stack(views).transpose(0, 3, 1, 2))
    views = _pad_crops(images, draws, recipe.padding, size)
    if recipe.flip:
        flipped = draws[:, _FLIP] < 0.5
        views[flipped] = views[flipped, ..., ::-1]
    return views


def eval_view(image: np.ndarray | bytes, size: int, view: EvalView, where: str = "image") -> np.ndarray:
    """An image uint8 [H, W, 3], or a file, as timm's evaluation shows it: uint8 [size, size, 3].

    Raises BadImage, naming `where` the file came from, if it cannot be decoded.
    """
    image = decode(image, where) if isinstance(image, bytes) else image
    return _eval_transform(size, view)(Image.fromarray(image)).permute(1, 2, 0).numpy()


@cache
def _eval_transform(size: int, view: EvalView) -> Callable[[Image.Image], torch.Tensor]:
    """timm's own, up to uint8 [3, size, size]: the networks normalise."""
    return create_transform((3, size, size), is_training=False, use_prefetcher=True, **view._asdict())


def _pad_crops(images: np.ndarray, draws: np.ndarray, padding: int, size: int) -> np.ndarray:
    """Random size x size windows of images [B, H, W, 3] with a black border of `padding` pixels: [B, 3, size, size]."""
    count, height, width, _ = images.shape
    border_y, border_x = (
        max(padding, size - side - padding) for side in (height, width)
    )  # a view may be larger
    padded = np.zeros((count, 3, height + 2 * border_y, width + 2 * border_x), dtype=np.uint8)
    padded[:, :, border_y : border_y + height, border_x : border_x + width] = images.transpose(0, 3, 1, 2)
    free = np.array([height, width]) + 2 * padding - size + 1
    top, left = (draws[:, _PLACE] * free).astype(np.int64).T - padding
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (size, size), axis=(2, 3)
    )  # [B, 3, tops, lefts, S, S]
    return windows[np.arange(count), :, top + border_y, left + border_x]


def _resized_crop_box(shape: tuple[int, int], draws: np.ndarray, recipe: Augment) -> Box:
    """Top, left, height, width of a crop of random area and aspect ratio; the centre if no try fits (Inception)."""
    height, width = shape
    log_ratio = np.log(recipe.ratio)
    for u, v in draws[2 : 2 + 2 * _TRIES].reshape(-1, 2):
        area = height * width * (recipe.scale[0] + u * (recipe.scale[1] - recipe.scale[0]))
        ratio = math.exp(log_ratio[0] + v * (log_ratio[1] - log_ratio[0]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
    w = min(width, round(height * recipe.ratio[1]))
    h = min(height, round(width / recipe.ratio[0]))
    return (height - h) // 2, (width - w) // 2, h, w


# --- timm's recipes --------------------------------------------------------------------------------------------------
# Of each operation, its argument at a strength within 0 and 1, which `signed` gives either sign.
_ARGUMENTS: dict[str, Callable[[float, float], tuple[float, ...]]] = {
    "AutoContrast": lambda strength, signed: (),
    "Equalize": lambda strength, signed: (),
    "Invert": lambda strength, signed: (),
    "Rotate": lambda strength, signed: (30 * signed,),  # degrees
    "PosterizeIncreasing": lambda strength, signed: (
        max(1, 4 - int(4 * strength)),
    ),  # bits kept; Pillow takes no 0
    "SolarizeIncreasing": lambda strength, signed: (
        256 - int(256 * strength),
    ),  # inverted from this value on
    "SolarizeAdd": lambda strength, signed: (int(110 * strength),),  # added below 128
    **{
        f"{name}Increasing": lambda strength, signed: (max(0.1, 1 + 0.9 * signed),)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    },
    **{f"Shear{axis}": lambda strength, signed: (0.3 * signed,) for axis in "XY"},
    **{f"Translate{axis}Rel": lambda strength, signed: (0.45 * signed,) for axis in "XY"},  # of the side
}
_OPERATIONS = list(_ARGUMENTS)


def _rand_augment(
    image: Image.Image, draws: np.ndarray, recipe: RandAugment, resamples: Sequence[Image.Resampling]
) -> Image.Image:
    for (name, argument), resample in zip(_operations(draws, recipe), resamples):
        image = NAME_TO_OP[name](image, *argument, resample=resample, fillcolor=_MEAN_COLOUR)
    return image


def _operations(draws: np.ndarray, recipe: RandAugment) -> list[tuple[str, tuple[float, ...]]]:
    """timm's names of the operations that the draws stand for, and their arguments."""
    chosen = []
    for which, whether, deviation, sign in draws.reshape(-1, 4)[: recipe.num_ops]:
        if whether < recipe.probability:
            magnitude = recipe.magnitude
            if recipe.mstd:
                magnitude += recipe.mstd * NormalDist().inv_cdf(
                    max(deviation, 2.0**-54)
                )  # which is not defined at 0
            strength = min(max(magnitude, 0), 10) / 10
            name = _OPERATIONS[int(which * len(_OPERATIONS))]
            chosen.append((name, _ARGUMENTS[name](strength, strength if sign < 0.5 else -strength)))
    return chosen


def _color_jitter(image: Image.Image, draws: np.ndarray, recipe: ColorJitter) -> Image.Image:
    """The adjustments, each by its draw, in the order of the other draws."""
    adjustments = (
        (tv.adjust_brightness, recipe.brightness),
        (tv.adjust_contrast, recipe.contrast),
        (tv.adjust_saturation, recipe.saturation),
        (tv.adjust_hue, recipe.hue),
    )
    for i in np.argsort(draws[4:]):
        adjust, width = adjustments[i]
        if width:
            low, high = (-width, width) if adjust is tv.adjust_hue else (max(0, 1 - width), 1 + width)
            image = adjust(image, low + draws[i] * (high - low))
    return image


def _erase(image: np.ndarray, draws: np.ndarray, recipe: RandomErasing) -> np.ndarray:
    """The image with a rectangle of it, or none, filled."""
    whether, key, *_ = draws
    box = _erased_box(image.shape[:2], draws[2:], recipe) if whether < recipe.probability else None
    if box is None:
        return image
    image = image.copy()
    cut(image, box)[:] = _MEAN_COLOUR if recipe.fill == "mean" else _noise(key, *box[2:])
    return image


def _erased_box(shape: tuple[int, int], draws: np.ndarray, recipe: RandomErasing) -> Box | None:
    """As timm draws it; None if no try is smaller than the image."""
    height, width = shape
    log_ratio = np.log(recipe.ratio)
    for u, v in draws[2 : 2 + 2 * _TRIES].reshape(-1, 2):
        area = height * width * (recipe.scale[0] + u * (recipe.scale[1] - recipe.scale[0]))
        ratio = math.exp(log_ratio[0] + v * (log_ratio[1] - log_ratio[0]))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
    return None


def _noise(key: float, height: int, width: int) -> np.ndarray:
    """Normal noise, as uint8 [height, width, 3], that depends on the key alone."""
    count = height * width * 3
    with np.errstate(over="ignore"):
        words = _mix(_mix(np.uint64(key * 2.0**53)) ^ np.arange(-(-count // 8), dtype=np.uint64))
    levels = words.astype("<u8").view(np.uint8)[:count].reshape(height, width, 3)
    return np.stack([_NOISE[channel][levels[..., channel]] for channel in range(3)], axis=2)


def _resamples(draws: np.ndarray, interpolation: str) -> list[Image.Resampling]:
    """How the crop is resized, then how each of RandAugment's operations reads between pixels."""
    both = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    if interpolation == "random":
        return [both[int(2 * u)] for u in draws]
    return [both[interpolation == "bicubic"]] * len(draws)


def _resize(image: np.ndarray, size: int, resample: Image.Resampling) -> np.ndarray:
    """uint8 [H, W, 3] to [size, size, 3]."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((size, size), resample))
