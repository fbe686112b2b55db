"""When and why a run began, stopped and went on: `history.jsonl` in its run directory, appended to by its rank 0.

A line at each start and one at each end in good order. A start without an end was killed, or its machine was. What
cannot be written is left out: no run fails for its record.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import time
from pathlib import Path
from typing import Any

from indistill import config
from indistill.config import Config, UserError

_open: set[Path] = set()  # run directories in which this process wrote a start, and no end yet


def start(run_dir: Path, step: int, **facts: Any) -> None:
    """A run begins, or goes on, after `step` completed steps; `facts` are what it runs on."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "python": platform.python_version()}
    slurm = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    _append(run_dir, {"event": "start", "step": step, **where, **slurm, **facts})
    _open.add(run_dir)


def end(under: Path, how: str, reason: str = "") -> None:
    """This process's runs in `under`, or in folders of it, end: `how` is a word of `status`, or crashed."""
    for run_dir in [path for path in tuple(_open) if path.is_relative_to(under)]:
        _open.discard(run_dir)
        _append(run_dir, {"event": "end", "how": how, "reason": reason})


def has_begun(settings: Config) -> bool:
    """Whether there is work to keep. Raises UserError if there is a run of another config.

    What was refused before it logged a line is none: the mended config takes its place.
    """
    run_dir = Path(settings.run_dir)
    saved, log = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not saved.exists():
        return False
    keeps = (run_dir / "summary.json").exists() or any((run_dir / "checkpoints").glob("step-*"))
    difference = config.difference(config.load(saved), settings)
    if difference and (keeps or (log.exists() and log.stat().st_size)):
        raise UserError(f"{run_dir} holds a run of another config ({difference}): choose another run_dir")
    return keeps


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    """One write of a whole line, or none: what a full disk has cut is taken back."""
    text = json.dumps({"time": round(time.time(), 3), **line}) + "\n"
    path = run_dir / "history.jsonl"
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            complete = file.write(text.encode()) == len(text.encode())
        except OSError:
            complete = False
        if not complete:
            os.truncate(path, size)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; one that was cut by a kill is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines
