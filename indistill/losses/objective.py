"""The loss of a batch: student outputs, targets, labels and phase to one scalar and its named terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from indistill.config import Inputs, Loss, Shape
from indistill.curriculum import Phase
from indistill.losses.common import same_size, sum_of
from indistill.losses.gather import Rows, gather_inputs, groups
from indistill.losses.hint_loss import hint
from indistill.losses.standard import Standard
from indistill.models.outputs import Output, Targets


class Place(NamedTuple):
    """Where a loss finds what it compares, if the student has several teachers."""

    teacher: str  # what it is called; "" for the losses of `kd.losses`
    targets: int  # index into `Targets.each`
    features: Sequence[int]  # indices into the student's maps
    weight: float = 1.0  # factor of all losses of this teacher

    def seen(self, output: Output, targets: Targets) -> tuple[Output, Targets]:
        """Return what the loss is given of both networks' outputs."""
        features = tuple(output.features[i] for i in self.features)
        return output._replace(features=features), targets.each[self.targets]


@dataclass(frozen=True)
class Objective:
    """The losses of a run; `scope` selects the samples that losses compare (losses/gather.py).

    `standards` has what standardises each of the teacher's features that a loss reads, by the loss's index.
    `places` are those of all losses if the student has several teachers, else ().
    """

    losses: Sequence[Loss]
    steps_per_epoch: int
    scope: str = "auto"
    standards: Mapping[int, Sequence[Standard]] = field(default_factory=dict)
    places: Sequence[Place] = ()
    dropping: float | None = None  # `kd.teacher_dropping`

    def __call__(
        self, output: Output, targets: Targets, *, labels: Tensor, phase: Phase, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum of the phase's losses, and each term unweighted and detached.

        Labels are int64 [B], or class probabilities [B, K] of mixed images. If the sum is not finite, neither
        are its gradients, so that every rank notices once they are summed over the ranks.
        """
        weights: Sequence[float]
        if phase.pairs:
            names = [f"mse_pair{pair + 1}" for pair in phase.pairs]
            values = [hint(*same_size(s, t)) for s, t in zip(output.features, targets.features)]
            weights = phase.weights
        else:
            epoch = int(step - phase.start) // self.steps_per_epoch
            names = term_names(self.losses, self.places)
            values = [
                self._term(i, output, targets=targets, labels=labels, epoch=epoch)
                for i in range(len(self.losses))
            ]
            of_teacher = [place.weight for place in self.places] or [1.0] * len(self.losses)
            weights = [loss.weight * factor for loss, factor in zip(self.losses, of_teacher)]
        if self.dropping is None or phase.pairs:
            total = sum_of(weight * value for weight, value in zip(weights, values))
        else:
            total = self._with_dropping(output, targets, [*zip(weights, values)], self.dropping)
        total = total * (1 + 0 * total.detach())  # times 1, or times nan
        return total, {name: value.detach() for name, value in zip(names, values)}

    def _with_dropping(
        self,
        output: Output,
        targets: Targets,
        weighted: Sequence[tuple[float, Tensor]],
        probability: float,
    ) -> Tensor:
        """Return the loss with teacher dropping (arXiv 2408.05088, section 3.3, and its published code).

        An image keeps the teacher with the largest loss, and each other one by chance. The mean over all kept
        pairs of image and teacher is added to `kd.losses`. The draws depend on step and rank, as dropout's.
        """
        of_teachers: dict[int, Tensor] = {}  # [B] each
        rest = weighted[0][1].new_zeros(())
        for i, (place, (weight, value)) in enumerate(zip(self.places, weighted)):
            if not place.teacher:
                rest = rest + weight * value
                continue
            student, teacher, _ = self._inputs(i, output, targets, labels=value)
            of_loss = weight * self.losses[i].of_each(student, teacher)
            of_teachers[place.targets] = of_teachers.get(place.targets, 0) + of_loss
        rows = torch.stack([*of_teachers.values()])  # [T, B]
        largest = rows.detach().argmax(0, keepdim=True)
        kept = (torch.rand_like(rows) >= probability).scatter(0, largest, True)
        return rest + (rows * kept).sum() / kept.sum()

    def _term(self, index: int, output: Output, *, targets: Targets, labels: Tensor, epoch: int) -> Tensor:
        if output.cohort:  # classifier heads that are trained, each by itself
            heads = [output._replace(logits=logits, cohort=()) for logits in output.cohort]
            return sum_of(
                self._term(index, head, targets=targets, labels=labels, epoch=epoch) for head in heads
            )
        loss = self.losses[index]
        student, teacher, own_labels = self._inputs(index, output, targets, labels)
        if loss.compares > 1:
            student, teacher, own_labels = gather_inputs(
                student, teacher, labels=own_labels, scope=self.scope, related=loss.compares
            )
        value = loss(student, teacher, own_labels, epoch)
        if not isinstance(value, Tensor) or value.ndim:
            returned = f"shape {[*value.shape]}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"loss {loss.name} returned {returned}: expected a tensor with one value, shape []"
            )
        return value

    def compared(self, output: Output, targets: Targets, labels: Tensor) -> list[Rows]:
        """Return the size of one sample's rows that the losses would gather, for each group of tensors."""
        rows = []
        for i, loss in enumerate(self.losses):
            if loss.compares > 1:
                for group in groups(*self._inputs(i, output, targets, labels)):
                    rows.append(Rows.of([*group.values()], loss.compares))
        return rows

    def _inputs(
        self, index: int, output: Output, targets: Targets, labels: Tensor
    ) -> tuple[Inputs, Inputs, Any]:
        """Return what a loss is given of student and teacher, and the labels if it reads them, else None."""
        loss = self.losses[index]
        if self.places:
            output, targets = self.places[index].seen(output, targets)
        own_labels = labels if "labels" in loss.reads else None
        projected = output.projected.get(str(index))
        if projected is not None and loss.compares > 1:
            return Inputs(projected=projected), Inputs(), own_labels
        of_student = {
            "logits": output.logits,
            "embedding": output.embedding,
            "features": output.features,
            "tokens": output.tokens,
            "token": output.token_logits,
        }
        of_teacher = {
            "logits": targets.logits,
            "embedding": targets.embedding,
            "features": targets.features,
            "tokens": targets.tokens,
            "heads": targets.cohort,
        }
        student = Inputs(**{name: value for name, value in of_student.items() if name in loss.reads})
        teacher = Inputs(**{name: value for name, value in of_teacher.items() if name in loss.teaches})
        if index in self.standards:
            _standardise(teacher, self.standards[index])
        if projected is not None:
            student.projected = projected
        return student, teacher, own_labels


def _standardise(teacher: Inputs, standards: Sequence[Standard]) -> None:
    for name, value in vars(teacher).items():
        if isinstance(value, tuple):
            setattr(teacher, name, tuple(standard(x) for standard, x in zip(standards, value)))
        else:
            setattr(teacher, name, standards[0](value))


def create_layers(losses: Sequence[tuple[Loss, Shape]], places: Sequence[Place] = ()) -> dict[str, nn.Module]:
    """Create the trainable layers of each loss that has any, keyed by the loss's index."""
    layers = {str(i): loss.layers(shape) for i, (loss, shape) in enumerate(losses)}
    return {
        index: _Placed(layer, places[int(index)]) if places else layer
        for index, layer in layers.items()
        if layer is not None
    }


class _Placed(nn.Module):
    """The layers of a loss, given what the loss is given."""

    def __init__(self, layers: nn.Module, place: Place) -> None:
        super().__init__()
        self.layers = layers
        self.place = place

    def forward(self, output: Output, targets: Targets) -> Any:
        return self.layers(*self.place.seen(output, targets))


def term_names(losses: Sequence[Loss], places: Sequence[Place] = ()) -> list[str]:
    """The names of the losses, with a number from the second of the same name on: kd, kd_2.

    The name of a teacher's own loss begins with what the teacher is called: clip/feature.
    """
    teachers = [place.teacher for place in places] or [""] * len(losses)
    names = [f"{teacher}/{loss.name}".lstrip("/") for loss, teacher in zip(losses, teachers)]
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [name if count == 1 else f"{name}_{count}" for name, count in zip(names, counts)]


def reads(losses: Sequence[Loss], what: str) -> bool:
    """Whether any loss reads the student's "logits", "embedding", "features", "tokens" or "token"."""
    return any(what in loss.reads for loss in losses)


def teaches(losses: Sequence[Loss], what: str) -> bool:
    """Whether any loss needs the teacher's "logits", "embedding", "features", "tokens" or "heads"."""
    return any(what in loss.teaches for loss in losses)
