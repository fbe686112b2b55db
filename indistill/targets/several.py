"""The targets of several teachers: each has a source of its own, live or stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from indistill.curriculum import Phase, Timetable
from indistill.data.training import TrainingData
from indistill.models.network import Network
from indistill.models.outputs import Targets
from indistill.targets.reader import Reader
from indistill.targets.source import TargetSource
from indistill.targets.stored import CachedTargets


class Member(NamedTuple):
    """One of several teachers."""

    name: str  # what it is called
    source: TargetSource
    # Index into `Targets.each` of what it gives: 0 for the ensemble, which teaches `kd.losses`, or the place
    # of its own losses. None: it teaches the warm-up alone.
    place: int | None
    weight: float  # in the ensemble


class SeveralTargets:
    """Gives the losses of each teacher its targets, and `kd.losses` those of the ensemble.

    `taught` is what the teacher of the warm-up is called; `mean` says what the ensemble averages.
    """

    def __init__(
        self, members: Sequence[Member], taught: str | None, mean: Literal["probabilities", "logits"]
    ) -> None:
        self.members = members
        self.mean = mean
        # The one whose stages are compared with the student's, in evaluation too.
        self.first = next((member for member in members if member.name == taught), members[0])

    @property
    def teacher(self) -> Network | None:
        return self.first.source.teacher

    @property
    def kd_stages(self) -> Sequence[int]:
        return self.first.source.kd_stages

    @property
    def fingerprint(self) -> str:
        return " ".join(member.source.fingerprint for member in self.members)

    def bring_along(self, training: TrainingData, timetable: Timetable) -> None:
        """Have the loader read the records of each teacher whose targets are stored."""
        stored = {one.name: one.source for one in self.members if isinstance(one.source, CachedTargets)}
        fields_of = {name: source.check(training, timetable) for name, source in stored.items()}

        def fields_at(step: int) -> tuple[str, ...]:
            return tuple(f"{name}/{field}" for name, fields in fields_of.items() for field in fields(step))

        if stored:
            training.bring_along(_Readers({name: one.reader for name, one in stored.items()}), fields_at)

    def hold_weights(self) -> None:
        """Convert the weights of each teacher to its precision."""
        for member in self.members:
            member.source.hold_weights()

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """The targets of images [B, 3, H, W]. `records` are those of all teachers, by NAME/FIELD."""
        of_reader = _by_reader(records or {})
        if phase.pairs:
            return self.first.source(images, phase, of_reader.get(self.first.name))
        own: dict[int, Targets] = {}
        ensemble: list[tuple[Targets, float]] = []
        for name, source, place, weight in self.members:
            if place == 0:
                ensemble.append((source(images, phase, of_reader.get(name)), weight))
            elif place is not None:
                own[place] = source(images, phase, of_reader.get(name))
        return Targets(each=(self._together(ensemble), *(own[place] for place in sorted(own))))

    def _together(self, ensemble: Sequence[tuple[Targets, float]]) -> Targets:
        """What the only member gives, or of several the mean of their logits [B, K] in float32."""
        if len(ensemble) < 2:
            return ensemble[0][0] if ensemble else Targets()
        total = sum(weight for _, weight in ensemble)
        rows = []
        for targets, weight in ensemble:
            assert targets.logits is not None  # all have a classifier, or the run would have been refused
            logits, share = targets.logits.float(), weight / total
            by_share = logits * share if self.mean == "logits" else logits.log_softmax(1) + math.log(share)
            rows.append(by_share)
        stacked = torch.stack(rows)
        return Targets(logits=stacked.sum(0) if self.mean == "logits" else stacked.logsumexp(0))


class _Readers:
    """The stored targets of several teachers as one: their fields are called NAME/FIELD."""

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = readers

    @property
    def remote(self) -> bool:
        return any(reader.remote for reader in self.readers.values())

    def read(self, views: int | np.ndarray, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        records: dict[str, Tensor] = {}
        for name, own in _by_reader(dict.fromkeys(fields)).items():
            read = self.readers[name].read(views, ids, [*own])
            records |= {f"{name}/{field}": rows for field, rows in read.items()}
        return records

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        for name, own in _by_reader(dict.fromkeys(fields)).items():
            if self.readers[name].remote:
                self.readers[name].prefetch(view, ids, [*own])


_Value = TypeVar("_Value")


def _by_reader(values: Mapping[str, _Value]) -> dict[str, dict[str, _Value]]:
    """Sort values with keys NAME/FIELD by name, then by field."""
    sorted_values: dict[str, dict[str, _Value]] = {}
    for key, value in values.items():
        name, _, field = key.partition("/")
        sorted_values.setdefault(name, {})[field] = value
    return sorted_values
