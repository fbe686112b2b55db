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
import traceback
from pathlib import Path
from typing import Any

from indistill.config import tree
from indistill.config.base import UserError
from indistill.config.read import load_recorded
from indistill.config.tree import Config

_open: set[Path] = set()  # run directories in which this process wrote a start, and no end yet


def append_start(run_dir: Path, step: int, **facts: Any) -> None:
    """A run begins, or goes on, after `step` completed steps; `facts` are what it runs on."""
    where = {"host": socket.gethostname(), "pid": os.getpid(), "python": platform.python_version()}
    slurm = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    _append(run_dir, {"event": "start", "step": step, **where, **slurm, **facts})
    _open.add(run_dir)


def append_end(under: Path, how: str, reason: str = "") -> None:
    """Record the end of this process's runs at or below `under`; `how` is a word of `status`."""
    for run_dir in [path for path in tuple(_open) if path.is_relative_to(under)]:
        _open.discard(run_dir)
        _append(run_dir, {"event": "end", "how": how, "reason": reason})


def describe_error(error: BaseException, folder: Path) -> str:
    """The kind, message and place of an unexpected error, and the file in `folder` that has its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}, line {frames[-1].lineno}; " if frames else ""
    return f"{type(error).__name__}: {in_one_line(error)} ({place}traceback: {keep_traceback(error, folder)})"


def keep_traceback(error: BaseException, folder: Path) -> Path | str:
    """Write the traceback to `folder`/errors/rank-N.txt, and return that path, or where else to look for it."""
    file = folder / "errors" / f"rank-{os.environ.get('RANK', '0')}.txt"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(traceback.format_exception(error)))
    except OSError:
        return "in the log"
    return file


def in_one_line(error: BaseException) -> str:
    """The message of an error; that of a loader's worker arrives in a traceback, whose last line it is."""
    lines = str(error).strip().splitlines() or [""]
    line = lines[-1] if lines[0].startswith("Caught ") else " ".join(" ".join(lines).split())
    return line.removeprefix(f"{UserError.__module__}.{UserError.__qualname__}: ")


def has_begun(settings: Config) -> bool:
    """Whether there is work to keep. Raises UserError if there is a run of another config.

    What was refused before it logged a line is none: the mended config takes its place.
    """
    run_dir = Path(settings.run_dir)
    saved, log = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not saved.exists():
        return False
    keeps = (run_dir / "summary.json").exists() or any((run_dir / "checkpoints").glob("step-*"))
    difference = tree.difference(load_recorded(saved), settings)
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
