"""The loss of DeiT's distillation token (Touvron, 2012.12877)."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, require_equal
from indistill.losses.kd_loss import kd


class TokenLoss(Loss, name="token"):
    """For students such as deit_tiny_distilled_patch16_224; `ce` then trains their class token."""

    reads = frozenset({"logits", "token"})
    mode: Literal["hard", "soft"] = "hard"  # the teacher's class as a label, or its softened probabilities
    temperature: PositiveFloat = 1.0  # for soft

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return token(student.token, teacher.logits, self.mode, self.temperature)


def token(
    token_logits: Tensor,
    teacher_logits: Tensor,
    mode: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
) -> Tensor:
    """The loss of DeiT's distillation token (Touvron, 2012.12877, section 4): what its classifier learns.

    Both [B, K]; returns a scalar. hard: cross-entropy with the teacher's decision, the published choice, at
    weight 0.5 beside the class token's 0.5. soft: T^2 * KL(teacher || token), batch mean, for which the paper
    names T = 3 at weight 0.1; its code defaults to T = 1, and divides by K too.
    """
    require_equal("token", token_logits.shape, teacher_logits.shape)
    match mode:
        case "hard":
            return F.cross_entropy(at_least_float32(token_logits), teacher_logits.argmax(dim=1))
        case "soft":
            return kd(token_logits, teacher_logits, temperature)
    raise ValueError(f"losses.token: mode {mode!r} is neither 'hard' nor 'soft'")
