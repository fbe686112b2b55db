"""What a case of hostile input is, and how its command is run and watched."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from conftest import data_section, start

SECONDS = 120  # a command that runs longer hangs; ordinary ones end in a few seconds
EXTRA_MEMORY = 2**30  # bytes that a command may take above an ordinary training run
PROGRAM_EVENTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn"}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what changes a terminal or replaces a line


@dataclass(frozen=True)
class Inputs:
    """A new folder for a case's input, and ordinary data to build on."""

    folder: Path
    data: Path  # train-*.tar and eval-*.tar, as `conftest.data_dir` packs them; not to be changed

    def tree(self) -> dict[str, Any]:
        """An ordinary config: a student that learns from labels for 2 steps."""
        return {
            "run_dir": str(self.folder / "run"),
            "duration": "2 steps",
            "data": {**data_section(self.data), "in_memory": False, "workers": 1},
            "student": {"name": "cnn32_student"},
            "kd": {"losses": [{"name": "ce"}]},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "trackers": [],
        }

    def write(self, tree: dict[str, Any], name: str = "config.yaml") -> str:
        """Write a config and return its path."""
        path = self.folder / name
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    def train(self, **data: Any) -> list[str]:
        """The arguments that train an ordinary config with other values in its section `data`."""
        tree = self.tree()
        tree["data"] |= data
        return ["train", self.write(tree)]


@dataclass(frozen=True)
class Case:
    """An input, the command that reads it, and the outcome that it must have."""

    name: str
    arguments: Callable[[Inputs], list[str]]  # writes the input and returns the command's arguments
    error: str | None = None  # pattern of the one line on stderr, with exit code 2; None: exit code 0
    code: int = 0  # exit code without an `error`: `shards verify` has 1 for bad shards
    output: str = ""  # pattern of what stdout and stderr say together
    environment: dict[str, str] = field(default_factory=dict)
    after: Callable[[Inputs], None] | None = None  # asserts what must be true afterwards


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int | None  # exit code; None: stopped for its time or memory
    out: str
    err: str
    peak: int  # bytes of the process and its children
    programs: list[str]  # other programs that it started
    orphans: list[int]  # processes that it left behind


def run(arguments: list[str], folder: Path, limit: int, environment: dict[str, str] | None = None) -> Outcome:
    """Run `indistill ARGUMENTS` in a process of its own, and stop it at `limit` bytes or after SECONDS."""
    process = start(_command, arguments, str(folder), environment or {})
    peak, family = _watch(process, limit)
    code = process.exitcode
    process.kill()
    process.join()
    if code is not None:
        peak = max(peak, int((folder / "peak").read_text()))
    _, orphans = psutil.wait_procs(family, timeout=20)
    for orphan in orphans:
        orphan.kill()
    texts = [(folder / name).read_text(errors="replace") for name in ("out", "err", "programs")]
    return Outcome(code, texts[0], texts[1], peak, texts[2].splitlines(), [orphan.pid for orphan in orphans])


def _watch(process: Any, limit: int) -> tuple[int, list[psutil.Process]]:
    """Wait until the process ends or passes a limit; return its peak in bytes, and its children."""
    peak = 0
    family: set[psutil.Process] = set()
    deadline = time.monotonic() + SECONDS
    while process.is_alive() and peak <= limit and time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(process.pid)
            family |= set(root.children(recursive=True))
            peak = max(peak, _private_bytes([root, *family]))
        process.join(0.05)
    return peak, list(family)


def _private_bytes(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def _command(arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """The process: `main` with its output in files, and each program that it starts written down."""
    from indistill.commands.cli import main

    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    programs = os.open(f"{folder}/programs", flags)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", flags), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.environ.update(environment)

    def note(event: str, details: tuple) -> None:
        if event in PROGRAM_EVENTS:
            os.write(programs, f"{event} {details[:2]!r}\n".encode())

    sys.addaudithook(note)
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(folder, "peak").write_text(str(peak))
