"""Find a run's student: its weights, its preprocessing and its class names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from indistill import config
from indistill.config import Config, UserError
from indistill.data import class_names
from indistill.models.network import Network, normalisation
from indistill.models.views import evaluation_view
from indistill.training import checkpoint


class Source(NamedTuple):
    """What of a run is exported."""

    run: Path
    settings: Config
    file: Path
    step: int
    weights: str  # ema or raw
    scores: dict[str, float]  # of these very weights; empty if they were not evaluated
    finished: bool


# --- export ----------------------------------------------------------------------------------------------------------
def find(run: Path, weights: str | None = None, step: str | None = None) -> Source:
    """Raises UserError, with the remedy, if the run has not what is asked for."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run}: holds no config.yaml: give the run_dir of a run, or, of a chain or several students, one's folder "
            "in it"
        )
    settings = config.load_recorded(run / "config.yaml")
    if settings.stage == "heads":
        raise UserError(f"{run}: stage: heads trains no student: export the run of one that learns from them")
    if weights == "ema" and settings.ema is None:
        raise UserError(f"{run}: kept no moving average (ema): export --weights raw")
    evaluated = "raw" if settings.ema is None else "ema"
    weights = weights or evaluated
    summary, student = run / "summary.json", run / "student.safetensors"
    finished = summary.is_file() and student.is_file()
    if finished and step is None and weights == evaluated:
        content = _read_json(summary)
        return Source(run, settings, student, content["step"], weights, content["metrics"], finished)

    saved = checkpoint.saved(run / "checkpoints")
    names = ", ".join(path.name for path in saved)
    if step is None and not saved:
        raise UserError(
            f"{run}: holds no {'raw weights: no' if finished else 'student.safetensors and no'} checkpoint"
        )
    path = saved[-1] if step is None else run / "checkpoints" / step
    if path not in saved:
        raise UserError(f"--checkpoint {step}: no checkpoint of {run}, which has {names or 'none'}")
    if damage := checkpoint.damaged(path):
        raise UserError(f"{path}: damaged ({damage}): choose another with --checkpoint: {names}")
    state = _read_json(path / "state.json")
    scores = (state["scores"] or {}) if weights == evaluated else {}
    file = path / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    return Source(run, settings, file, state["step"], weights, scores, finished)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


# --- the formats -----------------------------------------------------------------------------------------------------
def find_preprocessing(network: Network, settings: Config) -> dict[str, Any]:
    """What evaluation did with an image (augment.eval_view), in timm's words."""
    view = evaluation_view(settings)
    return {
        "image_size": settings.data.image_size,
        "crop_pct": view.crop_pct,
        "crop_mode": view.crop_mode,
        "interpolation": view.interpolation,
        # As they were given: float32 of them would be other numbers.
        **dict(zip(("mean", "std"), normalisation(network.net, settings.student, "student"))),
    }


def find_class_names(source: Source) -> list[str] | None:
    """The class of each output, from the run or else from beside its training shards; None if that is not known."""
    section = source.settings.data
    found = class_names.of_weights(source.file) or class_names.of_training(section)
    return found.names if found and len(found.names) == section.num_classes else None
