"""Contrastive representation distillation (Tian, 1910.10699)."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Shape
from indistill.losses.common import at_least_float32, require_equal
from indistill.models.outputs import Output, Targets


class CRDLoss(Loss, name="crd"):
    reads = frozenset({"embedding", "labels"})
    compares = 2
    whole_labels = True
    weight: float = 0.8  # Factor of this loss in the sum.
    dim: PositiveInt = 128  # Width of the common space of both embeddings.
    temperature: PositiveFloat = 0.07  # Divisor of the inner products.

    def layers(self, shape: Shape) -> nn.Module:
        return Contrast(shape, self.dim)

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        of_student, of_teacher = student.projected
        return crd(of_student, of_teacher, self.temperature, labels)


def crd(student: Tensor, teacher: Tensor, temperature: float = 0.07, labels: Tensor | None = None) -> Tensor:
    """Contrastive representation distillation (Tian, 1910.10699, equation 18).

    student and teacher [B, D], rows of length 1; returns a scalar. Each anchor has one positive, the other
    network's row of the same image, and N negatives. The loss is the mean over the anchors of -log
    h(positive) minus the sum over the negatives of log(1 - h(negative)), with h = e^x / (e^x + N) and x the
    inner product divided by the temperature. It is computed once with the teacher's rows as anchors and once
    with the student's, and added up. With labels, int64 [B], samples of the anchor's class are no negatives,
    as in the paper. Without any negative, h is 1.

    Two things differ from the paper. Its 16,384 negatives come from a memory bank of all M training images;
    here they are the other samples of the batch. The loss therefore sums fewer terms, and gradients flow to
    both sides of a pair. Its equation 19 is h = e^x / (e^x + N / M), but the authors' code first divides e^x
    by Z, which is M times the mean of e^x over the first batch. M therefore cancels, and N times that mean
    is left: the mean is 2.2 for random rows of 128 dimensions, and 1 is used here. Without Z, N / M of a
    batch is so small that every pair counts as positive, and the loss falls to a minimum in which all rows of
    the student are one vector and all rows of the teacher its opposite.
    """
    require_equal("crd", student.shape, teacher.shape)
    with torch.autocast(student.device.type, enabled=False):
        scores = at_least_float32(teacher) @ at_least_float32(student).T / temperature  # [B anchors, B]
    if labels is None:
        labels = torch.arange(len(scores), device=scores.device)
    if labels.shape != scores.shape[:1]:
        raise ValueError(
            f"losses.crd: labels {tuple(labels.shape)} of {len(scores)} samples: need one class for each"
        )
    negative = labels[:, None] != labels[None, :]  # [B, B]
    log_count = negative.sum(dim=1).to(scores.dtype).log()  # [B], -inf where there is none
    return _contrast(scores, negative, log_count) + _contrast(scores.T, negative, log_count)


def _contrast(scores: Tensor, negative: Tensor, log_count: Tensor) -> Tensor:
    """Binary cross-entropy of each row's diagonal entry against its negatives, summed; mean over rows."""
    own = -F.logsigmoid(scores.diagonal() - log_count)  # [B]
    others = -F.logsigmoid(log_count[:, None] - scores).masked_fill(~negative, 0)  # [B, B]
    return (own + others.sum(dim=1)).mean()


class Contrast(nn.Module):
    """CRD: linear maps of both embeddings to one unit sphere (1910.10699, equation 19)."""

    def __init__(self, shape: Shape, dim: int = 128) -> None:
        super().__init__()
        self.student = nn.Linear(shape.student_dim, dim)
        self.teacher = nn.Linear(shape.teacher_dim, dim)

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, Tensor]:
        """Student and teacher, [B, dim] each, rows of length one."""
        return _unit(self.student(output.embedding)), _unit(self.teacher(targets.embedding))


def _unit(x: Tensor) -> Tensor:
    # Half precision has no exact unit length, and F.normalize's own bound of 1e-12 would let gradients of
    # 1e12 through.
    return F.normalize(at_least_float32(x), dim=1, eps=1e-6)
