"""Decoupled knowledge distillation (Zhao, 2203.08679)."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, kl_divergence, require_equal
from indistill.losses.kd_loss import kd


class DKDLoss(Loss, name="dkd"):
    reads = frozenset({"logits", "labels"})
    whole_labels = True
    alpha: float = 1.0  # Weight of the target class against all others.
    beta: float = 8.0  # Weight of the other classes among themselves.
    temperature: PositiveFloat = 4.0  # Temperature of both softmaxes.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return dkd(student.logits, teacher.logits, labels, self.alpha, self.beta, self.temperature)


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation (Zhao, 2203.08679, equation 7), batch mean.

    The value is T^2 * (alpha * TCKD + beta * NCKD).
    Logits [B, K], labels int64 [B]; returns a scalar. TCKD is KL(teacher || student) of (target class, all
    others), NCKD that of the other classes among themselves. The published runs take beta 0.5 (ResNet-18) or
    2 (MobileNet-V1) and T 1 on ImageNet; on CIFAR-100 mostly beta 8 and T 4, with a warm-up of the loss's
    weight. Masked classes add 0, as in `kd`; where the teacher masks all classes but the target, NCKD is 0.
    """
    require_equal("dkd", student_logits.shape, teacher_logits.shape)
    batch, classes = student_logits.shape
    if labels.shape != (batch,):
        raise ValueError(
            f"losses.dkd: labels {tuple(labels.shape)} are not one class for each of {batch} samples"
        )
    if classes == 1:  # nothing but the target: zero, as is kd
        return kd(student_logits, teacher_logits, temperature)
    # The classes but the target, gathered: a mask would need a size from the device, or a large number to
    # subtract.
    others = torch.arange(classes - 1, device=labels.device).expand(batch, -1)
    others = others + (others >= labels[:, None])  # [B, K - 1]
    student_binary, student_rest = _decouple(student_logits, labels, others, temperature)
    teacher_binary, teacher_rest = _decouple(teacher_logits, labels, others, temperature)
    tckd = kl_divergence(student_binary, teacher_binary)
    nckd = kl_divergence(student_rest, teacher_rest)
    return temperature**2 * (alpha * tckd + beta * nckd)


def _decouple(logits: Tensor, labels: Tensor, others: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others), [B, 2], and of the others among themselves, [B, K - 1]."""
    logits = at_least_float32(logits) / temperature
    target = logits.gather(1, labels[:, None])
    rest = logits.gather(1, others)
    # A row of -inf has no softmax: it is computed from zeros, and -inf is put in afterwards.
    masked = (rest == -torch.inf).all(dim=1, keepdim=True)  # [B, 1]
    rest = rest.masked_fill(masked, 0)
    total = rest.logsumexp(dim=1, keepdim=True).masked_fill(masked, -torch.inf)
    binary = F.log_softmax(torch.cat([target, total], dim=1), dim=1)  # [B, 2]
    return binary, F.log_softmax(rest, dim=1).masked_fill(masked, -torch.inf)
