"""Fetch remote shards, each as a whole and once per node, into a cache of bounded size."""

import contextlib
import errno
import hashlib
import logging
import os
import queue
import random
import re
import shutil
import subprocess  # nosec B404  # for pipe: alone (open_remote)
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from filelock import FileLock, Timeout

from indistill.config import UserError
from indistill.distributed import preemption

log = logging.getLogger(__name__)

CACHED = re.compile(r"[0-9a-f]{16}-(?!.*\.lock$)")  # shards and parts of shards; nothing else is evicted
CACHE_BYTES = 200 * 10**9
FETCH_ATTEMPTS = 8  # with the pauses below, enough for an outage of about two minutes
FETCH_PAUSE_SECONDS = 1.0  # before the second attempt; doubles each time, plus or minus 50 %
FETCH_TIMEOUT_SECONDS = 60.0  # without a byte
FETCH_THREADS = 4  # per process, for shards that are prefetched
BUSY_SECONDS = 60.0  # to evict a shard that was used within this time means that the cache is too small


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command."""
    return "://" in path or path.startswith("pipe:")


def base_name(path: str) -> str:
    """The last part of a path or URL without its query; a command is returned as it is."""
    if path.startswith("pipe:"):
        return path
    return os.path.basename(re.sub(r"[?#].*", "", path) if is_remote(path) else path)


def cache_name(path: str) -> str:
    """The name of a shard in the cache, different for shards of one name in two directories."""
    identity = path if is_remote(path) else os.path.abspath(path)
    name = "pipe" if path.startswith("pipe:") else base_name(path)
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{name}"


def changed(path: str, how: str) -> str:
    """The error message for a shard that does not fit its index."""
    return (
        f"{path}: the shard is cut or changed: {how}; "
        "restore it or, if the change is intended, run `indistill shards index` on it"
    )


class ShardCache:
    """Remote shards, stored as whole files in a directory that the processes of a node share.

    They take at most `limit_bytes`, unfinished downloads included; the least recently used ones are evicted
    first. A lock per shard makes sure that it is fetched once; it gets its name when it is complete and its
    size is right.
    """

    def __init__(self, directory: str, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self._shards = os.path.join(directory, "remote-shards")
        with contextlib.suppress(OSError):
            os.makedirs(self._shards, exist_ok=True)
        if not os.access(self._shards, os.W_OK):
            raise UserError(f"data.cache_dir {directory} cannot be written: choose another directory")
        self._warned = False
        self._pid: int | None = None  # the process whose threads serve the queue
        self._queue: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._requested: set[tuple[str, int]] = set()  # shards in the queue or being fetched

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_pid", "_queue", "_requested")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pid=None, _queue=queue.SimpleQueue(), _requested=set())

    def open(self, url: str, size: int | None = None) -> IO[bytes]:
        """Open the shard's local copy; fetch it first if it is missing.

        `size`: bytes it must have, if known.
        """
        while True:
            with contextlib.suppress(FileNotFoundError):  # evicted between the two calls
                return open(self.get(url, size), "rb", buffering=0)

    def get(self, url: str, size: int | None = None) -> str:
        """Path of the shard's local copy; fetch it first if it is missing. Raises UserError if that fails."""
        file = os.path.join(self._shards, cache_name(url))
        if not self._use(file, size):
            with FileLock(f"{file}.lock"):
                if not self._use(file, size):
                    _fetch(url, file, size, self)
        return file

    def discard(self, url: str) -> None:
        """Delete the shard's local copy."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._shards, cache_name(url)))

    def fetch_index(self, url: str, file: str) -> bool:
        """Fetch the index beside a remote shard to `file`; return False if there is none."""
        if url.startswith("pipe:"):
            return False
        address, *query = url.partition("?")
        with FileLock(f"{file}.lock"):
            try:
                if not os.path.exists(file):
                    _fetch(f"{address}.index.json{''.join(query)}", file)
            except _Absent:
                log.warning("%s has no index beside it: the shard is fetched to build one", url)
                return False
        return True

    def prefetch(self, shards: Iterable[tuple[str, int]]) -> None:
        """Fetch (url, bytes) in the background, in this order. Errors are raised when the shard is opened."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._pid = os.getpid()
            self._queue = queue.SimpleQueue()
            self._requested = set()
            for _ in range(FETCH_THREADS):
                # Daemon threads, so that a process can end without waiting for downloads.
                threading.Thread(target=self._work, args=(self._queue, self._requested), daemon=True).start()
        for shard in shards:
            if shard not in self._requested:
                self._requested.add(shard)
                self._queue.put(shard)

    def _work(self, tasks: queue.SimpleQueue[tuple[str, int]], requested: set[tuple[str, int]]) -> None:
        while True:
            shard = tasks.get()
            try:
                self.get(*shard)
            except Exception as error:
                log.warning("prefetch: %s", error)
            requested.discard(shard)

    def _use(self, file: str, size: int | None) -> bool:
        """Whether the file is present and complete; if so, mark it as just used."""
        try:
            if size is not None and os.stat(file).st_size != size:
                return False
            os.utime(file)
        except FileNotFoundError:
            return False
        return True

    def room_lock(self) -> FileLock:
        """Lock for changes in the directory, so that a sum of its files counts each exactly once."""
        return FileLock(os.path.join(self._shards, "room.lock"))

    def make_room(self, part: str, size: int, wait: bool = True) -> None:
        """Evict shards until there is room for a download of `size` bytes, then make its file that long.

        If only unfinished downloads are left to evict, waits for them or, with `wait=False`, exceeds the
        limit.
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
        """Delete the least recently used shards until `size` bytes are free; return whether they are."""
        entries = []
        for entry in os.scandir(self._shards):
            with contextlib.suppress(FileNotFoundError):
                if CACHED.match(entry.name) and entry.path != part:
                    entries.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
        # The disk may have less room than the limit; a download that does not fit fails by itself.
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
            ):  # a part that was just completed has another name now
                os.unlink(path)
                excess -= freed
                crowded -= freed
        return excess <= 0


def _locked(file: str) -> bool:
    """Whether a process or thread holds this lock; one that was killed does not."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def cache_for(
    paths: Sequence[str], cache_dir: str | None, limit_bytes: int = CACHE_BYTES
) -> ShardCache | None:
    """The cache for these shards, or None if all are local.

    Raises UserError if some are remote and there is no `cache_dir`.
    """
    if not any(map(is_remote, paths)):
        return None
    if cache_dir is None:
        raise UserError(
            f"{next(filter(is_remote, paths))}: remote shards need data.cache_dir, on a disk of the node"
        )
    return ShardCache(cache_dir, limit_bytes)


def open_shard(path: str, cache: ShardCache | None, size: int | None = None) -> IO[bytes]:
    """Open a local shard, or the local copy of a remote one.

    `size`: bytes a remote one must have, if known.
    """
    if cache is not None and is_remote(path):
        return cache.open(path, size)
    return open(path, "rb", buffering=0)


class _Absent(UserError):
    """The file does not exist or access is denied, so another attempt would not help."""


def _fetch(url: str, file: str, size: int | None = None, cache: ShardCache | None = None) -> None:
    """Copy a remote file to `file`, completely or not at all. Call it with the file's lock held.

    size: bytes it must have, if known. cache: the cache that has to make room for it, if any.
    Raises UserError: _Absent at once if the source refuses, other errors after FETCH_ATTEMPTS.
    """
    # Not `files.replacing`: the part file has its full length from the start, so that it counts towards the
    # limit of the cache, and `_evict` recognises by its name and the lock of that name a part that a killed
    # process left.
    part = f"{file}.part"
    try:
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                _download(url, part, size, cache)
                with cache.room_lock() if cache else contextlib.nullcontext():
                    os.replace(part, file)
                return
            except UserError:
                raise
            except Exception as error:  # every fsspec backend has its own exceptions
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


def _download(url: str, part: str, size: int | None, cache: ShardCache | None) -> None:
    """Copy a remote file to the local file `part`. Raises UserError or OSError if its size is wrong."""
    with open_remote(url) as (source, length):
        if size is not None and length not in (None, size):
            raise UserError(changed(url, f"it has {length} bytes, its index says {size}"))
        promised = size or length or 0
        if cache:
            cache.make_room(part, promised)
        with open(part, "r+b" if cache else "wb") as target:  # r+ keeps the reserved length
            shutil.copyfileobj(source, target, 1 << 20)
            received = target.tell()
            target.truncate()
    if received != (promised or received):
        raise OSError(f"received {received} bytes instead of {promised}")
    if cache and not promised:
        cache.make_room(part, received, wait=False)


def read_if_there(url: str) -> bytes | None:
    """Read a small remote file. Returns None if it is absent or, with a warning, if it cannot be fetched."""
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
    """Whether another attempt would fail in the same way."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
    # ImportError, ValueError: fsspec needs a package to be installed, or does not know the protocol.
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError))


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a local or remote shard to read it once from front to end; nothing is cached or checked."""
    if is_remote(path):
        with open_remote(path) as (stream, _):
            yield stream
    else:
        with open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """Open a remote file; yields its stream and its size in bytes, None if the source does not state it."""
    if url.startswith(("http://", "https://")):  # fsspec would need aiohttp for these
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            yield response, None if length is None else int(length)
    elif url.startswith("pipe:"):
        with preemption.signals_blocked():
            command = subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)  # nosec B602  # what pipe: is for, if it is allowed
        with command as process:
            assert process.stdout is not None  # because of PIPE
            yield process.stdout, None
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    else:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        with system.open(path, "rb") as stream:
            yield stream, system.size(path)
