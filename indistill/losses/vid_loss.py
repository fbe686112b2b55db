"""Variational information distillation (Ahn, 1904.05835)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Shape
from indistill.losses.common import at_least_float32, require_equal, smaller_size, sum_of
from indistill.models.outputs import Output, Targets


class VIDLoss(Loss, name="vid"):
    """Compares every pair of `kd.pairs`, after trained layers from the student's maps to the teacher's."""

    reads = frozenset({"features"})

    def layers(self, shape: Shape) -> nn.Module:
        return Variational(shape)

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        means = student.projected[::2]
        variances = student.projected[1::2]
        return sum_of(vid(*pair) for pair in zip(means, variances, teacher.features))


def vid(mean: Tensor, variance: Tensor, teacher: Tensor) -> Tensor:
    """Variational information distillation: -log q(teacher | student), Gaussian (Ahn, 1904.05835, section 2).

    mean [B, C, H, W], variance [1, C, 1, 1] and positive, teacher [B, C, H_t, W_t], pooled to the mean's size
    as in the authors' code; returns a scalar, the mean over elements, without the constant log(2 pi) / 2.
    """
    if mean.shape[2] > teacher.shape[2] or mean.shape[3] > teacher.shape[3]:
        raise ValueError(
            f"losses.vid: mean {tuple(mean.shape)} is larger than teacher {tuple(teacher.shape)}"
        )
    mean = at_least_float32(mean)
    variance = at_least_float32(variance)
    teacher = F.adaptive_avg_pool2d(at_least_float32(teacher), (mean.shape[2], mean.shape[3]))
    require_equal("vid", mean.shape, teacher.shape)
    return ((mean - teacher).square() / variance + variance.log()).mean() / 2


class Variational(nn.Module):
    """VID: a Gaussian of the teacher's map given the student's (1904.05835, section 2).

    The mean comes from three 1x1 convolutions without bias, the variance is one parameter per channel through
    softplus; both as in the authors' code, which starts the variance at 5 and keeps it above 1e-5.
    """

    INITIAL_VARIANCE = 5.0
    MIN_VARIANCE = 1e-5

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.regressors = nn.ModuleList()
        self.raw_variances = nn.ParameterList()
        raw = math.log(
            math.expm1(self.INITIAL_VARIANCE - self.MIN_VARIANCE)
        )  # softplus of it is that variance
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
        """Mean [B, C_t, H, W] and variance [1, C_t, 1, 1] of each pair in turn; H, W of the smaller map."""
        gaussians = []
        pairs = zip(self.regressors, self.raw_variances, output.features, targets.features)
        for regressor, raw, student, teacher in pairs:
            # Pooled before the regressor, as published, which is not linear.
            mean = regressor(F.adaptive_avg_pool2d(student, smaller_size(student, teacher)))
            variance = F.softplus(raw) + self.MIN_VARIANCE
            gaussians += [mean, variance.view(1, -1, 1, 1)]
        return tuple(gaussians)
