"""The loss of a batch: student outputs, targets, labels and phase to one scalar and its named terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from indistill import config
from indistill.curriculum import Phase
from indistill.losses import common
from indistill.losses.gather import gather
from indistill.models.outputs import Output, Targets


@dataclass(frozen=True)
class Objective:
    """The losses of a run; `scope` says whose samples relational losses compare (losses/gather.py)."""

    losses: Sequence[config.Loss]
    steps_per_epoch: int
    scope: str = "auto"

    def __call__(
        self, output: Output, targets: Targets, labels: Tensor, phase: Phase, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the phase's losses, and each term unweighted, detached.

        Labels are int64 [B], or class probabilities [B, K] of mixed images. A sum that is not finite gives gradients
        that are not: what sums these over the ranks tells all of them.
        """
        if phase.pairs:
            names = [f"mse_pair{pair + 1}" for pair in phase.pairs]
            values = [common.hint(*same_size(s, t)) for s, t in zip(output.features, targets.features)]
            weights = phase.weights
        else:
            epoch = (step - phase.start) // self.steps_per_epoch
            names = term_names(self.losses)
            values = [
                self._term(loss, output, output.projected.get(str(i), ()), targets, labels, epoch)
                for i, loss in enumerate(self.losses)
            ]
            weights = [loss.weight for loss in self.losses]
        total = sum(weight * value for weight, value in zip(weights, values))
        total = total * (1 + 0 * total.detach())  # times 1, or times nan
        return total, {name: value.detach() for name, value in zip(names, values)}

    def _term(
        self,
        loss: config.Loss,
        output: Output,
        projected: Sequence[Tensor],
        targets: Targets,
        labels: Tensor,
        epoch: int,
    ) -> Tensor:
        together = partial(gather, scope=self.scope)  # what compares samples compares those of all ranks
        match loss:
            case config.CrossEntropy():
                classifiers = output.cohort or (output.logits,)
                return sum(
                    common.cross_entropy(logits, labels, loss.label_smoothing) for logits in classifiers
                )
            case config.KDLoss():
                return common.kd(output.logits, targets.logits, loss.temperature, loss.standardize)
            case config.DISTLoss():
                logits = together(output.logits, targets.logits)  # its intra-class term compares samples
                return common.dist(*logits, loss.beta, loss.gamma, loss.temperature)
            case config.DKDLoss():
                return common.dkd(
                    output.logits, targets.logits, labels, loss.alpha, loss.beta, loss.temperature
                )
            case config.CohortLoss():
                cohort = (targets.logits, *targets.cohort)
                return common.dih(output.logits, cohort, labels, loss.alpha, loss.temperature, loss.weights)
            case config.TokenLoss():
                return common.token(output.token_logits, targets.logits, loss.mode, loss.temperature)
            case config.PKTLoss():
                embeddings = together(output.embedding, targets.embedding)
                return common.pkt(*embeddings, loss.kernel, loss.divergence, loss.scale)
            case config.InformationFlowLoss():
                layers = [(output.embedding, targets.embedding, 1.0)]
                weight = loss.init * loss.decay**epoch
                layers += [(s, t, weight) for s, t in zip(output.features, targets.features)]
                return sum(
                    weight
                    * common.pkt(
                        *together(s.flatten(1), t.flatten(1)), loss.kernel, loss.divergence, loss.scale
                    )
                    for s, t, weight in layers
                )
            case config.RKDLoss():
                embeddings = together(
                    output.embedding, targets.embedding, related=3 if loss.angle_weight else 2
                )
                return common.rkd(*embeddings, loss.distance_weight, loss.angle_weight)
            case config.CRDLoss():
                student, teacher, labels = together(*projected, labels)
                return common.crd(student, teacher, loss.temperature, labels)
            case config.SPLoss():
                return sum(common.sp(*together(s, t)) for s, t in zip(output.features, targets.features))
            case config.ATLoss():
                return sum(common.at(*same_size(s, t)) for s, t in zip(output.features, targets.features))
            case config.MapLoss(name="hint"):
                return sum(common.hint(*same_size(s, t)) for s, t in zip(projected, targets.features))
            case config.MapLoss(name="reviewkd"):
                return sum(common.reviewkd(s, t) for s, t in zip(projected, targets.features))
            case config.MapLoss(name="vid"):
                means, variances = projected[::2], projected[1::2]
                return sum(common.vid(*vmt) for vmt in zip(means, variances, targets.features))


def term_names(kd: Sequence[config.Loss]) -> list[str]:
    """The losses' names; where one stands several times, with its place among them: kd, kd_2."""
    names = [loss.name for loss in kd]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts)]


def reads(kd: Sequence[config.Loss], what: str) -> bool:
    """Whether any KD loss reads the student's "logits", "embedding", "features" or distillation "token"."""
    return any(what in loss.reads for loss in kd)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps [B, C, H, W] to the smaller, per axis (arXiv 2205.10003, section 3)."""
    size = [min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:])]
    return tuple(
        m if list(m.shape[2:]) == size else F.adaptive_avg_pool2d(m, size) for m in (student, teacher)
    )
