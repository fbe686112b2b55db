"""The trainable parts of losses: modules that run inside the student's forward pass, as its wrapper expects.

Each maps what the student and the teacher gave on a batch to the tensors that its loss in common.py compares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill import config
from indistill.models.outputs import Output, Targets


class Shape(NamedTuple):
    """The widths that projectors translate between."""

    student_widths: Sequence[int]  # channels of the map of each pair, shallow to deep
    teacher_widths: Sequence[int]
    student_dim: int  # of the embedding
    teacher_dim: int


def create(losses: Sequence[config.Loss], shape: Shape) -> dict[str, nn.Module]:
    """The projector of each loss that has one, by the loss's place in the list."""
    projectors = {}
    for i, loss in enumerate(losses):
        match loss.name:
            case "hint":
                projectors[str(i)] = Hint(shape)
            case "vid":
                projectors[str(i)] = Variational(shape)
            case "reviewkd":
                projectors[str(i)] = Review(shape)
            case "crd":
                projectors[str(i)] = Contrast(shape, loss.dim)
    return projectors


class Hint(nn.Module):
    """FitNets' regressor, a 1x1 convolution from the student's width to the teacher's (1412.6550, section 2.2)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = zip(shape.student_widths, shape.teacher_widths)
        self.regressors = nn.ModuleList(
            nn.Conv2d(student, teacher, kernel_size=1) for student, teacher in widths
        )

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """One map [B, C_t, H_s, W_s] per pair."""
        return tuple(regressor(feature) for regressor, feature in zip(self.regressors, output.features))


class Variational(nn.Module):
    """VID: a Gaussian of the teacher's map given the student's (1904.05835, section 2).

    The mean comes from three 1x1 convolutions without bias, the variance is one parameter per channel through softplus;
    both as in the authors' code, which starts the variance at 5 and keeps it above 1e-5.
    """

    INITIAL_VARIANCE, MIN_VARIANCE = 5.0, 1e-5

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.regressors, self.raw_variances = nn.ModuleList(), nn.ParameterList()
        raw = math.log(
            math.expm1(self.INITIAL_VARIANCE - self.MIN_VARIANCE)
        )  # where softplus is that variance
        for student, teacher in zip(shape.student_widths, shape.teacher_widths):
            self.regressors.append(
                nn.Sequential(
                    nn.Conv2d(student, teacher, kernel_size=1, bias=False),
                    nn.ReLU(),
                    nn.Conv2d(teacher, teacher, kernel_size=1, bias=False),
                    nn.ReLU(),
                    nn.Conv2d(teacher, teacher, kernel_size=1, bias=False),
                )
            )
            self.raw_variances.append(nn.Parameter(torch.full((teacher,), raw)))

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """Mean [B, C_t, H, W] and variance [1, C_t, 1, 1] of each pair in turn; H, W of the smaller of the two maps."""
        gaussians = []
        pairs = zip(self.regressors, self.raw_variances, output.features, targets.features)
        for regressor, raw, student, teacher in pairs:
            size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:])]
            # Pooled before the regressor, as published, which is no longer linear.
            mean = regressor(F.adaptive_avg_pool2d(student, size))
            variance = F.softplus(raw) + self.MIN_VARIANCE
            gaussians += [mean, variance.view(1, -1, 1, 1)]
        return tuple(gaussians)


class Review(nn.Module):
    """ReviewKD: each stage of the student, fused with all deeper ones, against the teacher's (2104.09044, section 3).

    The fusion goes from deep to shallow; its inner width is that of the deepest student map, 512 at most, as in the
    authors' code for CIFAR-100 and ResNet-18 (for MobileNet on ImageNet they took 256). Their recursion starts one
    level deeper, at the pooled embedding; this one at the deepest pair, whose pooled map losses.reviewkd compares too.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        inner, deepest = min(512, shape.student_widths[-1]), len(shape.student_widths) - 1
        self.fusions = nn.ModuleList(
            _Fusion(student, inner, teacher, with_deeper=i < deepest)
            for i, (student, teacher) in enumerate(zip(shape.student_widths, shape.teacher_widths))
        )

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """One map of the shape of the teacher's, [B, C_t, H_t, W_t], per pair."""
        fused, review = [], None
        for fusion, student, teacher in list(zip(self.fusions, output.features, targets.features))[::-1]:
            result, review = fusion(student, review, teacher.shape[2:])
            fused.append(result)
        return tuple(fused[::-1])


class _Fusion(nn.Module):
    """Attention-based fusion of a student map with the review of the deeper ones (2104.09044, figure 3a)."""

    def __init__(self, student_width: int, inner: int, teacher_width: int, with_deeper: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(student_width, inner, kernel_size=1, bias=False), nn.BatchNorm2d(inner)
        )
        self.attention = nn.Conv2d(2 * inner, 2, kernel_size=1) if with_deeper else None
        self.expand = nn.Sequential(
            nn.Conv2d(inner, teacher_width, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(teacher_width),
        )
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, student: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The fused map [B, C_t, *size], and the review [B, inner, *size] for the next shallower stage."""
        review = self.reduce(student)  # [B, inner, H_s, W_s]
        if self.attention is not None:
            deeper = _nearest(deeper, review.shape[2:])
            gates = self.attention(torch.cat([review, deeper], dim=1)).sigmoid()  # [B, 2, H_s, W_s]
            review = gates[:, :1] * review + gates[:, 1:] * deeper
        review = _nearest(review, size)
        return self.expand(review), review


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == size else F.interpolate(x, tuple(size), mode="nearest")


class Contrast(nn.Module):
    """CRD: linear maps of both embeddings to one unit sphere (1910.10699, equation 19)."""

    def __init__(self, shape: Shape, dim: int = 128) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(shape.student_dim, dim), nn.Linear(shape.teacher_dim, dim)

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, Tensor]:
        """Student and teacher, [B, dim] each, rows of length one."""
        return _unit(self.student(output.embedding)), _unit(self.teacher(targets.embedding))


def _unit(x: Tensor) -> Tensor:
    # Half precision is no unit length, and F.normalize's own floor of 1e-12 would let gradients of 1e12 through.
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=1e-6)
