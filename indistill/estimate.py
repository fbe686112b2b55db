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
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from indistill import config, prune
from indistill.config import Config
from indistill.curriculum import Phase, Timetable
from indistill.data.loader import IndexedTraining, check_accumulation
from indistill.data.stream import StreamedTraining
from indistill.distributed import environment
from indistill.losses.gather import gathers
from indistill.losses.objective import Objective, reads
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.models.stages import find_stages
from indistill.models.timm_model import NoWeights
from indistill.order import SampleOrder
from indistill.targets.cost import SEEN, Choice, Work, decide, decode_seconds, measure, phase_steps, record_bytes
from indistill.targets.live import LiveTargets
from indistill.training import optim, parts

ENGINES = ("ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3")
NODES = (1, 2, 8, 64)
_FLOAT = 4  # bytes: parameters, gradients and the optimizer's state are float32 in any precision
_BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once
_BACKWARD = 2 / 3  # of the student's operations


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
    batch: int | None  # images a device with the config's global batch instead (strong scaling); None: does not divide
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


# --- what is counted -------------------------------------------------------------------------------------------------
def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps once every parameter has been stepped, found by such a step: weights may change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in values if value.dim())


# --- the network -----------------------------------------------------------------------------------------------------
def all_reduce_bytes(size: float, world: int) -> float:
    """That each rank of a ring sends to have `size` bytes summed everywhere: a scatter of sums, then a gather."""
    return 2 * (world - 1) / world * size


def all_gather_bytes(size: float, world: int) -> float:
    """That each rank of a ring sends until all have the `size` bytes that they hold parts of; or scatter sums of."""
    return (world - 1) / world * size


def traffic(
    settings: Config,
    student: Network | Heads,
    teacher: Network | None,
    phase: Phase,
    work: Work,
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by purpose; a broadcast counts as each rank passing it on to the next."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    weights = _FLOAT * sum(parameter.numel() for parameter in parameters)
    micro_batches, sent = settings.grad_accumulation, {}
    if engine == "ddp":
        # All of them in every phase: those that have none count as zero.
        sent["gradients"] = all_reduce_bytes(weights, world)
        sent["batch norm statistics"] = all_gather_bytes(sum(buffer.nbytes for buffer in student.buffers()), world)
        if settings.warmup or not reads(settings.kd.losses, "logits"):
            sent["which parameters are used"] = all_reduce_bytes(4 * len(parameters), world)
    elif engine == "ZeRO 3":  # gathered for forward and backward, gradients scattered
        sent["weights and gradients"] = 3 * micro_batches * all_gather_bytes(weights, world)
    else:  # DeepSpeed sums whole buckets and keeps its part; stage 2 after every micro-batch
        sums = micro_batches if engine == "ZeRO 2" else 1
        sent["gradients"] = sums * all_reduce_bytes(weights, world)
        sent["weights"] = all_gather_bytes(weights, world)
    if not phase.pairs:
        sent["samples of all ranks"] = micro_batches * _gathered(
            settings, student, teacher, work, world, world * micro_batch
        )
    if settings.sync_batchnorm:
        channels = sum(m.num_features for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        each = all_gather_bytes(world * (2 * channels + 1) * _FLOAT, world) + all_reduce_bytes(2 * channels * 4, world)
        sent["batch norm over all ranks"] = micro_batches * each
    if teacher is not None and settings.teacher.shard:
        sent["teacher"] = micro_batches * all_gather_bytes(sum(p.nbytes for p in teacher.parameters()), world)
    return {purpose: size for purpose, size in sent.items() if size}


def _gathered(
    settings: Config, student: Network | Heads, teacher: Network | None, work: Work, world: int, batch: int
) -> float:
    """Bytes that losses which compare samples have a rank send (gather.py), for a micro-batch of all ranks.

    The rows of student and teacher are gathered, and the gradients of the student's summed.
    """
    sent = 0.0
    maps = [math.prod(shape) for shape in work.student_maps]
    targets = [math.prod(shape) for shape in work.targets.values() if len(shape) == 3]
    for loss in settings.kd.losses:
        match loss.name:
            case "pkt" | "rkd" | "information_flow":
                rows = [(student.net.head_hidden_size, teacher.net.head_hidden_size)]
                rows += zip(maps, targets) if loss.name == "information_flow" else ()
            case "sp":
                rows = [*zip(maps, targets)]
            case "dist":
                rows = [(settings.data.num_classes, settings.data.num_classes)]
            case "crd":
                rows = [(loss.dim, loss.dim + 2)]  # and the labels, of 8 bytes
            case _:
                continue
        related = 3 if loss.name == "rkd" and loss.angle_weight else 2
        for of_student, of_teacher in rows:
            if gathers(settings.kd.relational_scope, batch, max(of_student, of_teacher), related):
                gathered = all_gather_bytes(_FLOAT * batch * (of_student + of_teacher), world)
                sent += gathered + all_reduce_bytes(_FLOAT * batch * of_student, world)
    return sent


def communication_seconds(machine: config.Machine, sent: float, buckets: int, devices: int) -> float:
    """A ring over all devices: its slowest link, and the latency of every hop of each bucket's all-reduce."""
    if devices == 1:
        return 0.0
    within = machine.intra_node_bytes_per_second
    across = min(within, machine.inter_node_bytes_per_second)
    hops = 2 * (devices - 1) * buckets
    return sent / (within if devices <= machine.devices_per_node else across) + hops * machine.latency_seconds


def step_seconds(settings: Config, work: Work, source: str, batch: float, communication: float) -> tuple[float, str]:
    """Of a rank's step on `batch` images, and what sets its pace."""
    machine, of_image = settings.machine, work.student_flops
    student = of_image / machine.flops_per_second
    teacher = 0.0 if source == "cached" else work.teacher_flops / machine.flops_per_second
    backward = _BACKWARD * student * batch / settings.grad_accumulation  # of the last micro-batch, where sums begin
    exposed = communication - min(machine.overlap * communication, backward)
    size = sum(record_bytes(*target, settings.targets) for target in work.targets.items())
    reading = size * machine.devices_per_node / machine.read_bytes_per_second if source == "cached" else 0.0
    paces = {
        "device": batch * (student + teacher) + exposed,
        "decoding": batch * decode_seconds(settings),
        "reading targets": batch * reading,
    }
    bound = max(paces, key=paces.get)
    return paces[bound], bound


# --- memory ----------------------------------------------------------------------------------------------------------
def memory(
    settings: Config,
    student: nn.Module,
    teacher: nn.Module | None,
    state: int,
    works: Sequence[Work],
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, int]:
    """Bytes on a rank's device at the end of a forward pass, by purpose, in the phase that keeps most."""
    stage = ENGINES.index(engine)
    parameters = _FLOAT * sum(parameter.numel() for parameter in student.parameters())
    trained = _FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)

    def share(size: int, from_stage: int) -> int:
        return math.ceil(size / world) if stage >= from_stage else size

    held = {
        "weights": share(parameters, 3),
        "gradients": share(trained, 2),
        "optimizer state": share(state, 1),
        "activations": max(micro_batch * work.activation_bytes + work.batch_bytes for work in works),
        # uint8, and normalised for each network
        "images": micro_batch * math.prod(config.input_size(settings)) * (1 + _FLOAT * (1 + (teacher is not None))),
    }
    if teacher is not None:
        whole = sum(value.nbytes for value in [*teacher.parameters(), *teacher.buffers()])
        held["teacher"] = math.ceil(whole / world) if settings.teacher and settings.teacher.shard else whole
    if settings.ema:
        held["moving average"] = parameters
    if stage:
        section = (
            settings.engine if isinstance(settings.engine, config.DeepSpeed) else config.DeepSpeed(name="deepspeed")
        )
        fetched = section.prefetch_bucket_size if stage == 3 else section.allgather_bucket_size
        buckets = [min(_FLOAT * (size or 50_000_000), trained) for size in (section.reduce_bucket_size, fetched)]
        held["ZeRO's own part of the weights"] = share(trained, 1)
        held["ZeRO's buckets"] = sum(buckets)
        held["whole copy for checkpoints"] = parameters
    return held


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
        file = "heads.safetensors" if settings.stage == "heads" else "student.safetensors"
        earlier[f"{settings.run_dir}/{file}"] = settings
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
    works = {phase: measure(settings, student, targets_of, objective, phase) for phase in phases}
    choices = decide(settings, works, timetable)
    pairs = _pairs(settings, student, teacher, plan, kept_unknown)
    optimizer = optim.create(student, settings.optimizer)
    optim.PhaseOptim(optimizer, settings, timetable)  # refuses what it would in training
    state = state_bytes(optimizer)

    machine, chosen = settings.machine, settings.targets.source
    sources = {phase: choices[phase.name].source if chosen == "auto" else chosen for phase in phases}
    batch = settings.data.global_batch // world
    micro_batch = batch // settings.grad_accumulation
    trained = _FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    buckets = 1 + math.ceil(trained / _BUCKET)  # the first is small

    def sent(phase: Phase, engine: str, devices: int) -> dict[str, float]:
        return traffic(settings, student, teacher, phase, works[phase], engine, devices, micro_batch)

    def communication(phase: Phase, devices: int) -> float:
        return communication_seconds(machine, sum(sent(phase, "ddp", devices).values()), buckets, devices)

    def pace(phase: Phase, batch: int, seconds: float) -> tuple[float, str]:
        return step_seconds(settings, works[phase], sources[phase], batch, seconds)

    def cost(phase: Phase) -> PhaseCost:
        steps, (seconds, bound) = phase_steps(phase, timetable), pace(phase, batch, communication(phase, world))
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
    """What build.networks returns, why it is not known which channels are kept, if so, and what else to tell.

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
        if settings.teacher and settings.teacher.heads in earlier and not Path(settings.teacher.heads).exists():
            of_heads = _with_teacher(earlier[settings.teacher.heads], checkpoint=None, pretrained=False)
            heads = f"{folder}/heads.safetensors"
            parts.heads(accelerator, of_heads).save(Path(heads))
            settings = _with_teacher(settings, heads=heads)
        if settings.warmup and settings.warmup.prune.criterion in prune.NEEDS_DATA:
            section = settings.warmup.prune.model_copy(update={"criterion": "random"})
            settings = settings.model_copy(update={"warmup": settings.warmup.model_copy(update={"prune": section})})
            unknown = "decided on calibration batches"
        while True:
            try:
                return *parts.networks(accelerator, settings, Path(folder), None), unknown, notes
            except NoWeights as error:
                section = getattr(settings, error.role).model_copy(update={"pretrained": False})
                settings = settings.model_copy(update={error.role: section})
                notes.append(f"architecture alone: {error}")
                if error.role == "teacher" and unknown is None and settings.warmup.prune.criterion != "random":
                    unknown = "need the weights"


def _with_teacher(settings: Config, **changes: Any) -> Config:
    return settings.model_copy(update={"teacher": settings.teacher.model_copy(update=changes)})


def _pairs(
    settings: Config, student: Network | Heads, teacher: Network | None, plan: prune.Plan, kept_unknown: str | None
) -> list[Pair]:
    if not plan.pairs:
        return []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        images = torch.zeros(SEEN[0], *config.input_size(settings), dtype=torch.uint8)
        sides = (teacher, [p.teacher_stage for p in plan.pairs]), (student, [p.student_stage for p in plan.pairs])
        maps = [[tuple(m.shape[1:]) for m in network.maps(images, stages)] for network, stages in sides]
    pairs = []
    for pair, teacher_map, student_map in zip(plan.pairs, *maps):
        names = find_stages(teacher.net)[pair.teacher_stage].name, find_stages(student.net)[pair.student_stage].name
        channels = pair.teacher_width if pair.kept is None else len(pair.kept)
        kept = [*range(channels)] if pair.kept is None else None if kept_unknown else pair.kept
        pairs.append(Pair(*names, teacher_map, student_map, channels, kept))
    return pairs


# --- as text ---------------------------------------------------------------------------------------------------------
def text(estimate: Estimate) -> str:
    """The page that `indistill plan` prints; what rests on an assumption names the key that states it."""
    return "\n\n".join(part for part in _parts(estimate) if part)


def _parts(e: Estimate) -> list[str]:
    machine, last = config.Machine(**e.machine), e.phases[-1]
    sections = [
        f"{e.world} process{'es' * (e.world > 1)}, {e.steps_per_epoch:,} steps an epoch of {e.samples:,} images, "
        f"{e.global_batch:,} images a step, {e.micro_batch} in a micro-batch of a process\n"
        f"{f'teacher {e.teacher_parameters / 1e6:.2f} M' if e.teacher_parameters else 'no teacher'}, "
        f"student {e.student_parameters / 1e6:.2f} M parameters, precision {e.precision}",
        "\n".join(f"note: {note}" for note in e.notes),
    ]
    if e.pairs:
        rows = []
        for i, pair in enumerate(e.pairs):
            sides = (f"{pair.teacher_stage} {_map(pair.teacher_map)}", f"{pair.student_stage} {_map(pair.student_map)}")
            rows.append([str(i + 1), *sides, f"{pair.channels} of {pair.teacher_map[0]}", _listed(pair)])
        sections.append(_table("Pairs", ["", "teacher map", "student map", "kept", "which"], rows))

    rows = [
        [
            p.name, f"{p.epochs:.4g}", f"{p.steps:,}", _giga(p.work.teacher_flops), _giga(p.work.student_flops),
            f"{e.global_batch / p.step_seconds:,.0f}", p.bound, f"{p.hours:.2f}",
        ]
        for p in e.phases
    ]  # fmt: skip
    total = sum((p.work.teacher_flops + p.work.student_flops) * p.steps * e.global_batch for p in e.phases)
    rows.append(
        ["run", "", f"{sum(p.steps for p in e.phases):,}", "", "", "", "", f"{sum(p.hours for p in e.phases):.2f}"]
    )
    columns = ["", "epochs", "steps", "teacher GFLOP", "student GFLOP", "images/s", "bound by", "hours"]
    sections.append(
        _table("Timetable (operations of an image, the student's with backward)", columns, rows)
        + f"\n{total:.3g} FLOP in all. Time: machine.flops_per_second {machine.flops_per_second:.3g} a device, "
        f"decoding {machine.decode_images_per_second:g} images/s a worker, and the network below; evaluation and "
        "checkpoints come on top."
    )

    purposes = list(dict.fromkeys(purpose for held in e.memory.values() for purpose in held))
    rows = [[p, *(_mega(held[p]) if p in held else "-" for held in e.memory.values())] for p in purposes]
    rows.append(["sum", *(_mega(sum(held.values())) for held in e.memory.values())])
    sections.append(
        _table("Memory of a process, MB", ["", *e.memory], rows)
        + f"\nOf machine.memory_bytes {_mega(machine.memory_bytes)} MB. Not in it: what single operations take while "
        "they run (the teacher's maps among it), the allocator's gaps, CUDA itself."
    )
    sections.append(_cached(e, machine))
    if e.world > 1:
        rows = [[p.name, *(_mega(p.network_bytes.get(k, 0)) for k in last.network_bytes)] for p in e.phases]
        table = _table("Network, MB that a process sends in a step under DDP", ["", *last.network_bytes], rows)
        others = ", ".join(f"{engine} {_mega(size)}" for engine, size in e.network_bytes.items())
        sections.append(f"{table}\nIn {last.name} by engine: {others}.")
    sections.append(_scaled(e, machine))
    return sections


def _cached(e: Estimate, machine: config.Machine) -> str:
    records = {name: size for p in e.phases for name, size in p.record_bytes.items()}
    if not records:
        return ""
    shapes = {name: shape for p in e.phases for name, shape in p.work.targets.items()}
    rows = [[n, _map(shapes[n]), f"{size:,}", f"{size * e.samples / 1e9:,.1f}"] for n, size in records.items()]
    options = ", ".join(f"{key} {value}" for key, value in e.targets.items() if key in ("features", "pool", "top_k"))
    first = _table("Cached targets", ["", "shape", "bytes of a view", "GB of a view of all images"], rows)
    rows = [
        [
            p.name, f"{p.choice.live_seconds / 3600:,.2f}",
            "-" if p.choice.uncached else f"{p.choice.cached_seconds / 3600:,.2f}",
            p.choice.source + (f" ({p.choice.uncached})" if p.choice.uncached else ""),
        ]
        for p in e.phases
    ]  # fmt: skip
    columns = ["", "recomputing", "making and reading", "cheaper"]
    second = _table("Live or cached, hours of one device for another", columns, rows)
    views = "a new view of each image in every epoch (data.augment.views)" if e.views is None else f"{e.views} views"
    return (
        f"{first}\ntargets: {options}; {views}.\n\n{second}\nmachine.read_bytes_per_second "
        f"{machine.read_bytes_per_second:.3g} a node, shared by machine.devices_per_node {machine.devices_per_node}; "
        f"targets.source is {e.targets['source']}."
    )


def _scaled(e: Estimate, machine: config.Machine) -> str:
    names = [phase.name for phase in e.phases]
    slowest = min(names, key=lambda name: e.scaling[-1].efficiency[name])
    shown = list(dict.fromkeys([slowest, names[-1]]))
    columns = ["nodes", "devices"]
    for name in shown:
        columns += [f"{name}: ring ms", "images/s", "efficiency", "same batch"]
    rows = []
    for s in e.scaling:
        row = [str(s.nodes), str(s.devices)]
        for name in shown:
            kept = f"{s.batch_efficiency[name]:.0%} at {s.batch}" if s.batch else "-"
            seconds, rate = s.communication_seconds[name], s.images_per_second[name]
            row += [f"{1e3 * seconds:.1f}", f"{rate:,.0f}", f"{s.efficiency[name]:.0%}", kept]
        rows.append(row)
    batch = e.global_batch // e.world
    return (
        _table(f"Scaling under DDP, {batch} images a device (same batch: {e.global_batch} on all)", columns, rows)
        + f"\nRing all-reduce: machine.intra_node_bytes_per_second {machine.intra_node_bytes_per_second:.3g}, "
        f"inter_node_bytes_per_second {machine.inter_node_bytes_per_second:.3g} a device, latency_seconds "
        f"{machine.latency_seconds:.3g} a hop, overlap {machine.overlap:g}. Of the phases "
        "the one that scales worst, and the last."
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in (columns, *rows)
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _map(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _listed(pair: Pair) -> str:
    if pair.kept is None:
        return "not known yet"
    if len(pair.kept) == pair.teacher_map[0]:
        return "all"
    return ", ".join(map(str, pair.kept[:6])) + ", ..." * (len(pair.kept) > 6)


def _giga(operations: float) -> str:
    return f"{operations / 1e9:.3g}"


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e5 else f"{size / 1e6:.2g}"
