"""Read the teacher's outputs for a batch from stored targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from indistill import config
from indistill.curriculum import ImageSizes, Phase, Timetable
from indistill.data.augment import view_of
from indistill.data.training import TrainingData
from indistill.losses.objective import teaches
from indistill.models.outputs import Targets
from indistill.targets.live import LiveTargets
from indistill.targets.reader import Reader
from indistill.targets.records import sized


class CachedTargets:
    """The targets that `indistill targets` stored (manifest.py), which the batches contain; called like
    LiveTargets.

    There is no teacher, unless `live` is given: then the targets of `phases` are stored, and those of others
    live. Without `warms_up` another teacher gives the targets of the warm-up.
    """

    def __init__(
        self,
        reader: Reader,
        losses: Sequence[config.Loss],
        *,
        kd_stages: Sequence[int],
        live: LiveTargets | None = None,
        phases: Sequence[str] = (),
        warms_up: bool = True,
    ) -> None:
        self.reader = reader
        self.losses = losses
        self.kd_stages = list(kd_stages)
        self.live = live
        self.phases = phases
        self.warms_up = warms_up
        self.sizes = ImageSizes(0, 0)  # until `bring_along` knows those of the run
        self.teacher = None if live is None else live.teacher
        self.fingerprint = reader.manifest.teacher.fingerprint
        if live and any(field.format != "float32" for field in reader.manifest.fields.values()):
            self.fingerprint += f" rounded in {', '.join(phases)}"  # a resumed run must read the same targets

    def bring_along(self, training: TrainingData, timetable: Timetable) -> None:
        """Make the loader read the fields of each step's phase; raises as `check`."""
        training.bring_along(self.reader, self.check(training, timetable))

    def check(self, training: TrainingData, timetable: Timetable) -> Callable[[int], tuple[str, ...]]:
        """Return a function from a step to the fields that it reads.

        Raises UserError if the targets are of other data, or lack a field.
        """
        samples = training.dataset.shards.sizes if training.dataset else None
        fields = needed(timetable, self._fields, training)
        self.reader.check(training.fingerprint, samples, fields)
        self.sizes = sizes = training.sizes

        def fields_at(step: int) -> tuple[str, ...]:
            names = self._fields(timetable.curriculum.at(step))
            return tuple(sized(name, sizes.at(step), sizes) for name in names)

        return fields_at

    def hold_weights(self) -> None:
        """Convert the live teacher's weights to its precision, if there is one."""
        if self.live:
            self.live.hold_weights()

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """The targets in the batch's records, uint8 [B, bytes] per field; zeros if there are no records."""
        if self.live and phase.name not in self.phases:
            return self.live(images, phase)
        tensors = {}
        for name in self._fields(phase):
            stored = sized(name, images.shape[-1], self.sizes)
            field = self.reader.manifest.fields[stored]
            if records:
                tensors[name] = field.decode(records[stored].to(images.device, non_blocking=True))
            else:
                tensors[name] = field.blank(len(images), images.device)
        return targets_from(tensors)

    def _fields(self, phase: Phase) -> tuple[str, ...]:
        if (self.live and phase.name not in self.phases) or (phase.pairs and not self.warms_up):
            return ()
        return fields_of(phase, self.losses, self.kd_stages, self.reader.manifest.heads)


def fields_of(
    phase: Phase, losses: Sequence[config.Loss], kd_stages: Sequence[int], heads: int
) -> tuple[str, ...]:
    """What a phase reads of the stored targets (manifest.py); a teacher with `heads` intermediate
    classifiers.
    """
    if phase.pairs:
        return tuple(f"pair{pair + 1}" for pair in phase.pairs)
    fields = [f"stage{stage}" for stage in kd_stages]
    if teaches(losses, "tokens"):
        fields.append("tokens")
    if teaches(losses, "embedding"):
        fields.append("embedding")
    if teaches(losses, "logits"):
        fields.append("logits")
    if teaches(losses, "heads"):
        fields += [f"head{i}" for i in range(1, heads + 1)]
    return tuple(fields)


def targets_from(fields: Mapping[str, Tensor]) -> Targets:
    """The targets of a phase from its fields, in the order of `fields_of`."""
    features = tuple(tensor for name, tensor in fields.items() if name.startswith(("pair", "stage")))
    cohort = tuple(tensor for name, tensor in fields.items() if name.startswith("head"))
    return Targets(features, fields.get("embedding"), fields.get("logits"), cohort, fields.get("tokens"))


def needed(
    timetable: Timetable, fields: Callable[[Phase], Sequence[str]], training: TrainingData
) -> dict[str, set[int]]:
    """The fields of the stored targets that a run reads, with the views in which it reads them."""
    section, sizes = training.section, training.sizes
    views_of_fields: dict[str, set[int]] = {}
    for phase in timetable.curriculum.phases():
        steps = timetable.steps_of(phase)
        for epoch, size in sorted({(step // timetable.steps_per_epoch, sizes.at(step)) for step in steps}):
            views = {view_of(section, epoch, repeat) for repeat in range(section.repeats)}
            for field in fields(phase):
                views_of_fields.setdefault(sized(field, size, sizes), set()).update(views)
    return views_of_fields
