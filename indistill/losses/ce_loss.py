"""Cross-entropy with the labels."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss
from indistill.losses.common import at_least_float32


class CrossEntropy(Loss, name="ce"):
    reads = frozenset({"logits", "labels"})
    teaches = frozenset()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # Share of a label that is spread over all classes.
    )

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return cross_entropy(student.logits, labels, self.label_smoothing)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, batch mean; returns a scalar.

    Logits [B, K]; labels int64 [B], or class probabilities [B, K]. label_smoothing: the share of a label that
    is spread evenly over all classes (Szegedy, 1512.00567, section 7). A class of probability 0 adds 0, even
    if its logit is -inf.
    """
    logits = at_least_float32(logits)
    if not labels.is_floating_point():
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    probabilities = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    log_student = F.log_softmax(logits, dim=1).masked_fill(probabilities == 0, 0)
    return -(probabilities * log_student).sum(dim=1).mean()
