"""The interface of everything that gives the targets of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from indistill.curriculum import Phase, Timetable
from indistill.data.training import TrainingData
from indistill.models.network import Network
from indistill.models.outputs import Targets


class TargetSource(Protocol):
    """Gives the targets of a batch: a live teacher, stored targets, or the teachers of several groups."""

    @property
    def teacher(self) -> Network | None:
        """The teacher, where it is loaded."""

    @property
    def kd_stages(self) -> Sequence[int]:
        """The teacher's stages whose whole maps KD reads."""

    @property
    def fingerprint(self) -> str:
        """The identity of the teacher's weights, and of its outputs where they were rounded."""

    def bring_along(self, training: TrainingData, timetable: Timetable) -> None:
        """Have the loader read what each step needs with its batch. Raises UserError if that cannot work."""

    def hold_weights(self) -> None:
        """Convert the teacher's weights to its precision, once no more pruning plans are made from them."""

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """Compute the targets of the student's input [B, 3, H, W], or decode the batch's `records`."""
