"""Distillation by the teacher and its intermediate classifier heads together (Asadian, 2103.00497)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import PositiveFloat
from torch import Tensor

from indistill.config import Inputs, Loss, Probability, UserError
from indistill.losses.ce_loss import cross_entropy
from indistill.losses.common import at_least_float32, require_equal
from indistill.losses.kd_loss import kd


class CohortLoss(Loss, name="dih"):
    """Distillation from the teacher and its intermediate classifiers; requires `teacher.heads`."""

    reads = frozenset({"logits", "labels"})
    teaches = frozenset({"logits", "heads"})
    alpha: Probability = 0.1  # Weight of distillation; cross-entropy has 1 - alpha.
    temperature: PositiveFloat = 5.0  # Temperature of all softmaxes.
    # Weights of the teacher, then of each classifier, shallow to deep; None: 1 for each.
    weights: list[float] | None = None

    def check(self, heads: int) -> None:
        if self.weights is not None and len(self.weights) != 1 + heads:
            raise UserError(f"kd.losses: dih.weights: {len(self.weights)} for the teacher and {heads} heads")

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        cohort = (teacher.logits, *teacher.heads)
        return dih(student.logits, cohort, labels, self.alpha, self.temperature, self.weights)


def dih(
    student_logits: Tensor,
    cohort_logits: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.1,
    temperature: float = 5.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Distillation by the teacher and its intermediate heads together (Asadian, 2103.00497).

    The sum over the cohort of weight * ((1 - alpha) * cross-entropy + alpha * T^2 * KL(member || student)).
    The cross-entropy with the labels counts once for every member, as in the published code. All logits
    [B, K]; labels int64 [B], or class probabilities [B, K]; weights one per member, 1 by default. Returns a
    scalar.
    """
    for member in cohort_logits:
        require_equal("dih", student_logits.shape, member.shape)
    weights = [1.0] * len(cohort_logits) if weights is None else weights
    if len(weights) != len(cohort_logits) or not weights:
        raise ValueError(f"losses.dih: {len(cohort_logits)} cohort members and {len(weights)} weights")
    if labels.shape not in (student_logits.shape, student_logits.shape[:1]):
        raise ValueError(
            f"losses.dih: labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}"
        )
    logits = at_least_float32(student_logits)
    hard = cross_entropy(logits, labels)
    soft = sum(weight * kd(logits, member, temperature) for weight, member in zip(weights, cohort_logits))
    return (1 - alpha) * sum(weights) * hard + alpha * soft
