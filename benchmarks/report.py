"""The heading of every results file, and its Markdown tables."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def heading(title: str, command: str, libraries: Sequence[str]) -> str:
    """Return title, command, date, machine and versions as Markdown. Paths of this machine are left out."""
    command = " ".join("FOLDER" if os.path.isabs(word) else word for word in command.split())
    load = " ".join(f"{minutes:.1f}" for minutes in os.getloadavg())
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    system = f"{platform.system()} {platform.machine()}"
    return f"""# {title}

`{command}`,
{datetime.date.today()}, {device}{processor()}, {os.cpu_count()} cores, {system},
Python {platform.python_version()}; load average {load} at the start.
{", ".join(f"{name} {_version(name)}" for name in libraries)}.
"""


def processor() -> str:
    """Return the model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
