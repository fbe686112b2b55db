"""Estimate a run before it starts: operations, time, memory, bytes stored and sent.

`of_run` builds the networks as training does, on the CPU, and puts each phase's loss and gradient through
PyTorch's fake tensors, which have shapes and no content: this takes seconds. The rest is arithmetic on these
counts and `config.Machine`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses import FakeTensorMode

from indistill import config, prune
from indistill.commands.plan.memory import ENGINES, FLOAT, memory, state_bytes
from indistill.commands.plan.network import BUCKET, communication_seconds, step_seconds, traffic
from indistill.commands.plan.result import Estimate, Pair, PhaseCost, Scale, TeacherCost
from indistill.config import Config
from indistill.config.run_dir import RunDir, weights_file
from indistill.curriculum import ImageSizes, Phase, Timetable
from indistill.data.dataset import open_shards
from indistill.data.loader import check_accumulation, sample_order
from indistill.data.stream import StreamedTraining
from indistill.distributed import environment
from indistill.losses.objective import Objective, Place
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.models.stages import find_stages
from indistill.models.timm_model import NoWeights
from indistill.models.trainable import Trainable
from indistill.models.views import without_weights
from indistill.targets.cost import SEEN, Choice, Work, decide, measure, operations, phase_steps, record_bytes
from indistill.targets.records import sized
from indistill.targets.several import SeveralTargets
from indistill.targets.source import TargetSource
from indistill.training import lessons, optim, parts

NODES = (1, 2, 8, 64)
_LONGEST = "warmup.curriculum: auto: the durations of the warm-up are the longest it can take"
_SHORT_EPOCHS = 24  # of the longest runs in which a sequential warm-up was seen to lose (docs/measured.md)
_SHORT = (
    f"warmup.curriculum: sequential: on CIFAR-10, runs of up to {_SHORT_EPOCHS} epochs were better without "
    "this warm-up, and better still with all_at_once (docs/measured.md)"
)


def of_chain(
    stages: Sequence[tuple[str, Config]], world: int | None = None, samples: int | None = None
) -> dict[str, Estimate]:
    """Estimate every stage that `runs.load` returned, by name.

    `world` is the number of processes, by default `machine.devices_per_node`; `samples` replaces the size of
    the training set where its shards are not available.
    """
    estimates: dict[str, Estimate] = {}
    earlier: dict[str, Config] = {}
    for name, settings in stages:
        node = settings.machine.devices_per_node
        estimates[name] = of_run(settings, world or node, samples, earlier)
        if world is None and node > 1:
            note = f"estimated for machine.devices_per_node ({node}) processes; --world N sets another number"
            estimates[name].notes.insert(0, note)
        earlier[weights_file(settings)] = settings
    return estimates


def of_run(
    settings: Config, world: int, samples: int | None = None, earlier: Mapping[str, Config] | None = None
) -> Estimate:
    """Estimate a run on `world` processes.

    `earlier` maps files that earlier stages of a chain write to the configs of these stages. Raises UserError
    for everything in the config that training would refuse.
    """
    steps_per_epoch = _steps_per_epoch(settings, world, samples)
    built = _build(settings, earlier or {})
    timetable = Timetable.of(settings, steps_per_epoch, pairs=len(built.plan.pairs))
    costs = _Costs.measured(settings, built, timetable, world)
    last = [*costs.works][-1]
    optimizer = optim.create(built.student, settings.optimizer)
    optim.PhaseOptim(optimizer, settings, timetable)  # raises UserError as in training
    state = state_bytes(optimizer)

    built.notes.extend([*_of_curriculum(timetable), *timetable.notes])
    return Estimate(
        machine=settings.machine.model_dump(),
        world=world,
        samples=steps_per_epoch * settings.data.global_batch,
        steps_per_epoch=steps_per_epoch,
        global_batch=settings.data.global_batch,
        micro_batch=costs.micro_batch,
        precision=settings.mixed_precision,
        image_size=settings.data.full_size,
        teacher_parameters=sum(_parameters(teacher) for teacher in built.teachers.values()),
        teacher_image_size=_own_size(settings, built.teachers.get("")),
        teachers=_teachers(settings, built) if settings.teachers else [],
        student_parameters=sum(p.numel() for p in built.student.parameters()),
        targets=settings.targets.model_dump(),
        views=settings.data.augment.views,
        notes=built.notes,
        pairs=_pairs(settings, built),
        phases=[costs.of_phase(phase) for phase in costs.works],
        memory={engine: costs.memory(engine, state) for engine in ENGINES},
        network_bytes={engine: sum(costs.sent(last, engine, world).values()) for engine in ENGINES},
        scaling=[costs.on_nodes(nodes) for nodes in NODES],
    )


def _of_curriculum(timetable: Timetable) -> list[str]:
    order, epochs = timetable.curriculum.order, timetable.total_steps / timetable.steps_per_epoch
    if order == "auto":
        return [_LONGEST]
    short = order == "sequential" and any(timetable.curriculum.pair_durations) and epochs <= _SHORT_EPOCHS
    return [_SHORT] if short else []


def _parameters(network: Trainable) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _own_size(settings: Config, teacher: Network | None) -> int | None:
    size = teacher.image_size if teacher else None
    return None if size == settings.data.image_size else size


def _teachers(settings: Config, built: _Built) -> list[TeacherCost]:
    """Describe each of several teachers."""
    costs = []
    for name, teacher in built.teachers.items():
        with FakeTensorMode(allow_non_fake_inputs=True), operations() as counter:
            teacher(torch.zeros(1, *config.input_size(settings), dtype=torch.uint8))
        flops = counter.get_total_flops()
        costs.append(TeacherCost(name, _parameters(teacher), _own_size(settings, teacher), flops))
    return costs


# --- costs --------------------------------------------------------------------------------------------------
class _Built(NamedTuple):
    """What training would build of a run, with random weights where the real ones are not available."""

    student: Trainable
    teachers: dict[str, Network]  # by what each of several is called; the only one is called ""
    targets_of: TargetSource
    plan: prune.Plan
    places: Sequence[Place]  # of the losses
    knows_kept: bool  # whether the plan keeps the channels that training will keep
    notes: list[str]


@dataclass(frozen=True)
class _Costs:
    """The work of a run's phases, and what it costs on any number of devices."""

    settings: Config
    built: _Built
    timetable: Timetable
    world: int
    works: dict[Phase, Work]  # in order
    full_size: dict[Phase, Work]  # what they would be with images of full size
    choices: dict[str, Choice]

    @classmethod
    def measured(cls, settings: Config, built: _Built, timetable: Timetable, world: int) -> _Costs:
        """Measure the work of all phases that have steps."""
        scope = settings.kd.relational_scope
        objective = Objective(settings.losses, timetable.steps_per_epoch, scope, places=built.places)
        sizes = ImageSizes.of(settings, timetable.steps_per_epoch)

        def measured_at(phase: Phase, size: int) -> Work:
            data = settings.data.model_copy(update={"image_size": size})
            work = measure(
                settings.model_copy(update={"data": data}),
                built.student,
                targets_of=built.targets_of,
                objective=objective,
                phase=phase,
            )
            targets = {sized(name, size, sizes): shape for name, shape in work.targets.items()}
            return replace(work, targets=targets)

        works: dict[Phase, Work] = {}
        full_size: dict[Phase, Work] = {}
        for phase in timetable.curriculum.phases():
            steps = timetable.steps_of(phase)
            parts = sizes.parts(phase, steps) if steps else []
            works |= {part: measured_at(part, size) for part, size in parts}
            if parts:
                last, size = parts[-1]
                full = works[last] if size == sizes.full else measured_at(last, sizes.full)
                full_size |= {part: full for part, _ in parts}
        return cls(settings, built, timetable, world, works, full_size, decide(settings, works, timetable))

    @property
    def batch(self) -> int:
        """Images per rank and step."""
        return self.settings.data.global_batch // self.world

    @property
    def micro_batch(self) -> int:
        return self.batch // self.settings.grad_accumulation

    def memory(self, engine: str, state: int) -> dict[str, int]:
        """Bytes per rank, by purpose, with an optimizer state of `state` bytes."""
        return memory(
            self.settings,
            self.built.student,
            teachers=self.built.teachers,
            state=state,
            works=list(self.works.values()),
            engine=engine,
            world=self.world,
            micro_batch=self.micro_batch,
        )

    def sent(self, phase: Phase, engine: str, devices: int) -> dict[str, float]:
        """Bytes that a rank sends per step, by purpose."""
        return traffic(
            self.settings,
            self.built.student,
            teachers=self.built.teachers,
            phase=phase,
            work=self.works[phase],
            engine=engine,
            world=devices,
            micro_batch=self.micro_batch,
        )

    def communication(self, phase: Phase, devices: int) -> float:
        """Seconds of communication per step under DDP."""
        trained = FLOAT * self.works[phase].trained_parameters
        buckets = 1 + math.ceil(trained / BUCKET)  # DDP's first bucket is small
        sent = sum(self.sent(phase, "ddp", devices).values())
        return communication_seconds(self.settings.machine, sent, buckets, devices)

    def step(
        self, phase: Phase, batch: int, communication: float, work: Work | None = None
    ) -> tuple[float, str]:
        """Seconds of a step with `batch` images per rank, and what bounds it.

        work: in place of the phase's own.
        """
        source = self.settings.targets.source
        if source == "auto":
            source = "cached" if self.choices[phase.name].source == "cached" else "live"
        return step_seconds(
            self.settings,
            work or self.works[phase],
            source=source,
            batch=batch,
            communication=communication,
        )

    def of_phase(self, phase: Phase) -> PhaseCost:
        work = self.works[phase]
        targets = self.settings.targets
        steps = phase_steps(phase, self.timetable)
        communication = self.communication(phase, self.world)
        seconds, bound = self.step(phase, self.batch, communication)
        full_size_seconds, _ = self.step(phase, self.batch, communication, self.full_size[phase])
        return PhaseCost(
            name=phase.name,
            start=int(phase.start),
            steps=steps,
            epochs=steps / self.timetable.steps_per_epoch,
            work=work,
            record_bytes={name: record_bytes(name, shape, targets) for name, shape in work.targets.items()},
            choice=self.choices[phase.name],
            network_bytes=self.sent(phase, "ddp", self.world),
            step_seconds=seconds,
            bound=bound,
            hours=steps * seconds / 3600,
            full_size_hours=steps * full_size_seconds / 3600,
        )

    def on_nodes(self, nodes: int) -> Scale:
        devices = nodes * self.settings.machine.devices_per_node
        batch, rest = divmod(self.settings.data.global_batch, devices)
        divides = batch > 0 and not rest
        communication = {phase: self.communication(phase, devices) for phase in self.works}
        seconds = {phase: self.step(phase, self.batch, communication[phase])[0] for phase in self.works}
        return Scale(
            nodes=nodes,
            devices=devices,
            communication_seconds={phase.name: communication[phase] for phase in self.works},
            images_per_second={phase.name: devices * self.batch / seconds[phase] for phase in self.works},
            efficiency=self._efficiency(self.batch, communication),
            batch=batch if divides else None,
            batch_efficiency=self._efficiency(batch, communication) if divides else {},
        )

    def _efficiency(self, batch: int, communication: dict[Phase, float]) -> dict[str, float]:
        """Seconds of a step without communication relative to those with it, by phase."""
        return {
            phase.name: self.step(phase, batch, 0.0)[0] / self.step(phase, batch, seconds)[0]
            for phase, seconds in communication.items()
        }


def _steps_per_epoch(settings: Config, world: int, samples: int | None) -> int:
    """Read the indices of the shards, unless `samples` is given; no image is decoded."""
    section = settings.data
    accumulation, mix = settings.grad_accumulation, settings.kd.mixing
    if section.access == "stream" and samples is None:
        return StreamedTraining(
            section, settings.seed, rank=0, world=world, accumulation=accumulation, mix=mix
        ).steps_per_epoch
    if section.access == "stream":
        check_accumulation(section, world, accumulation, mix)
        assert section.epoch_samples is not None  # access: stream requires it
        return section.epoch_samples // section.global_batch
    sizes = open_shards(section, section.train).sizes if samples is None else [samples]
    order = sample_order(section, settings.seed, sizes, mix)
    order.check(section.global_batch, world)
    check_accumulation(section, world, accumulation, mix)
    return order.steps_per_epoch(section.global_batch)


# --- networks -----------------------------------------------------------------------------------------------
def _build(settings: Config, earlier: Mapping[str, Config]) -> _Built:
    """Build the networks of a run.

    Weights that are not available are random: of an estimate only the kept channels depend on them.
    """
    environment.check(settings)
    AcceleratorState._reset_state(reset_partial_state=True)  # left by an earlier run of this process
    with environment.without_accumulation():
        accelerator = Accelerator(cpu=True)
    live = settings.targets.model_copy(update={"source": "live"})  # stored targets need not exist yet
    settings = settings.model_copy(update={"targets": live})
    knows_kept = True
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, one in settings.by_teacher.items():
            if one.teacher and _writer(one.teacher.checkpoint, earlier):
                settings = _with_teacher(settings, name, checkpoint=None)
                knows_kept = False
            if one.teacher and (stage := _writer(one.teacher.heads, earlier)):
                heads = Path(folder) / f"heads{name}.safetensors"
                parts.heads(accelerator, _with_teacher(stage, checkpoint=None, pretrained=False)).save(heads)
                settings = _with_teacher(settings, name, heads=str(heads))
        if settings.warmup and settings.warmup.prune.criterion in prune.NEEDS_DATA:
            settings = _with_random_criterion(settings, settings.warmup)
            knows_kept = False
        while True:
            try:
                student, targets_of, plan, places = lessons.networks(
                    accelerator, settings, files=RunDir(Path(folder))
                )
                break
            except NoWeights as error:
                settings = _with_random_weights(settings, error)
                notes.append(f"without pretrained weights, by architecture alone: {error}")
                if error.role == "teacher" and settings.warmup:
                    knows_kept = knows_kept and settings.warmup.prune.criterion == "random"
    return _Built(student, _teachers_of(student, targets_of), targets_of, plan, places, knows_kept, notes)


def _teachers_of(student: Trainable, targets_of: TargetSource) -> dict[str, Network]:
    teachers = {"": student._frozen[0] if isinstance(student, Heads) else targets_of.teacher}
    if isinstance(targets_of, SeveralTargets):
        teachers = {member.name: member.source.teacher for member in targets_of.members}
    return {name: teacher for name, teacher in teachers.items() if teacher is not None}


def _writer(file: str | None, earlier: Mapping[str, Config]) -> Config | None:
    """Return the config of the earlier stage that is still to write a file; None if none is."""
    return earlier.get(file) if file is not None and not Path(file).exists() else None


def _with_teacher(settings: Config, name: str = "", **changes: Any) -> Config:
    """Change the section of a teacher, by what it is called; the only one is called ""."""
    if name:
        teachers = [
            one.model_copy(update=changes) if one.called == name else one for one in settings.teachers
        ]
        return settings.model_copy(update={"teachers": teachers})
    assert settings.teacher is not None  # the callers have checked it, and `stage: heads` requires one
    return settings.model_copy(update={"teacher": settings.teacher.model_copy(update=changes)})


def _with_random_weights(settings: Config, error: NoWeights) -> Config:
    """Change the network whose weights could not be loaded."""
    if error.role == "student":
        assert settings.student is not None  # or it would have had no weights to load
        section = settings.student.model_copy(update=without_weights(settings.student, "student"))
        return settings.model_copy(update={"student": section})
    teacher = settings.by_teacher[error.teacher].teacher
    assert teacher is not None  # or it would have had no weights to load
    return _with_teacher(settings, error.teacher, **without_weights(teacher, "teacher"))


def _with_random_criterion(settings: Config, warmup: config.Warmup) -> Config:
    section = warmup.prune.model_copy(update={"criterion": "random"})
    return settings.model_copy(update={"warmup": warmup.model_copy(update={"prune": section})})


def _pairs(settings: Config, built: _Built) -> list[Pair]:
    """Describe the stage pairs of the warm-up."""
    plan = built.plan.pairs
    if not plan:
        return []
    teacher = built.teachers[settings.warmup_teacher or ""]
    student = built.student
    assert isinstance(student, Network)  # which a warm-up trains
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images = torch.zeros(SEEN[0], *config.input_size(settings), dtype=torch.uint8)
        teacher_maps = teacher.maps(images, [pair.teacher_stage for pair in plan])
        student_maps = student.maps(images, [pair.student_stage for pair in plan])
    pairs = []
    for pair, teacher_map, student_map in zip(plan, teacher_maps, student_maps):
        kept = list(range(pair.teacher_width)) if pair.kept is None else pair.kept
        described = Pair(
            teacher_stage=find_stages(teacher.net)[pair.teacher_stage].name,
            student_stage=find_stages(student.net)[pair.student_stage].name,
            teacher_map=tuple(teacher_map.shape[1:]),
            student_map=tuple(student_map.shape[1:]),
            channels=len(kept),
            kept=kept if pair.kept is None or built.knows_kept else None,
        )
        pairs.append(described)
    return pairs
