"""Augmentation as a pure function of (seed, view, sample id). By default, each epoch shows another view.

A sample has the same view in a given epoch whichever worker, rank or world size computes it, so a view can be
computed elsewhere or again. The recipes are those of timm and torchvision, with every parameter drawn here.
Images are resized by Pillow, as in those libraries: torch's resizing of uint8 images is faster, but depends
on the processor and differs by up to 20 levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP, auto_augment_policy
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms import Compose
from torchvision.transforms.v2 import functional as tv

from indistill.config import (
    MAX_AUGMIX,
    MAX_RAND_AUGMENT_OPS,
    Augment,
    AugMix,
    ColorJitter,
    Data,
    RandAugment,
    RandomErasing,
    limits,
)
from indistill.data.decode import Box, cut, decode_crop, decode_whole
from indistill.models.views import EvalView

_TRIES = 10  # to find a rectangle that fits, with 2 draws each; as many as in torchvision and timm
# The draws of a sample: each part of a recipe has its own, so that switching one on does not change the
# others.
_PAD_CROP = slice(0, 2)
_FLIP = 2
_CROP = slice(3, 5 + 2 * _TRIES)
_JITTER = slice(_CROP.stop, _CROP.stop + 8)
_RAND_AUGMENT = slice(_JITTER.stop, _JITTER.stop + 4 * MAX_RAND_AUGMENT_OPS)
_ERASING = slice(_RAND_AUGMENT.stop, _RAND_AUGMENT.stop + 4 + 2 * _TRIES)
_RESAMPLE = slice(
    _ERASING.stop, _ERASING.stop + 1 + MAX_RAND_AUGMENT_OPS
)  # of the crop, then of each operation
DRAWS = _RESAMPLE.stop
# Those of the other parts are made only for recipes that use one of them.
_VERTICAL_FLIP = DRAWS
_GRAYSCALE = DRAWS + 1
_BLUR = slice(DRAWS + 2, DRAWS + 4)
_AUTO_AUGMENT = slice(_BLUR.stop, _BLUR.stop + 1 + 2 * 2)  # of the two operations at most of a policy
_AUGMIX = slice(_AUTO_AUGMENT.stop, _AUTO_AUGMENT.stop + 1 + MAX_AUGMIX * (2 + 4 * MAX_AUGMIX))
ALL_DRAWS = _AUGMIX.stop

_LARGE = 2**22  # pixels of a padded image above which images are padded and cropped one by one

_MEAN_COLOUR = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
# 256 equally likely values of noise that is standard normal after normalisation: uint8 [channel, 256].
_NOISE = np.array(
    [
        [NormalDist(255 * mean, 255 * std).inv_cdf((i + 0.5) / 256) for i in range(256)]
        for mean, std in zip(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    ]
)
_NOISE = _NOISE.round().clip(0, 255).astype(np.uint8)

_Words = TypeVar("_Words", np.uint64, npt.NDArray[np.uint64])


_Number = TypeVar("_Number", int, npt.NDArray[np.int64])


def view_of(section: Data, epoch: int, repeat: _Number) -> _Number:
    """The number of the view that an epoch shows in the given repeat of a sample (`data.repeats`), from 0."""
    view = epoch * section.repeats + repeat
    return view if section.augment.views is None else view % section.augment.views


def draws_of(recipe: Augment) -> range:
    """Which of a sample's random numbers a view of this recipe needs: the first DRAWS, or all."""
    more = recipe.vertical_flip or recipe.auto_augment or recipe.augmix or recipe.grayscale or recipe.blur
    return range(ALL_DRAWS if more else DRAWS)


def uniforms(seed: int, view: int | np.ndarray, ids: np.ndarray, draws: range = range(DRAWS)) -> np.ndarray:
    """Random numbers in [0, 1) that depend on seed, view and sample id alone: float64 [len(ids), draws].

    view: of all samples, or of each, int64 [len(ids)]. draws: which of a sample's numbers.

    The generator is counter-based (the SplitMix64 finaliser over seed, view, id and index of the draw): to
    seed a generator for each sample would cost more than the crop of a small image.
    """
    with np.errstate(over="ignore"):
        of_view = _mix(_mix(np.uint64(seed)) ^ np.asarray(view, dtype=np.uint64))
        of_sample = _mix(of_view ^ np.asarray(ids, dtype=np.uint64))[:, None]  # [B, 1]
        bits = _mix(of_sample ^ np.arange(draws.start, draws.stop, dtype=np.uint64))  # [B, draws]
    return (bits >> np.uint64(11)) * 2.0**-53


def _mix(x: _Words) -> _Words:
    """The finaliser of SplitMix64 (Steele et al. 2014), element by element."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def train_view(
    image: np.ndarray | bytes,
    draws: np.ndarray,
    *,
    recipe: Augment,
    size: int,
    where: str = "image",
    interpolation: str = "bilinear",
    max_pixels: int = limits.MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """Augment an image with its draws [ALL_DRAWS], or [DRAWS] if it needs no more: uint8 [size, size, 3].

    image: uint8 [H, W, 3], or a file, of which only the rows that the view needs are decoded.
    interpolation: bilinear, bicubic or random (one of both), as in timm.

    Raises BadImage, naming `where` the file came from, if it cannot be decoded or has more than `max_pixels`.
    """
    if recipe.recipe == "random_resized_crop":
        picture = _random_crop(image, draws[_CROP], recipe=recipe, where=where, max_pixels=max_pixels)
        picture = picture.resize((size, size), _resamples(draws[_RESAMPLE], interpolation)[0])
    elif recipe.recipe == "pad_crop":
        picture = _pad_crop(_picture(image, where, max_pixels), draws, recipe.padding, size)
    else:
        # As in timm, where random interpolation is only for training.
        view = EvalView(interpolation.replace("random", "bilinear"), 1.0)
        picture = _eval_picture(_picture(image, where, max_pixels), size, view)
    if recipe.flip and draws[_FLIP] < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.vertical_flip and draws[_VERTICAL_FLIP] < recipe.vertical_flip:
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    if _needs_pillow(recipe):
        picture = _with_pillow(picture, draws, recipe, interpolation=interpolation)
    pixels = _pixels(picture)
    return _erase(pixels, draws[_ERASING], recipe.random_erasing) if recipe.random_erasing else pixels


def train_views(
    images: np.ndarray, draws: np.ndarray, *, recipe: Augment, size: int, interpolation: str = "bilinear"
) -> np.ndarray:
    """Augment images [B, H, W, 3] of one size with their draws, [B, ALL_DRAWS] or [B, DRAWS]: uint8
    [B, 3, size, size].

    Small images are padded, cropped and flipped together: one by one, numpy's calls take longer than the
    pixels.
    """
    _, height, width, _ = images.shape
    large = (height + 2 * size) * (width + 2 * size) > _LARGE  # padding whole images takes too much memory
    single = recipe.recipe != "pad_crop" or large
    if single or recipe.random_erasing or _needs_pillow(recipe):
        single_views = [
            train_view(image, row, recipe=recipe, size=size, interpolation=interpolation).transpose(2, 0, 1)
            for image, row in zip(images, draws)
        ]
        return np.stack(single_views)
    views = _pad_crops(images, draws, recipe.padding, size)
    if recipe.flip:
        flipped = draws[:, _FLIP] < 0.5
        views[flipped] = views[flipped, ..., ::-1]
    if recipe.vertical_flip:
        flipped = draws[:, _VERTICAL_FLIP] < recipe.vertical_flip
        views[flipped] = views[flipped, :, ::-1]
    return views


def eval_view(
    image: np.ndarray | bytes,
    size: int,
    *,
    view: EvalView,
    where: str = "image",
    max_pixels: int = limits.MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """Resize and crop an image as timm does for evaluation: uint8 [size, size, 3].

    image: uint8 [H, W, 3], or a file.

    Raises BadImage, naming `where` the file came from, if it cannot be decoded or has more than `max_pixels`.
    """
    return _pixels(_eval_picture(_picture(image, where, max_pixels), size, view))


def _picture(image: np.ndarray | bytes, where: str, max_pixels: int) -> Image.Image:
    """An image in Pillow's form, from pixels or from a file."""
    return decode_whole(image, where, max_pixels) if isinstance(image, bytes) else Image.fromarray(image)


def _pixels(picture: Image.Image) -> np.ndarray:
    """The pixels of an RGB image, uint8 [H, W, 3], one colour after the other in memory, as in batches."""
    planes = b"".join([picture.tobytes("raw", colour) for colour in "RGB"])
    return np.frombuffer(planes, dtype=np.uint8).reshape(3, picture.height, picture.width).transpose(1, 2, 0)


def _eval_picture(picture: Image.Image, size: int, view: EvalView) -> Image.Image:
    if view.crop_mode != "squash":
        picture = _middle(picture, size)
    return _eval_transform(size, view)(picture)


def _middle(picture: Image.Image, size: int) -> Image.Image:
    """Cut a very long image to its middle, all that a centre crop shows; others stay as they are.

    timm resizes an image as a whole, however long, and to a height of 0 if it is too long for a border.
    """
    width, height = picture.size
    longest = min(height, width) * min(limits.MAX_IMAGE_ASPECT, size)
    if max(height, width) <= longest:
        return picture
    h, w = min(height, longest), min(width, longest)
    top, left = (height - h) // 2, (width - w) // 2
    return picture.crop((left, top, left + w, top + h))


@cache
def _eval_transform(size: int, view: EvalView) -> Callable[[Image.Image], Image.Image]:
    """timm's transform, without its last step, the conversion to a tensor."""
    whole = create_transform((3, size, size), is_training=False, use_prefetcher=True, **view._asdict())
    return Compose(whole.transforms[:-1])


def _pad_crop(picture: Image.Image, draws: np.ndarray, padding: int, size: int) -> Image.Image:
    """`_pad_crops` of one image. Only the window is padded, not the image."""
    free = np.array([picture.height, picture.width]) + 2 * padding - size + 1
    top, left = ((draws[_PAD_CROP] * free).astype(np.int64) - padding).tolist()
    return picture.crop((left, top, left + size, top + size))


def _pad_crops(images: np.ndarray, draws: np.ndarray, padding: int, size: int) -> np.ndarray:
    """Pad images [B, H, W, 3] with `padding` black pixels and cut random windows: [B, 3, size, size]."""
    count, height, width, _ = images.shape
    # A view may be larger than the padded image.
    border_y, border_x = (max(padding, size - side - padding) for side in (height, width))
    padded = np.zeros((count, 3, height + 2 * border_y, width + 2 * border_x), dtype=np.uint8)
    padded[:, :, border_y : border_y + height, border_x : border_x + width] = images.transpose(0, 3, 1, 2)
    free = np.array([height, width]) + 2 * padding - size + 1
    top, left = (draws[:, _PAD_CROP] * free).astype(np.int64).T - padding
    # [B, 3, tops, lefts, S, S]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(2, 3))
    return windows[np.arange(count), :, top + border_y, left + border_x]


def _random_crop(
    image: np.ndarray | bytes, draws: np.ndarray, *, recipe: Augment, where: str, max_pixels: int
) -> Image.Image:
    """Cut the box of `_resized_crop_box` from an image, or decode it from a file."""

    def box(shape: tuple[int, int]) -> Box:
        return _resized_crop_box(shape, draws, recipe)

    if isinstance(image, bytes):
        return decode_crop(image, where, box, max_pixels)
    height, width, _ = image.shape
    return Image.fromarray(np.ascontiguousarray(cut(image, box((height, width)))))


def _resized_crop_box(shape: tuple[int, int], draws: np.ndarray, recipe: Augment) -> Box:
    """A box of random area and aspect ratio (Inception, 1409.4842); a central one if no try fits."""
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


# --- timm's recipes -----------------------------------------------------------------------------------------
def _needs_pillow(recipe: Augment) -> bool:
    """Whether `_with_pillow` changes anything."""
    policy = recipe.rand_augment or recipe.auto_augment or recipe.augmix
    return bool(policy or recipe.color_jitter or recipe.grayscale or recipe.blur)


def _with_pillow(
    image: Image.Image, draws: np.ndarray, recipe: Augment, *, interpolation: str
) -> Image.Image:
    """Apply the parts of a recipe between the flips and random erasing, in timm's order."""
    resamples = _resamples(draws[_RESAMPLE], interpolation)[1:]
    if recipe.rand_augment:
        image = _rand_augment(image, draws[_RAND_AUGMENT], recipe.rand_augment, resamples)
    elif recipe.auto_augment:
        image = _apply(image, _policy_operations(draws[_AUTO_AUGMENT], recipe.auto_augment), resamples)
    elif recipe.augmix:
        image = _augmix(image, draws[_AUGMIX], recipe.augmix, interpolation)
    if recipe.color_jitter:
        image = _color_jitter(image, draws[_JITTER], recipe.color_jitter)
    if recipe.grayscale and draws[_GRAYSCALE] < recipe.grayscale:
        image = image.convert("L").convert("RGB")
    if recipe.blur:
        chance, radius = draws[_BLUR]
        if chance < recipe.blur:
            image = image.filter(ImageFilter.GaussianBlur(_blur_radius(radius)))
    return image


# Operation -> its arguments at a strength from 0 to 1; `signed` is the strength with a random sign.
_ARGUMENTS: dict[str, Callable[[float, float], tuple[float, ...]]] = {
    "AutoContrast": lambda strength, signed: (),
    "Equalize": lambda strength, signed: (),
    "Invert": lambda strength, signed: (),
    "Rotate": lambda strength, signed: (30 * signed,),  # degrees
    # How many bits are kept; Pillow does not accept 0.
    "PosterizeIncreasing": lambda strength, signed: (max(1, 4 - int(4 * strength)),),
    # Values from this one on are inverted.
    "SolarizeIncreasing": lambda strength, signed: (256 - int(256 * strength),),
    "SolarizeAdd": lambda strength, signed: (int(110 * strength),),  # added below 128
    **{
        f"{name}Increasing": lambda strength, signed: (max(0.1, 1 + 0.9 * signed),)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    },
    **{f"Shear{axis}": lambda strength, signed: (0.3 * signed,) for axis in "XY"},
    # A fraction of the side.
    **{f"Translate{axis}Rel": lambda strength, signed: (0.45 * signed,) for axis in "XY"},
}
_OPERATIONS = list(_ARGUMENTS)
# The same for the operations of policies that RandAugment has in another form.
_POLICY_ARGUMENTS = _ARGUMENTS | {
    "PosterizeOriginal": lambda strength, signed: (int(4 * strength) + 4,),
    "Solarize": lambda strength, signed: (int(256 * strength),),
    **{
        name: lambda strength, signed: (1.8 * strength + 0.1,)
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
    },
    "Desaturate": lambda strength, signed: (0.5 + 0.5 * strength,),
}
_AUGMIX_ARGUMENTS = _ARGUMENTS | {
    f"Translate{axis}Rel": lambda strength, signed: (0.3 * signed,) for axis in "XY"
}
_AUGMIX_OPERATIONS = [
    "AutoContrast",
    *(f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")),
    *("Equalize", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
]
_Operation = tuple[str, tuple[float, ...]]  # timm's name, and the arguments


def _apply(
    image: Image.Image, operations: Sequence[_Operation], resamples: Sequence[Image.Resampling]
) -> Image.Image:
    """Apply timm's operations, one after the other."""
    for (name, argument), resample in zip(operations, resamples):
        operation: Any = NAME_TO_OP[name]  # the operations have different signatures
        image = operation(image, *argument, resample=resample, fillcolor=_MEAN_COLOUR)
    return image


def _rand_augment(
    image: Image.Image, draws: np.ndarray, recipe: RandAugment, resamples: Sequence[Image.Resampling]
) -> Image.Image:
    """Apply the operations that the draws select (RandAugment, 1909.13719)."""
    return _apply(image, _operations(draws, recipe), resamples)


def _operations(draws: np.ndarray, recipe: RandAugment) -> list[_Operation]:
    """timm's names of the operations that the draws select, and their arguments."""
    chosen = []
    for which, chance, deviation, sign in draws.reshape(-1, 4)[: recipe.num_ops]:
        if chance < recipe.probability:
            magnitude = recipe.magnitude
            if recipe.mstd:
                quantile = max(deviation, 2.0**-54)  # the inverse is not defined at 0
                magnitude += recipe.mstd * NormalDist().inv_cdf(quantile)
            strength = min(max(magnitude, 0), 10) / 10
            name = _OPERATIONS[int(which * len(_OPERATIONS))]
            chosen.append((name, _ARGUMENTS[name](strength, strength if sign < 0.5 else -strength)))
    return chosen


def _policy_operations(draws: np.ndarray, policy: str) -> list[_Operation]:
    """The operations that the draws select of timm's policy (AutoAugment, 1805.09501; DeiT III, 2204.07118).

    The first draw chooses a part of the policy; each of its operations has two.
    """
    chosen: list[_Operation] = []
    part = _policy(policy)[int(draws[0] * len(_policy(policy)))]
    for (name, probability, magnitude), (chance, value) in zip(part, draws[1:].reshape(-1, 2)):
        if chance >= probability:
            continue
        if name == "GaussianBlurRand":  # timm draws the radius within the operation
            chosen.append(("GaussianBlur", (_blur_radius(value),)))
        else:
            strength = magnitude / 10
            signed = strength if value < 0.5 else -strength
            chosen.append((name, _POLICY_ARGUMENTS[name](strength, signed)))
    return chosen


@cache
def _policy(name: str) -> list[list[tuple[str, float, float]]]:
    """The parts of timm's policy, one of which is chosen: name, probability and magnitude of operations."""
    return [[(one.name, one.prob, one.magnitude) for one in part] for part in auto_augment_policy(name)]


def _blur_radius(draw: float) -> float:
    """The standard deviation of a Gaussian blur in pixels, uniform from 0.1 to 2."""
    return 0.1 + (2.0 - 0.1) * float(draw)  # Pillow does not take numpy's numbers


def _augmix(image: Image.Image, draws: np.ndarray, recipe: AugMix, interpolation: str) -> Image.Image:
    """Mix the image with a mixture of chains of operations (AugMix, 1912.02781), as timm does.

    The first draw is the weight of the mixture, of the distribution Beta(1, 1). Each chain then has one for
    its weight, one for its depth, and four for each operation.
    """
    chains = draws[1:].reshape(MAX_AUGMIX, -1)[: recipe.width]
    # Exponential variables, divided by their sum, have the distribution Dirichlet(1, ..., 1).
    weights = -np.log1p(-np.maximum(chains[:, 0], 2.0**-54))
    weights = (weights / weights.sum()).astype(np.float32)
    mixed = np.zeros((image.height, image.width, 3), dtype=np.float32)
    for weight, chain in zip(weights, chains):
        operations, resamples = _chain(chain[1:], recipe, interpolation)
        mixed += weight * np.asarray(_apply(image, operations, resamples), dtype=np.float32)
    mixture = Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
    return Image.blend(image, mixture, float(np.float32(draws[0])))


def _chain(
    draws: np.ndarray, recipe: AugMix, interpolation: str
) -> tuple[list[_Operation], list[Image.Resampling]]:
    """The operations of a chain of AugMix, and the interpolation of each."""
    depth = recipe.depth or 1 + int(3 * draws[0])
    drawn = draws[1:].reshape(-1, 4)[:depth]
    operations: list[_Operation] = []
    for which, level, sign, _ in drawn:
        strength = recipe.magnitude * level / 10
        name = _AUGMIX_OPERATIONS[int(which * len(_AUGMIX_OPERATIONS))]
        operations.append((name, _AUGMIX_ARGUMENTS[name](strength, strength if sign < 0.5 else -strength)))
    return operations, _resamples(drawn[:, 3], interpolation)


def _color_jitter(image: Image.Image, draws: np.ndarray, recipe: ColorJitter) -> Image.Image:
    """Adjust brightness, contrast, saturation and hue by the first 4 draws, in the order of the last 4."""
    adjustments: tuple[tuple[Callable[..., Image.Image], float], ...] = (
        (tv.adjust_brightness, recipe.brightness),
        (tv.adjust_contrast, recipe.contrast),
        (tv.adjust_saturation, recipe.saturation),
        (tv.adjust_hue, recipe.hue),
    )
    for i in np.argsort(draws[4:]):
        adjust, width = adjustments[i]
        if width:
            is_hue = i == len(adjustments) - 1
            low, high = (-width, width) if is_hue else (max(0, 1 - width), 1 + width)
            image = adjust(image, low + draws[i] * (high - low))
    return image


def _erase(image: np.ndarray, draws: np.ndarray, recipe: RandomErasing) -> np.ndarray:
    """Fill a random rectangle of the image, or none (Random Erasing, 1708.04896)."""
    chance, key, *_ = draws
    if chance >= recipe.probability:
        return image
    box = _erased_box(image.shape[:2], draws[2:], recipe)
    if box is None:
        return image
    image = image.copy(order="K")
    cut(image, box)[:] = _MEAN_COLOUR if recipe.fill == "mean" else _noise(key, *box[2:])
    return image


def _erased_box(shape: tuple[int, ...], draws: np.ndarray, recipe: RandomErasing) -> Box | None:
    """The box to erase, drawn as in timm; None if no try is smaller than the image."""
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
    """Normal noise, uint8 [height, width, 3], that depends only on the key."""
    count = height * width * 3
    with np.errstate(over="ignore"):
        words = _mix(_mix(np.uint64(key * 2.0**53)) ^ np.arange(-(-count // 8), dtype=np.uint64))
    levels = words.astype("<u8").view(np.uint8)[:count].reshape(height, width, 3)
    return np.stack([_NOISE[channel][levels[..., channel]] for channel in range(3)], axis=2)


def _resamples(draws: np.ndarray, interpolation: str) -> list[Image.Resampling]:
    """The interpolation of the crop, then of each operation of RandAugment."""
    bilinear, bicubic = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
    if interpolation == "random":
        return [bilinear if u < 0.5 else bicubic for u in draws]
    return [bicubic if interpolation == "bicubic" else bilinear] * len(draws)
