"""Read the teacher's outputs for a batch from stored targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from indistill import config
from indistill.curriculum import Phase, Timetable
from indistill.losses.objective import teaches
from indistill.models.outputs import Targets
from indistill.targets.live import LiveTargets
from indistill.targets.reader import Reader

if TYPE_CHECKING:
    from indistill.data.loader import IndexedTraining


class CachedTargets:
    """What `indistill targets` stored (manifest.py), brought along by the batches; its calls are those of LiveTargets.

    There is no teacher, unless `live` is given: then the phases named are stored, and the others live.
    """

    def __init__(
        self,
        reader: Reader,
        losses: Sequence[config.Loss],
        kd_stages: Sequence[int],
        live: LiveTargets | None = None,
        phases: Sequence[str] = (),
    ) -> None:
        self.reader, self.losses, self.kd_stages, self.live, self.phases = (
            reader,
            losses,
            list(kd_stages),
            live,
            phases,
        )
        self.teacher = live and live.teacher
        self.fingerprint = reader.manifest.teacher.fingerprint
        if live and any(field.format != "float32" for field in reader.manifest.fields.values()):
            self.fingerprint += f" rounded in {', '.join(phases)}"  # a run that goes on has to read the same

    def bring_along(self, training: IndexedTraining, timetable: Timetable) -> None:
        """Have the loader read what each step's phase needs. Raises UserError for targets of other data, or without."""
        self.reader.check(training.fingerprint, needed(timetable, self._fields, self.reader.manifest.views))
        training.bring_along(self.reader, lambda step: self._fields(timetable.curriculum.at(step)))

    def hold_weights(self) -> None:
        if self.live:
            self.live.hold_weights()

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """From the records of the batch, uint8 [B, bytes] per field; zeros without them."""
        if self.live and phase.name not in self.phases:
            return self.live(images, phase)
        tensors = {}
        for name in self._fields(phase):
            field = self.reader.manifest.fields[name]
            if records:
                tensors[name] = field.decode(records[name].to(images.device, non_blocking=True))
            else:
                tensors[name] = field.blank(len(images), images.device)
        if phase.pairs:
            return Targets(tuple(tensors.values()))
        features = tuple(tensors[f"stage{stage}"] for stage in self.kd_stages)
        cohort = tuple(tensor for name, tensor in tensors.items() if name.startswith("head"))
        return Targets(features, tensors.get("embedding"), tensors.get("logits"), cohort)

    def _fields(self, phase: Phase) -> tuple[str, ...]:
        if self.live and phase.name not in self.phases:
            return ()
        return fields_of(phase, self.losses, self.kd_stages, self.reader.manifest.heads)


def fields_of(
    phase: Phase, losses: Sequence[config.Loss], kd_stages: Sequence[int], heads: int
) -> tuple[str, ...]:
    """What a phase reads of the stored targets (manifest.py); a teacher with `heads` intermediate classifiers."""
    if phase.pairs:
        return tuple(f"pair{pair + 1}" for pair in phase.pairs)
    fields = [f"stage{stage}" for stage in kd_stages]
    if teaches(losses, "embedding"):
        fields.append("embedding")
    if teaches(losses, "logits"):
        fields.append("logits")
    if teaches(losses, "heads"):
        fields += [f"head{i}" for i in range(1, heads + 1)]
    return tuple(fields)


def needed(timetable: Timetable, fields: Callable[[Phase], Sequence[str]], views: int) -> dict[str, set[int]]:
    """What a run reads of the stored targets: each field of its phases, and in which of the views."""
    found: dict[str, set[int]] = {}
    for phase in timetable.curriculum.phases():
        end = timetable.total_steps if phase.end is None else phase.end
        epochs = {step // timetable.steps_per_epoch for step in range(phase.start, end)}
        for field in fields(phase):
            found.setdefault(field, set()).update(epoch % views for epoch in epochs)
    return found
