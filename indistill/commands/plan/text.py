"""Print an estimate."""

from __future__ import annotations

from collections.abc import Sequence

from indistill import config
from indistill.commands.plan.estimate import Estimate, Pair


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
            sides = (
                f"{pair.teacher_stage} {_map(pair.teacher_map)}",
                f"{pair.student_stage} {_map(pair.student_map)}",
            )
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
        [
            "run",
            "",
            f"{sum(p.steps for p in e.phases):,}",
            "",
            "",
            "",
            "",
            f"{sum(p.hours for p in e.phases):.2f}",
        ]
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
        table = _table(
            "Network, MB that a process sends in a step under DDP", ["", *last.network_bytes], rows
        )
        others = ", ".join(f"{engine} {_mega(size)}" for engine, size in e.network_bytes.items())
        sections.append(f"{table}\nIn {last.name} by engine: {others}.")
    sections.append(_scaled(e, machine))
    return sections


def _cached(e: Estimate, machine: config.Machine) -> str:
    records = {name: size for p in e.phases for name, size in p.record_bytes.items()}
    if not records:
        return ""
    shapes = {name: shape for p in e.phases for name, shape in p.work.targets.items()}
    rows = [
        [n, _map(shapes[n]), f"{size:,}", f"{size * e.samples / 1e9:,.1f}"] for n, size in records.items()
    ]
    options = ", ".join(
        f"{key} {value}" for key, value in e.targets.items() if key in ("features", "pool", "top_k")
    )
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
    views = (
        "a new view of each image in every epoch (data.augment.views)"
        if e.views is None
        else f"{e.views} views"
    )
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
        _table(
            f"Scaling under DDP, {batch} images a device (same batch: {e.global_batch} on all)", columns, rows
        )
        + f"\nRing all-reduce: machine.intra_node_bytes_per_second {machine.intra_node_bytes_per_second:.3g}, "
        f"inter_node_bytes_per_second {machine.inter_node_bytes_per_second:.3g} a device, latency_seconds "
        f"{machine.latency_seconds:.3g} a hop, overlap {machine.overlap:g}. Of the phases "
        "the one that scales worst, and the last."
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
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
