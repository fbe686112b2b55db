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
    """Trains the distillation token of a student such as deit_tiny_distilled_patch16_224.

    `ce` trains its class token.
    """

    reads = frozenset({"logits", "token"})
    mode: Literal["hard", "soft"] = (
        "hard"  # `hard`: the teacher's class as a label; `soft`: its softened probabilities.
    )
    temperature: PositiveFloat = 1.0  # Temperature of `soft`.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return token(student.token, teacher.logits, self.mode, self.temperature)


def token(
    token_logits: Tensor,
    teacher_logits: Tensor,
    mode: Literal["hard", "soft"] = "hard",
    temperature: float = 1.0,
) -> Tensor:
    """The loss of DeiT's distillation token (Touvron, 2012.12877, section 4).

    Both [B, K]; returns a scalar. hard: cross-entropy with the teacher's predicted class; the published runs
    use it with weight 0.5, and 0.5 for the class token. soft: T^2 * KL(teacher || token), batch mean. The
    paper uses T = 3 and weight 0.1 for it; its code defaults to T = 1, and also divides by K.
    """
    require_equal("token", token_logits.shape, teacher_logits.shape)
    match mode:
        case "hard":
            return F.cross_entropy(at_least_float32(token_logits), teacher_logits.argmax(dim=1))
        case "soft":
            return kd(token_logits, teacher_logits, temperature)
    raise ValueError(f"losses.token: mode {mode!r} is neither 'hard' nor 'soft'")
