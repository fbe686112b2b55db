"""Checkpoints: copied to host memory in a moment, written by a thread, hashed, renamed once all ranks have written.

`step-XXXXXXXX` (completed optimizer steps) holds the student, its moving average, each rank's part of the optimizer's
state, `state.json`, and `manifest.json` with the size and the SHA-256 of all these. The teacher is not in it. Random
states and the position in the data are not either: both are functions of the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.operations import recursively_apply
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import distributed, nn

from indistill import config
from indistill.config import UserError, in_one_line
from indistill.config.files import sha256
from indistill.config.run_dir import CheckpointDir, RunDir, checkpoint_step
from indistill.distributed.engine import Engine, on_main

FORMAT_VERSION = 4
MOST_FAILURES = 3  # saves in a row that may fail before the run does


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
        engine: Engine,
        files: RunDir,
        section: config.Checkpoint,
        identity: dict[str, str],
        parts: dict[str, Stateful],
        whole: Callable[[], nn.Module],
    ) -> None:
        self.engine, self.accelerator = engine, engine.accelerator
        self.files, self.whole = files, whole
        self.folder = files.checkpoints
        self.section, self.identity, self.parts = section, identity, parts
        self.saved_at, self.best_top1 = time.monotonic(), -1.0
        self.writer: Thread | None = None
        self.crash: Exception | None = None  # of the writer: no disk's fault
        self.failure: str | None = None  # of the last save, known to all ranks once it has ended
        self.failures_in_a_row = 0
        # The writers' own, so that they can agree while the ranks train.
        self.group = distributed.new_group(backend="gloo") if self.accelerator.num_processes > 1 else None

    # --- resuming ----------------------------------------------------------------------------------------------------

    def resume(self, choice: str, ema: ModelEmaV3 | None) -> tuple[int, dict[str, float] | None]:
        """Restore what `--resume auto|never|PATH` means: the completed steps, and the scores if then evaluated.

        No scores but None says that the evaluation is still to be done.
        """
        path, state = on_main(self.accelerator, lambda: self.find(choice))
        if path is None:
            return 0, {}
        self.load(path, ema)
        self.best_top1 = state["best_top1"]
        for name, part in self.parts.items():
            part.restore(state["parts"][name])
        if self.accelerator.is_main_process:  # accelerator.print would say it on every node
            print(f"resumed from {path} at step {state['step']}", flush=True)
        return state["step"], state["scores"]

    def find(self, choice: str) -> tuple[Path | None, dict[str, Any]]:
        """The checkpoint to resume from, verified, with the content of `state.json`; None to start anew.

        A damaged one is passed over for the one before, unless it was named. Later ones then no longer count.
        """
        for path in self.folder.glob(".*"):  # what a kill left half-written or half-deleted
            shutil.rmtree(path)
        found = self.files.saved_checkpoints()
        if choice == "never" and found:
            raise UserError(
                f"{self.folder.parent} holds a run already: choose another run_dir, or --resume auto"
            )
        if choice in ("auto", "never"):
            candidates = found[::-1]
        else:
            candidates = [Path(choice)]
            if not candidates[0].is_dir():
                raise UserError(
                    f"--resume {choice}: no checkpoint there: give a directory called step-XXXXXXXX"
                )
        for path in candidates:
            damage = damaged(path)
            if damage is None:
                state = self.checked_state(path)
                self.set_aside_later(state["step"])
                return path, state
            print(f"indistill: {path} is damaged ({damage}) and passed over", file=sys.stderr, flush=True)
        if candidates:
            raise UserError(f"{path}: damaged ({damage}), and no other to go on from: choose another run_dir")
        return None, {}

    def checked_state(self, path: Path) -> dict[str, Any]:
        """The content of `state.json`. Raises UserError, naming what differs from this run."""
        state = json.loads(CheckpointDir(path).state.read_text())
        if state["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: format {state['format_version']}, this version reads {FORMAT_VERSION}")
        for name, value in self.identity.items():
            if (saved := state["identity"][name]) != value:
                which = f" ({saved}, not {value})" if name == "engine" else ""
                raise UserError(f"{path}: saved with another {name}{which}: resume with the one of that run")
        return state

    def load(self, path: Path, ema: ModelEmaV3 | None) -> None:
        """Restore networks and optimizer in place, on all ranks."""
        files = CheckpointDir(path).optimizers()
        parts = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        self.engine.restore(load_file(CheckpointDir(path).model), parts)
        if ema is not None:
            ema.module.load_state_dict(load_file(CheckpointDir(path).ema))

    def set_aside_later(self, step: int) -> None:
        """Going back to an earlier checkpoint: later ones of this run no longer count, nor is it at its end."""
        for path in self.files.saved_checkpoints():
            if checkpoint_step(path) > step:
                self.files.summary.unlink(missing_ok=True)
                path.rename(path.with_name(f"superseded-{path.name}-{time.time_ns()}"))

    # --- saving ------------------------------------------------------------------------------------------------------

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

    def save(self, step: int, ema: ModelEmaV3 | None, scores: dict[str, float] | None) -> None:
        """Begin to write `step-XXXXXXXX`; call on all ranks. `scores["top1"]`, where there is one, ranks the best.

        Returns when the state is in host memory, after waiting for the save before, if that is still under way. Raises
        UserError if MOST_FAILURES in a row could not be written.
        """
        self.wait()
        if self.failures_in_a_row >= MOST_FAILURES:
            raise UserError(
                f"{self.folder}: the last {MOST_FAILURES} checkpoints could not be written ({self.failure}): make "
                "room or mend the disk, and start again"
            )
        self.best_top1 = max(self.best_top1, (scores or {}).get("top1", -1.0))
        content = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "identity": self.identity,
            "scores": scores,
            "best_top1": self.best_top1,
            "parts": {name: part.state() for name, part in self.parts.items()},
        }
        files: dict[str, Any] = {}
        if part := self.engine.optimizer_part():
            files[f"optimizer-{self.accelerator.process_index:05d}.pt"] = part
        weights = self.whole().state_dict()
        if self.accelerator.is_main_process:
            files |= {"model.safetensors": weights, "state.json": content}
            if ema is not None:
                files["ema.safetensors"] = ema.module.state_dict()
        files = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), files)
        self.writer = Thread(target=self._write, args=(step, files), name="checkpoint", daemon=True)
        self.writer.start()
        self.saved_at = time.monotonic()

    def wait(self) -> None:
        """Until the save under way has ended, well or not. Call on all ranks. Raises what the writer did not expect."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
            if self.crash is not None:
                raise self.crash
            self.failures_in_a_row = self.failures_in_a_row + 1 if self.failure else 0

    def close(self) -> None:
        """At the end of a run: raises UserError if its last checkpoint could not be written."""
        self.wait()
        if self.group is not None:
            distributed.destroy_process_group(self.group)
        if self.failure:
            raise UserError(
                f"{self.folder}: the last checkpoint could not be written ({self.failure}): make room or mend the "
                "disk, and start again"
            )

    def _write(self, step: int, files: dict[str, Any]) -> None:
        """In a thread of each rank."""
        final = self.files.checkpoint(step)
        partial = self.folder / f".partial-{final.name}"
        try:
            self.failure = self._written(partial, final, files)
        except RuntimeError as error:  # a rank is gone, as the next step will find
            self.failure = f"the ranks cannot agree: {error}"
        except Exception as error:  # a thread cannot end the run: `wait` does
            self.crash = error
            return
        if self.accelerator.is_main_process and self.failure:
            shutil.rmtree(partial, ignore_errors=True)  # it may be what fills the disk
            with contextlib.suppress(OSError):  # the log may be on the disk that is full
                print(
                    f"indistill: CHECKPOINT NOT WRITTEN at step {step}: {self.failure}. The run goes on; the "
                    "checkpoint before is the last.",
                    file=sys.stderr,
                    flush=True,
                )

    def _written(self, partial: Path, final: Path, files: dict[str, Any]) -> str | None:
        """Write this rank's files, agree that all ranks have, and let rank 0 put the name on them; what failed, if any.

        The answer is the same on all ranks.
        """
        manifest, failure = {}, None
        try:
            partial.mkdir(exist_ok=True)
            manifest = {name: _write_file(partial / name, content) for name, content in files.items()}
        except Exception as error:  # whatever a full or broken disk makes of the libraries' writers
            failure = f"rank {self.accelerator.process_index}: {in_one_line(error, 300)}"
        for of_rank, failure_of_rank in self._from_all((manifest, failure)):
            manifest, failure = manifest | of_rank, failure or failure_of_rank
        if self.accelerator.is_main_process and failure is None:
            try:
                _write_file(CheckpointDir(partial).manifest, manifest)
                self._publish(partial, final)
            except OSError as error:
                failure = str(error)
        return self._from_all(failure)[0]

    def _from_all(self, mine: Any) -> list[Any]:
        if self.group is None:
            return [mine]
        told = [None] * self.accelerator.num_processes
        distributed.all_gather_object(told, mine, group=self.group)
        return told

    def _publish(self, partial: Path, final: Path) -> None:
        if final.exists():  # saved before its evaluation, which a preemption had stopped
            final.rename(final.with_name(f".deleted-{final.name}"))
        partial.rename(final)
        # Keep the newest `keep_last` and the `keep_best` of highest top-1 (the newer of equals).
        paths = self.files.saved_checkpoints()
        scored = [(top1, path) for path in paths if (top1 := _top1(path)) is not None]
        kept = set(paths[-self.section.keep_last :])
        kept.update(path for _, path in sorted(scored)[len(scored) - self.section.keep_best :])
        for path in paths:
            if path not in kept:
                path.rename(path.with_name(f".deleted-{path.name}"))  # never half there under its name
        for path in self.folder.glob(".deleted-*"):
            shutil.rmtree(path)


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, found by sizes and hashes; None if nothing is."""
    try:
        manifest = json.loads(CheckpointDir(path).manifest.read_text())
        for name, entry in manifest.items():
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, not {entry['bytes']}"
            if sha256(path / name) != entry["sha256"]:
                return f"{name} has another SHA-256 than when it was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json or a file that it names cannot be read: {in_one_line(error, 200)}"
    return None


def _write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write it to the disk itself; returns its entry in the manifest."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    elif path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(json.dumps(content))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _top1(path: Path) -> float | None:
    return (json.loads(CheckpointDir(path).state.read_text())["scores"] or {}).get("top1")
