"""Mixup and CutMix as pure functions of (seed, view, sample): the coefficients of each image, and their use.

An image is mixed with its neighbour in the batch: row 2i with row 2i + 1, and 2i + 1 with 2i. Neighbours are
partners in the sample order (`SampleOrder.paired`), so a sample of a view always has the same partner, and
the mixed image has one stored target. Each image has coefficients of its own, distributed as in timm's mode
`elem`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from indistill.config import Mix
from indistill.data import augment

# Far from those of the augmentation, so that it can use more without changing these.
_DRAWS = range(2**16, 2**16 + 6)


def coefficients(section: Mix, seed: int, *, view: int | np.ndarray, ids: np.ndarray, size: int) -> Tensor:
    """How images of `size` pixels a side are mixed with their partners: float32 [B, 6].

    view: of all samples, or of each. The columns are the weight of the image's own pixels and of its own
    label, and the rectangle that shows the partner: top, bottom, left, right. Under mixup it is empty; under
    CutMix the weight of the pixels is 1.
    """
    mixed, switch, *of_beta, y, x = augment.uniforms(seed, view, ids, _DRAWS).T
    cut = np.full(len(ids), bool(section.cutmix))
    if section.mixup and section.cutmix:
        cut = switch < section.switch_prob
    weight = np.ones(len(ids), dtype=np.float32)
    for alpha, rows in ((section.mixup, ~cut), (section.cutmix, cut)):
        if alpha:
            weight[rows] = symmetric_beta(alpha, *of_beta)[rows]
    weight[mixed >= section.prob] = 1
    box = _boxes(weight, y, x, size=size)  # [B, 4]
    box[~cut | (weight == 1)] = 0
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    label = np.where(cut, 1 - area / size**2, weight)
    columns = np.column_stack([np.where(cut, 1, weight), label, box])
    return torch.from_numpy(columns.astype(np.float32))


def symmetric_beta(alpha: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Turn pairs of uniform numbers in [0, 1) into numbers distributed as Beta(alpha, alpha).

    If T has Student's t distribution with 2 alpha degrees of freedom, then (1 + T / sqrt(2 alpha + T^2)) / 2
    has this one; T is Bailey's (1994), sqrt(2 alpha (U^(-1/alpha) - 1)) cos(2 pi V). An alpha near 0
    overflows to 0 or 1, as it should.
    """
    with np.errstate(over="ignore", divide="ignore"):
        squared = (1 - u) ** (-1 / alpha) - 1
        cosine = np.cos(2 * np.pi * v)
        return (1 + cosine / np.sqrt(1 / squared + cosine**2)) / 2


def _boxes(weight: np.ndarray, y: np.ndarray, x: np.ndarray, *, size: int) -> np.ndarray:
    """timm's rectangles of CutMix (`rand_bbox`) around points in [0, 1), clipped: int64 [B, 4]."""
    side = (size * np.sqrt(1 - weight)).astype(np.int64)
    edges = []
    for centre in ((y * size).astype(np.int64), (x * size).astype(np.int64)):
        edges += [np.clip(centre - side // 2, 0, size), np.clip(centre + (side + 1) // 2, 0, size)]
    return np.stack(edges, axis=1)


def mixed(images: Tensor, labels: Tensor, how: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mix the images of a batch, and their labels, with those of their neighbours.

    images [B, 3, S, S], labels int64 [B], how: `coefficients`, all on one device. Returns float32 images and
    class probabilities [B, num_classes], which are 0 for an image without label (-1).
    """
    images = images.float()
    pixels = torch.arange(images.shape[-1], device=images.device)
    weight, of_label, top, bottom, left, right = how.T[..., None]  # [B, 1] each
    rows = (pixels >= top) & (pixels < bottom)  # [B, S]
    columns = (pixels >= left) & (pixels < right)
    inside = rows[:, :, None] & columns[:, None, :]
    own = weight[:, :, None].masked_fill(inside, 0)[:, None]  # [B, 1, S, S]
    classes = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()  # [B, K]
    return (
        images * own + _neighbours(images) * (1 - own),
        classes * of_label + _neighbours(classes) * (1 - of_label),
    )


def _neighbours(rows: Tensor) -> Tensor:
    """The rows of a batch, each pair in the reverse order."""
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
