"""The estimate of a run: its numbers, and the text that `indistill plan` prints of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from indistill import config
from indistill.targets.cost import Choice, Work


@dataclass(frozen=True)
class Pair:
    """A stage pair of the warm-up; the target is the `channels` channels `kept` of the teacher's map."""

    teacher_stage: str
    student_stage: str
    teacher_map: tuple[int, ...]  # C, H, W
    student_map: tuple[int, ...]
    channels: int
    kept: list[int] | None  # None: not known before training


@dataclass(frozen=True)
class TeacherCost:
    """One of several teachers; its memory and what it sends are listed with those of the run."""

    name: str
    parameters: int
    image_size: int | None  # side of its input in pixels, if that is another than the student's
    flops: int  # of a whole forward pass, per image


@dataclass(frozen=True)
class PhaseCost:
    """The cost of a phase."""

    name: str
    start: int  # first step
    steps: int
    epochs: float
    work: Work
    record_bytes: dict[str, int]  # per view of an image, by target
    choice: Choice
    network_bytes: dict[str, float]  # sent by a rank per step under DDP, by purpose
    step_seconds: float
    bound: str  # what limits the speed: device, decoding or reading targets
    hours: float
    full_size_hours: float  # with images of the run's last size, where the size grows


@dataclass(frozen=True)
class Scale:
    """The speed on a number of nodes with the same images per device (weak scaling); values by phase."""

    nodes: int
    devices: int
    communication_seconds: dict[str, float]
    images_per_second: dict[str, float]
    efficiency: dict[str, float]  # relative to as many devices that do not communicate
    # Images per device with the config's global batch (strong scaling); None: it is not divisible.
    batch: int | None
    batch_efficiency: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """All numbers of an estimate, as `indistill plan --json` prints them; `str` gives the text for people."""

    machine: dict[str, float]
    world: int
    samples: int
    steps_per_epoch: int
    global_batch: int
    micro_batch: int  # per rank and accumulation step
    precision: str
    image_size: int  # side of the student's input in pixels; the last one, where it grows
    teacher_parameters: int
    teacher_image_size: int | None  # side of its input in pixels, if that is another than the student's
    teachers: list[TeacherCost]  # if there are several
    student_parameters: int
    targets: dict[str, Any]  # the config's section
    views: int | None
    notes: list[str]
    pairs: list[Pair]
    phases: list[PhaseCost]
    memory: dict[str, dict[str, int]]  # bytes per rank, by engine and purpose
    network_bytes: dict[str, float]  # sent by a rank per step of the last phase, by engine
    scaling: list[Scale]

    def __str__(self) -> str:
        """The text that `indistill plan` prints; an assumption is shown with the key that sets it."""
        machine = config.Machine.model_validate(self.machine)
        parts = [
            _overview(self),
            "\n".join(f"note: {note}" for note in self.notes),
            _teachers(self),
            _pairs(self),
            _timetable(self, machine),
            _memory(self, machine),
            _cached(self, machine),
            _network(self),
            _scaling(self, machine),
        ]
        return "\n\n".join(part for part in parts if part)


# --- parts of the text; those that do not apply are empty ---------------------------------------------------
def _overview(estimate: Estimate) -> str:
    processes = "1 process" if estimate.world == 1 else f"{estimate.world} processes"
    teacher = "no teacher"
    if estimate.teacher_parameters:
        word = "teachers" if estimate.teachers else "teacher"
        teacher = f"{word} {estimate.teacher_parameters / 1e6:.2f} M"
        if estimate.teacher_image_size:
            teacher += f" at {estimate.teacher_image_size} px"
    return (
        f"{processes}, {estimate.steps_per_epoch:,} steps per epoch of {estimate.samples:,} images, "
        f"{estimate.global_batch:,} images per step, {estimate.micro_batch} per process and micro-batch\n"
        f"{teacher}, student {estimate.student_parameters / 1e6:.2f} M parameters, "
        f"precision {estimate.precision}"
    )


def _teachers(estimate: Estimate) -> str:
    if not estimate.teachers:
        return ""
    rows = [
        [one.name, f"{one.parameters / 1e6:.2f}", str(one.image_size or "as the student"), _giga(one.flops)]
        for one in estimate.teachers
    ]
    return _table("Teachers", ["", "M parameters", "pixels a side", "GFLOP per image"], rows)


def _pairs(estimate: Estimate) -> str:
    if not estimate.pairs:
        return ""
    rows = []
    for i, pair in enumerate(estimate.pairs, start=1):
        teacher = f"{pair.teacher_stage} {_shape(pair.teacher_map)}"
        student = f"{pair.student_stage} {_shape(pair.student_map)}"
        rows.append(
            [str(i), teacher, student, f"{pair.channels} of {pair.teacher_map[0]}", _kept_channels(pair)]
        )
    return _table("Pairs", ["", "teacher map", "student map", "kept", "channels"], rows)


def _timetable(estimate: Estimate, machine: config.Machine) -> str:
    rows = []
    flops = 0
    grows = any(phase.hours != phase.full_size_hours for phase in estimate.phases)
    for phase in estimate.phases:
        work = phase.work
        flops += (work.teacher_flops + work.student_flops) * phase.steps * estimate.global_batch
        rate = f"{estimate.global_batch / phase.step_seconds:,.0f}"
        operations = [_giga(work.teacher_flops), _giga(work.student_flops)]
        length = [f"{phase.epochs:.4g}", f"{phase.steps:,}"]
        rows.append([phase.name, *length, *operations, rate, phase.bound, *_hours([phase], grows)])
    steps = sum(phase.steps for phase in estimate.phases)
    rows.append(["run", "", f"{steps:,}", "", "", "", "", *_hours(estimate.phases, grows)])
    columns = ["", "epochs", "steps", "teacher GFLOP", "student GFLOP", "images/s", "bound by", "hours"]
    if grows:
        columns.append(f"of those at {estimate.image_size} px")
    return (
        _table("Timetable (GFLOP per image, of the student forward and backward)", columns, rows)
        + f"\n{flops:.3g} FLOP in total. Assumed: machine.flops_per_second {machine.flops_per_second:.3g} "
        f"per device, machine.decode_images_per_second {machine.decode_images_per_second:g} per loader "
        "worker, and the network below. Not included: evaluation and checkpoints."
    )


def _hours(phases: Sequence[PhaseCost], grows: bool) -> list[str]:
    """The hours of phases; if the size of the images `grows`, also relative to those at the last size."""
    hours = sum(phase.hours for phase in phases)
    shares = [f"{hours / sum(phase.full_size_hours for phase in phases):.0%}"] if grows else []
    return [f"{hours:.2f}", *shares]


def _memory(estimate: Estimate, machine: config.Machine) -> str:
    engines = estimate.memory.values()
    purposes = dict.fromkeys(purpose for by_purpose in engines for purpose in by_purpose)
    rows = [
        [purpose, *(_mega(by_purpose[purpose]) if purpose in by_purpose else "-" for by_purpose in engines)]
        for purpose in purposes
    ]
    rows.append(["sum", *(_mega(sum(by_purpose.values())) for by_purpose in engines)])
    return (
        _table("Memory per process, MB", ["", *estimate.memory], rows)
        + f"\nAvailable: machine.memory_bytes, {_mega(machine.memory_bytes)} MB. Not included: temporary "
        "memory of single operations and of the teacher's forward pass, fragmentation, and CUDA itself."
    )


def _cached(estimate: Estimate, machine: config.Machine) -> str:
    records = {name: size for phase in estimate.phases for name, size in phase.record_bytes.items()}
    if not records:
        return ""
    shapes = {name: shape for phase in estimate.phases for name, shape in phase.work.targets.items()}
    rows = [
        [name, _shape(shapes[name]), f"{size:,}", f"{size * estimate.samples / 1e9:,.1f}"]
        for name, size in records.items()
    ]
    sizes = _table("Cached targets", ["", "shape", "bytes per view", "GB per view of all images"], rows)
    options = ", ".join(f"{key} {_yaml(estimate.targets[key])}" for key in ("features", "pool", "top_k"))
    views = "a new view of each image in every epoch (data.augment.views is not set)"
    if estimate.views is not None:
        views = f"data.augment.views {estimate.views}"

    rows = []
    for phase in estimate.phases:
        choice = phase.choice
        live = f"{choice.live_seconds / 3600:,.2f}"
        if choice.uncached:
            rows.append([phase.name, live, "-", f"{choice.source} ({choice.uncached})"])
        else:
            rows.append([phase.name, live, f"{choice.cached_seconds / 3600:,.2f}", choice.source])
    hours = _table("Live or cached targets, device hours", ["", "live", "store and read", "cheaper"], rows)
    return (
        f"{sizes}\ntargets: {options}; {views}.\n\n{hours}\nAssumed: machine.read_bytes_per_second "
        f"{machine.read_bytes_per_second:.3g} per node, with machine.devices_per_node "
        f"{machine.devices_per_node}. The config has targets.source: {estimate.targets['source']}."
    )


def _network(estimate: Estimate) -> str:
    if estimate.world == 1:
        return ""
    last = estimate.phases[-1]
    rows = [
        [phase.name, *(_mega(phase.network_bytes.get(purpose, 0)) for purpose in last.network_bytes)]
        for phase in estimate.phases
    ]
    table = _table("Network under DDP, MB sent per process and step", ["", *last.network_bytes], rows)
    engines = ", ".join(f"{engine} {_mega(size)}" for engine, size in estimate.network_bytes.items())
    return f"{table}\nPhase {last.name} by engine: {engines}."


def _scaling(estimate: Estimate, machine: config.Machine) -> str:
    names = [phase.name for phase in estimate.phases]
    slowest = min(names, key=lambda name: estimate.scaling[-1].efficiency[name])
    shown = list(dict.fromkeys([slowest, names[-1]]))
    columns = ["nodes", "devices"]
    for name in shown:
        columns += [f"{name}: ring ms", "images/s", "efficiency", "same batch"]
    rows = []
    for scale in estimate.scaling:
        row = [str(scale.nodes), str(scale.devices)]
        for name in shown:
            row += [f"{1e3 * scale.communication_seconds[name]:.1f}", f"{scale.images_per_second[name]:,.0f}"]
            row += [f"{scale.efficiency[name]:.0%}"]
            row += [f"{scale.batch_efficiency[name]:.0%} at {scale.batch}" if scale.batch else "-"]
        rows.append(row)
    batch = estimate.global_batch // estimate.world
    title = (
        f"Scaling under DDP, {batch} images per device (same batch: {estimate.global_batch} on all devices)"
    )
    return (
        _table(title, columns, rows)
        + "\nShown: the phase that scales worst, and the last. Assumed for a ring all-reduce, from section "
        f"machine: intra_node_bytes_per_second {machine.intra_node_bytes_per_second:.3g} and "
        f"inter_node_bytes_per_second {machine.inter_node_bytes_per_second:.3g} per device, "
        f"latency_seconds {machine.latency_seconds:.3g} per hop, overlap {machine.overlap:g}."
    )


# --- text ---------------------------------------------------------------------------------------------------
def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = [title]
    for first, *rest in (columns, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _kept_channels(pair: Pair) -> str:
    if pair.kept is None:
        return "not known yet"
    if len(pair.kept) == pair.teacher_map[0]:
        return "all"
    listed = ", ".join(map(str, pair.kept[:6]))
    return f"{listed}, ..." if len(pair.kept) > 6 else listed


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


def _giga(operations: float) -> str:
    return f"{operations / 1e9:.3g}"


def _mega(size: float) -> str:
    return f"{size / 1e6:,.1f}" if size >= 1e5 else f"{size / 1e6:.2g}"
