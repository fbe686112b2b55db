"""Several students of one teacher, each on ranks of its own: `students` with `student_groups: disjoint`.

The ranks are divided into as many equal groups as there are students, and each group trains its student as a
run of its own, in its own process group. Rank j of every group loads the same images. Its teacher runs on one
part of them, and an all-gather among those ranks exchanges the targets that the students need, pruned and in
the teacher's precision.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from indistill.config import Config, UserError
from indistill.config.ranks import Ranks, variables
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Batch
from indistill.data.training import TrainingData
from indistill.distributed.accelerator import find_interface
from indistill.losses.objective import teaches
from indistill.models.network import DTYPES
from indistill.models.outputs import Targets
from indistill.prune import PairPlan, Plan
from indistill.targets.live import LiveTargets, pooled
from indistill.targets.source import TargetSource
from indistill.targets.stored import fields_of, targets_from
from indistill.training import checkpoint
from indistill.training.callbacks import Callback
from indistill.training.loop import train
from indistill.training.parts import Sources


def train_groups(
    students: Sequence[tuple[str, Config]], resume: str = "auto", callbacks: Sequence[Callback] = ()
) -> dict[str, dict[str, Any]]:
    """Train all students to the end; return the content of each one's `summary.json`, on every rank.

    Raises UserError if the number of processes is not a multiple of the number of students, and otherwise
    like `loop.train`. When the groups are asked to stop, or one of them fails, all resume from the newest
    step of which every student has a checkpoint.
    """
    ranks = Ranks.from_environment()
    count, rank, world = len(students), ranks.rank, ranks.world_size
    if world % count:
        raise UserError(
            f"student_groups: disjoint: {world} processes cannot be cut into {count} equal groups: start a "
            f"multiple of {count}, or set student_groups: equal"
        )
    group, place = divmod(rank, world // count)
    name, settings = students[group]
    find_interface(ranks)
    timeout = timedelta(minutes=settings.collective_timeout_minutes)
    store, *_ = next(distributed.rendezvous("env://", rank, world, timeout=timeout))
    groups = _Groups(store, students, group=group, rank=place, size=world // count)
    launched = dict(os.environ)
    os.environ |= variables(place, world // count) | {"INDISTILL_GROUP": f"{name}/"}
    try:
        exchange = groups.begin(timeout)
        resume = _common_checkpoint(groups, resume)
        summary = train(settings, resume, _GroupSources(groups, exchange), callbacks)
        summaries = groups.gather("summary", summary)
        groups.leave(rank, world)
        distributed.destroy_process_group()  # a later run is one of all ranks
        return summaries
    except UserError as error:
        error.found_by_one_rank = place == 0  # of its group
        raise
    finally:
        os.environ.clear()
        os.environ.update(launched)


@dataclass(frozen=True)
class _Groups:
    """The groups of ranks, seen from one rank. `store` connects all ranks; values in it are JSON."""

    store: distributed.Store
    students: Sequence[tuple[str, Config]]
    _: KW_ONLY
    group: int  # index of this rank's student
    rank: int  # within the group
    size: int  # ranks of a group

    @property
    def name(self) -> str:
        return self.students[self.group][0]

    @property
    def settings(self) -> Config:
        return self.students[self.group][1]

    def begin(self, timeout: timedelta) -> distributed.ProcessGroup:
        """Make this student's process group the default; return the group of ranks with the same images."""
        own = distributed.PrefixStore(f"student {self.group}", self.store)
        same_images = distributed.PrefixStore(f"images {self.rank}", self.store)
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(Ranks.from_environment().local_rank)
        backend = "nccl" if on_gpus else "gloo"
        if distributed.is_initialized():  # by an earlier run of this process
            distributed.destroy_process_group()
        distributed.init_process_group(
            backend, store=own, rank=self.rank, world_size=self.size, timeout=timeout
        )
        # Any: both take a timeout, which torch's type hints do not say.
        kind: Any = distributed.ProcessGroupNCCL if on_gpus else distributed.ProcessGroupGloo
        return kind(same_images, self.group, len(self.students), timeout)

    def gather(self, key: str, value: Any) -> dict[str, Any]:
        """Gather one value from each student's first rank, by student name; blocks until all have arrived."""
        if self.rank == 0:
            self.store.set(f"{key} {self.group}", json.dumps(value))
        return {name: json.loads(self.store.get(f"{key} {i}")) for i, (name, _) in enumerate(self.students)}

    def leave(self, rank: int, world: int) -> None:
        """Tell rank 0, which may hold the store, that this rank needs it no more; rank 0 waits for all."""
        self.store.set(f"left {rank}", "")
        if rank == 0:
            self.store.wait([f"left {other}" for other in range(world)])


def _common_checkpoint(groups: _Groups, resume: str) -> str:
    """Return what to resume from: the newest step of which every student has an undamaged checkpoint.

    Raises UserError if there are checkpoints, but of no common step.
    """
    files = RunDir.of(groups.settings)
    mine: list[str] = []
    if groups.rank == 0:
        mine = [path.name for path in files.saved_checkpoints() if checkpoint.damaged(path) is None]
    saved = groups.gather("saved", mine)
    if resume == "never" or not any(saved.values()):
        return resume
    common = set.intersection(*map(set, saved.values()))
    if not common:
        raise UserError(f"the students have no checkpoint of the same step ({saved}): choose another run_dir")
    return str(files.checkpoints / max(common))


class _GroupSources(Sources):
    """A run's own images and teacher; its targets come from the teachers of all groups."""

    def __init__(self, groups: _Groups, exchange: distributed.ProcessGroup) -> None:
        self.groups = groups
        self.exchange = exchange
        self.name = groups.name
        self.position = groups.group
        self.step = 0  # of the current batch

    def batches(
        self, training: TrainingData, first_step: int, last_step: int, device: torch.device
    ) -> Iterator[Batch]:
        accumulation = self.groups.settings.grad_accumulation
        for i, batch in enumerate(super().batches(training, first_step, last_step, device)):
            self.step = first_step + i // accumulation
            yield batch

    def targets(
        self, targets_of: TargetSource, plan: Plan, timetable: Timetable, settings: Config
    ) -> ExchangedTargets:
        assert isinstance(targets_of, LiveTargets)  # the config refuses students that read stored targets
        assert settings.teacher is not None  # and students without a teacher
        students = self.groups.students
        world = Ranks.from_environment().world_size
        micro_batch = settings.data.global_batch // world // settings.grad_accumulation
        if micro_batch % len(students):
            raise UserError(
                f"student_groups: disjoint: {micro_batch} images of a rank and accumulation step cannot be "
                f"shared out to {len(students)} teachers: change data.global_batch"
            )
        needs = self.groups.gather("plan", {"plan": plan.to_json(), "kd_stages": targets_of.kd_stages})
        heads = len(targets_of.heads.stages) if targets_of.heads else 0
        needs_of = [
            Needs(
                student_settings,
                Plan.parse(needs[name]["plan"]),
                kd_stages=needs[name]["kd_stages"],
                heads=heads,
                steps_per_epoch=timetable.steps_per_epoch,
            )
            for name, student_settings in students
        ]
        begins = sorted({of_student.curriculum.phases()[-1].start for of_student in needs_of})
        if settings.kd.mixing and len(begins) > 1:
            raise UserError(
                f"student_groups: disjoint: KD begins at steps {' and '.join(map(str, begins))} of the "
                "students, and in between their teachers would not see the same images, as kd.mix mixes "
                "those of KD: give all warm-ups one length, remove kd.mix, or set student_groups: equal"
            )
        return ExchangedTargets(
            targets_of, self, needs_of, settings.teacher.precision or settings.mixed_precision
        )


class Needs:
    """Which teacher outputs one student needs at a given step."""

    def __init__(
        self, settings: Config, plan: Plan, *, kd_stages: Sequence[int], heads: int, steps_per_epoch: int
    ) -> None:
        self.losses = settings.kd.losses
        self.kd_stages = kd_stages
        self.heads = heads
        self.pairs = plan.pairs
        self.curriculum = Timetable.of(settings, steps_per_epoch, len(plan.pairs)).curriculum

    def fields(self, step: int) -> tuple[str, ...]:
        return fields_of(self.curriculum.at(step), self.losses, self.kd_stages, self.heads)

    def stage(self, field: str) -> int | None:
        """The teacher stage whose map the field is made from; None if it takes the whole network."""
        if field.startswith("pair"):
            return self._pair(field).teacher_stage
        return int(field.removeprefix("stage")) if field.startswith("stage") else None

    def kept(self, field: str) -> list[int] | None:
        """The channels of the map that the field keeps; None if it keeps all."""
        return self._pair(field).kept if field.startswith("pair") else None

    def _pair(self, field: str) -> PairPlan:
        return self.pairs[int(field.removeprefix("pair")) - 1]


class ExchangedTargets:
    """Runs the teacher on this rank's part of the batch for every student; groups exchange the targets."""

    def __init__(
        self, live: LiveTargets, sources: _GroupSources, students: Sequence[Needs], precision: str
    ) -> None:
        self.live = live
        self.sources = sources
        self.students = students
        self.dtype = DTYPES[precision]
        if live.teacher is not None:
            live.teacher.with_tokens = any(teaches(student.losses, "tokens") for student in students)
        self.teacher = live.teacher
        self.fingerprint = live.fingerprint
        self.kd_stages = live.kd_stages

    def bring_along(self, training: TrainingData, timetable: Timetable) -> None:
        self.live.bring_along(training, timetable)

    def hold_weights(self) -> None:
        self.live.hold_weights()

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """Images [B, 3, H, W], the same on these ranks of all groups."""
        count = len(self.students)
        group = self.sources.groups.group
        step = self.sources.step
        requested = [(student, field) for student in self.students for field in student.fields(step)]
        tensors = self._compute(images.chunk(count)[group], requested)
        rows = [tensor.to(self.dtype).flatten(1) for tensor in tensors]
        sent = torch.cat(rows, dim=1)  # [B / count, values]
        parts = [torch.empty_like(sent) for _ in range(count)]
        as_bytes = [part.view(torch.uint8) for part in parts]
        self.sources.exchange.allgather([as_bytes], [sent.view(torch.uint8)]).wait()
        columns = torch.cat(parts).split([tensor[0].numel() for tensor in tensors], dim=1)
        mine = {
            field: column.unflatten(1, tensor.shape[1:])
            for (student, field), tensor, column in zip(requested, tensors, columns)
            if student is self.students[group]
        }
        return targets_from(mine)

    def _compute(self, images: Tensor, requested: Sequence[tuple[Needs, str]]) -> list[Tensor]:
        """Compute the requested fields in one teacher pass, no deeper than necessary."""
        stages = sorted(
            {stage for student, field in requested if (stage := student.stage(field)) is not None}
        )
        whole = any(student.stage(field) is None for student, field in requested)
        outputs = self.live.found(images, stages, whole)
        tensors = []
        for student, field in requested:
            stage = student.stage(field)
            if stage is None:
                tensors.append(outputs[field])
                continue
            feature = outputs[f"stage{stage}"]
            kept = student.kept(field)
            if kept is not None:
                feature = feature.index_select(1, torch.tensor(kept, device=feature.device))
            tensors.append(pooled(feature, self.live.pool))
        return tensors
