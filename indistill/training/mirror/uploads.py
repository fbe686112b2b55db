"""Keep a mirror like the run directory, by a thread of rank 0."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from indistill.config import Config, UserError, in_one_line, run_lock, tree
from indistill.config.files import read_json, replace_text, sha256
from indistill.config.ranks import Ranks
from indistill.config.run_dir import CheckpointDir, RunDir, checkpoint_of, is_record
from indistill.data import remote
from indistill.distributed import preemption
from indistill.distributed.engine import Engine, on_main
from indistill.training.checkpoint import damaged
from indistill.training.mirror.fetch import check_owner, download, record_of
from indistill.training.mirror.store import (
    NAMES,
    Store,
    complete_checkpoints,
    mark_of,
    pause_after,
    say,
    tried,
)

PREEMPTED_SECONDS = 60.0  # for the uploads of a run that stops; after a signal PATIENCE_SECONDS from that
END_SECONDS = 900.0  # for the uploads of a run that has finished
RELEASE_SECONDS = 5.0  # to upload the end of the history, and to let the mirror go

_open: list[Uploads] = []  # by runs of this process


class Mirror:
    """A run's mirror, on every rank. Without the key `mirror` it does nothing."""

    def __init__(self, engine: Engine, settings: Config, files: RunDir) -> None:
        """Claim the mirror, once the run directory is open. Raises UserError on all ranks if it is refused.

        Nodes that do not see the run directory of rank 0 get its checkpoints.
        """
        self.accelerator = engine.accelerator
        self.uploads: Uploads | None = None  # of rank 0
        self.used = settings.mirror is not None
        if settings.mirror is None:
            return
        store, ranks = Store(settings.mirror), Ranks.from_environment()
        several = ranks.world_size > ranks.local_world_size
        if self.accelerator.is_main_process:
            self.uploads = Uploads(files, store, settings)
        begun = on_main(self.accelerator, lambda: self.uploads and self.uploads.begin(settings, several))
        if several:
            _share(engine, files, store, begun)

    def wake(self) -> None:
        """Have the mirror brought up to date by its thread."""
        if self.uploads is not None:
            self.uploads.wake()

    def leave(self) -> None:
        """Give a run that was asked to stop time for its uploads. Call it on all ranks, which wait."""
        self._finish(preemption.seconds_left(PREEMPTED_SECONDS), close=False)

    def close(self, timeout_minutes: float) -> None:
        """Give a finished run time for its uploads, and let the mirror go. Call it on all ranks, which wait.

        timeout_minutes: after which ranks no longer wait for each other; uploads get half of it.
        """
        self._finish(min(END_SECONDS, 30 * timeout_minutes), close=True)

    def _finish(self, seconds: float, *, close: bool) -> None:
        def finish() -> None:
            if self.uploads is not None:
                self.uploads.finish(seconds, close=close)

        if self.used:  # launchers end the processes of a run once one of them has ended
            on_main(self.accelerator, finish)


def close_all() -> None:
    """Let go of the mirrors of runs that did not finish, once their ends are in the history."""
    while _open:
        _open.pop().finish(RELEASE_SECONDS, close=True)


def _share(engine: Engine, files: RunDir, store: Store, begun: dict[str, Any]) -> None:
    """Give this node the checkpoints of rank 0, if it does not see rank 0's run directory.

    Raises UserError on all ranks if they save a checkpoint together, for which all must see the directory.
    """
    seen = record_of(files).get("start") == begun["start"]
    if not all(gather_object([seen])) and engine.describe() != "ddp":
        raise UserError.of_all_ranks(
            f"mirror: {engine.describe()} saves a part of each checkpoint on every node: choose a run_dir "
            "that all nodes see, or the engine ddp"
        )
    if seen:
        return
    files.path.mkdir(parents=True, exist_ok=True)
    with remote.locked(f"{files.path}/.mirror.lock"):
        for path in files.saved_checkpoints():
            if path.name not in begun["saved"]:
                shutil.rmtree(path)  # of an earlier start
        replace_text(files.mirror, json.dumps({"run": begun["run"]}) + "\n")
        wanted = set(begun["saved"]) - {path.name for path in files.saved_checkpoints()}
        names = tried(store, store.names) if wanted else set()
        download(store, files, {name for name in names if checkpoint_of(name) in wanted})


class Uploads:
    """Keeps a mirror like the run directory, by a thread of rank 0."""

    def __init__(self, files: RunDir, store: Store, settings: Config) -> None:
        self.files = files
        self.store = store
        self.config = tree.fingerprint(settings)
        self.run = ""  # the id of the run, once it is claimed
        self.changed = threading.Condition()
        self.wanted = self.done = 0  # how often the mirror was to be brought up to date, and has been
        self.closing = self.closed = self.late = False
        self.sent: dict[str, str] = {}  # SHA-256 of what the mirror has, by name
        self.named: set[str] = set()  # damaged checkpoints that a line has named
        self.guard = threading.Lock()  # a beat does not overlap the release

    # --- claiming it ----------------------------------------------------------------------------------------

    def begin(self, settings: Config, several: bool) -> dict[str, Any]:
        """Write first whose mirror this is. Raises UserError if it is another run's, or one's at work.

        Returns what other nodes need; if there are `several` nodes, the checkpoints are on the mirror then.
        """
        owner = tried(self.store, self.store.owner)
        if owner is not None:
            check_owner(self.store, owner, self.files, settings)
            if owner.get("held") and owner.get("id") != run_lock.own_record()["id"] and self._is_alive(owner):
                raise UserError(
                    f"mirror: {self.store.url}: another start of this run is at work there "
                    f"({run_lock.described(owner)}): stop it or wait until it has ended, or choose another "
                    "mirror"
                )
        self.run = record_of(self.files).get("run") or (owner["run"] if owner else os.urandom(8).hex())
        begun = {"run": self.run, "start": os.urandom(8).hex()}
        replace_text(self.files.mirror, json.dumps(begun) + "\n")
        tried(self.store, lambda: self._write_owner(held=True))
        threading.Thread(target=self._beat, name="mirror beat", daemon=True).start()
        if several:
            tried(self.store, self.update)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()
        self.wake()
        _open.append(self)
        return {**begun, "saved": [path.name for path in self.files.saved_checkpoints()]}

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        """Whether another start is at work: on another machine, whether it gives a sign of life."""
        alive = run_lock.is_alive(owner)
        if alive is not None:
            return alive
        say(
            f"mirror: {self.store.url}: another start of this run may be at work "
            f"({run_lock.described(owner)}): waiting up to {run_lock.STALE_SECONDS:.0f} s for a sign of life"
        )
        end = time.monotonic() + run_lock.STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(2.0, run_lock.BEAT_SECONDS))
            now = tried(self.store, self.store.owner)
            if now is None or not now.get("held", True):
                return False
            if now != owner:
                return True
        return False

    def _write_owner(self, *, held: bool, beat: int = 0) -> None:
        owner = {**run_lock.own_record(), "run": self.run, "config": self.config, "held": held, "beat": beat}
        self.store.write(NAMES.mirror.name, json.dumps(owner).encode())

    def _beat(self) -> None:
        """Give signs of life; end this process if another start has taken the mirror over."""
        beat = 0
        while not self.closed:
            time.sleep(run_lock.BEAT_SECONDS)
            beat += 1
            with self.guard, contextlib.suppress(Exception):  # uploads that fail as well say so
                if self.closed:
                    return
                owner = self.store.owner()
                if owner is not None and owner.get("id") != run_lock.own_record()["id"]:
                    break
                self._write_owner(held=True, beat=beat)
        else:
            return
        preemption.lost(f"mirror: {self.store.url}: taken over by {run_lock.described(owner)}")

    # --- keeping it up to date ------------------------------------------------------------------------------

    def wake(self) -> int:
        """Have the mirror brought up to date; returns at once."""
        with self.changed:
            self.wanted += 1
            self.changed.notify_all()
            return self.wanted

    def finish(self, seconds: float, *, close: bool = False) -> None:
        """Wait until the mirror is up to date, at most `seconds`. `close`: then let it go."""
        if self.closed:
            return
        self.closing = close
        wanted = self.wake()
        with self.changed:
            done = self.changed.wait_for(lambda: self.done >= wanted and self.closed >= close, seconds)
        if not (done or self.late):
            self.late = True
            say(
                f"MIRROR NOT UP TO DATE: {self.store.url}: the run ends, and {seconds:.0f} s were not enough "
                f"for its uploads: the same command, started again with {self.files.path}, uploads the rest"
            )

    def _work(self) -> None:
        """Bring the mirror up to date whenever that is asked for, again and again if it fails."""
        failures = 0
        while not self.closed:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted > self.done)
                wanted = self.wanted
            try:
                self.update()
            except Exception as error:  # every fsspec backend has its own exceptions
                failures += 1
                pause = pause_after(failures)
                say(
                    f"MIRROR NOT UP TO DATE: {self.store.url}: {in_one_line(error, 300, with_type=True)} "
                    f"(attempt {failures}). The run goes on; again in {pause:.1f} s."
                )
                with self.changed:  # sooner if there is something new
                    self.changed.wait_for(lambda: self.wanted > wanted, pause)  # noqa: B023
                continue
            failures = 0
            if self.closing and wanted == self.wanted:
                self._release()
                with contextlib.suppress(ValueError):
                    _open.remove(self)
            with self.changed:
                self.done = wanted
                self.changed.notify_all()

    def _release(self) -> None:
        """Let another start have the mirror at once."""
        with self.guard:
            self.closed = True
            with contextlib.suppress(Exception):  # then it waits for a sign of life
                self._write_owner(held=False)

    def update(self) -> None:
        """Upload what is new, the newest checkpoint first, and delete what is no longer here."""
        wanted = self.wanted
        saved = self.files.saved_checkpoints()
        names = self.store.names()
        for path in reversed(saved):
            if self.wanted > wanted and path is not saved[-1]:
                break  # the next time, behind a newer one
            try:
                self._upload_checkpoint(path, names)
            except FileNotFoundError:
                if path.exists():  # else it is no longer kept
                    raise
        self._upload_records()
        if saved and mark_of(saved[-1].name) in self.sent:  # the mirror always has a complete one
            kept = {path.name for path in (*self.files.saved_checkpoints(), saved[-1])}
            self.store.delete([name for name in names if _is_old(name, kept)])

    def _upload_checkpoint(self, path: Path, names: Collection[str]) -> None:
        """Upload a checkpoint, unless the mirror has it or it is damaged here."""
        mark = mark_of(path.name)
        content = CheckpointDir(path).manifest.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if self.sent.get(mark) == digest or path.name in self.named:
            return
        if mark in names and self.store.read(mark) == content:
            self.sent[mark] = digest
            return
        if complete_checkpoints(names) == [path.name]:
            return  # an earlier save of this step is all that the mirror has: it goes when there is another
        # Of an earlier save of this step, perhaps on more ranks, or one that was cut off.
        self.store.delete([name for name in names if checkpoint_of(name) == path.name])
        with self._held(path) as held:
            if damage := self._upload_files(held, path.name):
                self.named.add(path.name)
                say(f"mirror: {path} is damaged ({damage}) and not uploaded")
                return
            self._upload_records()
            self.store.replace(CheckpointDir(held).manifest, mark, digest)
        self.sent[mark] = digest

    def _upload_files(self, held: Path, step: str) -> str | None:
        """Upload what the manifest of a checkpoint names; return what is wrong with the checkpoint, or None.

        What arrives is compared with the hashes of the manifest. Only if it differs are the files here read a
        second time, for which of the two is wrong.
        """
        damage = damaged(held, hashes=False)
        if damage is not None:
            return damage
        manifest = read_json(CheckpointDir(held).manifest.read_bytes())
        names = {name: (NAMES.checkpoints / step / name).as_posix() for name in manifest}
        try:
            for name, entry in manifest.items():
                self.store.upload(held / name, names[name], entry["sha256"])
        except OSError:
            damage = damaged(held)
            if damage is None:
                raise
            self.store.delete([*names.values()])
        return damage

    @contextlib.contextmanager
    def _held(self, path: Path) -> Iterator[Path]:
        """Keep the files of a checkpoint by hard links until they are uploaded: else a run that saves faster
        than it uploads would delete each checkpoint before it is complete on the mirror.
        """
        held = self.files.path / ".mirror-checkpoint"
        shutil.rmtree(held, ignore_errors=True)
        try:
            try:
                shutil.copytree(path, held, copy_function=os.link)
            except (PermissionError, shutil.Error):  # a file system without hard links
                shutil.rmtree(held, ignore_errors=True)
                shutil.copytree(path, held)
            yield held
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _upload_records(self) -> None:
        """Upload the records that have changed; a copy of each, because the run may write to it meanwhile."""
        copy = self.files.path / ".mirror-upload"
        for name in sorted(os.listdir(self.files.path)):
            if not is_record(name):
                continue
            try:
                shutil.copyfile(self.files.path / name, copy)
                digest = sha256(copy)
                if self.sent.get(name) != digest:
                    self.store.replace(copy, name, digest)
                    self.sent[name] = digest
            finally:
                copy.unlink(missing_ok=True)


def _is_old(name: str, kept: Collection[str]) -> bool:
    """Whether a file of the mirror belongs to a checkpoint that is not kept, or was cut off."""
    step = checkpoint_of(name)
    return name.endswith(".part") or (step is not None and step not in kept)
