"""Experiment trackers: Accelerate's, by name, started so that none can end a run or wait for a keyboard.

`metrics.jsonl` contains every line that they get, so a tracker that fails loses nothing but its own copy.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from indistill import config
from indistill.config import Config, in_one_line, printable
from indistill.config.run_dir import RunDir

_PROJECT = "indistill"
# wandb would wait for its server for 90 s at the start, and for ever at the end. A run that is asked to stop
# is killed 30 s later.
_INIT_SECONDS = "30"
_FINISH_SECONDS = "20"
# A line that takes longer before it fails is the last: libraries that retry over a network may take minutes
# for each.
_PATIENCE_SECONDS = 10.0


class Trackers:
    """The trackers of one run, on rank 0. No method raises: `say` reports a failure, and the run goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.running: dict[str, GeneralTracker] = {}
        # Trackers that have missed a line, which was reported; they get the next ones all the same.
        self.failed: set[str] = set()

    def start(self, settings: Config, run_id: str, step: int) -> None:
        """Start the trackers after `step` completed steps; `run_id` is the same at every start of a run."""
        files = RunDir.of(settings)
        flat = config.flatten(settings, without=())
        plain = {
            key: value if isinstance(value, int | float) else printable(str(value))
            for key, value in flat.items()
        }
        installed = {str(name) for name in get_available_trackers()}
        for name in dict.fromkeys(settings.trackers):
            if name not in installed:
                self.say(f"tracker {name}: not installed (pip install {name}): the run goes on without it")
                continue
            with self._report(name, "could not be started", "the run goes on without it"), _no_keyboard():
                self._start_one(name, files, plain, options=_options(name, files, run_id, step))

    def _start_one(self, name: str, files: RunDir, plain: dict[str, Any], options: dict[str, Any]) -> None:
        kind = LOGGER_TYPE_TO_CLASS[name]
        project = _PROJECT
        if name == "tensorboard":
            project = files.tensorboard.name
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", project)
            os.environ.setdefault("WANDB_INIT_TIMEOUT", _INIT_SECONDS)
            os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)
        folder = (files.path,) if kind.requires_logging_directory else ()
        tracker = kind(project, *folder, **options)
        tracker.start()
        self.running[name] = tracker
        if name == "wandb":  # Accelerate would set the config of the process's first run
            tracker.tracker.config.update(plain, allow_val_change=True)
        elif name == "tensorboard" and any(files.tensorboard.glob("*/hparams.yml")):
            pass  # TensorBoard would list each start as another run
        else:
            tracker.store_init_configuration(plain)

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log a line. A tracker that fails gets the next one, unless it failed slowly or cannot recover."""
        for name, tracker in [*self.running.items()]:
            begin = time.monotonic()
            try:
                tracker.log(numbers, step=step)
            except Exception as error:
                # TensorBoard's writer thread ends at its first error.
                if name == "tensorboard" or time.monotonic() - begin > _PATIENCE_SECONDS:
                    del self.running[name]
                    self._say(name, f"failed at step {step}", error, "the run goes on without it")
                elif name not in self.failed:
                    self.failed.add(name)
                    consequence = "the run goes on, and tries again at each line"
                    self._say(name, f"failed at step {step}", error, consequence)

    def finish(self) -> None:
        """Close all trackers."""
        for name, tracker in [*self.running.items()]:
            with self._report(name, "failed at the end", "metrics.jsonl has what it may lack"):
                tracker.finish()
        self.running.clear()

    @contextlib.contextmanager
    def _report(self, name: str, failure: str, consequence: str) -> Iterator[None]:
        """Report an error of the block, and drop the tracker."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self.running.pop(name, None)
            if name not in self.failed:
                self._say(name, failure, error, consequence)

    def _say(self, name: str, failure: str, error: BaseException, consequence: str) -> None:
        self.say(f"tracker {name} {failure} ({in_one_line(error, with_type=True)}): {consequence}")


def _options(name: str, files: RunDir, run_id: str, step: int) -> dict[str, Any]:
    """The arguments by which a tracker's library names, stores and resumes a run."""
    run_dir = files.path
    match name:
        case "tensorboard":  # hides what a killed run logged after its last checkpoint
            return {"purge_step": step + 1 if step else 0}
        case "wandb":  # create_new: several students may run in one process
            return {
                "name": run_dir.name,
                "id": run_id,
                "resume": "allow",
                "dir": str(run_dir),
                "reinit": "create_new",
            }
        case "trackio":  # resumes by name alone
            return {"name": f"{run_dir.name}-{run_id[:8]}", "resume": "allow"}
        case "mlflow":
            return {"run_name": run_dir.name}
        case "clearml":
            return {"task_name": run_dir.name}
        case "dvclive":
            return {"dir": str(files.dvclive), "resume": step > 0}
    return {}


@contextlib.contextmanager
def _no_keyboard() -> Iterator[None]:
    """Hide the terminal, so that a library fails where it would ask for a login and wait for the answer."""
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = stdin
