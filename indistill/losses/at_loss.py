"""Activation-based attention transfer (Zagoruyko, 1612.03928)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal, same_size, sum_of


class ATLoss(Loss, name="at"):
    reads = frozenset({"features"})
    weight: float = 1000.0  # Factor of this loss in the sum.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return sum_of(at(*same_size(s, t)) for s, t in zip(student.features, teacher.features))


def at(student: Tensor, teacher: Tensor) -> Tensor:
    """Activation-based attention transfer (Zagoruyko, 1612.03928, equation 2, p = 2, F_sum^2).

    student [B, C_s, H, W], teacher [B, C_t, H, W]; returns a scalar. A map's attention is its mean square
    over the channels, flattened and scaled to length 1; the squared difference is averaged over B*H*W. As in
    the published code, the length is clamped to at least 1e-12, which keeps the gradient of maps near zero
    below 8e6 / (B*H*W). For this mean, the paper's weight beta is 1000.
    """
    require_equal("at", student[:, 0].shape, teacher[:, 0].shape)
    return F.mse_loss(_attention(student), _attention(teacher))


def _attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W], rows of length 1."""
    return F.normalize(at_least_float32(feature).square().mean(dim=1).flatten(1), dim=1)
