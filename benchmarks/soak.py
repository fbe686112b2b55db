"""Train for an hour with kills, and measure what grows: memory, open files, threads.

    OMP_NUM_THREADS=1 python benchmarks/soak.py [--minutes 60] [--steps 200000] [--samples 1000000]

See benchmarks/README.md for the method. Prints its table and writes it to benchmarks/results/soak.md. Exits
with 1 if a step was logged twice or not at all, or if a killed run left a process behind. Runs on Linux.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import signal
import statistics
import subprocess  # nosec B404  # of indistill
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image
from report import RESULTS, heading, table

PER_SHARD, CLASSES, BATCH, SIZE = 1000, 10, 8, 32
SAMPLE_SECONDS = 5.0
SETTLED_SECONDS = 60.0  # of each start, which do not count for the slopes
LIBRARIES = ("torch", "timm", "accelerate", "webdataset")


class Reading(NamedTuple):
    """The state of a run at one time, of its main process and of the worker for which it is largest."""

    seconds: float  # since the start of the process
    step: int
    main: float  # MB of its own
    worker: float
    files: int
    threads: int


class Start(NamedTuple):
    readings: list[Reading]
    first_line: float | None  # seconds until the first step was logged
    orphans: int  # processes that outlived a kill


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="after which the run is asked to stop")
    parser.add_argument("--kill-minutes", type=float, default=5.0, help="between kills, on average")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", default="soak", help="name of the result file")
    arguments = parser.parse_args()
    text = heading("Soak", f"python benchmarks/soak.py {' '.join(sys.argv[1:])}".strip(), LIBRARIES)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), arguments.samples // PER_SHARD)
        path = Path(folder) / "soak.yaml"
        path.write_text(yaml.safe_dump(settings(Path(folder), arguments)))
        starts = soak(path, arguments)
        text += report(starts, Path(folder) / "run", arguments)
        sound = all(start.orphans == 0 for start in starts) and gaps(Path(folder) / "run") == 0
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.out}.md").write_text(text)
    print(text)
    return 0 if sound else 1


def write_shards(folder: Path, count: int) -> None:
    """Write one shard of small images, and give it `count` names: their samples have other ids."""
    generator = np.random.default_rng(0)
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for i in range(PER_SHARD):
            label = i % CLASSES
            pixels = generator.integers(64, size=(SIZE, SIZE, 3), dtype=np.uint8) + np.uint8(16 * label)
            image = io.BytesIO()
            Image.fromarray(pixels).save(image, "JPEG")
            for name, content in ((f"{i:04d}.jpg", image.getvalue()), (f"{i:04d}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    os.link(folder / "train-0000.tar", folder / "eval.tar")
    for shard in range(1, count):
        os.link(folder / "train-0000.tar", folder / f"train-{shard:04d}.tar")


def settings(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    last = arguments.samples // PER_SHARD - 1
    return {
        "run_dir": str(folder / "run"),
        "duration": f"{arguments.steps} steps",
        "data": {
            "root": str(folder),
            "train": f"train-{{0000..{last:04d}}}.tar",
            "eval": "eval.tar",
            "num_classes": CLASSES,
            "image_size": SIZE,
            "global_batch": BATCH,
            "streams": BATCH,
            "eval_crop": 1.0,
            "augment": {"recipe": "pad_crop", "padding": 4},
        },
        "student": {"name": "cnn32_student"},
        "teacher": {"name": "cnn32_auxiliary", "random": True},
        "optimizer": {"name": "adam", "lr": 1.0e-4},
        "warmup": {"curriculum": "sequential", "durations": ["1 percent"] * 3},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "evaluate": {"every": "2.5 percent"},
        "checkpoint": {"every_steps": 500},
        "log": {"every_steps": 1},
    }


# --- the run ------------------------------------------------------------------------------------------------
def soak(config: Path, arguments: argparse.Namespace) -> list[Start]:
    """Start the run again after each kill, until it is done or the time is up."""
    end = time.monotonic() + 60 * arguments.minutes
    chance = random.Random(0)  # nosec B311  # of kills
    starts: list[Start] = []
    while time.monotonic() < end:
        life = 60 * arguments.kill_minutes * chance.uniform(0.5, 1.5)
        start, done = watch(config, min(time.monotonic() + life, end), last=time.monotonic() + life >= end)
        starts.append(start)
        if done:
            break
    return starts


def watch(config: Path, until: float, *, last: bool) -> tuple[Start, bool]:
    """Read the state of one start of the run; kill it at `until`, or have it stop if it is the `last`."""
    metrics = config.parent / "run" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    begin = time.monotonic()
    readings: list[Reading] = []
    first_line = None
    command = [sys.executable, "-m", "indistill", "train", str(config)]
    with (config.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)  # nosec B603  # constant
    seen: set[int] = set()
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05 if first_line is None else SAMPLE_SECONDS)
        if first_line is None:
            if metrics.exists() and metrics.stat().st_mtime_ns != before:
                first_line = time.monotonic() - begin
            continue
        workers = children(process.pid)
        seen |= set(workers)
        reading = read(process.pid, workers, time.monotonic() - begin, last_step(metrics))
        if reading is not None:
            readings.append(reading)
    process.send_signal(signal.SIGTERM if last else signal.SIGKILL)
    code = process.wait()
    time.sleep(10)
    orphans = 0 if last else sum(Path(f"/proc/{pid}").exists() for pid in seen)
    if code not in (0, 75, -signal.SIGKILL):
        raise SystemExit(
            f"soak: the run ended with {code}:\n{(config.parent / 'log.txt').read_text()[-2000:]}"
        )
    return Start(readings, first_line, orphans), code == 0


def children(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in task.read_text().split()]
        except OSError:  # the thread has ended
            continue
        found += [*direct, *(grandchild for child in direct for grandchild in children(child))]
    return found


def read(pid: int, workers: list[int], seconds: float, step: int) -> Reading | None:
    """The state of the run's processes; None if one of them ended meanwhile."""
    try:
        return Reading(
            seconds,
            step,
            own_mb(pid),
            max(map(own_mb, workers), default=0.0),
            max(len(os.listdir(f"/proc/{one}/fd")) for one in (pid, *workers)),
            max(len(os.listdir(f"/proc/{one}/task")) for one in (pid, *workers)),
        )
    except OSError:
        return None


def own_mb(pid: int) -> float:
    """Memory that a process shares with no other, in MB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1000


def last_step(metrics: Path) -> int:
    """The last step in the log."""
    with metrics.open("rb") as stream:
        stream.seek(max(0, metrics.stat().st_size - 4000))
        lines = stream.read().decode().splitlines()[1:-1]  # the outer ones may be cut
    return max((json.loads(line).get("step", 0) for line in lines), default=0)


# --- the report ---------------------------------------------------------------------------------------------
def gaps(run_dir: Path) -> int:
    """How many steps, up to the last one, are missing from the log or in it more than once."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    steps = [line["step"] for line in lines if "loss" in line]
    return len(set(range(1, max(steps) + 1)) ^ set(steps)) + len(steps) - len(set(steps))


def slopes(starts: list[Start], name: str) -> list[float]:
    """The least-squares slope over each start's settled readings, per 10,000 steps."""
    found = []
    for start in starts:
        settled = [one for one in start.readings if one.seconds > SETTLED_SECONDS]
        if len(settled) > 10:
            steps = [one.step / 10_000 for one in settled]
            found.append(statistics.linear_regression(steps, [getattr(one, name) for one in settled]).slope)
    return found


def report(starts: list[Start], run_dir: Path, arguments: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    readings = [one for start in starts for one in start.readings]
    step = max(one.step for one in readings)
    rows = []
    for name, title in (
        ("main", "main process, MB of its own"),
        ("worker", "largest loader worker, MB of its own"),
        ("files", "open files, most of a process"),
        ("threads", "threads, most of a process"),
    ):
        values = [getattr(one, name) for one in readings]
        rows.append([title, f"{min(values):.0f}", f"{max(values):.0f}", middle(slopes(starts, name))])
    resumes = [start.first_line for start in starts[1:] if start.first_line is not None]
    return "\n".join(
        (
            f"\n{step:,} of {arguments.steps:,} steps of {BATCH} images of {SIZE} pixels, "
            f"{arguments.samples:,} samples, {len(starts)} starts, {len(starts) - 1} kills.\n",
            table(
                ["", "lowest", "highest", "per 10,000 steps: median of the starts [lowest, highest]"], rows
            ),
            f"- Steps that are missing from the log, or in it twice: {gaps(run_dir)}",
            f"- Processes that outlived a kill: {sum(start.orphans for start in starts)}",
            f"- From the start of a process to its first logged step: {spread(resumes)}",
            f"- CPU seconds of `indistill report` at the end: {report_seconds(run_dir):.1f}\n",
        )
    )


def middle(values: list[float]) -> str:
    if not values:
        return "no start was long enough"
    return f"{statistics.median(values):+.2f} [{min(values):+.2f}, {max(values):+.2f}]"


def spread(seconds: list[float]) -> str:
    if not seconds:
        return "there was one start"
    return f"{statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most"


def report_seconds(run_dir: Path) -> float:
    """CPU seconds that it takes to write the run's page."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "indistill", "report", str(run_dir)]
    subprocess.run(command, check=True, stdout=subprocess.PIPE)  # nosec B603  # constant
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    sys.exit(main())
