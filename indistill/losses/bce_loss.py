"""Binary cross-entropy with the labels: each class is a decision of its own."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from indistill.config import Inputs, Loss, Probability
from indistill.losses.common import at_least_float32


class BinaryCrossEntropy(Loss, name="bce"):
    reads = frozenset({"logits", "labels"})
    teaches = frozenset()
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = (
        0.0  # Share of a label that is spread over all classes.
    )
    # Labels above this become 1 and the others 0, after smoothing and mixing; None: they stay as they are.
    target_threshold: Probability | None = None
    sum_classes: bool = False  # Sum over the classes, instead of their mean.

    def __call__(self, student: Inputs, teacher: Inputs, labels: Tensor, epoch: int) -> Tensor:
        return bce(
            student.logits,
            labels,
            label_smoothing=self.label_smoothing,
            target_threshold=self.target_threshold,
            sum_classes=self.sum_classes,
        )


def bce(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    target_threshold: float | None = None,
    sum_classes: bool = False,
) -> Tensor:
    """Binary cross-entropy of the sigmoid of each class's logit, batch mean; returns a scalar.

    Logits [B, K]; labels int64 [B], or class probabilities [B, K] of mixed images. The mean over the classes,
    or with sum_classes their sum (Wightman, 2110.00476, section 3). label_smoothing: the share of a label
    that is spread evenly over all classes. target_threshold: smoothed labels above it become 1, the others 0.
    With timm's `Mixup(label_smoothing=...)` and `BinaryCrossEntropy(smoothing=...)` the result is the same.
    """
    logits = at_least_float32(logits)
    if not labels.is_floating_point():
        labels = F.one_hot(labels, logits.shape[1])
    targets = labels.to(logits.dtype) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    if target_threshold is not None:
        targets = (targets > target_threshold).to(logits.dtype)
    terms = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # [B, K]
    return terms.sum(dim=1).mean() if sum_classes else terms.mean()
