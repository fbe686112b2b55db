"""A run directory: the names of its files, and the record of when and why the run started and stopped.

`history.jsonl` gets a line at each start of the run and one at each orderly end, written by the run's rank 0.
A start without an end was killed, or its machine failed. A line that cannot be written is left out: no run
fails for its record.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indistill.config import tree
from indistill.config.base import UserError, in_one_line, printable
from indistill.config.destinations import finished_name
from indistill.config.files import read_bytes, read_json
from indistill.config.limits import MAX_RECORD_BYTES
from indistill.config.ranks import Ranks
from indistill.config.read import load_recorded, read
from indistill.config.redact import redacted
from indistill.config.tree import Config

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_LEFT_OVER = re.compile(r"\.(partial|deleted)-step-\d{8,}(-\d+)?")  # of a checkpoint, by a kill
# In the mirror of a run: the files that a resume or a report needs, and those of its checkpoints.
_RECORD = re.compile(
    r"(config\.yaml|(metrics|history)\.jsonl|(summary|prune_plan|classes|inputs|networks)\.json"
    r"|(student|heads|standards(-[\w.-]+)?)\.safetensors|report\.html)"
)
_MIRRORED = re.compile(r"checkpoints/(step-\d{8,})/[\w-]+\.(json|safetensors|pt)")
_LOGS = (".log", ".out", ".err", ".txt")
_open: set[Path] = set()  # run directories in which this process wrote a start, and no end yet


# --- the names of the files ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Folder:
    path: Path


class _Entry:
    """A file or folder in a `_Folder`; as an attribute of one it is the path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, folder: _Folder, owner: type[_Folder]) -> Path:
        return folder.path / self.name


class RunDir(_Folder):
    """The files of a run. No other module knows their names."""

    config = _Entry("config.yaml")  # all keys with their values
    status = _Entry("status")  # running, done, requeue or failed; a chain's is above its stages
    lock = _Entry("run.lock")  # of the start that is at work (run_lock.py)
    mirror = _Entry("mirror.json")  # of a run with a mirror: the id that the mirror has, too
    starts = _Entry("starts_without_step")  # how many starts in a row have not made a step; absent after one
    metrics = _Entry("metrics.jsonl")  # a line for each logged step, evaluation and checkpoint
    history = _Entry("history.jsonl")  # a line for each start and end
    summary = _Entry("summary.json")  # of a finished run: final scores, seconds
    student = _Entry("student.safetensors")  # of a finished run: the student's weights under timm's names
    heads = _Entry("heads.safetensors")  # with `stage: heads`: the intermediate classifiers
    pruning_plan = _Entry("prune_plan.json")  # the teacher channels that the warm-up teaches
    standards = _Entry("standards.safetensors")  # what standardises the teacher's features
    classes = _Entry("classes.json")  # class names, where the data has them
    inputs = _Entry("inputs.json")  # of a chain's stage: SHA-256 of the weights that it began with
    checkpoints = _Entry("checkpoints")
    errors = _Entry("errors")  # tracebacks, by rank
    targets = _Entry(tree.TARGETS)  # stored targets, unless `targets.dir` names another directory
    tensorboard = _Entry("tensorboard")
    dvclive = _Entry("dvclive")
    profile = _Entry("profile")  # traces of the steps of the section `profile`, and tables, by rank
    report = _Entry("report.html")
    networks = _Entry("networks.json")  # parameters and operations, which `indistill report` counts once

    @classmethod
    def of(cls, settings: Config) -> RunDir:
        return cls(Path(settings.run_dir))

    def checkpoint(self, step: int) -> Path:
        """The checkpoint after `step` completed steps."""
        return self.checkpoints / f"step-{step:08d}"

    def saved_checkpoints(self) -> list[Path]:
        """The checkpoints that all ranks have written, oldest first. A disk may have damaged them since.

        Raises UserError if the folder cannot be read, which is not the same as a folder that is not there.
        """
        return sorted(self._checkpoints_called(_CHECKPOINT), key=checkpoint_step)

    def left_over_checkpoints(self) -> list[Path]:
        """What a killed process left half-written or half-deleted; raises as `saved_checkpoints`."""
        return sorted(self._checkpoints_called(_LEFT_OVER))

    def _checkpoints_called(self, pattern: re.Pattern[str]) -> list[Path]:
        try:
            names = os.listdir(self.checkpoints)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.checkpoints}: cannot be read ({error.strerror}): mend that") from None
        return [self.checkpoints / name for name in names if pattern.fullmatch(name)]

    def standards_of(self, teacher: str) -> Path:
        """What standardises the features of one of several teachers."""
        return self.path / f"standards-{teacher}.safetensors"

    def traceback(self, rank: str) -> Path:
        """The file for the traceback of a rank's unexpected error."""
        return self.errors / f"rank-{rank}.txt"


class CheckpointDir(_Folder):
    """The files of a checkpoint (training/checkpoint.py). No other module knows their names."""

    model = _Entry("model.safetensors")  # the student with all that is trained with it
    ema = _Entry("ema.safetensors")  # its moving average, if the run keeps one
    state = _Entry("state.json")  # step, identity of the run, scores, and what the log and the pace count
    manifest = _Entry("manifest.json")  # size and SHA-256 of the other files

    def optimizer(self, rank: int) -> Path:
        """A rank's part of the optimizer's state."""
        return self.path / f"optimizer-{rank:05d}.pt"

    def optimizers(self) -> list[Path]:
        """Every rank's part of the optimizer's state, in the order of the ranks."""
        return sorted(self.path.glob("optimizer-*.pt"))


def checkpoint_step(path: Path) -> int:
    """The completed steps of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def is_record(name: str) -> bool:
    """Whether a resume or a report needs the file of this name in a run directory."""
    return _RECORD.fullmatch(name) is not None


def checkpoint_of(name: str) -> str | None:
    """The checkpoint to which a file belongs, by its path in a run directory; None for any other file."""
    match = _MIRRORED.fullmatch(name)
    return match[1] if match else None


def weights_file(settings: Config) -> str:
    """The file of the weights that a run trains, as `teacher.checkpoint` or `teacher.heads` would name it."""
    entry = RunDir.of(settings).heads if settings.stage == "heads" else RunDir.of(settings).student
    return f"{settings.run_dir}/{entry.name}"


# --- starts and ends ----------------------------------------------------------------------------------------
def append_start(run_dir: Path, step: int, **facts: Any) -> None:
    """Record that a run starts or resumes after `step` completed steps; `facts` describe what it runs on."""
    process = {"host": socket.gethostname(), "pid": os.getpid(), "python": platform.python_version()}
    slurm = {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
    _append(run_dir, {"event": "start", "step": step, **process, **slurm, **facts})
    _open.add(run_dir)


def append_end(under: Path, how: str, reason: str = "") -> None:
    """Record the end of this process's runs at or below `under`; `how` is a word of `status`."""
    for run_dir in [path for path in tuple(_open) if path.is_relative_to(under)]:
        _open.discard(run_dir)
        _append(run_dir, {"event": "end", "how": how, "reason": reason})


def refuse_foreign(path: Path, runs: Collection[str] = ()) -> None:
    """Raise UserError for a folder that is not empty and not of a run, whose files would be mixed up.

    Hidden files, notes and logs may be there before the run. `runs` are the names of runs in it.
    """
    try:
        # Another rank, which has just created the folder, may be writing the first file.
        names = {finished_name(name) for name in os.listdir(path)}
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"run_dir {path}: cannot be written ({error.strerror}): choose another") from None
    known = {entry.name for entry in vars(RunDir).values() if isinstance(entry, _Entry)}
    files = RunDir(path)
    signs = {file.name for file in (files.config, files.status, files.history, files.metrics)}
    foreign = [
        name
        for name in sorted(names - known - {*runs} - {"lost+found"})
        if not name.startswith(".") and not name.endswith(_LOGS)
    ]
    if foreign and not signs & names:
        raise UserError(
            f"run_dir {path}: is not empty, and no run of indistill (it contains {foreign[0]!r}): choose "
            "another run_dir"
        )


def has_begun(settings: Config) -> bool:
    """Whether the run directory has a checkpoint or result of this run.

    Raises UserError if it has a run of another config. A run that was refused before its first logged line
    does not count: the corrected config may replace it. A damaged config.yaml does not count if a checkpoint
    says that the run is of this config.
    """
    files = RunDir.of(settings)
    if not os.path.lexists(files.config):
        return False
    saved = files.saved_checkpoints()
    if any(_is_of(path, settings) for path in saved):
        return True
    has_work = files.summary.exists() or bool(saved)
    has_lines = files.metrics.exists() and files.metrics.stat().st_size > 0
    begun = has_work or has_lines
    damage = damaged_config(files)
    if damage is not None:
        if begun or files.config.stat().st_size:
            raise UserError(
                f"{damage}, and no checkpoint says of which config the run is: put the file back, or choose "
                "another run_dir"
            )
        return False
    difference = tree.difference(load_recorded(files.config), settings)
    if difference and begun:
        raise UserError(f"{files.path} holds a run of another config ({difference}): choose another run_dir")
    return has_work


def damaged_config(files: RunDir) -> str | None:
    """Return why a run's config.yaml cannot be read; None if it can, or is not there."""
    try:
        if os.path.lexists(files.config):
            read(files.config)
    except UserError as error:
        return str(error)
    return None


def _is_of(checkpoint: Path, settings: Config) -> bool:
    """Whether a checkpoint says that it is of this config; it does not if it is damaged."""
    try:
        state = read_json(read_bytes(CheckpointDir(checkpoint).state, MAX_RECORD_BYTES))
        return state["identity"]["config"] in (tree.fingerprint(settings), tree.earlier_fingerprint(settings))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _append(run_dir: Path, line: dict[str, Any]) -> None:
    """Append one line in a single write; a line that a full disk cuts short is removed again."""
    text = redacted(json.dumps({"time": round(time.time(), 3), **line})) + "\n"
    path = RunDir(run_dir).history
    with contextlib.suppress(OSError), open(path, "ab", buffering=0, opener=_without_waiting) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            complete = file.write(text.encode()) == len(text.encode())
        except OSError:
            complete = False
        if not complete:
            os.truncate(path, size)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file for writing; a FIFO that nothing reads is an error instead of a wait without end."""
    return os.open(path, flags | os.O_NONBLOCK, 0o666)


# --- errors -------------------------------------------------------------------------------------------------
def describe_error(error: BaseException, folder: Path) -> str:
    """Describe an unexpected error in one line: type, message, source line, and file of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f"{frames[-1].filename}, line {frames[-1].lineno}; " if frames else ""
    return f"{in_one_line(error, with_type=True)} ({line}traceback: {keep_traceback(error, folder)})"


def keep_traceback(error: BaseException, folder: Path) -> Path | str:
    """Write the traceback to errors/rank-N.txt in `folder`; return that path, or "in the log" on failure."""
    file = RunDir(folder).traceback(str(Ranks.from_environment().rank))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = printable("".join(traceback.format_exception(error)), lines=True)
        file.write_text(text, encoding="utf-8")
    except OSError:
        return "in the log"
    return file
