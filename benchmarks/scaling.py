"""Measure the cost of a second and a fourth process, and the bytes sent between processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 2]

See benchmarks/README.md for the method. Prints its tables and writes them to benchmarks/results/scaling.md.
Runs on Linux, on CPUs, with gloo.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import recorded
import torch
from report import RESULTS, heading, table

from indistill import config
from indistill.commands.plan import estimate
from indistill.commands.plan.network import all_reduce_bytes, communication_seconds

SIZE, BATCH, STEPS, LAST = 64, 8, 5, 8
WORLDS = (1, 2, 4)
SIZES = [2**n for n in range(10, 25, 2)]  # bytes of each separate all-reduce
ENGINES = {"ZeRO 1": 1, "ZeRO 2": 2, "ZeRO 3": 3}
RESULT = RESULTS / "scaling.md"
_context = multiprocessing.get_context("forkserver")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--without-zero", action="store_true", help="where DeepSpeed is not installed")
    arguments = parser.parse_args()
    # Import torch, timm and accelerate once, for all processes.
    _context.set_forkserver_preload(["indistill.training.loop", "recorded"])
    begin = heading(
        "Scaling", f"python benchmarks/scaling.py --rounds {arguments.rounds}", recorded.LIBRARIES
    )
    with recorded.scratch(samples=64, size=SIZE) as folder:
        runs: dict[int, list[list[list[recorded.Step]]]] = {world: [] for world in WORLDS}
        for number in range(arguments.rounds):
            for world in WORLDS:
                trees = tree(folder, world, f"ddp-{world}-{number}")
                runs[world].append(on_ranks(train, world, trees))
        zero = {}
        for name, stage in {} if arguments.without_zero else ENGINES.items():
            settings = tree(folder, 2, name.replace(" ", "")) | {
                "engine": {"name": "deepspeed", "stage": stage}
            }
            zero[name] = on_ranks(train, 2, settings)
        plans = {
            world: estimate.of_run(config.parse(tree(folder, world, "plan"), "benchmark"), world)
            for world in WORLDS
        }
    sums = {world: on_ranks(all_reduces, world)[0] for world in WORLDS[1:]}
    parts = [
        begin,
        f"ResNet-34 to a ResNet-18 of half the width, {BATCH} images of {SIZE} pixels per process and step "
        f"(weak scaling), one thread per process, float32, gloo over the loopback, {arguments.rounds} runs "
        f"of each. **{os.cpu_count()} cores**: more processes than cores take turns, and their wall clock "
        "means nothing.",
        speed(runs),
        crossing(plans, runs, zero),
        fit(sums),
    ]
    RESULT.write_text("\n\n".join(parts) + "\n")
    print(RESULT.read_text())


def tree(folder: Path, world: int, name: str) -> dict[str, Any]:
    return recorded.tree(folder, folder / name, SIZE, BATCH * world, STEPS, LAST)


# --- processes ----------------------------------------------------------------------------------------------


def on_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` on `world` processes, started as a launcher would; return their results."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [_context.Pipe(duplex=False) for _ in range(world)]
    processes = [
        _context.Process(target=_on_rank, args=(pipes[rank][1], rank, world, port, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for _, write in pipes:
        write.close()  # so that `recv` raises EOFError if the process dies
    results = [read.recv() for read, _ in pipes]
    for process in processes:
        process.join()
    return results


def _on_rank(
    pipe: Any, rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    pipe.send(function(*arguments))


def train(plain: dict[str, Any]) -> list[recorded.Step]:
    return recorded.train(config.parse(plain, "benchmark"))


def all_reduces(repeats: int = 15) -> dict[int, float]:
    """Return the median seconds of an all-reduce, by its number of bytes."""
    torch.distributed.init_process_group("gloo")
    seconds = {}
    for size in SIZES:
        values = torch.zeros(size // 4)
        taken = []
        for _ in range(repeats):
            torch.distributed.barrier()
            begin = time.perf_counter()
            torch.distributed.all_reduce(values)
            taken.append(time.perf_counter() - begin)
        seconds[size] = statistics.median(taken)
    torch.distributed.destroy_process_group()
    return seconds


# --- tables -------------------------------------------------------------------------------------------------


def medians(ranks: list[list[recorded.Step]], field: str) -> dict[str, float]:
    """Return the median increase of `field` over a step, for the steps of all ranks, by phase."""
    taken: dict[str, list[float]] = {}
    for steps in ranks:
        for before, step in recorded.within_phases(steps):
            taken.setdefault(step.phase, []).append(getattr(step, field) - getattr(before, field))
    return {phase: statistics.median(values) for phase, values in taken.items()}


def speed(runs: dict[int, list[list[list[recorded.Step]]]]) -> str:
    flat = {world: [steps for ranks in of_world for steps in ranks] for world, of_world in runs.items()}
    wall, cpu = ({world: medians(steps, field) for world, steps in flat.items()} for field in ("wall", "cpu"))
    rows = []
    for phase in wall[1]:
        for world in runs:
            rate = world * BATCH / wall[world][phase]
            ratios = [f"{clock[1][phase] / clock[world][phase]:.0%}" for clock in (wall, cpu)]
            times = [f"{1e3 * clock[world][phase]:.0f}" for clock in (wall, cpu)]
            rows.append([phase, str(world), *times, f"{rate:.1f}", *ratios])
    columns = [
        "phase",
        "processes",
        "wall ms per step",
        "CPU ms per step and process",
        "images/s",
        "wall efficiency",
    ]
    return (
        f"## Speed\n\n{table([*columns, 'CPU efficiency'], rows)}\nMedians over all steps and processes. "
        "Efficiency is the time of one process, which has no DDP, divided by that of each of several "
        "processes. CPU time includes the copies and sums of DDP and gloo, but not waiting for other "
        "processes."
    )


def crossing(
    plans: dict[int, estimate.Estimate],
    runs: dict[int, list[list[list[recorded.Step]]]],
    zero: dict[str, list[list[recorded.Step]]],
) -> str:
    """Compare the bytes that a process sends in a step: the plan's, and the kernel's count."""
    rows = []
    for world, of_world in runs.items():
        if world == 1:
            continue
        for phase in plans[world].phases:
            predicted = sum(phase.network_bytes.values())
            measured = statistics.mean(sent(ranks, phase.name) for ranks in of_world)
            rows.append(["ddp", phase.name, str(world), *compared(predicted, measured)])
    for name, ranks in zero.items():
        last = plans[2].phases[-1].name
        rows.append([name, last, "2", *compared(plans[2].network_bytes[name], sent(ranks, last))])
    columns = ["engine", "phase", "processes", "predicted bytes", "measured bytes", "error"]
    return (
        f"## Bytes sent\n\n{table(columns, rows)}\nBytes that a process sends in a step: the mean over "
        "processes and the steps of a phase from the third on. Measured are the bytes that the kernel counts "
        "as acknowledged on its TCP connections (payload, without headers)."
    )


def sent(ranks: list[list[recorded.Step]], phase: str) -> float:
    """Return the bytes sent per step: the mean over the ranks and over the phase's steps from the third on.

    In the first DDP is created, and sends all weights; in the second it arranges its buckets anew.
    """
    each = []
    for steps in ranks:
        inside = [step.sent for step in steps if step.phase == phase]
        each.append((inside[-1] - inside[1]) / (len(inside) - 2))
    return statistics.mean(each)


def compared(predicted: float, measured: float) -> list[str]:
    return [f"{predicted:,.0f}", f"{measured:,.0f}", f"{predicted / measured - 1:+.1%}"]


def fit(sums: dict[int, dict[int, float]]) -> str:
    """Fit latency and bandwidth by least squares of the relative errors, over all sizes and world sizes."""
    points = [
        (world, size, seconds) for world, of_world in sums.items() for size, seconds in of_world.items()
    ]
    factors = np.array([[2 * (w - 1), all_reduce_bytes(size, w)] for w, size, _ in points])
    seconds = np.array([seconds for *_, seconds in points])
    latency, per_byte = np.linalg.lstsq(factors / seconds[:, None], np.ones(len(points)), rcond=None)[0]
    machine = config.Machine(
        latency_seconds=max(latency, 0),
        intra_node_bytes_per_second=1 / per_byte,
        devices_per_node=max(WORLDS),
    )
    rows = []
    errors = []
    for world, size, measured in points:
        predicted = communication_seconds(machine, all_reduce_bytes(size, world), 1, world)
        errors.append(abs(predicted / measured - 1))
        rows.append(
            [
                f"{size:,}",
                str(world),
                f"{1e3 * predicted:.2f}",
                f"{1e3 * measured:.2f}",
                f"{predicted / measured - 1:+.0%}",
            ]
        )
    columns = ["bytes summed", "processes", "predicted ms", "measured ms", "error"]
    return (
        f"## The ring, fitted\n\n{table(columns, rows)}\nMedians of separate all-reduces. Fitted: "
        f"latency_seconds {machine.latency_seconds:.2g} per hop, intra_node_bytes_per_second "
        f"{1 / per_byte:.3g}. Median error {statistics.median(errors):.0%}, largest {max(errors):.0%}."
    )


if __name__ == "__main__":
    main()
