"""The loss of a batch: student outputs, targets, labels and phase to one scalar and its named terms."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from indistill import config, losses
from indistill.curriculum import Phase
from indistill.models import Output
from indistill.targets import Targets


def objective(
    output: Output, targets: Targets, labels: Tensor, phase: Phase, kd: Sequence[config.Loss]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of the phase's losses, and each term unweighted, detached.

    Labels are int64 [B], or class probabilities [B, K] of mixed images.
    """
    if phase.pairs:
        names = [f"mse_pair{pair + 1}" for pair in phase.pairs]
        values = [losses.hint(*same_size(s, t)) for s, t in zip(output.features, targets.features)]
        weights = phase.weights
    else:
        names = [loss.name for loss in kd]
        values = [_term(loss, output, targets, labels) for loss in kd]
        weights = [loss.weight for loss in kd]
    total = sum(weight * value for weight, value in zip(weights, values))
    return total, {name: value.detach() for name, value in zip(names, values)}


def _term(loss: config.Loss, output: Output, targets: Targets, labels: Tensor) -> Tensor:
    match loss:
        case config.CrossEntropy():
            return F.cross_entropy(output.logits.float(), labels, label_smoothing=loss.label_smoothing)
        case config.KDLoss():
            return losses.kd(output.logits, targets.logits, loss.temperature)
        case config.PKTLoss():
            return losses.pkt(output.embedding, targets.embedding)


def needs_logits(kd: Sequence[config.Loss]) -> bool:
    """Whether any KD loss trains the student's classifier."""
    return any(loss.name != "pkt" for loss in kd)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps [B, C, H, W] to the smaller, per axis (arXiv 2205.10003, section 3)."""
    size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:])]
    return tuple(m if list(m.shape[2:]) == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher))
