"""DIST: correlations within samples and within classes (Huang, 2205.10536)."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal


class DISTLoss(Loss, name="dist"):
    reads = frozenset({"logits"})
    compares = 2  # the correlation over the samples
    beta: float = 1.0  # Weight of the correlation over the classes, per sample.
    gamma: float = 1.0  # Weight of the correlation over the samples, per class.
    temperature: PositiveFloat = 1.0  # Temperature of both softmaxes.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return dist(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: relations between and within classes (Huang, 2205.10536).

    Both [B, K]; returns T^2 * (beta * inter + gamma * intra), of the softened probabilities: inter is 1 -
    Pearson's correlation of student and teacher over the classes, mean over the samples; intra the same over
    the samples, mean over the classes. A class or sample of equal probabilities has correlation 0. The
    defaults are those of the published code, which gives the loss weight 2 on ImageNet.
    """
    require_equal("dist", student_logits.shape, teacher_logits.shape)
    student = F.softmax(at_least_float32(student_logits) / temperature, dim=1)
    teacher = F.softmax(at_least_float32(teacher_logits) / temperature, dim=1)
    inter = 1 - _correlation(student, teacher).mean()
    intra = 1 - _correlation(student.T, teacher.T).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of every row: [N, M], [N, M] -> [N]."""
    return (_unit_deviations(x) * _unit_deviations(y)).sum(dim=1)


def _unit_deviations(x: Tensor) -> Tensor:
    """Each row's deviations from its mean, scaled to length 1: [N, M] -> [N, M].

    The published code adds 1e-8 to the product of two lengths. A lower bound of 1e-4 on each has the same
    effect where both vanish, and bounds the gradient where one does: with a student whose logits start at
    zero.
    """
    x = x - x.mean(dim=1, keepdim=True)
    return x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-4)
