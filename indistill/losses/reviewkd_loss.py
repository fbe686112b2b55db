"""Knowledge review: each stage of the student, fused with all deeper ones (Chen, 2104.09044)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Shape
from indistill.losses.common import at_least_float32, require_equal, sum_of
from indistill.models.outputs import Output, Targets


class ReviewKDLoss(Loss, name="reviewkd"):
    """Compares every pair of `kd.pairs`, after trained layers from the student's maps to the teacher's."""

    reads = frozenset({"features"})

    def layers(self, shape: Shape) -> nn.Module:
        return Review(shape)

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return sum_of(reviewkd(s, t) for s, t in zip(student.projected, teacher.features))


def reviewkd(fused: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss of two maps [B, C, H, W] (Chen, 2104.09044, section 3); returns a scalar.

    Mean squared errors of the maps, and of the maps pooled to 4x4, 2x2 and 1x1 where that is smaller. Each
    weighs half of the one before, and the weights are divided by their sum, as in the authors' code.
    """
    require_equal("reviewkd", fused.shape, teacher.shape)
    fused = at_least_float32(fused)
    teacher = at_least_float32(teacher)
    errors = [F.mse_loss(fused, teacher)]
    for size in (4, 2, 1):
        if size < min(fused.shape[2:]):
            errors.append(
                F.mse_loss(F.adaptive_avg_pool2d(fused, size), F.adaptive_avg_pool2d(teacher, size))
            )
    weights = [0.5**i for i in range(len(errors))]
    return sum_of(weight * error for weight, error in zip(weights, errors)) / sum(weights)


class Review(nn.Module):
    """ReviewKD: fuses each stage of the student with all deeper ones (2104.09044, section 3).

    The fusion goes from deep to shallow; its inner width is that of the deepest student map, at most 512, as
    in the authors' code for CIFAR-100 and ResNet-18 (for MobileNet on ImageNet they took 256). Their
    recursion starts one level deeper, at the pooled embedding; this one at the deepest pair, whose pooled map
    losses.reviewkd compares too.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner = min(512, shape.student_widths[-1])
        deepest = len(shape.student_widths) - 1
        self.fusions = nn.ModuleList(
            _Fusion(student, inner, teacher, with_deeper=i < deepest)
            for i, (student, teacher) in enumerate(zip(shape.student_widths, shape.teacher_widths))
        )

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """One map of the shape of the teacher's, [B, C_t, H_t, W_t], per pair."""
        fused = []
        review: Tensor | None = None
        for fusion, student, teacher in list(zip(self.fusions, output.features, targets.features))[::-1]:
            result, review = fusion(student, review, teacher.shape[2:])
            fused.append(result)
        return tuple(fused[::-1])


class _Fusion(nn.Module):
    """Attention-based fusion of a student map with the review of the deeper ones (2104.09044, figure 3a)."""

    def __init__(self, student_width: int, inner: int, teacher_width: int, *, with_deeper: bool) -> None:
        super().__init__()
        reduce = nn.Conv2d(student_width, inner, kernel_size=1, bias=False)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(inner))
        self.attention = nn.Conv2d(2 * inner, 2, kernel_size=1) if with_deeper else None
        expand = nn.Conv2d(inner, teacher_width, kernel_size=3, padding=1, bias=False)
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher_width))
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, student: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The fused map [B, C_t, *size], and the review [B, inner, *size] for the next shallower stage."""
        review = self.reduce(student)  # [B, inner, H_s, W_s]
        if self.attention is not None and deeper is not None:
            deeper = _nearest(deeper, review.shape[2:])
            gates = self.attention(torch.cat([review, deeper], dim=1)).sigmoid()  # [B, 2, H_s, W_s]
            review = gates[:, :1] * review + gates[:, 1:] * deeper
        review = _nearest(review, size)
        return self.expand(review), review


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, list(size), mode="nearest")
