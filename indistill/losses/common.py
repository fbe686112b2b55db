"""Functions that several losses use. All of them compute in float32 at least, and none broadcasts shapes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def require_equal(loss: str, student: torch.Size, teacher: torch.Size) -> None:
    """Raise ValueError, naming the loss, if the two shapes differ."""
    if student != teacher:
        raise ValueError(
            f"losses.{loss}: student {tuple(student)} and teacher {tuple(teacher)} differ in shape"
        )


def kl_divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities [B, K], batch mean; classes with p = 0 add 0."""
    p = log_p.exp()
    # Masked before the product, whose gradient would be 0 * inf. F.kl_div gives nan where both are -inf.
    terms = p * (log_p.masked_fill(p == 0, 0) - log_q.masked_fill(p == 0, 0))
    return terms.sum() / len(terms)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps [B, C, H, W] to the smaller, per axis (2205.10003, section 3)."""
    size = smaller_size(student, teacher)
    return _pool(student, size), _pool(teacher, size)


def smaller_size(student: Tensor, teacher: Tensor) -> tuple[int, int]:
    """The smaller height and the smaller width of two maps [B, C, H, W]."""
    height, width = (min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:]))
    return height, width


def _pool(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if feature.shape[2:] == size else F.adaptive_avg_pool2d(feature, size)


def square_distances(x: Tensor) -> Tensor:
    """Squared Euclidean distances: [B, D] -> [B, B], 0 on the diagonal; rounding may make others negative."""
    # A shift changes no distance; with mean 0, the difference of squares below is far more accurate.
    x = x - x.mean(dim=0)
    squares = x.square().sum(dim=1)  # [B]
    distances = squares[:, None] + squares[None, :] - 2 * x @ x.T
    # Rounding errors on the diagonal grow with the scale, and a kernel is steepest there.
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0.0)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """The sum of scalars, one per pair of maps. Raises ValueError if there is none."""
    terms = list(terms)
    if not terms:
        raise ValueError("losses: no pair of maps to compare")
    return sum(terms[1:], start=terms[0])
