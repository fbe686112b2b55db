"""Similarity-preserving distillation (Tung, 1907.09682)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal, sum_of


class SPLoss(Loss, name="sp"):
    reads = frozenset({"features"})
    compares = 2
    weight: float = 3000.0  # Factor of this loss in the sum.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return sum_of(sp(s, t) for s, t in zip(student.features, teacher.features))


def sp(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving distillation (Tung, 1907.09682); on the last map alone its usual weight is 3000.

    student [B, ...], teacher [B, ...], flattened, of any widths; returns a scalar. The rows of both batches'
    Gram matrices [B, B] are scaled to length 1; their squared difference is averaged over the B*B entries. As
    in the published code, a row's length is clamped to at least 1e-12. The row of a map whose length is about
    1e-6 or less gets no gradient, because it would be at least a million times the usual one.
    """
    require_equal("sp", student.shape[:1], teacher.shape[:1])
    with torch.autocast(student.device.type, enabled=False):
        student = at_least_float32(student.flatten(1))
        teacher = at_least_float32(teacher.flatten(1))
        return F.mse_loss(_unit_rows(student @ student.T), _unit_rows(teacher @ teacher.T))


def _unit_rows(gram: Tensor) -> Tensor:
    """F.normalize of the rows of products of samples, [B, B], without gradient for the shortest."""
    length = torch.linalg.vector_norm(gram, dim=1, keepdim=True)
    shortest = 1e-6 * gram.diagonal().sum().sqrt()  # the most that a sample of length 1e-6 can have
    return F.normalize(torch.where(length > shortest, gram, gram.detach()), dim=1)
