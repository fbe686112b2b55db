"""The files of a mirror, and how often an attempt is made to reach them."""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TextIO, TypeVar

from indistill.config import UserError, in_one_line, redacted
from indistill.config.files import read_json
from indistill.config.limits import MAX_RECORD_BYTES
from indistill.config.run_dir import CheckpointDir, RunDir, checkpoint_of, checkpoint_step
from indistill.data import remote

ATTEMPTS = remote.FETCH_ATTEMPTS  # at the start of a run; later there is no last attempt
PAUSE_SECONDS = 1.0  # after the first failure; doubles each time, plus or minus 50 %
MOST_PAUSE_SECONDS = 60.0
NAMES = RunDir(Path())  # of the files in a mirror
_WITH_FOLDERS = ("file", "local", "memory", "sftp", "ssh", "smb", "ftp", "webhdfs")  # to create before files
_READ_ONLY = ("http", "https", "hf")

_Result = TypeVar("_Result")


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
        for name in sorted(names, key=lambda name: name != mark_of(checkpoint_of(name) or "")):
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
        content = self.read(NAMES.mirror.name)
        if content is None:
            return None
        with contextlib.suppress(ValueError):
            if isinstance(record := read_json(content), dict) and isinstance(record.get("run"), str):
                return record
        raise OSError(f"{NAMES.mirror.name} is damaged")  # or, on some file systems, being written

    def has_begun(self) -> bool:
        """Whether the run of the mirror has logged a line or saved a checkpoint."""
        names = self.names()
        log = NAMES.metrics.name
        has_lines = log in names and self.system.size(self._path(log)) > 0
        return has_lines or bool(complete_checkpoints(names))


def complete_checkpoints(names: Collection[str]) -> list[str]:
    """The complete checkpoints among the files of a mirror, oldest first."""
    steps = {step for name in names if (step := checkpoint_of(name)) and mark_of(step) in names}
    return sorted(steps, key=step_of)


def step_of(checkpoint: str) -> int:
    return checkpoint_step(Path(checkpoint))


def mark_of(step: str) -> str:
    """The file that marks a checkpoint as complete."""
    return CheckpointDir(NAMES.checkpoints / step).manifest.as_posix()


def tried(store: Store, action: Callable[[], _Result]) -> _Result:
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
            pause = pause_after(attempt)
            say(f"mirror: {store.url}: {reason} (attempt {attempt}), again in {pause:.1f} s")
            time.sleep(pause)
    raise AssertionError


def pause_after(failures: int) -> float:
    pause = min(MOST_PAUSE_SECONDS, PAUSE_SECONDS * 2.0 ** min(failures - 1, 10))
    return pause * random.uniform(0.5, 1.5)  # nosec B311  # of a pause


def say(line: str, out: TextIO | None = None) -> None:
    with contextlib.suppress(OSError):  # the log may be on a disk that is full
        print(f"indistill: {redacted(line)}", file=out or sys.stderr, flush=True)
