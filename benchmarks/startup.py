"""Measure what it costs a process to open a large set: seconds, and memory of its own.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--repeats 5]

See benchmarks/README.md for the method. Prints its table and writes it to benchmarks/results/startup.md.
Runs on Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle  # nosec B403  # for its size
import statistics
import subprocess  # nosec B404  # of this file
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader import IMAGENET_SAMPLES, IMAGENET_SHARDS, simulated_imagenet
from PIL import Image
from report import RESULTS, heading, table

from indistill import config
from indistill.data import mapped, shards
from indistill.data.loader import IndexedTraining

LIBRARIES = ("torch", "numpy")
WORKERS, BATCHES = 2, 20
PARSED, FIRST, LATER = "JSON, parsed by each process", "mapped file, first start", "mapped file, later starts"


class Simulated(shards.ShardSet):
    """Shards whose samples are all the same image: the files hold none."""

    image = b""

    def read(self, sample_id: int) -> shards.Sample:
        return shards.Sample("", self.image, sample_id % 1000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs=3, metavar=("TRAIN", "HOW", "START"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    begin = heading("Start-up", f"python benchmarks/startup.py --repeats {arguments.repeats}", LIBRARIES)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "simulated"
        simulated_imagenet(folder)
        bare = in_processes(f"{folder}/0000.tar", PARSED, arguments.repeats)
        rows = [
            row(how, in_processes(f"{folder}/*.tar", how, arguments.repeats), bare)
            for how in (PARSED, FIRST, LATER)
        ]
    columns = [
        "indices",
        "seconds to open",
        "CPU seconds",
        "of its own, MB: the rank",
        "a forked worker",
        "a spawned worker",
        "sent to it, MB",
    ]
    about = (
        f"{IMAGENET_SAMPLES:,} samples in {IMAGENET_SHARDS:,} shards, rank 0 of 8, {WORKERS} loader workers, "
        f"after {BATCHES} batches; medians of {arguments.repeats} fresh processes. Memory is what is a "
        "process's own (`Private_Dirty` in `/proc/PID/smaps_rollup`). For a rank and for a spawned worker "
        f"the table has the difference from a set of one shard, where they have {bare['rank']:.0f} and "
        f"{bare['spawn']:.0f} MB, nearly all of it torch's. For a forked worker it has all of it. The "
        f"resident set of a forked worker, {bare['resident']:.0f} MB with one shard, is mostly its rank's."
    )
    text = f"{begin}\n{about}\n\n{table(columns, rows)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.md").write_text(text)
    print(text)


def row(how: str, found: dict[str, float], bare: dict[str, float]) -> list[str]:
    beyond = [found[name] - bare[name] for name in ("rank", "spawn")]
    memory = [beyond[0], found["fork"], beyond[1]]
    seconds = [f"{found['seconds']:.2f}", f"{found['cpu']:.2f}"]
    return [how, *seconds, *(f"{size:.0f}" for size in memory), f"{found['sent']:.1f}"]


def in_processes(train: str, how: str, repeats: int) -> dict[str, float]:
    """Measure in fresh processes, some with forked and some with spawned workers; return the medians."""
    found: dict[str, list[float]] = {}
    for _ in range(repeats):
        for start in ("fork", "spawn"):
            command = [sys.executable, __file__, "--measure", train, how, start]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # nosec B603
            for name, value in json.loads(output.splitlines()[-1]).items():
                found.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def measure(train: str, how: str, start: str) -> dict[str, Any]:
    """Open the set in this process and load some batches; return seconds and MB."""
    if how == PARSED:
        mapped.MIN_JSON_BYTES = 2**62  # no set is as large
    elif how == FIRST:
        for file in Path(train).parent.glob(f"*{mapped.SUFFIX}*"):
            file.unlink()
    section = config.Data(train=train, num_classes=1000, image_size=32, global_batch=1024, workers=WORKERS)
    begin, cpu = time.perf_counter(), time.process_time()
    training = IndexedTraining(section, 0, rank=0, world=8, accumulation=1)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    rank = own("self")["Private_Dirty"]
    training.dataset.shards.__class__ = Simulated
    training.dataset.shards.image = noise()
    sent = len(pickle.dumps(training.dataset)) / 1e6
    loader = training.loader(0, BATCHES + WORKERS, torch.device("cpu"))
    loader.multiprocessing_context = start
    batches = iter(loader)
    for _ in range(BATCHES):
        next(batches)
    workers = [own(worker.pid) for worker in batches._workers]
    of_workers = statistics.mean(worker["Private_Dirty"] for worker in workers)
    resident = {"resident": workers[0]["Rss"]} if start == "fork" else {}
    return {"seconds": seconds, "cpu": cpu, "rank": rank, "sent": sent, start: of_workers, **resident}


def own(pid: int | str) -> dict[str, float]:
    """The MB of a process, by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name.rstrip(":"): int(size) / 1024 for name, size, _ in map(str.split, lines)}


def noise() -> bytes:
    content = io.BytesIO()
    pixels = np.random.RandomState(0).randint(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


if __name__ == "__main__":
    main()
