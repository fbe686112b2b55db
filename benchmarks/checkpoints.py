"""Measure what a checkpoint costs a run of ResNet-18, compared with the steps between two of them.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py [--checkpoints 8] [--batch 8]

See benchmarks/README.md for the method. Prints its table and writes it to benchmarks/results/checkpoints.md.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report import RESULTS, heading, table

from indistill import Callback, Trainer
from indistill.data import packing

LIBRARIES = ("torch", "timm", "accelerate", "safetensors")
IMAGES, SIZE, CLASSES = 64, 224, 10
EVERY_STEPS = 100  # between two checkpoints of a real run
STEPS_EACH = 3  # here


class Clock(Callback):
    """The seconds of each step, and of each checkpoint, which is written before the next step begins."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.stalls: list[float] = []  # in which the loop waits
        self.writing: list[float] = []  # until the thread has written it
        self.cpu: list[float] = []  # of the whole process, from the beginning of the stall on
        self.read: list[int] = []  # bytes that the process reads from files meanwhile

    def on_step_begin(self, run: Any, phase: Any) -> None:
        self.begin = time.perf_counter()

    def on_step(self, run: Any, phase: Any, line: Any) -> None:
        self.end, self.cpu_begin = time.perf_counter(), time.process_time()
        self.steps.append(self.end - self.begin)
        before, of_this_count = bytes_read()
        self.read_begin = before + of_this_count

    def on_checkpoint(self, run: Any) -> None:
        held = time.perf_counter()
        run.checkpoints.wait()
        self.stalls.append(held - self.end)
        self.writing.append(time.perf_counter() - held)
        self.cpu.append(time.process_time() - self.cpu_begin)
        self.read.append(bytes_read()[0] - self.read_begin)


def bytes_read() -> tuple[int, int]:
    """The bytes that the process has read so far (Linux), and those read by this count, which it lacks."""
    text = Path("/proc/self/io").read_text()
    return int(text.split()[1]), len(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, default=8, help="whose median is taken")
    parser.add_argument("--batch", type=int, default=8, help="the smaller, the more a checkpoint costs")
    arguments = parser.parse_args()
    text = heading(
        "Checkpoints",
        f"python benchmarks/checkpoints.py --checkpoints {arguments.checkpoints} --batch {arguments.batch}",
        LIBRARIES,
    )
    with tempfile.TemporaryDirectory() as folder:
        text += f"\n{measure(Path(folder), arguments.checkpoints, arguments.batch)}"
    print(text)
    (RESULTS / "checkpoints.md").write_text(text)


def measure(folder: Path, checkpoints: int, batch: int) -> str:
    """Return the table of one run."""
    pack(folder)
    run_dir, clock = folder / "run", Clock()
    _ = Trainer(settings(folder, run_dir, checkpoints, batch)).train(callbacks=[clock])
    newest = max((run_dir / "checkpoints").iterdir())
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    step = statistics.median(clock.steps[STEPS_EACH:])  # the first ones warm up
    stall, writing, cpu = (statistics.median(x) for x in (clock.stalls, clock.writing, clock.cpu))
    rows = [
        ["a training step", f"{step:.2f}", ""],
        ["a checkpoint: the loop waits", f"{stall:.3f}", f"{100 * stall / (EVERY_STEPS * step):.2f}"],
        ["then a thread writes it", f"{writing:.3f}", f"{100 * writing / (EVERY_STEPS * step):.2f}"],
        ["CPU time of both", f"{cpu:.3f}", f"{100 * cpu / (EVERY_STEPS * step):.2f}"],
    ]
    about = (
        f"ResNet-18 taught by ResNet-34 at {SIZE} px, batch {batch}, AdamW and a moving average: "
        f"{size / 1e6:.0f} MB a checkpoint. Medians of {len(clock.steps) - STEPS_EACH} steps and "
        f"{len(clock.stalls)} checkpoints. Meanwhile the process reads {statistics.median(clock.read):,.0f} "
        "bytes (the median)."
    )
    return f"{about}\n\n{table(['', 'seconds', f'% of {EVERY_STEPS} steps'], rows)}"


def pack(folder: Path) -> None:
    generator = np.random.default_rng(0)
    packed = []
    for i in range(IMAGES):
        buffer = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(buffer, "JPEG")
        packed.append((f"{i:04d}", buffer.getvalue(), "jpg", i % CLASSES))
    packing.pack(packed, folder, "train", samples_per_shard=IMAGES)


def settings(folder: Path, run_dir: Path, checkpoints: int, batch: int) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "duration": f"{STEPS_EACH * checkpoints} steps",
        "data": {
            "root": str(folder),
            "train": "train-*.tar",
            "num_classes": CLASSES,
            "image_size": SIZE,
            "global_batch": batch,
            "streams": 1,
            "in_memory": True,
        },
        "student": {"name": "resnet18"},
        "teacher": {"name": "resnet34", "random": True},
        "warmup": None,
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "ema": {},
        "checkpoint": {"every_steps": STEPS_EACH, "keep_last": 2},
        "log": {"every_steps": EVERY_STEPS},
        "trackers": [],
    }


if __name__ == "__main__":
    main()
