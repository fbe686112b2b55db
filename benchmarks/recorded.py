"""A small run of the real training loop that records each step; used by plan_check.py and scaling.py."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from indistill import config
from indistill.data import packing

CLASSES = 10
LIBRARIES = ("torch", "timm", "accelerate", "deepspeed")
_BYTES_ACKED = 120  # offset of tcpi_bytes_acked in Linux's struct tcp_info


class Step(NamedTuple):
    """The clocks and counters at the end of a step."""

    phase: str
    wall: float  # seconds
    cpu: float  # seconds of this process
    sent: int  # bytes sent over TCP so far


def pack(folder: Path, samples: int, size: int) -> None:
    """Write shards of noise images, because their content does not affect the time."""
    noise = np.random.RandomState(0)

    def image(i: int) -> tuple[str, bytes, str, int]:
        buffer = io.BytesIO()
        pixels = noise.randint(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        return f"{i:05d}", buffer.getvalue(), "png", i % CLASSES

    packing.pack(map(image, range(samples)), folder, "train", samples_per_shard=samples)


def tree(
    folder: Path, run_dir: Path, size: int | dict[str, Any], batch: int, steps: int, last: int
) -> dict[str, Any]:
    """Return a config: student of half the width, four pairs of `steps` steps, then `last` steps of KD."""
    return {
        "run_dir": str(run_dir),
        "duration": f"{4 * steps + last} steps",
        "data": {
            "root": str(folder),
            "train": "train-*.tar",
            "num_classes": CLASSES,
            "image_size": size,
            "global_batch": batch,
            "streams": 4,
            "in_memory": True,
            "augment": {"recipe": "none", "flip": False},
        },
        "teacher": {"name": "resnet34", "random": True},
        "student": {"name": "resnet18", "kwargs": {"channels": [32, 64, 128, 256]}},
        "warmup": {"curriculum": "sequential", "durations": [f"{steps} steps"] * 4},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}, {"name": "pkt"}]},
        "optimizer": {"name": "momentum", "lr": 0.001},
        "checkpoint": {"every_steps": None},
        "log": {"every_steps": 10**6},
        "trackers": [],
    }


def train(settings: config.Config) -> list[Step]:
    """Train, and return a record of the end of every step."""
    from indistill import Callback
    from indistill.training import loop

    steps: list[Step] = []

    class Record(Callback):
        def on_step(self, run: Any, phase: Any, line: Any) -> None:
            steps.append(Step(phase.name, time.perf_counter(), time.process_time(), sent_bytes()))

    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(settings, "never", callbacks=[Record()])
    return steps


def within_phases(steps: list[Step]) -> Iterator[tuple[Step, Step]]:
    """Yield each step with the one before it, except the first step of every phase."""
    return ((before, step) for before, step in itertools.pairwise(steps) if before.phase == step.phase)


def sent_bytes() -> int:
    """Return the kernel's count of acknowledged bytes sent over TCP, loopback included (Linux)."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED + 8)
                    total += struct.unpack_from("Q", info, _BYTES_ACKED)[0]
    return total


@contextlib.contextmanager
def scratch(samples: int, size: int) -> Iterator[Path]:
    """Create a temporary folder with the shards."""
    folder = Path(tempfile.mkdtemp())
    try:
        pack(folder, samples, size)
        yield folder
    finally:
        shutil.rmtree(folder)
