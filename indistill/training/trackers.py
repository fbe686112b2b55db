"""Experiment trackers: those of Accelerate, by name, started so that none can end a run or wait for a keyboard.

`metrics.jsonl` has all that they are told, so what one misses is lost to it alone.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from indistill import config
from indistill.config import Config, in_one_line
from indistill.config.run_dir import RunDir

_PROJECT = "indistill"
# For wandb, which would wait for its server for 90 s at the start and without end at the end. A run that is asked to
# stop is killed 30 s later.
_INIT_SECONDS, _FINISH_SECONDS = "30", "20"
_PATIENCE_SECONDS = (
    10.0  # with a line that fails: libraries that retry over a network may take minutes for each
)


class Trackers:
    """Those of one run, on rank 0. No method raises: what fails is told, once, by `say`, and the run goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[str, GeneralTracker] = {}
        self.failed: set[str] = (
            set()
        )  # that missed a line, and were told of; they get the next ones all the same

    def start(self, settings: Config, run_id: str, step: int) -> None:
        """Begin, or go on after `step` completed steps; `run_id` is the same at every start of a run."""
        run_dir = Path(settings.run_dir)
        flat = config.flatten(settings, without=())
        plain = {
            key: value if isinstance(value, int | float | str) else str(value) for key, value in flat.items()
        }
        installed = {str(name) for name in get_available_trackers()}
        for name in dict.fromkeys(settings.trackers):
            if name not in installed:
                self.say(f"tracker {name}: not installed (pip install {name}): the run goes on without it")
                continue
            with self._told(name, "could not be started", "the run goes on without it"), _no_keyboard():
                kind = LOGGER_TYPE_TO_CLASS[name]
                project = _PROJECT
                if name == "tensorboard":
                    project = RunDir(run_dir).tensorboard.name  # its folder in run_dir
                elif name == "wandb":
                    project = os.environ.get("WANDB_PROJECT", project)
                    os.environ.setdefault("WANDB_INIT_TIMEOUT", _INIT_SECONDS)
                    os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)
                place = (run_dir,) if kind.requires_logging_directory else ()
                tracker = kind(project, *place, **_options(name, run_dir, run_id, step))
                tracker.start()
                self.running[name] = tracker
                if name == "wandb":
                    tracker.tracker.config.update(
                        plain, allow_val_change=True
                    )  # Accelerate's sets another run's
                elif name != "tensorboard" or not any(RunDir(run_dir).tensorboard.glob("*/hparams.yml")):
                    tracker.store_init_configuration(
                        plain
                    )  # TensorBoard would list each start as another run

    def log(self, numbers: dict[str, float], step: int) -> None:
        """A tracker that fails gets the next line all the same, unless it holds the run up or cannot recover."""
        for name, tracker in [*self.running.items()]:
            begin = time.monotonic()
            try:
                tracker.log(numbers, step=step)
            except Exception as error:
                # TensorBoard's thread that writes does not survive it.
                if name == "tensorboard" or time.monotonic() - begin > _PATIENCE_SECONDS:
                    del self.running[name]
                    self._tell(name, f"failed at step {step}", error, "the run goes on without it")
                elif name not in self.failed:
                    self.failed.add(name)
                    self._tell(
                        name, f"failed at step {step}", error, "the run goes on, and tries again at each line"
                    )

    def finish(self) -> None:
        for name, tracker in [*self.running.items()]:
            with self._told(name, "failed at the end", "metrics.jsonl has what it may lack"):
                tracker.finish()
        self.running.clear()

    @contextlib.contextmanager
    def _told(self, name: str, what: str, so: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            self.running.pop(name, None)
            if name not in self.failed:
                self._tell(name, what, error, so)

    def _tell(self, name: str, what: str, error: BaseException, so: str) -> None:
        self.say(f"tracker {name} {what} ({in_one_line(error, with_type=True)}): {so}")


def _options(name: str, run_dir: Path, run_id: str, step: int) -> dict[str, Any]:
    """What a tracker's library is to call a run, where to keep it and how to go on with it."""
    match name:
        case "tensorboard":  # hides what a run that was killed had told after its last checkpoint
            return {"purge_step": step + 1 if step else 0}
        case "wandb":  # create_new: several students may run in one process
            return {
                "name": run_dir.name, "id": run_id, "resume": "allow", "dir": str(run_dir), "reinit": "create_new",
            }  # fmt: skip
        case "trackio":  # goes on by name alone
            return {"name": f"{run_dir.name}-{run_id[:8]}", "resume": "allow"}
        case "mlflow":
            return {"run_name": run_dir.name}
        case "clearml":
            return {"task_name": run_dir.name}
        case "dvclive":
            return {"dir": str(RunDir(run_dir).dvclive), "resume": step > 0}
    return {}


@contextlib.contextmanager
def _no_keyboard() -> Iterator[None]:
    """For a library that would ask for a login and wait for the answer: it finds no terminal, and says so."""
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = stdin
