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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, TypeVar

from filelock import FileLock, Timeout

from indistill.config import UserError, in_one_line, is_redacted, limits, redacted
from indistill.config.extras import need
from indistill.data.urls import check_url, is_remote
from indistill.data.web import open_http
from indistill.distributed import preemption

log = logging.getLogger(__name__)

CACHED = re.compile(r"[0-9a-f]{16}-(?!.*\.lock$)")  # shards and parts of shards; nothing else is evicted
_PART = re.compile(r"(\.[0-9a-f]{16})?\.part$")  # what a part's name has instead of .lock
CACHE_BYTES = 200 * 10**9
_S3, _GCS = ("s3", "s3fs"), ("gcs", "gcsfs")
# Extra and module of each protocol.
_EXTRAS = {"s3": _S3, "s3a": _S3, "gs": _GCS, "gcs": _GCS, "hf": ("hf", "huggingface_hub")}
FETCH_ATTEMPTS = 8  # with the pauses below, enough for an outage of about two minutes
FETCH_PAUSE_SECONDS = 1.0  # before the second attempt; doubles each time, plus or minus 50 %
FETCH_TIMEOUT_SECONDS = 60.0  # without a byte
FETCH_THREADS = 4  # per process, for shards that are prefetched
LOCK_MESSAGE_SECONDS = 30.0  # of waiting for another process, before a message says so
RESERVED_BYTES = 2**26  # in the cache, ahead of a download of unknown size
BUSY_SECONDS = 60.0  # to evict a shard that was used within this time means that the cache is too small

_Parsed = TypeVar("_Parsed")
Wanted = tuple[str, int, str | None]  # a shard's URL, and its bytes and SHA-256 if its index has it


def _warn(message: str, *values: object) -> None:
    log.warning("%s", redacted(message % values))


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
        make_private(directory)
        make_private(self._shards)
        self._warned = False
        self._pid: int | None = None  # the process whose threads serve the queue
        self._queue: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
        self._requested: set[Wanted] = set()  # shards in the queue or being fetched

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("_pid", "_queue", "_requested")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _pid=None, _queue=queue.SimpleQueue(), _requested=set())

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> IO[bytes]:
        """Open the shard's local copy; fetch it first if it is missing.

        size, sha256: what it must have, if known; the latter is checked when it is fetched.
        """
        while True:
            with contextlib.suppress(FileNotFoundError):  # evicted between the two calls
                return open(self.get(url, size, sha256), "rb", buffering=0)

    def get(self, url: str, size: int | None = None, sha256: str | None = None) -> str:
        """Path of the shard's local copy; fetch it first if it is missing. Raises UserError if that fails."""
        file = os.path.join(self._shards, cache_name(url))
        if not self._use(file, size):
            with locked(f"{file}.lock"):
                if not self._use(file, size):
                    _fetch(url, file, size=size, sha256=sha256, cache=self)
        return file

    def discard(self, url: str) -> None:
        """Delete the shard's local copy."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._shards, cache_name(url)))

    def fetch_index(
        self, url: str, file: str, parse: Callable[[str], _Parsed], suffix: str = ".index.json"
    ) -> _Parsed | None:
        """Fetch the index beside a remote shard to `file` and parse it; return None if there is none.

        parse: raises UserError for a file that is not an index. Such a file is not kept: a server may answer
            with a page that says that it has no such file, or asks for a password.
        """
        with locked(f"{file}.lock"):
            with contextlib.suppress(FileNotFoundError, UserError):  # fetched by another process meanwhile
                return parse(file)
            if url.startswith("pipe:"):
                return None
            address, *query = url.partition("?")
            try:
                _fetch(f"{address}{suffix}{''.join(query)}", file)
            except _Absent:
                _warn("%s has no index beside it: the shard is fetched to build one", url)
                return None
            try:
                return parse(file)
            except UserError as error:
                os.unlink(file)
                _warn("%s: what is beside it is %s; the shard is fetched to build one", url, error)
                return None

    def prefetch(self, shards: Iterable[Wanted]) -> None:
        """Fetch shards in the background, in this order. Errors are raised when a shard is opened."""
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

    def _work(self, tasks: queue.SimpleQueue[Wanted], requested: set[Wanted]) -> None:
        while True:
            shard = tasks.get()
            try:
                self.get(*shard)
            except Exception as error:
                _warn("prefetch: %s", error)
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

    def room_lock(self) -> contextlib.AbstractContextManager[None]:
        """Lock for changes in the directory, so that a sum of its files counts each exactly once."""
        return locked(os.path.join(self._shards, "room.lock"))

    def make_room(self, part: IO[bytes], size: int, wait: bool = True) -> None:
        """Evict shards until there is room for a download of `size` bytes, then make its file that long.

        If only unfinished downloads are left to evict, waits for them or, with `wait=False`, exceeds the
        limit.
        """
        if size > self.limit_bytes:
            raise UserError(
                f"{part.name}: {size} bytes do not fit data.cache_bytes ({self.limit_bytes}): raise it"
            )
        while True:
            with self.room_lock():
                if self._evict(part.name, size) or not wait:
                    part.truncate(size)
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
            if path.endswith(".part") and _is_locked(_PART.sub(".lock", path)):
                continue
            age = time.time() - used
            if age < BUSY_SECONDS and not self._warned:
                self._warned = True
                _warn("evicting a shard used %.0f s ago: raise data.cache_bytes", age)
            with contextlib.suppress(
                FileNotFoundError
            ):  # a part that was just completed has another name now
                os.unlink(path)
                excess -= freed
                crowded -= freed
        return excess <= 0


class NoLock(UserError):
    """A file cannot be locked where it is."""


@contextlib.contextmanager
def locked(file: str) -> Iterator[None]:
    """Hold a lock file. Says so if another process holds it, and raises UserError after MAX_LOCK_SECONDS.

    Raises NoLock if the folder cannot be written to, or its file system has no locks.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=LOCK_MESSAGE_SECONDS)
    except Timeout:
        _warn("%s: waiting for another process that holds it while it fetches a file", file)
        try:
            lock.acquire(timeout=limits.MAX_LOCK_SECONDS)
        except Timeout:
            raise UserError(
                f"{file}: another process holds it for more than {limits.MAX_LOCK_SECONDS:.0f} s "
                "(MAX_LOCK_SECONDS): end that process, or choose another folder"
            ) from None
    except OSError as error:
        reason = error.strerror or error
        raise NoLock(f"{file}: cannot be locked ({reason}): choose a folder on a disk of the node") from None
    try:
        yield
    finally:
        lock.release()


def _is_locked(file: str) -> bool:
    """Whether a process or thread holds this lock; one that was killed does not."""
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True


def make_private(directory: str) -> None:
    """Create a directory that only its owner can use, or check that it belongs to us or to root.

    Raises UserError otherwise: another user could put files into it that this one trusts.
    """
    with contextlib.suppress(OSError):  # the check below says what is wrong
        os.makedirs(os.path.dirname(directory) or ".", exist_ok=True)
        os.mkdir(directory, mode=0o700)
    try:
        # As the file system sees us: it may know root, or the users of a container, by another number.
        with tempfile.TemporaryFile(dir=directory) as probe:
            ours = os.fstat(probe.fileno()).st_uid
        owner = os.stat(directory).st_uid
    except OSError:
        raise UserError(f"data.cache_dir: {directory} cannot be written: choose another directory") from None
    if owner not in (ours, 0):
        raise UserError(
            f"data.cache_dir: {directory} belongs to another user (uid {owner}), who could change the files "
            "in it: choose a directory of your own"
        )


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


def open_shard(
    path: str, cache: ShardCache | None, size: int | None = None, sha256: str | None = None
) -> IO[bytes]:
    """Open a local shard, or the local copy of a remote one.

    size, sha256: what a remote one must have, if known.
    """
    if cache is not None and is_remote(path):
        return cache.open(path, size, sha256)
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened: {error.strerror}") from None


class _Absent(UserError):
    """The file does not exist or access is denied, so another attempt would not help."""


def _fetch(
    url: str,
    file: str,
    *,
    size: int | None = None,
    sha256: str | None = None,
    cache: ShardCache | None = None,
) -> None:
    """Copy a remote file to `file`, completely or not at all. Call it with the file's lock held.

    size, sha256: what it must have, if known. cache: the cache that has to make room for it; without one it
    is a small file.
    Raises UserError: _Absent at once if the source refuses, other errors after FETCH_ATTEMPTS.
    """
    for attempt in range(1, FETCH_ATTEMPTS + 1):
        try:
            with _part(file, cache) as part:
                _download(url, part, size=size, sha256=sha256, cache=cache)
            return
        except UserError:
            raise
        except Exception as error:  # every fsspec backend has its own exceptions
            reason = in_one_line(error, 500)
            if hopeless(error):
                raise _Absent(f"{url}: cannot be fetched: {reason}") from None
            if attempt == FETCH_ATTEMPTS or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{url}: cannot be fetched: {reason} (attempt {attempt})") from None
            pause = FETCH_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)  # nosec B311  # of a pause
            _warn("%s: %s (attempt %d), again in %.1f s", url, reason, attempt, pause)
            time.sleep(pause)


@contextlib.contextmanager
def _part(file: str, cache: ShardCache | None) -> Iterator[IO[bytes]]:
    """Open a new file that gets the name `file` at the end of the `with` block, unless that raises.

    Not `files.replacing`: `_evict` recognises by its name and the lock of that name a part that a killed
    process left.
    """
    part = f"{file}.{os.urandom(8).hex()}.part"
    try:
        with open(part, "xb") as stream:  # O_CREAT | O_EXCL: follows no link
            yield stream
        with cache.room_lock() if cache else contextlib.nullcontext():
            os.replace(part, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


def _download(
    url: str, part: IO[bytes], *, size: int | None, sha256: str | None, cache: ShardCache | None
) -> None:
    """Copy a remote file to `part`. Raises UserError or OSError if it is not what it must be."""
    with open_remote(url) as (source, length):
        if size is not None and length not in (None, size):
            raise UserError(changed(url, f"it has {length} bytes, its index says {size}"))
        promised = size or length or 0
        _check_size(url, promised, cache)
        if cache:
            cache.make_room(part, promised)
        received, digest = _copy(
            url, source, part=part, promised=promised, cache=cache, hashed=sha256 is not None
        )
        part.truncate()
    if received != (promised or received):
        raise OSError(f"received {received} bytes instead of {promised}")
    if digest != sha256:
        raise UserError(changed(url, f"its SHA-256 is {digest}, its index says {sha256}"))


def _copy(
    url: str,
    source: IO[bytes],
    *,
    part: IO[bytes],
    promised: int,
    cache: ShardCache | None,
    hashed: bool,
) -> tuple[int, str | None]:
    """Copy `source` to its end, or a little beyond the promised bytes; return their number and SHA-256."""
    digest = hashlib.sha256() if hashed else None
    received = reserved = 0
    read = getattr(source, "read1", source.read)  # read1 returns what is there, however little
    while block := read(1 << 20):
        received += len(block)
        if promised and received > promised:
            break  # `_download` reports it
        if not promised and received > reserved:
            _check_size(url, received, cache)
            reserved = received + RESERVED_BYTES
            if cache:
                cache.make_room(part, min(reserved, cache.limit_bytes), wait=False)
        part.write(block)
        if digest:
            digest.update(block)
    return received, digest.hexdigest() if digest else None


def _check_size(url: str, size: int, cache: ShardCache | None) -> None:
    """Raise UserError for a file that is too large to be fetched."""
    if cache and size > cache.limit_bytes:
        raise UserError(f"{url}: {size} bytes do not fit data.cache_bytes ({cache.limit_bytes}): raise it")
    if not cache and size > limits.MAX_SMALL_FILE_BYTES:
        raise UserError(
            f"{url}: has more than {limits.MAX_SMALL_FILE_BYTES} bytes (MAX_SMALL_FILE_BYTES): it is not "
            "what its name says"
        )


def read_if_there(url: str) -> bytes | None:
    """Read a small remote file. Returns None if it is absent or, with a warning, if it cannot be fetched."""
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "file")
        try:
            _fetch(url, file)
        except UserError as error:
            if not isinstance(error, _Absent):
                _warn("%s", error)
            return None
        with open(file, "rb") as stream:
            return stream.read()


def hopeless(error: Exception) -> bool:
    """Whether another attempt would fail in the same way."""
    if isinstance(error, urllib.error.HTTPError):
        return 300 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
    # ImportError, ValueError: fsspec needs a package to be installed, or does not know the protocol.
    kinds = (FileNotFoundError, PermissionError, ImportError, ValueError)
    return isinstance(error, kinds) or type(error).__name__.endswith("CredentialsError")  # botocore's


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a local or remote shard to read it once from front to end; nothing is cached or checked."""
    if is_remote(path):
        with open_remote(path) as (stream, _):
            yield stream
    else:
        with open(path, "rb") as file:
            yield file


def _check_whole(url: str) -> None:
    """Raise UserError for a URL that may not be opened, or that lacks its secrets."""
    check_url(url)
    if is_redacted(url):
        raise UserError(
            f"{url}: a saved config does not keep the query or the password of a URL: give the whole URL, "
            "as in the command that began the run"
        )


def file_system(url: str, **options: Any) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it. Raises UserError, or what fsspec raises for
    a package that is missing.
    """
    import fsspec

    _check_whole(url)
    protocol = url.partition("://")[0]
    if protocol in _EXTRAS:
        extra, module = _EXTRAS[protocol]
        need(extra, f"{protocol}://", module)
    system, path = fsspec.core.url_to_fs(url, **options)
    return system, path


@contextlib.contextmanager
def open_remote(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """Open a remote file; yields its stream and its size in bytes, None if the source does not state it."""
    _check_whole(url)
    if url.startswith(("http://", "https://")):  # fsspec would need aiohttp for these
        with open_http(url, FETCH_TIMEOUT_SECONDS) as response:
            yield response, response.length
    elif url.startswith("pipe:"):
        with preemption.signals_blocked():
            command = subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE)  # nosec B602  # what pipe: is for, if it is allowed
        with command as process:
            assert process.stdout is not None  # because of PIPE
            yield process.stdout, None
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    else:
        system, path = file_system(url)
        with system.open(path, "rb") as stream:
            yield stream, system.size(path)
