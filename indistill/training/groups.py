"""Several students of one teacher, each on ranks of its own: `students` with `student_groups: disjoint`.

The ranks are cut into as many equal groups as there are students, and each group trains its student as a run of its
own, in a process group of its own. Rank j of every group has the same images, loaded by itself. Its teacher runs on one
part of them, and one all-gather among those ranks hands round what the students need of it, pruned and in the teacher's
precision: in bf16 where that is bf16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from indistill.config import Config, UserError
from indistill.config.ranks import Ranks, variables
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Batch
from indistill.data.training import Training
from indistill.distributed import engine
from indistill.models.network import DTYPES
from indistill.models.outputs import Targets
from indistill.prune import Plan
from indistill.targets.live import LiveTargets, pooled
from indistill.targets.stored import fields_of
from indistill.training import checkpoint
from indistill.training.callbacks import Callback
from indistill.training.loop import train as train_run
from indistill.training.parts import Sources


def train(
    students: Sequence[tuple[str, Config]], resume: str = "auto", callbacks: Sequence[Callback] = ()
) -> dict[str, dict[str, Any]]:
    """Train all of them to the end; returns each one's `summary.json`, on every rank.

    Raises UserError for a number of processes that the students do not divide, and otherwise as `loop.train`. When the
    groups are asked to stop, or one is lost, all go on from the newest step of which each has a checkpoint.
    """
    ranks, count = Ranks.from_environment(), len(students)
    rank, world = ranks.rank, ranks.world_size
    if world % count:
        raise UserError(
            f"student_groups: disjoint: {world} processes cannot be cut into {count} equal groups: start a multiple of "
            f"{count}, or set student_groups: equal"
        )
    group, place = divmod(rank, world // count)
    name, settings = students[group]
    engine.find_interface(ranks)
    timeout = timedelta(minutes=settings.collective_timeout_minutes)
    store, *_ = next(distributed.rendezvous("env://", rank, world, timeout=timeout))
    launched = dict(os.environ)
    os.environ |= variables(place, world // count) | {"INDISTILL_GROUP": f"{name}/"}
    try:
        exchange = _begin_groups(store, group, count, place, world // count, timeout)
        resume = _common(store, group, place, students, resume)
        sources = _Apart(store, exchange, group, place, students)
        summary = train_run(settings, resume, sources, callbacks)
        return _from_all(store, "summary", group, place, students, summary)
    except UserError as error:
        error.found_by_one_rank = place == 0  # of its group
        raise
    finally:
        os.environ.clear()
        os.environ.update(launched)


def _begin_groups(
    store: distributed.Store, group: int, count: int, place: int, size: int, timeout: timedelta
) -> distributed.ProcessGroup:
    """Make this student's process group the default one; returns that of the ranks with the same images."""
    backend = "gloo"
    kind = distributed.ProcessGroupGloo
    if torch.cuda.is_available():
        torch.cuda.set_device(Ranks.from_environment().local_rank)
        backend, kind = "nccl", distributed.ProcessGroupNCCL
    own = distributed.PrefixStore(f"student {group}", store)
    distributed.init_process_group(backend, store=own, rank=place, world_size=size, timeout=timeout)
    return kind(distributed.PrefixStore(f"images {place}", store), group, count, timeout)


def _from_all(
    store: distributed.Store,
    what: str,
    group: int,
    place: int,
    students: Sequence[tuple[str, Config]],
    mine: Any,
) -> dict[str, Any]:
    """By name, what each student's first rank tells; waits for all of them."""
    if place == 0:
        store.set(f"{what} {group}", json.dumps(mine))
    return {name: json.loads(store.get(f"{what} {i}")) for i, (name, _) in enumerate(students)}


def _common(
    store: distributed.Store, group: int, place: int, students: Sequence[tuple[str, Config]], resume: str
) -> str:
    """What to resume from: the newest step that every student has a whole checkpoint of."""
    files = RunDir.of(students[group][1])
    whole = (
        [path.name for path in files.saved_checkpoints() if checkpoint.damaged(path) is None]
        if place == 0
        else []
    )
    saved = _from_all(store, "saved", group, place, students, whole)
    if resume == "never" or not any(saved.values()):
        return resume
    common = set.intersection(*map(set, saved.values()))
    if not common:
        raise UserError(f"the students have no checkpoint of the same step ({saved}): choose another run_dir")
    return str(files.checkpoints / max(common))


class _Apart(Sources):
    """A run's own images and teacher; its targets come from the teachers of all groups."""

    def __init__(
        self,
        store: distributed.Store,
        exchange: distributed.ProcessGroup,
        group: int,
        place: int,
        students: Sequence[tuple[str, Config]],
    ) -> None:
        self.store, self.exchange, self.group, self.place, self.students = (
            store,
            exchange,
            group,
            place,
            students,
        )
        self.name, self.position = students[group][0], group
        self.step = 0  # that the current batch is of

    def batches(
        self, training: Training, first_step: int, last_step: int, device: torch.device
    ) -> Iterator[Batch]:
        accumulation = self.students[self.group][1].grad_accumulation
        for i, batch in enumerate(super().batches(training, first_step, last_step, device)):
            self.step = first_step + i // accumulation
            yield batch

    def targets(
        self, targets_of: LiveTargets, plan: Plan, timetable: Timetable, settings: Config
    ) -> ExchangedTargets:
        world = Ranks.from_environment().world_size
        micro_batch = settings.data.global_batch // world // settings.grad_accumulation
        if micro_batch % len(self.students):
            raise UserError(
                f"student_groups: disjoint: {micro_batch} images of a rank and accumulation step cannot be shared out "
                f"to {len(self.students)} teachers: change data.global_batch"
            )
        told = {"plan": plan.to_json(), "kd_stages": targets_of.kd_stages}
        all_told = _from_all(self.store, "plan", self.group, self.place, self.students, told)
        heads = len(targets_of.heads.stages) if targets_of.heads else 0
        students = [
            Student(of_one, Plan.parse(all_told[name]["plan"]), all_told[name]["kd_stages"], heads, timetable)
            for name, of_one in self.students
        ]
        return ExchangedTargets(
            targets_of, self, students, settings.teacher.precision or settings.mixed_precision
        )


class Student:
    """What one of them needs of the teacher, at any step."""

    def __init__(
        self, settings: Config, plan: Plan, kd_stages: Sequence[int], heads: int, timetable: Timetable
    ) -> None:
        self.losses, self.kd_stages, self.heads, self.pairs = settings.kd.losses, kd_stages, heads, plan.pairs
        self.curriculum = Timetable.of(settings, timetable.steps_per_epoch, len(plan.pairs)).curriculum

    def fields(self, step: int) -> tuple[str, ...]:
        return fields_of(self.curriculum.at(step), self.losses, self.kd_stages, self.heads)

    def stage(self, field: str) -> int | None:
        """The teacher's stage whose map the field is made of; None for what needs the whole network."""
        if field.startswith("pair"):
            return self.pairs[int(field.removeprefix("pair")) - 1].teacher_stage
        return int(field.removeprefix("stage")) if field.startswith("stage") else None

    def kept(self, field: str) -> list[int] | None:
        return self.pairs[int(field.removeprefix("pair")) - 1].kept if field.startswith("pair") else None


class ExchangedTargets:
    """LiveTargets of a part of the images, for all students; the other ranks give the other parts."""

    def __init__(self, live: LiveTargets, apart: _Apart, students: Sequence[Student], precision: str) -> None:
        self.live, self.apart, self.students = live, apart, students
        self.dtype = DTYPES[precision]
        self.teacher, self.fingerprint, self.kd_stages = live.teacher, live.fingerprint, live.kd_stages
        self.bring_along, self.hold_weights = live.bring_along, live.hold_weights

    def __call__(self, images: Tensor, phase: Phase, records: Mapping[str, Tensor] | None = None) -> Targets:
        """Images [B, 3, H, W], the same on these ranks of all groups."""
        count, group = len(self.students), self.apart.group
        wanted = [(student, field) for student in self.students for field in student.fields(self.apart.step)]
        tensors = self._made(images.chunk(count)[group], wanted)
        sent = torch.cat(
            [tensor.to(self.dtype).flatten(1) for tensor in tensors], dim=1
        )  # [B / count, values]
        parts = [torch.empty_like(sent) for _ in range(count)]
        as_bytes = [part.view(torch.uint8) for part in parts]
        self.apart.exchange.allgather([as_bytes], [sent.view(torch.uint8)]).wait()
        columns = torch.cat(parts).split([tensor[0].numel() for tensor in tensors], dim=1)
        mine = {
            field: column.unflatten(1, tensor.shape[1:])
            for (student, field), tensor, column in zip(wanted, tensors, columns)
            if student is self.students[group]
        }
        if phase.pairs:
            return Targets(tuple(mine.values()))
        features = tuple(mine[f"stage{stage}"] for stage in self.kd_stages)
        cohort = tuple(tensor for field, tensor in mine.items() if field.startswith("head"))
        return Targets(features, mine.get("embedding"), mine.get("logits"), cohort)

    def _made(self, images: Tensor, wanted: Sequence[tuple[Student, str]]) -> list[Tensor]:
        """What is wanted of these images, in one pass of the teacher, no deeper than it needs to be."""
        stages = sorted({stage for student, field in wanted if (stage := student.stage(field)) is not None})
        whole = any(student.stage(field) is None for student, field in wanted)
        found = self.live.found(images, stages, whole)
        made = []
        for student, field in wanted:
            stage, kept = student.stage(field), student.kept(field)
            tensor = found[field] if stage is None else found[f"stage{stage}"]
            tensor = (
                tensor if kept is None else tensor.index_select(1, torch.tensor(kept, device=tensor.device))
            )
            made.append(tensor if stage is None else pooled(tensor, self.live.pool))
        return made
