"""Find a run's student: its weights, its preprocessing and its class names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from indistill import config
from indistill.config import Config, Model, UserError, records
from indistill.config.files import denied
from indistill.config.run_dir import CheckpointDir, RunDir
from indistill.data import class_names
from indistill.models.network import Network, normalisation
from indistill.models.views import evaluation_view
from indistill.training import checkpoint


class Source(NamedTuple):
    """The weights of a run that are exported."""

    run: Path
    settings: Config
    file: Path
    step: int
    weights: str  # ema or raw
    scores: dict[str, float]  # of exactly these weights; empty if they were not evaluated
    finished: bool

    @property
    def student(self) -> Model:
        """The config section of the student."""
        assert self.settings.student is not None  # `find` refuses a run that trains none
        return self.settings.student


# --- export -------------------------------------------------------------------------------------------------
def find(run: Path, weights: str | None = None, step: str | None = None) -> Source:
    """Find the weights to export; `weights` and `step` as in `indistill.commands.export.write.export`.

    Raises UserError if the run does not have them.
    """
    files = RunDir(run)
    settings = _load_config(files)
    if weights == "ema" and settings.ema is None:
        raise UserError(f"{run}: has no moving average (ema): use --weights raw")
    evaluated = "raw" if settings.ema is None else "ema"
    weights = weights or evaluated
    summary, student = files.summary, files.student
    finished = summary.is_file() and student.is_file()
    if finished and step is None and weights == evaluated:
        content = records.load(summary, records.Summary, "restore it, or name a --checkpoint")
        return Source(run, settings, student, content.step, weights, content.metrics, finished)

    saved = files.saved_checkpoints()
    names = ", ".join(path.name for path in saved)
    if step is None and not saved:
        raise UserError(
            f"{run}: has no checkpoint, which --weights raw needs: leave it out"
            if finished
            else f"{run}: has no student.safetensors and no checkpoint: train it first"
        )
    path = saved[-1] if step is None else files.checkpoints / step
    if path not in saved:
        raise UserError(
            f"--checkpoint {step}: {run} has no such checkpoint: choose one of: {names or 'none'}"
        )
    if damage := checkpoint.damaged(path):
        raise UserError(f"{path}: damaged ({damage}): choose another with --checkpoint: {names}")
    state = checkpoint.read_state(path)
    scores = (state.scores or {}) if weights == evaluated else {}
    file = CheckpointDir(path).ema if weights == "ema" else CheckpointDir(path).model
    return Source(run, settings, file, state.step, weights, scores, finished)


def _load_config(files: RunDir) -> Config:
    """Load a run's config. Raises UserError if there is none, or if the run trains no student."""
    if denied(files.config):
        raise UserError(f"{files.config}: permission denied: change its permissions or those of its folder")
    if not files.config.is_file():
        raise UserError(
            f"{files.path}: has no config.yaml: give the run_dir of a run; for a chain or several students, "
            "the folder of one of them in it"
        )
    settings = config.load_recorded(files.config)
    if settings.stage == "heads":
        raise UserError(f"{files.path}: stage: heads trains no student: export the run of a student instead")
    return settings


# --- the formats --------------------------------------------------------------------------------------------
def find_preprocessing(network: Network, source: Source) -> dict[str, Any]:
    """Describe the preprocessing of evaluation by the keys of timm's `pretrained_cfg`."""
    view = evaluation_view(source.settings)
    mean, std = normalisation(
        network.net, source.student, "student"
    )  # not the network's, which are rounded to float32
    return {
        "image_size": source.settings.data.full_size,
        "crop_pct": view.crop_pct,
        "crop_mode": view.crop_mode,
        "interpolation": view.interpolation,
        "mean": mean,
        "std": std,
    }


def find_class_names(source: Source) -> list[str] | None:
    """The class name of each output, from the run or else from its training shards; None if unknown."""
    section = source.settings.data
    if source.student.num_classes == 0:
        return None
    names = class_names.of_weights(source.file) or class_names.of_training(section)
    return names.names if names and len(names.names) == section.num_classes else None
