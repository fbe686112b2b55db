"""The interface of callbacks, which follow a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from indistill.config import Config, UserError
from indistill.curriculum import Phase


class TrainingRun(Protocol):
    """The attributes of a run (`indistill.training.loop.Run`) that a callback may read."""

    settings: Config
    run_dir: Path
    done: int  # completed optimizer steps
    loss: Any  # of the last step: a tensor [] on this rank's device; reading its value waits for the device


class Callback:
    """Base class of callbacks: override what you need. Every rank calls them, in its training thread."""

    def on_step_begin(self, run: TrainingRun, phase: Phase) -> None:
        """Called before each optimizer step of `phase`."""
        return None

    def on_step(self, run: TrainingRun, phase: Phase, line: dict[str, Any] | None) -> None:
        """Called after each optimizer step of `phase`; `line` is its line in `metrics.jsonl`, or None."""
        return None

    def on_evaluation(self, run: TrainingRun, scores: dict[str, float]) -> None:
        """Called after each evaluation during training, with its scores as fractions of 1."""
        return None

    def on_checkpoint(self, run: TrainingRun) -> None:
        """Called once a checkpoint is in host memory, while a thread writes it."""
        return None

    def on_stop(self, run: TrainingRun) -> None:
        """Called when the run was asked to stop, once its checkpoint is written; `on_end` is not called."""
        return None

    def on_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """Called after the last step, when the student's weights and `summary.json` are written."""
        return None


def check_callbacks(callbacks: Sequence[Callback]) -> Sequence[Callback]:
    """Return the callbacks. Raises UserError, before a step could be lost, for what is none."""
    if isinstance(callbacks, Callback):
        raise UserError(f"callbacks: give a list, callbacks=[{type(callbacks).__name__}()]")
    for callback in callbacks:
        if isinstance(callback, type) and issubclass(callback, Callback):
            raise UserError(
                f"callbacks: {callback.__name__} is a class: give an object, {callback.__name__}()"
            )
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks: {type(callback).__name__} is no callback: derive its class from "
                "indistill.Callback"
            )
    return callbacks
