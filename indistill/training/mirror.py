"""The mirror of a run directory at a URL, `mirror: s3://bucket/run`, for nodes that share no file system.

The mirror has the names of the run directory, and `mirror.json`, which says whose it is. A thread of rank 0
makes it like the run directory after each checkpoint. What is uploaded is read back and compared by size and
SHA-256. `manifest.json` marks a checkpoint of the mirror as complete: it is uploaded last, after the records
that belong to the checkpoint, and deleted first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

from accelerate.utils import gather_object

from indistill.config import Config, UserError, in_one_line, redacted, run_lock, tree
from indistill.config.files import read_bytes, read_json, replace_text, sha256
from indistill.config.limits import MAX_CONFIG_BYTES, MAX_RECORD_BYTES
from indistill.config.ranks import Ranks
from indistill.config.read import load_recorded
from indistill.config.run_dir import CheckpointDir, RunDir, checkpoint_of, checkpoint_step, is_record
from indistill.data import remote
from indistill.distributed import preemption
from indistill.distributed.engine import Engine, on_main
from indistill.training.checkpoint import damaged

PREEMPTED_SECONDS = 60.0  # for the uploads of a run that stops; after a signal PATIENCE_SECONDS from that
END_SECONDS = 900.0  # for the uploads of a run that has finished
RELEASE_SECONDS = 5.0  # to upload the end of the history, and to let the mirror go
ATTEMPTS = remote.FETCH_ATTEMPTS  # at the start of a run; later there is no last attempt
PAUSE_SECONDS = 1.0  # after the first failure; doubles each time, plus or minus 50 %
MOST_PAUSE_SECONDS = 60.0
_NAMES = RunDir(Path())  # of the files in a mirror
_WITH_FOLDERS = ("file", "local", "memory", "sftp", "ssh", "smb", "ftp", "webhdfs")  # to create before files
_READ_ONLY = ("http", "https", "hf")

_Result = TypeVar("_Result")
_open: list[Uploads] = []  # by runs of this process


# --- the files of the mirror --------------------------------------------------------------------------------
class Store:
    """The files of a mirror, by their names in the run directory. Raises what fsspec raises."""

    def __init__(self, url: str) -> None:
        """Raises UserError, which names the key, for a URL that cannot be a mirror."""
        self.url = url.rstrip("/")
        self.protocol = url.partition("://")[0]
        if not remote.is_remote(url) or self.protocol in _READ_ONLY:
            raise UserError(f"mirror: {url} is no URL to write to: give one like s3://bucket/run")
        try:
            # What was listed before may not be there any more.
            self.system, self.root = remote.file_system(self.url, use_listings_cache=False)
        except UserError as error:
            raise UserError(f"mirror: {error}") from None
        except Exception as error:  # a missing package, or options in the environment that it does not know
            raise UserError(
                f"mirror: {url}: {in_one_line(error, 300)}: mend that, or remove the key"
            ) from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def names(self) -> set[str]:
        """The names of all files."""
        try:
            found = self.system.find(self.root)
        except FileNotFoundError:
            return set()
        root = str(self.system._strip_protocol(self.root)).strip("/")
        names = (str(self.system._strip_protocol(path)).strip("/") for path in found)
        return {name.removeprefix(f"{root}/") for name in names if name.startswith(f"{root}/")}

    def read(self, name: str, limit: int = MAX_RECORD_BYTES) -> bytes | None:
        """The content of a small file; None if it is not there."""
        try:
            with self.system.open(self._path(name), "rb") as stream:
                content: bytes = stream.read(limit + 1)
        except FileNotFoundError:
            return None
        if len(content) > limit:
            raise OSError(f"{name}: larger than {limit:,} bytes")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, unchecked."""
        self._create_folder(name)
        self.system.pipe_file(self._path(name), content)

    def upload(self, file: Path, name: str, digest: str) -> None:
        """Upload a file, read it back and compare it. Raises OSError if it is not what it must be."""
        self._create_folder(name)
        self.system.put_file(str(file), self._path(name))
        received, size = hashlib.sha256(), 0
        with self.system.open(self._path(name), "rb", block_size=2**23) as stream:
            while block := stream.read(2**20):
                received.update(block)
                size += len(block)
        if (size, received.hexdigest()) != (file.stat().st_size, digest):
            raise OSError(f"{name}: {size} bytes of SHA-256 {received.hexdigest()} are not what was uploaded")

    def replace(self, file: Path, name: str, digest: str) -> None:
        """Upload a file under another name, and give it its own when it is complete and compared."""
        part = self._path(f"{name}.part")
        self.upload(file, f"{name}.part", digest)
        if self.protocol in _WITH_FOLDERS:
            self.system.mv(part, self._path(name))
        else:  # what mv does there, without the two lists that it asks for
            self.system.cp_file(part, self._path(name))
            self.system.rm_file(part)

    def download(self, name: str, file: Path) -> None:
        self.system.get_file(self._path(name), str(file))

    def delete(self, names: Collection[str]) -> None:
        """Delete files, the marks of complete checkpoints first."""
        for name in sorted(names, key=lambda name: name != _mark(checkpoint_of(name) or "")):
            with contextlib.suppress(FileNotFoundError):
                self.system.rm_file(self._path(name))
        if self.protocol in _WITH_FOLDERS:
            for folder in sorted({name.rpartition("/")[0] for name in names} - {""}):
                with contextlib.suppress(Exception):  # not empty, or not there
                    self.system.rmdir(self._path(folder))

    def _create_folder(self, name: str) -> None:
        if self.protocol in _WITH_FOLDERS:  # s3fs would create a bucket
            self.system.makedirs(self.system._parent(self._path(name)), exist_ok=True)

    # --- whose it is ----------------------------------------------------------------------------------------

    def owner(self) -> dict[str, Any] | None:
        """What the start that wrote to the mirror last has written of itself; None if there was none."""
        content = self.read(_NAMES.mirror.name)
        if content is None:
            return None
        with contextlib.suppress(ValueError):
            if isinstance(record := read_json(content), dict) and isinstance(record.get("run"), str):
                return record
        raise OSError(f"{_NAMES.mirror.name} is damaged")  # or, on some file systems, being written

    def has_begun(self) -> bool:
        """Whether the run of the mirror has logged a line or saved a checkpoint."""
        names = self.names()
        log = _NAMES.metrics.name
        has_lines = log in names and self.system.size(self._path(log)) > 0
        return has_lines or bool(complete_checkpoints(names))


def complete_checkpoints(names: Collection[str]) -> list[str]:
    """The complete checkpoints among the files of a mirror, oldest first."""
    steps = {step for name in names if (step := checkpoint_of(name)) and _mark(step) in names}
    return sorted(steps, key=_step)


def _step(checkpoint: str) -> int:
    return checkpoint_step(Path(checkpoint))


def _mark(step: str) -> str:
    """The file that marks a checkpoint as complete."""
    return CheckpointDir(_NAMES.checkpoints / step).manifest.as_posix()


def _is_old(name: str, kept: Collection[str]) -> bool:
    """Whether a file of the mirror belongs to a checkpoint that is not kept, or was cut off."""
    step = checkpoint_of(name)
    return name.endswith(".part") or (step is not None and step not in kept)


def _tried(store: Store, action: Callable[[], _Result]) -> _Result:
    """Return `action()`, tried again where that may help. Raises UserError, which names the key."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # every fsspec backend has its own exceptions
            reason = in_one_line(error, 300, with_type=not isinstance(error, OSError))
            if remote.hopeless(error) or attempt == ATTEMPTS:
                raise UserError(
                    f"mirror: {store.url} cannot be used ({reason}): mend that, choose another, or remove "
                    "the key"
                ) from None
            pause = _pause(attempt)
            _say(f"mirror: {store.url}: {reason} (attempt {attempt}), again in {pause:.1f} s")
            time.sleep(pause)
    raise AssertionError


def _pause(failures: int) -> float:
    pause = min(MOST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** min(failures - 1, 10))
    return pause * random.uniform(0.5, 1.5)  # nosec B311  # of a pause


def check(settings: Config) -> None:
    """Write, read and delete a file. Raises UserError if one is not possible, or for another run's."""
    if settings.mirror is None:
        return
    store = Store(settings.mirror)
    name, content = f"check-{os.urandom(8).hex()}", os.urandom(2**10)
    doing = "written"
    try:
        store.write(name, content)
        doing = "read"
        same = store.read(name) == content
        doing = "deleted"
        store.delete([name])
        gone = name not in store.names()
    except Exception as error:  # every fsspec backend has its own exceptions
        reason = in_one_line(error, 300, with_type=not isinstance(error, OSError))
        raise UserError(f"mirror: {store.url} cannot be {doing} ({reason})") from None
    if not same:
        raise UserError(f"mirror: {store.url}: a file that was written there is another one when it is read")
    if not gone:
        raise UserError(f"mirror: {store.url}: a file that was deleted there is still there")
    if (owner := _tried(store, store.owner)) is not None:
        _check_owner(store, owner, RunDir.of(settings), settings)


# --- a node without the run ---------------------------------------------------------------------------------
def fetch(settings: Config) -> None:
    """Bring a run directory that is empty, or behind, to the state of the mirror.

    Call it on every rank, before the directory is read: of the ranks that see it one downloads, and the
    others wait. Raises UserError if the mirror cannot be read, or holds another run.
    """
    if settings.mirror is None:
        return
    store, files = Store(settings.mirror), RunDir.of(settings)
    owner = _tried(store, store.owner)
    if owner is None:
        return
    _check_owner(store, owner, files, settings)
    if not _missing(store, files):
        return
    try:
        files.path.mkdir(parents=True, exist_ok=True)
        with remote.locked(f"{files.path}/.mirror.lock"):
            if missing := _missing(store, files):
                replace_text(files.mirror, json.dumps({"run": owner["run"]}) + "\n")
                download(store, files, missing)
    except OSError as error:
        raise UserError(
            f"run_dir {files.path}: cannot be written ({error.strerror}): choose another"
        ) from None


def _missing(store: Store, files: RunDir) -> set[str]:
    """The files of the mirror that a run directory needs which is behind it; none if it is not behind."""
    names = _tried(store, store.names)
    there = complete_checkpoints(names)
    here = [path.name for path in files.saved_checkpoints()]
    newest_there, newest_here = (max(map(_step, steps), default=-1) for steps in (there, here))
    lacks = not files.config.exists() or (files.summary.name in names and not files.summary.exists())
    if newest_there < newest_here or (newest_there == newest_here and not lacks):
        return set()
    wanted = set(there) - set(here)
    return {name for name in names if is_record(name) or checkpoint_of(name) in wanted}


def download(store: Store, files: RunDir, names: Collection[str]) -> None:
    """Download records, then checkpoints, the newest last: until it has its name, the directory is behind.

    A checkpoint that is damaged is passed over, and no longer marked on the mirror. Raises UserError if all
    of them are damaged.
    """
    checkpoints = complete_checkpoints(names)
    if checkpoints:
        _say(f"mirror: downloading {', '.join(checkpoints)} from {store.url}", out=sys.stdout)
    for name in sorted(name for name in names if is_record(name)):
        _tried(store, partial(store.download, name, files.path / f".mirror-{name}"))
        (files.path / f".mirror-{name}").replace(files.path / name)
    files.checkpoints.mkdir(exist_ok=True)
    damage = {step: _download_checkpoint(store, files, step, names) for step in checkpoints}
    reasons = {step: reason for step, reason in damage.items() if reason is not None}
    for step, reason in reversed(reasons.items()):
        if len(reasons) == len(checkpoints):
            raise UserError(f"mirror: {store.url}: {step} is damaged ({reason}), and no other to go on from")
        _say(f"mirror: {store.url}: {step} is damaged ({reason}) and passed over")
    if reasons:
        _tried(store, lambda: store.delete([_mark(step) for step in reasons]))


def _download_checkpoint(store: Store, files: RunDir, step: str, names: Collection[str]) -> str | None:
    """Download a checkpoint and give it its name; return what is wrong with it, or None."""
    part = files.checkpoints / f".partial-{step}"
    damage = None
    for _ in range(2):  # it may have been damaged on its way
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in sorted(names):
            if checkpoint_of(name) == step:
                _tried(store, partial(store.download, name, part / name.rpartition("/")[2]))
        damage = damaged(part)
        if damage is None:
            part.rename(files.checkpoints / step)
            return None
    shutil.rmtree(part, ignore_errors=True)
    return damage


def _check_owner(store: Store, owner: dict[str, Any], files: RunDir, settings: Config) -> None:
    """Raise UserError if the mirror holds another run than the run directory, or one of another config.

    As in a run directory, a run that was refused before its first logged line does not count.
    """
    if not _tried(store, store.has_begun):
        return
    mine = _own(files).get("run")
    if mine != owner["run"] and (mine is not None or files.saved_checkpoints()):
        raise UserError(
            f"mirror: {store.url} holds another run than {files.path} ({run_lock.described(owner)}): choose "
            "another mirror, or an empty run_dir to go on with the run of the mirror"
        )
    if owner.get("config") in (None, tree.fingerprint(settings)):
        return
    difference = None
    if content := _tried(store, lambda: store.read(files.config.name, MAX_CONFIG_BYTES)):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
            path = Path(folder, files.config.name)
            path.write_bytes(content)
            difference = tree.difference(load_recorded(path), settings)
    raise UserError(
        f"mirror: {store.url} holds a run of another config ({difference or 'its fingerprint differs'}): "
        "choose another mirror"
    )


def _own(files: RunDir) -> dict[str, str]:
    """What a run directory says of itself: `run`, and `start` of rank 0; empty if it has had no mirror."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(record := read_json(read_bytes(files.mirror, MAX_RECORD_BYTES)), dict):
            return {name: str(value) for name, value in record.items()}
    return {}


# --- a run's own --------------------------------------------------------------------------------------------
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
    seen = _own(files).get("start") == begun["start"]
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
        names = _tried(store, store.names) if wanted else set()
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
        owner = _tried(self.store, self.store.owner)
        if owner is not None:
            _check_owner(self.store, owner, self.files, settings)
            if owner.get("held") and owner.get("id") != run_lock.own_record()["id"] and self._is_alive(owner):
                raise UserError(
                    f"mirror: {self.store.url}: another start of this run is at work there "
                    f"({run_lock.described(owner)}): stop it or wait until it has ended, or choose another "
                    "mirror"
                )
        self.run = _own(self.files).get("run") or (owner["run"] if owner else os.urandom(8).hex())
        begun = {"run": self.run, "start": os.urandom(8).hex()}
        replace_text(self.files.mirror, json.dumps(begun) + "\n")
        _tried(self.store, lambda: self._write_owner(held=True))
        threading.Thread(target=self._beat, name="mirror beat", daemon=True).start()
        if several:
            _tried(self.store, self.update)
        threading.Thread(target=self._work, name="mirror", daemon=True).start()
        self.wake()
        _open.append(self)
        return {**begun, "saved": [path.name for path in self.files.saved_checkpoints()]}

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        """Whether another start is at work: on another machine, whether it gives a sign of life."""
        alive = run_lock.is_alive(owner)
        if alive is not None:
            return alive
        _say(
            f"mirror: {self.store.url}: another start of this run may be at work "
            f"({run_lock.described(owner)}): waiting up to {run_lock.STALE_SECONDS:.0f} s for a sign of life"
        )
        end = time.monotonic() + run_lock.STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(min(2.0, run_lock.BEAT_SECONDS))
            now = _tried(self.store, self.store.owner)
            if now is None or not now.get("held", True):
                return False
            if now != owner:
                return True
        return False

    def _write_owner(self, *, held: bool, beat: int = 0) -> None:
        owner = {**run_lock.own_record(), "run": self.run, "config": self.config, "held": held, "beat": beat}
        self.store.write(_NAMES.mirror.name, json.dumps(owner).encode())

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
            _say(
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
                pause = _pause(failures)
                _say(
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
        if saved and _mark(saved[-1].name) in self.sent:  # the mirror always has a complete one
            kept = {path.name for path in (*self.files.saved_checkpoints(), saved[-1])}
            self.store.delete([name for name in names if _is_old(name, kept)])

    def _upload_checkpoint(self, path: Path, names: Collection[str]) -> None:
        """Upload a checkpoint, unless the mirror has it or it is damaged here."""
        mark = _mark(path.name)
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
            if damage := damaged(held):
                self.named.add(path.name)
                _say(f"mirror: {path} is damaged ({damage}) and not uploaded")
                return
            for name, entry in read_json(content).items():
                there = (_NAMES.checkpoints / path.name / name).as_posix()
                self.store.upload(held / name, there, entry["sha256"])
            self._upload_records()
            self.store.replace(CheckpointDir(held).manifest, mark, digest)
        self.sent[mark] = digest

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


def _say(line: str, out: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # the log may be on a disk that is full
        print(f"indistill: {redacted(line)}", file=out or sys.stderr, flush=True)
