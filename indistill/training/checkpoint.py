"""Checkpoints: copied to host memory, written and hashed by a thread, renamed once all ranks have written.

`step-XXXXXXXX` (completed optimizer steps) contains the student, its moving average, each rank's part of the
optimizer's state, `state.json`, and `manifest.json` with the size and the SHA-256 of these files. It contains
neither the teacher, nor random states and the position in the data: both are functions of the step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

import safetensors.torch
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.operations import recursively_apply
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn

from indistill import config
from indistill.config import UserError, in_one_line, metric_names, records
from indistill.config.files import HashedFile, sha256
from indistill.config.records import CHECKPOINT_VERSION, State
from indistill.config.run_dir import CheckpointDir, RunDir, checkpoint_step
from indistill.distributed.engine import Engine, on_main
from indistill.models.weights import misfit

MOST_FAILURES = 3  # saves in a row that may fail before the run does
VISIBLE_SECONDS = 60.0  # until rank 0 sees a file of another node; file systems keep old lists of names


class Stateful(Protocol):
    """A part of a run with a state of its own: small, JSON-able, and the same on every rank."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The `checkpoints/` folder of a run.

    `identity` (config, plan, data, teacher, engine) must be the same at save and resume, or as `earlier`
    versions of this program wrote it; if only the source file of a plugin's loss differs, the run goes on
    with a warning. `parts` are saved with the networks. `whole` returns the student with all its weights; it
    is called on all ranks. `published` is called on rank 0, in the writer's thread, once a checkpoint has its
    name and the older ones are deleted.
    """

    def __init__(
        self,
        engine: Engine,
        files: RunDir,
        *,
        section: config.Checkpoint,
        identity: dict[str, str],
        earlier: Mapping[str, str],
        parts: Mapping[str, Stateful],
        whole: Callable[[], nn.Module],
        published: Callable[[], None],
    ) -> None:
        self.engine = engine
        self.accelerator = engine.accelerator
        self.files = files
        self.folder = files.checkpoints
        self.section = section
        self.identity = identity
        self.earlier = earlier
        self.parts = parts
        self.whole = whole
        self.published = published
        self.saved_at = time.monotonic()
        self.best_top1 = -1.0
        self.writer: Thread | None = None
        self.crash: Exception | None = None  # of the writer's thread, and not the disk's fault
        self.failure: str | None = None  # of the last save, known to all ranks once it has ended
        self.failures_in_a_row = 0
        self.warned: set[Path] = set()  # what could not be deleted, said once
        # A group for the writers alone, so that they can agree while the ranks train. (Any: torch's type hint
        # allows an int, for ranks that are not in the group.)
        self.group: Any = (
            distributed.new_group(backend="gloo") if engine.accelerator.num_processes > 1 else None
        )

    # --- resuming -------------------------------------------------------------------------------------------

    def resume(self, choice: str, ema: ModelEmaV3 | None) -> tuple[int, dict[str, float] | None]:
        """Load the checkpoint that `--resume auto|never|PATH` names; return its completed steps and its
        scores.

        The scores are {} if no evaluation was due at that step, and None if one was due and has not been
        made.
        """
        path, state = on_main(self.accelerator, lambda: self.find(choice))
        if path is None or state is None:
            return 0, {}
        try:
            self.load(path, ema)
            for name, part in self.parts.items():
                part.restore(getattr(state.parts, name).model_dump(exclude_unset=True))
        except UserError as error:
            raise UserError(f"{path}: {error}: resume from another checkpoint, with --resume PATH") from None
        self.best_top1 = state.best_top1
        if self.accelerator.is_main_process:  # accelerator.print would print it on every node
            print(f"resumed from {path} at step {state.step}", flush=True)
        return state.step, state.scores

    def find(self, choice: str) -> tuple[Path | None, State | None]:
        """Return the checkpoint to resume from, verified, and its `state.json`; None to start from the first
        step.

        If a checkpoint is damaged, the one before it is taken, unless it was named. Later ones then no longer
        count.
        """
        self._finish_killed_save()
        self._sweep()
        candidates = self._candidates(choice)
        for path in candidates:
            damage = damaged(path)
            if damage is None:
                state = self.checked_state(path)
                self.set_aside_later(state.step)
                return path, state
            print(f"indistill: {path} is damaged ({damage}) and passed over", file=sys.stderr, flush=True)
        if candidates:
            raise UserError(f"{path}: damaged ({damage}), and no other to go on from: choose another run_dir")
        return None, None

    def _candidates(self, choice: str) -> list[Path]:
        """The checkpoints that `--resume choice` allows, the preferred one first."""
        if choice not in ("auto", "never"):
            _check_named(choice)
            return [Path(choice)]
        saved = self.files.saved_checkpoints()
        if choice == "never" and saved:
            raise UserError(
                f"{self.files.path} holds a run already: choose another run_dir, or --resume auto"
            )
        return saved[::-1]

    def checked_state(self, path: Path) -> State:
        """Read `state.json`. Raises UserError, naming what differs from this run."""
        state = read_state(path)
        for name, value in self.identity.items():
            if (saved := state.identity.get(name)) in (value, self.earlier.get(name, value)):
                continue
            if not name.startswith("loss "):
                values = f" ({saved}, not {value})" if name == "engine" else ""
                raise UserError(f"{path}: saved with another {name}{values}: resume with the one of that run")
            if saved is not None:  # a mended plugin may go on; checkpoints of earlier versions do not say
                _say(
                    f"WARNING: {name}: its code has changed since {path} was saved ({saved}, now {value}): "
                    "the run goes on with the code of now"
                )
        return state

    def load(self, path: Path, ema: ModelEmaV3 | None) -> None:
        """Restore networks and optimizer in place, on all ranks."""
        files = CheckpointDir(path)
        parts = [_read(file) for file in files.optimizers()]
        self.engine.restore(_read(files.model), parts)
        if ema is not None:
            average = _read(files.ema)
            if problem := misfit(average, ema.module.state_dict()):
                raise UserError(f"{files.ema.name} {problem}")
            ema.module.load_state_dict(average)

    def set_aside_later(self, step: int) -> None:
        """Set aside the later checkpoints of a run that goes back to `step`, and delete its summary."""
        for path in self.files.saved_checkpoints():
            if checkpoint_step(path) > step:
                self.files.summary.unlink(missing_ok=True)
                try:
                    path.rename(path.with_name(f"superseded-{path.name}-{time.time_ns()}"))
                except OSError as error:
                    raise UserError(
                        f"{path}: is later than step {step}, and cannot be renamed ({error.strerror}): "
                        "move it away"
                    ) from None

    def _finish_killed_save(self) -> None:
        """Give a checkpoint its name that was complete when its run was killed just before."""
        for path in self.files.left_over_checkpoints():
            final = self.folder / path.name.removeprefix(".partial-")
            if CheckpointDir(path).manifest.is_file() and not os.path.lexists(final) and not damaged(path):
                with contextlib.suppress(OSError):
                    path.rename(final)

    def _sweep(self) -> None:
        """Delete what a kill left half-written or half-deleted, under names that only this class gives."""
        for path in self.files.left_over_checkpoints():
            try:
                _delete(path)
            except OSError as error:
                self._warn(path, error)

    def _warn(self, path: Path, error: Exception) -> None:
        """Say once that a path cannot be deleted."""
        if path not in self.warned:
            self.warned.add(path)
            reason = in_one_line(error, 200)
            _say(f"{path} cannot be deleted ({reason}): this is tried again after the next checkpoint")

    # --- saving ---------------------------------------------------------------------------------------------

    def due(self, step: int, logged: bool, scores: dict[str, float]) -> bool:
        """Whether to save after `step` steps.

        For `every_minutes` rank 0's clock counts, broadcast to all ranks, and only at logged steps.
        """
        if self.section.keep_best and _score(scores) > self.best_top1:
            return True
        if self.section.every_steps and step % self.section.every_steps == 0:
            return True
        if not (self.section.every_minutes and logged):
            return False
        late = [time.monotonic() - self.saved_at > 60 * self.section.every_minutes]
        return broadcast_object_list(late)[0]

    def save(self, step: int, ema: ModelEmaV3 | None, scores: dict[str, float] | None) -> None:
        """Begin to write `step-XXXXXXXX`; call on all ranks. The best checkpoints are those of the highest
        `top1`.

        Waits for the save before, if it is still under way, and returns when the state is in host memory.
        Raises UserError if MOST_FAILURES saves in a row failed.
        """
        self.wait()
        if self.failures_in_a_row >= MOST_FAILURES:
            raise UserError(
                f"{self.folder}: the last {MOST_FAILURES} checkpoints could not be written ({self.failure}): "
                "make room or mend the disk, and start again"
            )
        self.best_top1 = max(self.best_top1, _score(scores))
        state = {
            "format_version": CHECKPOINT_VERSION,
            "step": step,
            "identity": self.identity,
            "scores": scores,
            "best_top1": self.best_top1,
            "parts": {name: part.state() for name, part in self.parts.items()},
        }
        final = self.files.checkpoint(step)
        # Written under another name, so that a checkpoint which is there under its own is complete.
        partial = CheckpointDir(self.folder / f".partial-{final.name}")
        contents: dict[Path, Any] = {}  # of the files that this rank writes
        if part := self.engine.optimizer_part():
            contents[partial.optimizer(self.accelerator.process_index)] = part
        weights = self.whole().state_dict()
        if self.accelerator.is_main_process:
            contents |= {partial.model: weights, partial.state: state}
            if ema is not None:
                contents[partial.ema] = ema.module.state_dict()
        contents = recursively_apply(lambda tensor: tensor.detach().to("cpu", copy=True), contents)
        self.writer = Thread(
            target=self._write, args=(step, partial, final, contents), name="checkpoint", daemon=True
        )
        self.writer.start()
        self.saved_at = time.monotonic()

    def wait(self) -> None:
        """Wait for the save under way. Call on all ranks. Raises the writer's unexpected errors."""
        if self.writer is not None:
            self.writer.join()
            self.writer = None
            if self.crash is not None:
                raise self.crash
            self.failures_in_a_row = self.failures_in_a_row + 1 if self.failure else 0

    def close(self) -> None:
        """Wait for the last save, at the end of a run. Raises UserError if it failed."""
        self.wait()
        if self.group is not None:
            distributed.destroy_process_group(self.group)
        if self.failure:
            raise UserError(
                f"{self.folder}: the last checkpoint could not be written ({self.failure}): make room or "
                "mend the disk, and start again"
            )

    def _write(self, step: int, partial: CheckpointDir, final: Path, contents: dict[Path, Any]) -> None:
        """Write a checkpoint, in a thread of each rank."""
        try:
            self.failure = self._write_and_publish(partial, final, contents)
        except RuntimeError as error:  # a rank is gone, as the next step will find out
            self.failure = f"the ranks cannot agree: {error}"
        except Exception as error:  # a thread cannot end the run: `wait` raises it
            self.crash = error
            return
        if not self.accelerator.is_main_process:
            return
        if self.failure:
            shutil.rmtree(partial.path, ignore_errors=True)  # it may be what fills the disk
            _say(
                f"CHECKPOINT NOT WRITTEN at step {step}: {self.failure}. The run goes on; the checkpoint "
                "before is the last."
            )
            return
        try:
            self._delete_older()
        except Exception as error:  # the new checkpoint is there, whatever is wrong with the others
            self._warn(self.folder, error)
        self.published()

    def _write_and_publish(
        self, partial: CheckpointDir, final: Path, contents: dict[Path, Any]
    ) -> str | None:
        """Write this rank's files, then have rank 0 rename the folder; return why that failed, or None.

        The answer is the same on all ranks.
        """
        manifest: dict[str, Any] = {}
        failure = None
        unexpected: Exception | None = None  # of rank 0, and not the disk's fault; all ranks hear of it
        try:
            if contents:  # else the folder may not be on this node
                partial.path.mkdir(exist_ok=True)
            manifest = {path.name: _write_file(path, content) for path, content in contents.items()}
        except Exception as error:  # the libraries' writers raise many kinds on a full or broken disk
            failure = f"rank {self.accelerator.process_index}: {in_one_line(error, 300)}"
        for manifest_of_rank, failure_of_rank in self._from_all((manifest, failure)):
            manifest |= manifest_of_rank
            failure = failure or failure_of_rank
        if self.accelerator.is_main_process and failure is None:
            try:
                _write_file(partial.manifest, manifest)
                _publish(partial, final, manifest)
            except OSError as error:
                failure = str(error)
            except Exception as error:
                unexpected = error
        failure, crash = self._from_all((failure, unexpected and in_one_line(unexpected, with_type=True)))[0]
        if crash is not None:
            raise unexpected or UserError(f"rank 0: {crash}")
        return failure

    def _from_all(self, mine: Any) -> list[Any]:
        """Gather one value from each rank's writer."""
        if self.group is None:
            return [mine]
        gathered: list[Any] = [None] * self.accelerator.num_processes
        distributed.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def _delete_older(self) -> None:
        """Delete the checkpoints that are no longer to be kept; one that is cut neither counts nor goes.

        The newest `keep_last` and the `keep_best` of highest top-1 (the newer of equals) are kept.
        """
        paths = [path for path in self.files.saved_checkpoints() if damaged(path, hashes=False) is None]
        scored = [(top1, path) for path in paths if (top1 := _top1(path)) is not None]
        kept = set(paths[-self.section.keep_last :])
        kept.update(path for _, path in sorted(scored)[len(scored) - self.section.keep_best :])
        for path in paths:
            if path not in kept:
                try:
                    _retire(path)
                except OSError as error:
                    self._warn(path, error)
        self._sweep()


def _publish(partial: CheckpointDir, final: Path, manifest: Mapping[str, Any]) -> None:
    """Give a complete checkpoint its name. Raises OSError if a rank has written its part elsewhere."""
    end = time.monotonic() + VISIBLE_SECONDS
    for name in manifest:
        while not (partial.path / name).exists():
            if time.monotonic() > end:
                raise OSError(f"{name} of another node is not there: run_dir must be one that all nodes see")
            time.sleep(0.5)
    for path in partial.optimizers():
        if path.name not in manifest:  # of an earlier save of this step, on more ranks, that was killed
            path.unlink()
    if os.path.lexists(final):  # saved before its evaluation, which a preemption had stopped
        _retire(final)
    partial.path.rename(final)


def _retire(path: Path) -> None:
    """Rename a checkpoint before it is deleted, so that an incomplete one never has its name."""
    path.rename(path.with_name(f".deleted-{path.name}-{time.time_ns()}"))


def _delete(path: Path) -> None:
    """Delete a folder with all that can be deleted in it, or a file or link. Raises OSError if it stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        shutil.rmtree(path)  # for the reason


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(f"indistill: {line}", file=sys.stderr, flush=True)


def damaged(path: Path, *, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, by sizes and hashes of its files; None if nothing is.

    hashes: compare the files' SHA-256, too.
    """
    files = CheckpointDir(path)
    try:
        manifest = records.load(files.manifest, records.CheckpointManifest, "not to be used").root
        for required in (files.model.name, files.state.name):
            if required not in manifest:
                return f"{required} is not in {files.manifest.name}"
        for name, entry in manifest.items():
            file = path / name
            if not stat.S_ISREG((status := file.stat()).st_mode):
                return f"{name} is not a file of it"
            if status.st_size != entry.bytes:
                return f"{name} has {status.st_size} bytes, not {entry.bytes}"
            if hashes and sha256(file) != entry.sha256:
                return f"{name} has another SHA-256 than when it was written"
        with contextlib.suppress(records.OtherVersion):  # refused by name in `checked_state`
            read_state(path)
    except (OSError, UserError) as error:
        reason = in_one_line(error, 200)
        return f"{files.manifest.name} or a file that it names cannot be read: {reason}"
    return None


def _check_named(choice: str) -> None:
    """Check that `--resume choice` names a checkpoint, damaged or not. Raises UserError if it does not."""
    path = Path(choice)
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--resume {choice}: no checkpoint there: give a directory called step-XXXXXXXX"
        ) from None
    except OSError as error:
        raise UserError(f"--resume {choice}: cannot be read ({error.strerror}): mend that") from None
    files = CheckpointDir(path)
    if {files.manifest.name, files.state.name}.isdisjoint(names):
        saved = RunDir(path).saved_checkpoints() or RunDir(path.parent).saved_checkpoints()
        example = saved[-1] if saved else "step-XXXXXXXX"
        raise UserError(f"--resume {choice}: is not a checkpoint itself: give one, such as {example}")


def read_state(path: Path) -> State:
    """Read `state.json` of a checkpoint. Raises UserError if it is damaged or has another version."""
    return records.load(CheckpointDir(path).state, State, "go on from another checkpoint, or start again")


def _read(path: Path) -> dict[str, Any]:
    """Read the tensors of a checkpoint's file. Raises UserError if it is not what this program writes."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the libraries raise many kinds for a damaged file
        raise UserError(f"{path.name} cannot be read ({in_one_line(error, 200)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path.name} is not a mapping")
    return content


def _write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a file through to the disk; return its entry in the manifest."""
    with HashedFile(path) as file:
        if path.suffix == ".safetensors":
            _write_safetensors(file, content)
        elif path.suffix == ".pt":
            torch.save(content, file)
        else:
            file.write(json.dumps(content).encode())
    return {"bytes": file.size, "sha256": file.sha256}


def _write_safetensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Write what `safetensors.torch.save_file` writes, byte for byte, to a stream.

    The library writes to a path alone, or to memory, which would take a second copy of the weights there.
    From it come the order of the tensors and the names of their types, in the header of empty ones.
    """
    empty = safetensors.torch.save({name: value.new_empty(0) for name, value in tensors.items()})
    header = json.loads(empty[8:])
    end = 0
    for name, entry in header.items():
        begin, end = end, end + tensors[name].nbytes
        entry |= {"shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for name in header:
        tensor = tensors[name].contiguous()  # a copy, of channels_last weights; one at a time
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _top1(path: Path) -> float | None:
    """The top-1 of a checkpoint, by classifier or k-NN; None if it was not evaluated or is damaged."""
    try:
        return metric_names.deciding(read_state(path).scores or {})
    except UserError:
        return None


def _score(scores: Mapping[str, float] | None) -> float:
    """The score that decides which checkpoints are the best; -1 without one."""
    score = metric_names.deciding(scores or {})
    return -1.0 if score is None else score
