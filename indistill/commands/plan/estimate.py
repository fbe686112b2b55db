"""What a run will take, reckoned before it starts: operations, time, memory, bytes of targets and on the network.

`of_run` builds the networks as training does, on the CPU, and puts each phase's loss and gradient through PyTorch's
fake tensors, which have shapes and no content: seconds. What follows is arithmetic on the numbers of `config.Machine`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch._subclasses import FakeTensorMode

from indistill import config, prune
from indistill.commands.plan.memory import ENGINES, FLOAT, memory, state_bytes
from indistill.commands.plan.network import BUCKET, communication_seconds, step_seconds, traffic
from indistill.config import Config
from indistill.config.run_dir import RunDir, weights_file
from indistill.curriculum import Phase, Timetable
from indistill.data.loader import IndexedTraining, check_accumulation
from indistill.data.stream import StreamedTraining
from indistill.distributed import environment
from indistill.losses.objective import Objective
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.models.stages import find_stages
from indistill.models.timm_model import NoWeights
from indistill.order import SampleOrder
from indistill.targets.cost import SEEN, Choice, Work, decide, measure, phase_steps, record_bytes
from indistill.targets.live import LiveTargets
from indistill.training import optim, parts

NODES = (1, 2, 8, 64)


@dataclass(frozen=True)
class Pair:
    """A stage pair of the warm-up: the target is `channels` of the teacher's map; `kept` says which, if it is known."""

    teacher_stage: str
    student_stage: str
    teacher_map: tuple[int, ...]  # C, H, W
    student_map: tuple[int, ...]
    channels: int
    kept: list[int] | None


@dataclass(frozen=True)
class PhaseCost:
    name: str
    start: int  # step
    steps: int
    epochs: float
    work: Work
    record_bytes: dict[str, int]  # of one view of an image, by target
    choice: Choice
    network_bytes: dict[str, float]  # that a rank sends in a step under DDP, by purpose
    step_seconds: float
    bound: str  # what sets the pace: device, decoding or reading
    hours: float


@dataclass(frozen=True)
class Scale:
    """A number of nodes, every device with as many images a step as now (weak scaling); values by phase."""

    nodes: int
    devices: int
    communication_seconds: dict[str, float]
    images_per_second: dict[str, float]
    efficiency: dict[str, float]  # of the rate of as many devices that do not communicate
    batch: (
        int | None
    )  # images a device with the config's global batch instead (strong scaling); None: does not divide
    batch_efficiency: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """All of it: the content of `indistill plan --json`."""

    machine: dict[str, float]
    world: int
    samples: int
    steps_per_epoch: int
    global_batch: int
    micro_batch: int  # per rank and accumulation step
    precision: str
    teacher_parameters: int
    student_parameters: int
    targets: dict[str, Any]  # the config's section
    views: int | None
    notes: list[str]
    pairs: list[Pair]
    phases: list[PhaseCost]
    memory: dict[str, dict[str, int]]  # bytes of a rank, by engine and purpose
    network_bytes: dict[str, float]  # that a rank sends in a step of the last phase, by engine
    scaling: list[Scale]


# --- a run -----------------------------------------------------------------------------------------------------------
def of_chain(
    stages: Sequence[tuple[str, Config]], world: int | None = None, samples: int | None = None
) -> dict[str, Estimate]:
    """Every stage of what `runs.load` returned. `samples` stands in for training shards that are not here."""
    estimates, earlier = {}, {}
    for name, settings in stages:
        node = settings.machine.devices_per_node
        estimates[name] = of_run(settings, world or node, samples, earlier)
        if world is None and node > 1:
            note = f"for a node of machine.devices_per_node ({node}): --world 1 for one process"
            estimates[name].notes.insert(0, note)
        earlier[weights_file(settings)] = settings
    return estimates


def of_run(
    settings: Config, world: int, samples: int | None = None, earlier: Mapping[str, Config] | None = None
) -> Estimate:
    """A run on `world` processes. `earlier` maps files that earlier stages of a chain leave to the stages' configs.

    Raises UserError for whatever in the config training would refuse.
    """
    steps_per_epoch = _steps_per_epoch(settings, world, samples)
    student, targets_of, plan, kept_unknown, notes = _networks(settings, earlier or {})
    teacher = student._frozen[0] if settings.stage == "heads" else targets_of.teacher
    timetable = Timetable.of(settings, steps_per_epoch, pairs=len(plan.pairs))
    if timetable.curriculum.order == "auto":
        notes.append("warmup.curriculum: auto: the durations of the warm-up are the longest it can take")
    objective = Objective(settings.kd.losses, steps_per_epoch, settings.kd.relational_scope)
    phases = [phase for phase in timetable.curriculum.phases() if phase_steps(phase, timetable)]
    works = {
        phase: measure(settings, student, targets_of=targets_of, objective=objective, phase=phase)
        for phase in phases
    }
    choices = decide(settings, works, timetable)
    pairs = _pairs(settings, student, teacher, plan, kept_unknown)
    optimizer = optim.create(student, settings.optimizer)
    optim.PhaseOptim(optimizer, settings, timetable)  # refuses what it would in training
    state = state_bytes(optimizer)

    machine, chosen = settings.machine, settings.targets.source
    sources = {phase: choices[phase.name].source if chosen == "auto" else chosen for phase in phases}
    batch = settings.data.global_batch // world
    micro_batch = batch // settings.grad_accumulation
    trained = FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    buckets = 1 + math.ceil(trained / BUCKET)  # the first is small

    def sent(phase: Phase, engine: str, devices: int) -> dict[str, float]:
        return traffic(settings, student, teacher, phase, works[phase], engine, devices, micro_batch)

    def communication(phase: Phase, devices: int) -> float:
        return communication_seconds(machine, sum(sent(phase, "ddp", devices).values()), buckets, devices)

    def pace(phase: Phase, batch: int, seconds: float) -> tuple[float, str]:
        return step_seconds(settings, works[phase], sources[phase], batch, seconds)

    def cost(phase: Phase) -> PhaseCost:
        steps, (seconds, bound) = (
            phase_steps(phase, timetable),
            pace(phase, batch, communication(phase, world)),
        )
        records = {n: record_bytes(n, shape, settings.targets) for n, shape in works[phase].targets.items()}
        length = steps, steps / steps_per_epoch
        spent = seconds, bound, steps * seconds / 3600
        choice = choices[phase.name]
        return PhaseCost(
            phase.name, phase.start, *length, works[phase], records, choice, sent(phase, "ddp", world), *spent
        )

    def scale(nodes: int) -> Scale:
        devices = nodes * machine.devices_per_node
        own, rest = divmod(settings.data.global_batch, devices)
        own = None if rest or not own else own
        slow = {phase: communication(phase, devices) for phase in phases}
        steps = {phase: pace(phase, batch, slow[phase])[0] for phase in phases}

        def efficiency(batch: int | None) -> dict[str, float]:
            return {p.name: pace(p, batch, 0.0)[0] / pace(p, batch, slow[p])[0] for p in phases if batch}

        rates = {phase.name: devices * batch / steps[phase] for phase in phases}
        seconds = {phase.name: slow[phase] for phase in phases}
        return Scale(nodes, devices, seconds, rates, efficiency(batch), own, efficiency(own))

    held = [settings, student, teacher, state, [*works.values()]]
    return Estimate(
        machine=machine.model_dump(),
        world=world,
        samples=steps_per_epoch * settings.data.global_batch,
        steps_per_epoch=steps_per_epoch,
        global_batch=settings.data.global_batch,
        micro_batch=micro_batch,
        precision=settings.mixed_precision,
        teacher_parameters=sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0,
        student_parameters=sum(p.numel() for p in student.parameters()),
        targets=settings.targets.model_dump(),
        views=settings.data.augment.views,
        notes=notes,
        pairs=pairs,
        phases=[cost(phase) for phase in phases],
        memory={engine: memory(*held, engine, world, micro_batch) for engine in ENGINES},
        network_bytes={engine: sum(sent(phases[-1], engine, world).values()) for engine in ENGINES},
        scaling=[scale(nodes) for nodes in NODES],
    )


def _steps_per_epoch(settings: Config, world: int, samples: int | None) -> int:
    section, accumulation = settings.data, settings.grad_accumulation
    if samples is None:
        kind = IndexedTraining if section.access == "index" else StreamedTraining
        section = section.model_copy(update={"in_memory": False})  # nothing is read but the indices
        return kind(section, settings.seed, 0, world, accumulation).steps_per_epoch
    check_accumulation(section, world, accumulation)
    if section.access == "stream":
        return section.epoch_samples // section.global_batch
    order = SampleOrder([samples], settings.seed, section.streams, section.window)
    order.check(section.global_batch, world)
    return order.steps_per_epoch(section.global_batch)


def _networks(
    settings: Config, earlier: Mapping[str, Config]
) -> tuple[Network | Heads, LiveTargets, prune.Plan, str | None, list[str]]:
    """Return what `parts.networks` does, why the kept channels are unknown (if they are), and further notes.

    Weights that cannot be had here are random ones: they decide on the kept channels, and on nothing else.
    """
    environment.check(settings)
    unknown, notes = None, []
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run of this process
    with environment.without_accumulation():
        accelerator = Accelerator(cpu=True)
    live = settings.targets.model_copy(update={"source": "live"})  # a store need not be there yet
    settings = settings.model_copy(update={"targets": live})
    with tempfile.TemporaryDirectory() as folder:
        if (
            settings.teacher
            and settings.teacher.checkpoint in earlier
            and not Path(settings.teacher.checkpoint).exists()
        ):
            settings = _with_teacher(settings, checkpoint=None)
            unknown = "an earlier stage trains the teacher"
        if (
            settings.teacher
            and settings.teacher.heads in earlier
            and not Path(settings.teacher.heads).exists()
        ):
            of_heads = _with_teacher(earlier[settings.teacher.heads], checkpoint=None, pretrained=False)
            heads = str(RunDir(Path(folder)).heads)
            parts.heads(accelerator, of_heads).save(Path(heads))
            settings = _with_teacher(settings, heads=heads)
        if settings.warmup and settings.warmup.prune.criterion in prune.NEEDS_DATA:
            section = settings.warmup.prune.model_copy(update={"criterion": "random"})
            settings = settings.model_copy(
                update={"warmup": settings.warmup.model_copy(update={"prune": section})}
            )
            unknown = "decided on calibration batches"
        while True:
            try:
                return *parts.networks(accelerator, settings, files=RunDir(Path(folder))), unknown, notes
            except NoWeights as error:
                section = getattr(settings, error.role).model_copy(update={"pretrained": False})
                settings = settings.model_copy(update={error.role: section})
                notes.append(f"architecture alone: {error}")
                if (
                    error.role == "teacher"
                    and unknown is None
                    and settings.warmup.prune.criterion != "random"
                ):
                    unknown = "need the weights"


def _with_teacher(settings: Config, **changes: Any) -> Config:
    return settings.model_copy(update={"teacher": settings.teacher.model_copy(update=changes)})


def _pairs(
    settings: Config,
    student: Network | Heads,
    teacher: Network | None,
    plan: prune.Plan,
    kept_unknown: str | None,
) -> list[Pair]:
    if not plan.pairs:
        return []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images = torch.zeros(SEEN[0], *config.input_size(settings), dtype=torch.uint8)
        sides = (
            (teacher, [p.teacher_stage for p in plan.pairs]),
            (student, [p.student_stage for p in plan.pairs]),
        )
        maps = [[tuple(m.shape[1:]) for m in network.maps(images, stages)] for network, stages in sides]
    pairs = []
    for pair, teacher_map, student_map in zip(plan.pairs, *maps):
        names = (
            find_stages(teacher.net)[pair.teacher_stage].name,
            find_stages(student.net)[pair.student_stage].name,
        )
        channels = pair.teacher_width if pair.kept is None else len(pair.kept)
        kept = [*range(channels)] if pair.kept is None else None if kept_unknown else pair.kept
        pairs.append(Pair(*names, teacher_map, student_map, channels, kept))
    return pairs
