"""FitNets: the squared error of feature maps, through a convolution (Romero, 1412.6550)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Shape
from indistill.losses.common import at_least_float32, require_equal, same_size, sum_of
from indistill.models.outputs import Output, Targets


class HintLoss(Loss, name="hint"):
    """Mean squared error of every pair of `kd.pairs`, after a trained 1x1 convolution of the student."""

    reads = frozenset({"features"})

    def layers(self, shape: Shape) -> nn.Module:
        return Hint(shape)

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return sum_of(hint(*same_size(s, t)) for s, t in zip(student.projected, teacher.features))


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of two maps [B, C, H, W], also the warm-up's loss (2205.10003); returns a scalar."""
    require_equal("hint", student.shape, teacher.shape)
    return F.mse_loss(at_least_float32(student), at_least_float32(teacher))


class Hint(nn.Module):
    """FitNets' regressor: a 1x1 convolution from student to teacher width (1412.6550, section 2.2)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = zip(shape.student_widths, shape.teacher_widths)
        self.regressors = nn.ModuleList(
            nn.Conv2d(student, teacher, kernel_size=1) for student, teacher in widths
        )

    def forward(self, output: Output, targets: Targets) -> tuple[Tensor, ...]:
        """One map [B, C_t, H_s, W_s] per pair."""
        return tuple(regressor(feature) for regressor, feature in zip(self.regressors, output.features))
