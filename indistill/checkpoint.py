"""Checkpoints: written aside and renamed, so that a directory called `step-XXXXXXXX` is always whole.

The number is that of completed optimizer steps. A checkpoint holds student, optimizer, gradient scaler, random states,
moving average and `state.json`; the teacher is not in it, and the data order needs no state beyond the step.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import nn

from indistill import config, engine
from indistill.config import UserError

FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8,})")


class Stateful(Protocol):
    """What has a state beside tensors: small and JSON-able, the same on every rank."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The `checkpoints/` folder of a run.

    `identity` (config, plan, data, teacher, engine) must be the same at save and resume; `parts` are saved with the
    networks. `whole` gives the student with all its weights, on all ranks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        section: config.Checkpoint,
        identity: dict[str, str],
        parts: dict[str, Stateful],
        whole: Callable[[], nn.Module],
    ) -> None:
        self.accelerator, self.folder, self.whole = accelerator, run_dir / "checkpoints", whole
        self.section, self.identity, self.parts = section, identity, parts
        self.saved_at, self.best_top1 = time.monotonic(), -1.0

    def resume(self, choice: str, ema: ModelEmaV3 | None) -> tuple[int, dict[str, float] | None]:
        """Restore what `--resume auto|never|PATH` means: the completed steps, and the scores if then evaluated.

        No scores but None says that the evaluation is still to be done.
        """
        path = self.find(choice)
        if path is None:
            return 0, {}
        state = self.load(path, ema)
        self.set_aside_later(state["step"])
        self.best_top1 = state["best_top1"]
        for name, part in self.parts.items():
            part.restore(state["parts"][name])
        if self.accelerator.is_main_process:  # accelerator.print would say it on every node
            print(f"resumed from {path} at step {state['step']}", flush=True)
        return state["step"], state["scores"]

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `--resume auto|never|PATH` means, None to start anew. Raises UserError."""
        newest = max(complete(self.folder), default=None)
        if resume == "never":
            if newest is not None:
                raise UserError(f"{self.folder.parent} holds a run already: choose another run_dir, or --resume auto")
            return None
        if resume == "auto":
            return newest
        if not (Path(resume) / "state.json").is_file():
            raise UserError(f"--resume {resume}: no checkpoint there: give a directory called step-XXXXXXXX")
        return Path(resume)

    def load(self, path: Path, ema: ModelEmaV3 | None) -> dict[str, Any]:
        """Restore everything in place; returns the content of `state.json`. Raises UserError, naming what differs."""
        try:
            state = json.loads((path / "state.json").read_text())
            if state["format_version"] != FORMAT_VERSION:
                raise UserError(f"{path}: format {state['format_version']}, this version reads {FORMAT_VERSION}")
            for name, value in self.identity.items():
                if (saved := state["identity"][name]) != value:
                    which = f" ({saved}, not {value})" if name == "engine" else ""
                    raise UserError(f"{path}: saved with another {name}{which}: resume with the one of that run")
            engine.load_state(self.accelerator, path)
            if ema is not None:
                load_model(ema.module, path / "ema.safetensors")
        except UserError:
            raise
        except Exception as error:  # a damaged file fails in json, zip, pickle, safetensors or on a missing key
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: damaged ({reason}): delete it to resume from the one before") from None
        return state

    def set_aside_later(self, step: int) -> None:
        """Going back to an earlier checkpoint: later ones of this run no longer count, nor is it at its end."""
        if self.accelerator.is_main_process:
            for path in complete(self.folder):
                if _step(path) > step:
                    (self.folder.parent / "summary.json").unlink(missing_ok=True)
                    path.rename(path.with_name(f"superseded-{path.name}-{time.time_ns()}"))

    def due(self, step: int, logged: bool, scores: dict[str, float]) -> bool:
        """Whether to save after `step` steps. The clock is rank 0's, asked at logged steps: it costs a broadcast."""
        if self.section.keep_best and scores.get("top1", -1.0) > self.best_top1:
            return True
        if self.section.every_steps and step % self.section.every_steps == 0:
            return True
        if not (self.section.every_minutes and logged):
            return False
        late = [time.monotonic() - self.saved_at > 60 * self.section.every_minutes]
        return broadcast_object_list(late)[0]

    def save(self, step: int, ema: ModelEmaV3 | None, scores: dict[str, float] | None) -> Path:
        """Write `step-XXXXXXXX`; call on all ranks. `scores["top1"]`, where there is one, ranks the best."""
        self.best_top1 = max(self.best_top1, (scores or {}).get("top1", -1.0))
        states = {name: part.state() for name, part in self.parts.items()}
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".partial-{final.name}"
        main = self.accelerator.is_main_process
        if main:
            for path in self.folder.glob(".*"):  # what a kill left half-written or half-deleted
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        weights = self.whole() if engine.stage(self.accelerator) else None  # ZeRO's files are of use to ZeRO alone
        if main:
            if weights is not None:
                save_model(weights, str(partial / "model.safetensors"))
            if ema is not None:
                save_model(ema.module, str(partial / "ema.safetensors"))
            content = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "identity": self.identity,
                "scores": scores,
                "best_top1": self.best_top1,
                "parts": states,
            }
            (partial / "state.json").write_text(json.dumps(content))
        self.accelerator.wait_for_everyone()
        if main:
            if final.exists():  # saved before its evaluation, which a preemption had stopped
                final.rename(final.with_name(f".deleted-{final.name}"))
            partial.rename(final)
            self._retain()
            for tracker in self.accelerator.trackers:
                tracker.tracker.flush()  # TensorBoard's record then reaches as far as the checkpoint
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()
        return final

    def _retain(self) -> None:
        """Keep the newest `keep_last` and the `keep_best` of highest top-1 (the newer of equals)."""
        paths = sorted(complete(self.folder))
        scored = [(top1, path) for path in paths if (top1 := _top1(path)) is not None]
        kept = set(paths[-self.section.keep_last :])
        kept.update(path for _, path in sorted(scored)[len(scored) - self.section.keep_best :])
        for path in paths:
            if path not in kept:
                shutil.rmtree(path.rename(path.with_name(f".deleted-{path.name}")))  # never half there under its name


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end."""
    return [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "state.json").is_file()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _top1(path: Path) -> float | None:
    return (json.loads((path / "state.json").read_text())["scores"] or {}).get("top1")
