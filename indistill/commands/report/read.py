"""Read the records of runs from their directories."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from indistill import config
from indistill.commands.report import charts
from indistill.config import Config, UserError
from indistill.config.files import denied, read_lines
from indistill.config.run_dir import CheckpointDir, RunDir

STATES = {
    "done": ("finished", "good"),
    "running": ("running or killed", "open"),
    "requeue": ("stopped, to be resumed", "open"),
    "failed": ("failed", "bad"),
}


class Run(NamedTuple):
    """The records of a run. A missing or damaged record is empty."""

    path: Path
    name: str
    settings: Config
    lines: list[dict[str, Any]]  # of metrics.jsonl
    summary: dict[str, Any]
    status: str
    history: list[dict[str, Any]]
    plan: dict[str, Any]
    networks: dict[str, Any]
    checkpoints: list[dict[str, Any]]  # step, bytes and scores, oldest first
    bad: list[str]  # samples that could not be decoded, from the newest checkpoint

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps; other lines have scores or the time of a checkpoint."""
        return [line for line in self.lines if "loss" in line]

    def points(self, key: str) -> list[charts.Point]:
        """The values of a metric by step."""
        return [
            (line["step"], line[key])
            for line in self.lines
            if isinstance(line.get(key, ""), int | float | None)
        ]

    @property
    def scores(self) -> dict[str, float]:
        """The latest scores, as fractions of 1; those of the end of the run if it has ended."""
        latest: dict[str, float] = {}
        for line in self.lines:
            latest |= {key: value for key, value in line.items() if key.startswith("top")}
        return latest | self.summary.get("metrics", {})


def run_dirs(path: Path) -> list[Path]:
    """Return the run directories at or in `path`, by first start. Raises UserError if there are none."""
    if denied(RunDir(path).config) or denied(path):
        raise UserError(f"{path}: permission denied: change the permissions of the folder and its files")
    if RunDir(path).config.is_file():
        return [path]
    inside = [child for child in path.glob("*") if RunDir(child).config.exists()]
    if not inside:
        reason = "there is no config.yaml in it or in its folders" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {reason}: give the run_dir of a run, of a chain or of several students")

    def began(folder: Path) -> tuple[float, str]:
        starts = [line["time"] for line in _history(folder) if line["event"] == "start"]
        return (starts[0] if starts else RunDir(folder).config.stat().st_mtime), folder.name

    return sorted(inside, key=began)


def read(folder: Path, name: str) -> Run:
    """Read the records of a run. Raises UserError if its config is not valid in this version."""
    files = RunDir(folder)
    kept = []
    bad: list[str] = []
    for path in files.saved_checkpoints():
        state = read_json(CheckpointDir(path).state)
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in path.iterdir())
            kept.append(
                {
                    "name": path.name,
                    "step": state.get("step"),
                    "bytes": size,
                    "scores": state.get("scores") or {},
                }
            )
        bad = (state.get("parts") or {}).get("log", {}).get("bad", bad)
    status = [files.status, RunDir(folder.parent).status]
    words = [word for file in status if (word := _text(file).partition("\n")[0]) in STATES]
    lines = [line for line in _lines(files.metrics) if isinstance(line.get("step"), int)]
    summary = read_json(files.summary)
    return Run(
        path=folder,
        name=name,
        settings=config.load_recorded(files.config),
        lines=lines,
        summary=summary,
        status="done" if summary else words[0] if words and words[0] != "done" else "",
        history=_history(folder),
        plan=read_json(files.pruning_plan),
        networks=read_json(files.networks),
        checkpoints=kept,
        bad=bad,
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' paths below their common parent."""
    if len(folders) == 1:
        return [folders[0].absolute().name]
    paths = [str(folder.absolute()) for folder in folders]
    parent = os.path.commonpath(paths) if len(set(paths)) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(path, parent) for path in paths]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _history(folder: Path) -> list[dict[str, Any]]:
    lines = _lines(RunDir(folder).history)
    return [
        one
        for one in lines
        if one.get("event") in ("start", "end") and isinstance(one.get("time"), int | float)
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [line for line in read_lines(path) if isinstance(line, dict)]
    except (OSError, UnicodeDecodeError):
        return []
