"""What a caller of `train` may hook into."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from indistill.config import Config
from indistill.curriculum import Phase


class TrainingRun(Protocol):
    """What a callback may read of a run (`indistill.training.loop.Run`)."""

    settings: Config
    run_dir: Path
    done: int  # completed optimizer steps
    loss: Any  # of the last step, a tensor [] on this rank's device; to read its value waits for the device


class Callback(Protocol):
    """Subclass it and override what you need. Each method is called on every rank, in the thread that trains."""

    def on_step(self, run: TrainingRun, phase: Phase, line: dict[str, Any] | None) -> None:
        """After each optimizer step of `phase`. `line` is its line in `metrics.jsonl`; None if it logged none."""

    def on_evaluation(self, run: TrainingRun, scores: dict[str, float]) -> None:
        """After each evaluation during training, with its scores as fractions of 1."""

    def on_checkpoint(self, run: TrainingRun) -> None:
        """After the copy of a checkpoint to host memory, from where a thread writes it."""

    def on_end(self, run: TrainingRun, summary: dict[str, Any]) -> None:
        """After the last step, when the student's weights and `summary.json` are written."""
