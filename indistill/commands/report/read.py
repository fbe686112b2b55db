"""Read what runs have left in their directories."""

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
from indistill.config.files import read_lines

NETWORKS = "networks.json"
STATES = {
    "done": ("finished", "good"),
    "running": ("running, or killed", "open"),
    "requeue": ("stopped, to be started again", "open"),
    "failed": ("failed", "bad"),
}


class Run(NamedTuple):
    """What a run directory holds. What is missing, or damaged, is empty."""

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
    bad: list[str]  # samples that could not be decoded, by the newest checkpoint

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The lines of steps; the others hold scores, or what a checkpoint cost."""
        return [line for line in self.lines if "loss" in line]

    def points(self, key: str) -> list[charts.Point]:
        return [
            (line["step"], line[key])
            for line in self.lines
            if isinstance(line.get(key, ""), int | float | None)
        ]

    @property
    def scores(self) -> dict[str, float]:
        """The latest, of the end of the run where it has one."""
        latest: dict[str, float] = {}
        for line in self.lines:
            latest |= {key: value for key, value in line.items() if key.startswith("top")}
        return latest | self.summary.get("metrics", {})


# --- reading ---------------------------------------------------------------------------------------------------------
def run_dirs(path: Path) -> list[Path]:
    """The run directories that `path` stands for, by their first start. Raises UserError if there are none."""
    if (path / "config.yaml").is_file():
        return [path]
    inside = [file.parent for file in path.glob("*/config.yaml")]
    if not inside:
        what = "holds no config.yaml, and no folder in it does" if path.is_dir() else "no such directory"
        raise UserError(f"{path}: {what}: give the run_dir of a run, of a chain or of several students")

    def began(folder: Path) -> tuple[float, str]:
        starts = [line["time"] for line in _history(folder) if line["event"] == "start"]
        return (starts[0] if starts else (folder / "config.yaml").stat().st_mtime), folder.name

    return sorted(inside, key=began)


def read(folder: Path, name: str) -> Run:
    """Raises UserError if the config is not one of this version's."""
    kept = []
    bad: list[str] = []
    for path in sorted((folder / "checkpoints").glob("step-*")):
        state = read_json(path / "state.json")
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
    status = [(where / "status") for where in (folder, folder.parent)]
    words = [word for file in status if (word := _text(file).partition("\n")[0]) in STATES]
    lines = [line for line in _lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    summary = read_json(folder / "summary.json")
    return Run(
        path=folder,
        name=name,
        settings=config.load_recorded(folder / "config.yaml"),
        lines=lines,
        summary=summary,
        status="done" if summary else words[0] if words and words[0] != "done" else "",
        history=_history(folder),
        plan=read_json(folder / "prune_plan.json"),
        networks=read_json(folder / NETWORKS),
        checkpoints=kept,
        bad=bad,
    )


def short_names(folders: Sequence[Path]) -> list[str]:
    """As short as they can be and still differ."""
    if len(folders) == 1:
        return [folders[0].absolute().name]
    wholes = [str(folder.absolute()) for folder in folders]
    common = os.path.commonpath(wholes) if len(set(wholes)) > 1 else os.path.dirname(wholes[0])
    return [os.path.relpath(whole, common) for whole in wholes]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _history(folder: Path) -> list[dict[str, Any]]:
    lines = _lines(folder / "history.jsonl")
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
