"""Shards that lie elsewhere: fetched whole, once per node, into a bounded cache."""

import contextlib
import errno
import hashlib
import logging
import os
import queue
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

from filelock import FileLock, Timeout

from indistill.config import UserError
from indistill.distributed import preemption

log = logging.getLogger(__name__)

CACHED = re.compile(
    r"[0-9a-f]{16}-(?!.*\.lock$)"
)  # shards and parts of shards in the cache; nothing else is evicted
CACHE_BYTES = 200 * 10**9
FETCH_ATTEMPTS = 8  # with the pauses below an outage of about two minutes is survived
FETCH_PAUSE_SECONDS = 1.0  # before the second attempt; doubles, give or take a half
FETCH_TIMEOUT_SECONDS = 60.0  # without a byte
FETCH_THREADS = 4  # per process, for shards asked for ahead of use
BUSY_SECONDS = 60.0  # evicting a shard used so shortly ago means that the cache is too small


def is_remote(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def base_name(path: str) -> str:
    """The last part of a path or URL, without a query; a command whole."""
    if path.startswith("pipe:"):
        return path
    return os.path.basename(re.sub(r"[?#].*", "", path) if is_remote(path) else path)


def cache_name(path: str) -> str:
    """Shards of one name in two directories have two names in the cache."""
    identity = path if is_remote(path) else os.path.abspath(path)
    name = "pipe" if path.startswith("pipe:") else base_name(path)
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{name}"


def changed(path: str, how: str) -> str:
    return (
        f"{path}: the shard is cut or changed: {how}; "
        "restore it or, if it is meant to be so, run `indistill shards index` on it"
    )


class ShardCache:
    """Remote shards as whole files in a directory that the processes of a node share.

    At most `limit_bytes` of them, downloads under way included: those unused for longest go first. A lock per shard
    makes sure that it is fetched once; a file takes its place when it is complete and its size is right.
    """

    def __init__(self, directory: str, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._shards = os.path.join(directory, "remote-shards")
        with contextlib.suppress(OSError):
            os.makedirs(self._shards, exist_ok=True)
        if not os.access(self._shards, os.W_OK):
            raise UserError(f"data.cache_dir {directory} cannot be written: name another directory")
        self._warned = False
        self._pid, self._queue, self._asked = None, None, set()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pid": None, "_queue": None, "_asked": set()}

    def open(self, url: str, size: int | None = None) -> IO[bytes]:
        """The shard's local copy, opened; fetched first if it is not here. `size`: bytes it must have, if known."""
        while True:
            with contextlib.suppress(FileNotFoundError):  # evicted between the two calls
                return open(self.get(url, size), "rb", buffering=0)

    def get(self, url: str, size: int | None = None) -> str:
        """The path of the shard's local copy, fetched first if it is not here. UserError if that does not succeed."""
        file = os.path.join(self._shards, cache_name(url))
        if not self._use(file, size):
            with FileLock(f"{file}.lock"):
                if not self._use(file, size):
                    _fetch(url, file, size, self)
        return file

    def discard(self, url: str) -> None:
        """Forget the shard's local copy."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._shards, cache_name(url)))

    def fetch_index(self, url: str, file: str) -> bool:
        """Fetch the index that lies beside a remote shard. False if there is none."""
        if url.startswith("pipe:"):
            return False
        address, *query = url.partition("?")
        with FileLock(f"{file}.lock"):
            try:
                if not os.path.exists(file):
                    _fetch(f"{address}.index.json{''.join(query)}", file)
            except _Absent:
                log.warning("%s has no index beside it and is fetched to be counted", url)
                return False
        return True

    def prefetch(self, shards: Iterable[tuple[str, int]]) -> None:
        """Fetch (url, bytes) in the background, in this order. What fails is told when the shard is opened."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid, self._queue, self._asked = os.getpid(), queue.SimpleQueue(), set()
            for _ in range(FETCH_THREADS):
                # Daemons: a process that ends does not wait for downloads.
                threading.Thread(target=self._work, args=(self._queue, self._asked), daemon=True).start()
        for shard in shards:
            if shard not in self._asked:
                self._asked.add(shard)
                self._queue.put(shard)

    def _work(self, tasks: queue.SimpleQueue, asked: set) -> None:
        while True:
            shard = tasks.get()
            try:
                self.get(*shard)
            except Exception as error:
                log.warning("prefetch: %s", error)
            asked.discard(shard)

    def _use(self, file: str, size: int | None) -> bool:
        """Is the file here, and whole? Then it was used just now."""
        try:
            if size is not None and os.stat(file).st_size != size:
                return False
            os.utime(file)
        except FileNotFoundError:
            return False
        return True

    def room_lock(self) -> FileLock:
        """Held where the directory changes, so that who adds up its files misses none that is being renamed."""
        return FileLock(os.path.join(self._shards, "room.lock"))

    def make_room(self, part: str, size: int, wait: bool = True) -> None:
        """Reserve `size` bytes for a download by making its file that long, after evicting what has to go.

        Where only downloads under way could go, it waits for them, or with `wait=False` exceeds the limit.
        """
        if size > self.limit_bytes:
            raise UserError(
                f"{part}: {size} bytes do not fit data.cache_bytes ({self.limit_bytes}): raise it"
            )
        while True:
            with self.room_lock():
                if self._evict(part, size) or not wait:
                    with open(part, "ab") as stream:
                        stream.truncate(size)
                    return
            time.sleep(0.1)

    def _evict(self, part: str, size: int) -> bool:
        """Delete the shards unused for longest until `size` bytes are free. Did that succeed?"""
        entries = []
        for entry in os.scandir(self._shards):
            with contextlib.suppress(FileNotFoundError):
                if CACHED.match(entry.name) and entry.path != part:
                    entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        # The disk may hold less than the limit; a download that it cannot take then fails by itself.
        crowded = size - shutil.disk_usage(self._shards).free
        excess = sum(entry[1] for entry in entries) + size - self.limit_bytes
        for used, freed, path in sorted(entries):
            if max(excess, crowded) <= 0:
                break
            if path.endswith(".part") and _locked(f"{path.removesuffix('.part')}.lock"):
                continue
            age = time.time() - used
            if age < BUSY_SECONDS and not self._warned:
                self._warned = True
                log.warning("evicting a shard used %.0f s ago: raise data.cache_bytes", age)
            with contextlib.suppress(
                FileNotFoundError
            ):  # a part that has just been completed has another name now
                os.unlink(path)
                excess, crowded = excess - freed, crowded - freed
        return excess <= 0


def _locked(file: str) -> bool:
    """Does a process or thread hold this lock? One that was killed does not."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def cache_for(
    paths: Sequence[str], cache_dir: str | None, limit_bytes: int = CACHE_BYTES
) -> ShardCache | None:
    if not any(map(is_remote, paths)):
        return None
    if cache_dir is None:
        raise UserError(
            f"{next(filter(is_remote, paths))}: remote shards need data.cache_dir, on a disk of the node"
        )
    return ShardCache(cache_dir, limit_bytes)


def open_shard(path: str, cache: ShardCache | None, size: int | None = None) -> IO[bytes]:
    return cache.open(path, size) if is_remote(path) else open(path, "rb", buffering=0)


class _Absent(UserError):
    """The source answers that there is no such file, or not for us: another attempt is of no use."""


def _fetch(url: str, file: str, size: int | None = None, cache: ShardCache | None = None) -> None:
    """Copy a remote file to `file`, whole or not at all; call with the file's lock held.

    size: bytes it must have, where known. cache: where room has to be made for it.
    Raises UserError: at once where the source says no, otherwise after FETCH_ATTEMPTS.
    """
    # Not `files.replacing`: the part file is as long as the download from the start, so that it counts in the cache's
    # limit, and one that a killed process left is known by its name and that of its lock.
    part = f"{file}.part"
    try:
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                with open_remote(url) as (source, length):
                    if size is not None and length not in (None, size):
                        raise UserError(changed(url, f"it has {length} bytes, its index says {size}"))
                    promised = size or length or 0
                    if cache:
                        cache.make_room(part, promised)
                    with open(part, "r+b" if cache else "wb") as target:  # r+: the room stays reserved
                        shutil.copyfileobj(source, target, 1 << 20)
                        received = target.tell()
                        target.truncate()
                if received != (promised or received):
                    raise OSError(f"{received} bytes came instead of {promised}")
                if cache and not promised:
                    cache.make_room(part, received, wait=False)
                with cache.room_lock() if cache else contextlib.nullcontext():
                    os.replace(part, file)
                return
            except UserError:
                raise
            except Exception as error:  # every fsspec backend has exceptions of its own
                if _hopeless(error):
                    raise _Absent(f"{url}: cannot be fetched: {error}") from None
                if attempt == FETCH_ATTEMPTS or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(f"{url}: cannot be fetched: {error} (attempt {attempt})") from None
                pause = FETCH_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                log.warning("%s: %s (attempt %d), again in %.1f s", url, error, attempt, pause)
                time.sleep(pause)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def read_if_there(url: str) -> bytes | None:
    """The content of a small remote file; None, with a warning unless it is simply not there, if it cannot be had."""
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "file")
        try:
            _fetch(url, file)
        except UserError as error:
            if not isinstance(error, _Absent):
                log.warning("%s", error)
            return None
        with open(file, "rb") as stream:
            return stream.read()


def _hopeless(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
    # ImportError and ValueError: fsspec names the package to install, or does not know the protocol.
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError))


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """A shard's bytes from front to end, where it is: nothing is cached or checked."""
    with open(path, "rb") if not is_remote(path) else open_remote(path) as opened:
        yield opened[0] if is_remote(path) else opened


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """The stream of a remote file and, where the source tells, its size in bytes."""
    if url.startswith(("http://", "https://")):  # fsspec would need aiohttp for these
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            yield response, None if length is None else int(length)
    elif url.startswith("pipe:"):
        with preemption.signals_blocked():
            command = subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)
        with command as process:
            yield process.stdout, None
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    else:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        with system.open(path, "rb") as stream:
            yield stream, system.size(path)
