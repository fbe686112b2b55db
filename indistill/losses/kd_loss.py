"""Knowledge distillation of softened class probabilities (Hinton, 1503.02531)."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32, kl_divergence, require_equal


class KDLoss(Loss, name="kd"):
    reads = frozenset({"logits"})
    temperature: PositiveFloat = 4.0  # Temperature of both softmaxes.
    standardize: bool = False  # Standardise the logits first (arXiv 2403.01427).

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return kd(student.logits, teacher.logits, self.temperature, self.standardize)


def kd(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, standardize: bool = False
) -> Tensor:
    """T^2 * KL(teacher || student) of softened probabilities, batch mean (Hinton, 1503.02531, section 2).

    Both [B, K]; returns a scalar. The factor T^2 keeps the gradient's size independent of the temperature.
    A class that the teacher masks, with a logit of -inf, adds 0, even if the student masks it too.

    standardize: each sample's logits are first shifted to mean 0 and scaled to standard deviation 1 over the
    classes (logit standardisation, Sun, 2403.01427), so that only their proportions are learned. As in its
    published code the deviation is the sample's (K - 1); its authors use temperature 2 and weight 9 with it.
    Masked classes stay masked and do not count in mean and deviation.
    """
    require_equal("kd", student_logits.shape, teacher_logits.shape)
    student = at_least_float32(student_logits)
    teacher = at_least_float32(teacher_logits)
    if standardize:
        student = _standardize(student)
        teacher = _standardize(teacher)
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher / temperature, dim=1)
    return kl_divergence(log_student, log_teacher) * temperature**2


def _standardize(logits: Tensor) -> Tensor:
    """Scale each row of [B, K] to mean 0 and sample standard deviation 1 over classes that are not -inf."""
    masked = logits == -torch.inf
    count = (~masked).sum(dim=1, keepdim=True).to(logits.dtype)
    mean = logits.masked_fill(masked, 0).sum(dim=1, keepdim=True) / count
    centred = (logits - mean).masked_fill(masked, 0)
    deviation = torch.linalg.vector_norm(centred, dim=1, keepdim=True) / (count - 1).clamp_min(1).sqrt()
    # The published code adds 1e-7, with which a classifier that starts at zero has gradients of 1e7.
    return (centred / deviation.clamp_min(1e-3)).masked_fill(masked, -torch.inf)
