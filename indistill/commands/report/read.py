"""Read the records of runs from their directories."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from indistill import config
from indistill.commands.report import charts
from indistill.config import Config, UserError, metric_names, records
from indistill.config.files import denied
from indistill.config.limits import MAX_METRIC_NAMES, MAX_REPORTED_BYTES
from indistill.config.run_dir import CheckpointDir, RunDir

STATES = {
    "done": ("finished", "good"),
    "running": ("running or killed", "open"),
    "requeue": ("stopped, to be resumed", "open"),
    "failed": ("failed", "bad"),
}


@dataclass(frozen=True)
class Run:
    """The records of a run (config/records.py). A missing or damaged record is empty."""

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

    # A log may have 200,000 lines, so each of these goes through them once.
    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of training steps; other lines have scores or the time of a checkpoint."""
        return [line for line in self.lines if "loss" in line]

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all lines, in the order in which they come first."""
        return list(dict.fromkeys(chain.from_iterable(self.lines)))

    @cached_property
    def scores(self) -> dict[str, float]:
        """The latest scores, as fractions of 1; those of the end of the run if it has ended."""
        latest = {
            key: next(line[key] for line in reversed(self.lines) if key in line)
            for key in self.keys
            if metric_names.is_accuracy(key)
        }
        return latest | self.summary.get("metrics", {})

    def points(self, key: str) -> list[charts.Point]:
        """The values of a metric by step."""
        return [(line["step"], line[key]) for line in self.lines if key in line]


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
        with contextlib.redirect_stderr(None):  # `read` warns of damaged lines
            starts = [line["time"] for line in _history(folder) if line["event"] == "start"]
        return (starts[0] if starts else RunDir(folder).config.stat().st_mtime), folder.name

    return sorted(inside, key=began)


def read(folder: Path, name: str) -> Run:
    """Read the records of a run; warns of damaged ones. Raises UserError if its config is not valid."""
    files = RunDir(folder)
    settings = config.load_recorded(files.config)
    checkpoints = [_checkpoint(path) for path in files.saved_checkpoints()]
    summary = record(files.summary, records.Summary)
    words = [records.status(file)[0] for file in (files.status, RunDir(folder.parent).status)]
    words = [word for word in words if word in STATES]
    return Run(
        path=folder,
        name=name,
        settings=settings,
        lines=_metrics(files.metrics),
        summary=summary,
        status="done" if summary else words[0] if words and words[0] != "done" else "",
        history=_history(folder),
        plan=record(files.pruning_plan, records.PlanRecord),
        networks=record(files.networks, records.Networks),
        checkpoints=[checkpoint for checkpoint, _ in checkpoints],
        bad=next((bad for _, bad in checkpoints[::-1] if bad is not None), []),
    )


def _checkpoint(path: Path) -> tuple[dict[str, Any], list[str] | None]:
    """Name, step, bytes and scores of a checkpoint, and the samples that could not be decoded by then."""
    state = record(CheckpointDir(path).state, records.State)
    size = 0
    with contextlib.suppress(OSError):
        size = sum(file.stat().st_size for file in path.iterdir())
    scores = state.get("scores") or {}
    shown = {"name": path.name, "step": state.get("step"), "bytes": size, "scores": scores}
    return shown, state["parts"]["log"]["bad"] if state else None


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' paths below their common parent."""
    if len(folders) == 1:
        return [folders[0].absolute().name]
    paths = [str(folder.absolute()) for folder in folders]
    parent = os.path.commonpath(paths) if len(set(paths)) > 1 else os.path.dirname(paths[0])
    return [os.path.relpath(path, parent) for path in paths]


def record(path: Path, schema: type[BaseModel]) -> dict[str, Any]:
    """The content of a record; empty if the file is missing or damaged, of which it warns."""
    if not os.path.lexists(path):
        return {}
    try:
        content = records.load(path, schema, "the report leaves it out")
    except UserError as error:
        records.warn(error)
        return {}
    return content.model_dump(exclude_unset=True)


def _history(folder: Path) -> list[dict[str, Any]]:
    return _lines(RunDir(folder).history, records.HistoryLine)


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, up to MAX_METRIC_NAMES different metrics and phases."""
    lines = _lines(path, records.MetricsLine)
    names: set[str] = set()
    for i, line in enumerate(lines):
        names.update(line, (line.get("phase", ""),))
        if len(names) > MAX_METRIC_NAMES:
            records.warn(f"{path}: more than {MAX_METRIC_NAMES:,} names: the rest of it is left out")
            return lines[:i]
    return lines


def _lines(path: Path, schema: type[BaseModel]) -> list[dict[str, Any]]:
    """The lines of a log that fit the schema; of a large file those at its end."""
    try:
        lines = list(records.lines(path, schema, reported=True))
    except UserError as error:
        records.warn(error)
        return []
    if os.path.exists(path) and os.path.getsize(path) > MAX_REPORTED_BYTES:
        records.warn(f"{path}: the report shows its last {MAX_REPORTED_BYTES:,} bytes")
    return lines
