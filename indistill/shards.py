"""WebDataset tars with an index: counted, verified, read at random by offset, wherever they are.

A shard is an ordinary WebDataset tar: `{key}.jpg` and `{key}.cls` (the class number in ASCII), next to each other. Its
index, `<shard>.index.json`, holds the byte size of the tar and key, offset, size and label of every sample; it is built
once and saved beside the shard or, if a cache directory is given, there. A remote shard is fetched whole into that
directory, once per node.
"""

import contextlib
import copy
import csv
import errno
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import queue
import random
import re
import shutil
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from braceexpand import braceexpand
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from indistill.config import UserError

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key reaches to the first dot of the base name, what follows is the extension.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
BLOCK = tarfile.BLOCKSIZE  # bytes: what a tar is padded to, and the size of a member's header
CACHED = re.compile(r"[0-9a-f]{16}-(?!.*\.lock$)")  # shards and parts of shards in the cache; nothing else is evicted
OVERHEAD_BYTES = 3 * BLOCK + BLOCK // 2  # of a sample: two headers, the label's block, half a block of padding
INDEX_VERSION = 1
OPEN_SHARDS = 256  # kept-open local shards per process, well under the usual limit of 1,024 descriptors

CACHE_BYTES = 200 * 10**9
FETCH_ATTEMPTS = 8  # with the pauses below an outage of about two minutes is survived
FETCH_PAUSE_SECONDS = 1.0  # before the second attempt; doubles, give or take a half
FETCH_TIMEOUT_SECONDS = 60.0  # without a byte
FETCH_THREADS = 4  # per process, for shards asked for ahead of use
BUSY_SECONDS = 60.0  # evicting a shard used so shortly ago means that the cache is too small


class Sample(NamedTuple):
    key: str
    image: bytes  # the encoded file
    label: int  # -1 where the shard holds none


class Index(NamedTuple):
    """What one shard holds. Arrays have one entry per sample, in the order of the tar."""

    bytes: int  # size of the shard
    keys: np.ndarray  # utf-8 bytes
    offsets: np.ndarray  # int64, where the image begins; in a compressed shard within the uncompressed stream
    sizes: np.ndarray  # int64, bytes of the image
    labels: np.ndarray  # int64, -1 for none


class ShardSet:
    """Shards in order, seen as one row of samples. A sample's id is its place in that row.

    urls: local paths, `http(s)://` or any `fsspec` URL, `pipe:COMMAND`; braces are expanded, `*` of local paths is
        expanded and sorted. What is relative is relative to `root`.
    cache_dir: where indices and remote shards go. By default an index goes beside its shard; remote shards need it.
    cache_bytes: how much of remote shards is kept. It should hold what one window of the sample order touches.
    allow_pipe: `pipe:` runs any command, so it has to be wanted.

    Safe after fork, in threads and through pickle: reads name their offset, and open files do not travel.
    Raises UserError for a missing, cut, damaged or changed shard and for malformed labels, naming the shard.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        root: str | None = None,
        cache_dir: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        allow_pipe: bool = False,
    ):
        self.paths = expand(urls, root, allow_pipe)
        self._cache = _cache_for(self.paths, cache_dir, cache_bytes)
        # Processes that start together build missing indices in different orders, so they share the work.
        shuffled = random.SystemRandom().sample(self.paths, len(self.paths))
        with ThreadPoolExecutor(16 if self._cache else 1) as pool:
            loaded = dict(zip(shuffled, pool.map(lambda path: load_index(path, cache_dir, self._cache), shuffled)))
        self._indices = [loaded[path] for path in self.paths]
        self.sizes = [len(index.keys) for index in self._indices]  # samples per shard
        digest = hashlib.sha256()
        for path, index in zip(self.paths, self._indices):
            # The name without its directory: a data set that has moved is still the same.
            digest.update(f"{_name(path)}\0{index.bytes}\0{len(index.keys)}\0".encode())
            for array in index[1:]:
                digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()
        self._first_ids = np.cumsum([0, *self.sizes])  # [shards + 1]
        self._files: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def read(self, sample_id: int) -> Sample:
        """One sample, by one read at its offset. UserError if the shard is compressed or not as it was indexed."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"no sample {sample_id} among {len(self)}")
        shard = int(self._shards_of(sample_id))
        path, index, row = self.paths[shard], self._indices[shard], sample_id - self._first_ids[shard]
        if _compressed(path):
            raise UserError(
                f"{path}: a compressed shard cannot be read at random: set data.in_memory: true, "
                "or re-shard with `indistill shards pack`"
            )
        offset, size, key = int(index.offsets[row]), int(index.sizes[row]), _decoded(index.keys[row])
        # The member's header comes along, as a proof that the tar is still the one that was indexed.
        file = self._open(shard)  # held, so that it stays open for the read
        data = os.pread(file.fileno(), BLOCK + size, offset - BLOCK)
        with contextlib.suppress(tarfile.HeaderError):
            if tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape").size == size == len(data) - BLOCK:
                return Sample(key, data[BLOCK:], int(index.labels[row]))
        raise UserError(_changed(path, f"sample '{key}' is not where the index says"))

    def iterate(self, begin: int = 0, end: int | None = None) -> Iterator[Sample]:
        """The samples `begin` up to `end`, by default all, in id order; each shard is read from front to end."""
        end = len(self) if end is None else end
        for shard, path in enumerate(self.paths):
            first, last = self._first_ids[shard], self._first_ids[shard + 1]
            wanted = range(max(begin, first), min(end, last))
            if wanted and _compressed(path):
                with _open_shard(path, self._cache, self._indices[shard].bytes) as stream:
                    for sample_id, (key, _, image, label) in enumerate(_samples(path, stream), first):
                        if sample_id in wanted:
                            yield Sample(key, image, label)
            else:
                yield from map(self.read, wanted)

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples], -1 where a sample has none."""
        return np.concatenate([index.labels for index in self._indices])

    def where(self, sample_id: int) -> str:
        """The sample's shard and key, as messages name it."""
        shard = int(self._shards_of(sample_id))
        key = _decoded(self._indices[shard].keys[sample_id - self._first_ids[shard]])
        return f"{_name(self.paths[shard])}: sample {key}"

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return self._cache is not None

    def prefetch(self, sample_ids: np.ndarray) -> None:
        """Fetch the remote shards that hold these samples in the background. At once done for local shards."""
        if self._cache:
            shards = [shard for shard in np.unique(self._shards_of(sample_ids)) if _remote(self.paths[shard])]
            self._cache.prefetch((self.paths[shard], self._indices[shard].bytes) for shard in shards)

    def _slice(self, begin: int, end: int) -> "ShardSet":
        """Only the shards of samples `begin` up to `end`, which keep their ids: a small thing to send to a process."""
        low, high = self._shards_of(np.array([begin, end - 1]))
        part = copy.copy(self)
        part.paths, part.sizes = self.paths[low : high + 1], self.sizes[low : high + 1]
        part._indices, part._first_ids = self._indices[low : high + 1], self._first_ids[low : high + 2]
        return part

    def _shards_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_ids, sample_ids, side="right") - 1

    def _open(self, shard: int) -> IO[bytes]:
        path, size = self.paths[shard], self._indices[shard].bytes
        if _remote(path):  # opened for every read: an open file that the cache evicts would go on using the disk
            return self._cache.open(path, size)
        file = self._files.get(shard)
        if file is None:
            file = _open_shard(path, None)
            if os.fstat(file.fileno()).st_size != size:
                raise UserError(_changed(path, f"it no longer has the {size} bytes that its index says"))
            if len(self._files) >= OPEN_SHARDS:
                oldest, *_ = self._files
                self._files.pop(oldest, None)  # closes when the last thread that reads from it lets go of it
            self._files[shard] = file
        return file


def expand(urls: str | Sequence[str], root: str | None = None, allow_pipe: bool = False) -> list[str]:
    """The shard paths that the patterns stand for: braces in their order, `*` sorted, all below `root` if relative."""
    paths = []
    for url in [urls] if isinstance(urls, str) else urls:
        try:
            expanded = list(braceexpand(os.path.expanduser(url)))
        except ValueError as error:
            raise UserError(f"{url}: {error}: correct the braces") from None
        for path in expanded:
            if path.startswith("pipe:") and not allow_pipe:
                raise UserError(f"{path}: runs a command, which is not allowed here (allow_pipe)")
            if "://" in path and "*" in path:
                raise UserError(f"{path}: * is for local files; list remote shards with braces, as {{000000..000127}}")
            path = path.removeprefix("file://")
            place = path if _remote(path) else os.path.join(root or "", path)
            if _remote(place) or os.path.isfile(place):
                paths.append(place)
                continue
            found = sorted(glob.glob(os.path.join(glob.escape(root or ""), path)))
            # An index or a sidecar that the pattern takes in is no shard.
            found = [path for path in found if not path.endswith((".json", ".lock", ".part")) and os.path.isfile(path)]
            if not found:
                raise UserError(f"{place}: no such shard: correct the path or data.root")
            paths += found
    if not paths:
        raise UserError("the list of shards is empty: name at least one")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice}: listed twice: every shard counts once")
    return paths


def _remote(path: str) -> bool:
    return "://" in path or path.startswith("pipe:")


def _name(path: str) -> str:
    """The last part of a path or URL, without a query; a command whole."""
    if path.startswith("pipe:"):
        return path
    return os.path.basename(re.sub(r"[?#].*", "", path) if _remote(path) else path)


def _compressed(path: str) -> bool:
    return _name(path).endswith((".gz", ".tgz")) and not path.startswith("pipe:")


def _changed(path: str, how: str) -> str:
    return (
        f"{path}: the shard is cut or changed: {how}; "
        "restore it or, if it is meant to be so, run `indistill shards index` on it"
    )


# --- the index -------------------------------------------------------------------------------------------------------


def load_index(path: str, cache_dir: str | None = None, cache: "ShardCache | None" = None) -> Index:
    """The shard's index, built and saved first if there is none. Raises UserError if it does not fit the shard."""
    problem = None
    for file in _index_files(path, cache_dir):
        if os.path.exists(file) or (_remote(path) and cache.fetch_index(path, file)):
            index = _parse_index(file)
            if _remote(path) or index.bytes == (size := os.stat(path).st_size):
                return index
            problem = _changed(path, f"it has {size} bytes, its index {file} says {index.bytes}")
    if problem:
        raise UserError(problem)
    return build_index(path, cache_dir, cache)


def build_index(path: str, cache_dir: str | None = None, cache: "ShardCache | None" = None) -> Index:
    """Read the headers of a shard, save its index. Raises UserError if the tar is damaged or a label is malformed."""
    try:
        with _open_shard(path, cache) as stream:
            rows = [(key, *place, label) for key, place, _, label in _samples(path, stream, load=False)]
            index = _index(os.fstat(stream.fileno()).st_size, *zip(*rows))
    except UserError:
        if cache:
            cache.discard(path)  # so that it is fetched again when it has been mended
        raise
    _save_index(_index_files(path, cache_dir)[0], index)
    return index


def _index(
    bytes: int, keys: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> Index:
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    return Index(bytes, encoded, *(np.array(numbers, dtype=np.int64) for numbers in (offsets, sizes, labels)))


def _decoded(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")  # as tarfile decodes names


def _index_files(path: str, cache_dir: str | None) -> list[str]:
    """Where the shard's index may be, the preferred place first."""
    if cache_dir is None:
        return [f"{path}.index.json"]
    cached = os.path.join(cache_dir, f"{_cache_name(path)}.index.json")
    return [cached] if _remote(path) else [cached, f"{path}.index.json"]


def _cache_name(path: str) -> str:
    """Shards of one name in two directories have two names in the cache."""
    identity = path if _remote(path) else os.path.abspath(path)
    name = "pipe" if path.startswith("pipe:") else _name(path)
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{name}"


def _parse_index(file: str) -> Index:
    try:
        stored = json.loads(Path(file).read_bytes())
        if stored.pop("version") != INDEX_VERSION:
            raise ValueError
        return _index(**stored)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not an index that this version reads: delete it and it is built anew") from None


def _save_index(file: str, index: Index) -> None:
    columns = {name: getattr(index, name).tolist() for name in ("offsets", "sizes", "labels")}
    keys = [_decoded(key) for key in index.keys.tolist()]
    content = json.dumps({"version": INDEX_VERSION, "bytes": index.bytes, "keys": keys, **columns})
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        with _replacing(file) as stream:
            stream.write(content.encode())
    except OSError as error:
        raise UserError(
            f"{file}: cannot save the index ({error.strerror}): set data.cache_dir to a writable place"
        ) from None


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place whole and at once. Several processes may write the same one."""
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# --- remote shards ---------------------------------------------------------------------------------------------------


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
        file = os.path.join(self._shards, _cache_name(url))
        if not self._use(file, size):
            with FileLock(f"{file}.lock"):
                if not self._use(file, size):
                    _fetch(url, file, size, self)
        return file

    def discard(self, url: str) -> None:
        """Forget the shard's local copy."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._shards, _cache_name(url)))

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
            raise UserError(f"{part}: {size} bytes do not fit data.cache_bytes ({self.limit_bytes}): raise it")
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
            with contextlib.suppress(FileNotFoundError):  # a part that has just been completed has another name now
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


def _cache_for(paths: Sequence[str], cache_dir: str | None, limit_bytes: int = CACHE_BYTES) -> ShardCache | None:
    if not any(map(_remote, paths)):
        return None
    if cache_dir is None:
        raise UserError(f"{next(filter(_remote, paths))}: remote shards need data.cache_dir, on a disk of the node")
    return ShardCache(cache_dir, limit_bytes)


def _open_shard(path: str, cache: ShardCache | None, size: int | None = None) -> IO[bytes]:
    return cache.open(path, size) if _remote(path) else open(path, "rb", buffering=0)


class _Absent(UserError):
    """The source answers that there is no such file, or not for us: another attempt is of no use."""


def _fetch(url: str, file: str, size: int | None = None, cache: ShardCache | None = None) -> None:
    """Copy a remote file to `file`, whole or not at all; call with the file's lock held.

    size: bytes it must have, where known. cache: where room has to be made for it.
    Raises UserError: at once where the source says no, otherwise after FETCH_ATTEMPTS.
    """
    part = f"{file}.part"
    try:
        for attempt in range(1, FETCH_ATTEMPTS + 1):
            try:
                with _open_remote(url) as (source, length):
                    if size is not None and length not in (None, size):
                        raise UserError(_changed(url, f"it has {length} bytes, its index says {size}"))
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


def _hopeless(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)  # timeout, too many requests
    # ImportError and ValueError: fsspec names the package to install, or does not know the protocol.
    return isinstance(error, (FileNotFoundError, PermissionError, ImportError, ValueError))


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """A shard's bytes from front to end, where it is: nothing is cached or checked."""
    with open(path, "rb") if not _remote(path) else _open_remote(path) as opened:
        yield opened[0] if _remote(path) else opened


@contextlib.contextmanager
def _open_remote(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """The stream of a remote file and, where the source tells, its size in bytes."""
    if url.startswith(("http://", "https://")):  # fsspec would need aiohttp for these
        with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_SECONDS) as response:
            length = response.headers.get("Content-Length")
            yield response, None if length is None else int(length)
    elif url.startswith("pipe:"):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            yield process.stdout, None
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    else:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        with system.open(path, "rb") as stream:
            yield stream, system.size(path)


# --- reading tars ----------------------------------------------------------------------------------------------------


def _samples(path: str, stream: IO[bytes], load: bool = True, report: Callable[[str, str], None] | None = None):
    """(key, (offset, size) of the image, image or None without `load`, label) of every sample, in one pass.

    report(key, problem) is called for every malformed sample; by default it raises UserError.
    """

    def refuse(key: str, problem: str) -> None:
        raise UserError(f"{path}: {problem}")

    report = report or refuse
    seen = set()
    key, image, label = None, None, None

    def finished() -> Iterator[tuple]:
        if image is not None:
            yield key, image[:2], image[2], -1 if label is None else label
        elif label is not None:
            report(key, f"sample '{key}' has a .cls but no image ({', '.join(IMAGE_EXTENSIONS)})")

    for member_key, extension, offset, size, content in _members(path, stream, load):
        if member_key != key:
            yield from finished()
            key, image, label = member_key, None, None
            if key in seen:
                report(key, f"the members of sample '{key}' are not next to each other: pack it anew")
            seen.add(key)
        if extension == "cls":
            if label is not None:
                report(key, f"sample '{key}' has two labels")
            label = int(content) if re.fullmatch(rb"\s*\d{1,9}\s*", content) else -1
            if label < 0:
                report(key, f"{key}.cls holds {content[:20]!r}: a label is a whole number from 0 on")
        elif image is not None:
            report(key, f"sample '{key}' has two images")
        else:
            image = offset, size, content
    yield from finished()
    if not seen:
        refuse("", "holds no sample, a sample being {key}.jpg (jpeg, png, webp) and {key}.cls")


def _members(path: str, stream: IO[bytes], load: bool) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """(key, extension, offset, size, content) of every image and label; without `load` images come without content.

    tarfile takes a cut or a damaged header for the end of the archive: what lies behind the last member tells.
    """
    try:
        with contextlib.ExitStack() as stack:
            if _compressed(path):
                stream = stack.enter_context(gzip.open(stream))
            tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r:"))
            while member := tar.next():
                tar.members.clear()  # tarfile would keep every header
                match = KEY_AND_EXTENSION.match(member.name)
                if match is None or not member.isreg():
                    continue
                key, extension = match[1], match[2].lower()
                if extension == "cls" or extension in IMAGE_EXTENSIONS:
                    content = tar.extractfile(member).read() if load or extension == "cls" else None
                    yield key, extension, member.offset_data, member.size, content
            stream.seek(tar.offset)
            end = stream.read(BLOCK)
            if len(end) < BLOCK or any(end) or any(any(rest) for rest in iter(lambda: stream.read(1 << 20), b"")):
                raise UserError(f"{path}: the tar is cut or damaged at byte {tar.offset}: fetch or pack it anew")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the tar is cut or damaged ({error}): fetch or pack it anew") from None


class BadMember(NamedTuple):
    shard: str
    key: str  # "" if it is the shard itself
    problem: str


def verify(
    urls: str | Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> list[BadMember]:
    """Read every member, decode every image, compare with the index if there is one. Returns all that is wrong."""
    tasks = [(path, cache_dir) for path in expand(urls, root, allow_pipe)]
    return [bad for found in _parallel(_verify_shard, tasks, workers, progress) for bad in found]


def index(
    urls: str | Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, int]:
    """Build the index of every shard anew. Returns samples per shard."""
    paths = expand(urls, root, allow_pipe)
    return dict(zip(paths, _parallel(_index_shard, [(path, cache_dir) for path in paths], workers, progress)))


def _verify_shard(task: tuple[str, str | None]) -> list[BadMember]:
    path, cache_dir = task
    cache, bad, rows = _cache_for([path], cache_dir), [], []

    def report(key: str, problem: str) -> None:
        bad.append(BadMember(path, key, problem))

    try:
        with _open_shard(path, cache) as stream:
            for key, place, image, label in _samples(path, stream, report=report):
                rows.append((key, *place, label))
                try:
                    with Image.open(io.BytesIO(image)) as decoded:
                        decoded.convert("RGB")
                except Exception as error:  # Pillow's decoders raise many kinds
                    report(key, f"cannot be decoded: {_undecodable(error)}")
            size = os.fstat(stream.fileno()).st_size
        for file in filter(os.path.exists, _index_files(path, cache_dir)):
            if not all(map(np.array_equal, _parse_index(file), _index(size, *zip(*rows)))):
                report("", f"{file} does not fit the shard: run `indistill shards index` on it")
    except UserError as error:
        report("", str(error))
    return bad


def _undecodable(error: Exception) -> str:
    # Pillow names the address of the buffer there.
    return "no known image format" if isinstance(error, UnidentifiedImageError) else str(error)


def _index_shard(task: tuple[str, str | None]) -> int:
    path, cache_dir = task
    cache = _cache_for([path], cache_dir)
    if cache:
        cache.discard(path)  # the index is to be that of the shard as it now is
    return len(build_index(path, cache_dir, cache).keys)


def _parallel(function: Callable, tasks: Sequence, workers: int, progress: bool) -> Iterator:
    """function(task) for each task, in order."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they are
            pool = stack.enter_context(ProcessPoolExecutor(workers, spawn))
            results = pool.map(function, tasks)
        else:
            results = map(function, tasks)
        yield from tqdm(results, total=len(tasks), unit="shard", disable=not progress)


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(
    samples: Iterable[tuple[str, bytes, str, int]], destination: str | Path, prefix: str, samples_per_shard: int
) -> list[Path]:
    """Write (key, encoded image, extension, label) samples as `<prefix>-000000.tar`, ... with their indices.

    The same samples give the same bytes. A label of -1 writes no .cls. Returns the shards' paths.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    paths, samples = [], iter(samples)
    while pending := list(itertools.islice(samples, samples_per_shard)):
        paths.append(_shard_path(destination, prefix, len(paths)))
        _write_shard(paths[-1], pending)
    left_over = _shard_path(destination, prefix, len(paths))
    if left_over.exists():
        raise UserError(f"{left_over}: left from an earlier packing of more shards: delete what is no longer wanted")
    return paths


def pack_source(
    source: str | Sequence[str],
    destination: str | Path,
    prefix: str = "shard",
    shard_bytes: int = 100_000_000,
    resize: int | None = None,
    quality: int = 90,
    seed: int = 0,
    workers: int = 1,
    cache_dir: str | None = None,
    progress: bool = False,
) -> dict:
    """Pack a data set into shards of about `shard_bytes` with their indices and a `dataset.json`, which is returned.

    source: a folder with one sub-folder per class (labels are their places in sorted order), a CSV of path,label (paths
        relative to it; labels are numbers or, if any is not, names that are numbered in sorted order), or shards: a
        folder of them or patterns as `ShardSet` takes them. Images from files are shuffled once by `seed`, so that
        every shard mixes classes; shards keep their order.
    resize: pixels that a longer shorter side is reduced to, as JPEG of `quality`. All other images stay as they are.

    The same source and options give the same bytes whatever the number of workers. A packing that was interrupted goes
    on where it ended: finished shards are kept.
    Raises UserError for images that cannot be read and for a destination that holds another packing, naming them.
    """
    if shard_bytes < 1 or (resize is not None and resize < 1):
        raise UserError(f"shard_bytes ({shard_bytes}) and resize ({resize}) must be at least 1")
    origin = _find_source(source, seed, cache_dir)
    sizes, scale = origin.sizes, 1.0
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    record = destination / "dataset.json"
    plan = hashlib.sha256(repr((origin.identity, prefix, shard_bytes, resize, quality)).encode()).hexdigest()
    if record.exists():
        if json.loads(record.read_text()).get("plan") != plan:
            raise UserError(f"{destination}: holds another packing (see {record.name}): choose an empty directory")
    elif stray := next(destination.glob("*.tar*"), None):
        raise UserError(f"{stray}: not of this packing: choose an empty directory")
    _save_json(record, {"plan": plan, "complete": False})
    for part in destination.glob("*.part"):  # of a packing that was killed
        part.unlink()

    if resize:  # how much smaller images become, from the first ones
        tried = min(len(sizes), 64)
        shrunk = _shrunk(origin.part(0, tried)(), resize, quality)
        scale = sum(len(image) for _, image, _, _ in shrunk) / max(sizes[:tried].sum(), 1)
    sizes = (sizes * scale).astype(np.int64) + OVERHEAD_BYTES
    shards = max(1, round(sizes.sum() / shard_bytes))
    # Image i goes where its first byte lies in a row of equal shards; one larger than a shard leaves none empty.
    of_shard = (np.cumsum(sizes) - sizes) * shards // sizes.sum()
    cuts = [0, *(np.flatnonzero(np.diff(of_shard)) + 1).tolist(), len(sizes)]
    paths = [_shard_path(destination, prefix, number) for number in range(len(cuts) - 1)]
    tasks = [(path, origin.part(*cut), resize, quality) for path, cut in zip(paths, itertools.pairwise(cuts))]
    for _ in _parallel(_pack_shard, tasks, workers, progress):
        pass

    indices = [load_index(str(path)) for path in paths]
    labels = np.concatenate([index.labels for index in indices])
    image_bytes = np.concatenate([index.sizes for index in indices])
    summary = {
        "plan": plan,
        "complete": True,
        "shards": len(paths),
        "urls": f"{prefix}-{{{0:06d}..{len(paths) - 1:06d}}}.tar",
        "samples": len(labels),
        "mean_bytes": round(float(image_bytes.mean()), 1),
        "unlabelled": int((labels < 0).sum()),
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(origin.classes or [])).tolist(),
        "classes": origin.classes,
        "ignored_files": origin.ignored,
    }
    _save_json(record, summary)
    return summary


class _Files(NamedTuple):
    """Images that are files."""

    identity: str
    items: list[tuple[str, str, int]]  # key, path, label
    sizes: np.ndarray  # int64 [items], bytes
    classes: list[str] | None
    ignored: int  # files that are no images

    def part(self, begin: int, end: int) -> Callable[[], Iterator[tuple]]:
        return functools.partial(_read_files, self.items[begin:end])


class _Shards(NamedTuple):
    """Images that are in shards."""

    identity: str
    shards: ShardSet
    sizes: np.ndarray
    classes: list[str] | None
    numbered: bool  # keys repeat, as they may in different shards, so they are made unique
    ignored: int = 0

    def part(self, begin: int, end: int) -> Callable[[], Iterator[tuple]]:
        return functools.partial(_read_shards, self.shards._slice(begin, end), begin, end, self.numbered)


def _read_files(items: list[tuple[str, str, int]]) -> Iterator[tuple[str, bytes, str, int]]:
    for key, path, label in items:
        yield key, Path(path).read_bytes(), _extension(path), label


def _read_shards(shards: ShardSet, begin: int, end: int, numbered: bool) -> Iterator[tuple[str, bytes, str, int]]:
    extensions = {b"\x89PNG": "png", b"RIFF": "webp"}  # what the content begins with
    for number, (key, image, label) in enumerate(shards.iterate(begin, end), begin):
        yield f"{key}_{number:08d}" if numbered else key, image, extensions.get(image[:4], "jpg"), label


def _find_source(source: str | Sequence[str], seed: int, cache_dir: str | None) -> _Files | _Shards:
    if isinstance(source, str) and source.lower().endswith(".csv"):
        return _list_files(*_read_csv(Path(source)), seed)
    if isinstance(source, str) and os.path.isdir(source):
        folder = Path(source)
        found = [path for pattern in ("*.tar", "*.tar.gz", "*.tgz") for path in folder.glob(pattern)]
        if not found:
            return _list_files(*_read_folder(folder), seed)
        source = sorted(map(str, found))
    shards = ShardSet(source, cache_dir=cache_dir)
    keys = np.concatenate([index.keys for index in shards._indices])
    sizes = np.concatenate([index.sizes for index in shards._indices])
    record = Path(shards.paths[0]).parent / "dataset.json"
    classes = json.loads(record.read_text()).get("classes") if record.exists() else None
    return _Shards(shards.fingerprint, shards, sizes, classes, len(np.unique(keys)) < len(keys))


def _list_files(found: list[tuple[str, int]], classes: list[str] | None, ignored: int, seed: int) -> _Files:
    """found: (path, label) in an order that does not depend on the machine."""
    items = []
    for number, (path, label) in enumerate(found):
        # The number makes keys unique; a key has no dot.
        items.append((f"{number:08d}_{Path(path).stem.replace('.', '_')}", path, label))
    items = [items[i] for i in np.random.RandomState(seed).permutation(len(items))]
    sizes = np.array([os.path.getsize(path) for _, path, _ in items], dtype=np.int64)
    identity = hashlib.sha256(sizes.tobytes())
    for key, _, label in items:
        identity.update(f"{key}\0{label}\0".encode("utf-8", "surrogateescape"))
    return _Files(identity.hexdigest(), items, sizes, classes, ignored)


def _read_folder(folder: Path) -> tuple[list[tuple[str, int]], list[str], int]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*"))]
    files = [(str(path), label) for path, label in files if path.is_file()]
    images = [(path, label) for path, label in files if _extension(path) in IMAGE_EXTENSIONS]
    if not images:
        raise UserError(f"{folder}: neither shards nor class folders with images ({', '.join(IMAGE_EXTENSIONS)}) in it")
    return images, classes, len(files) - len(images)


def _read_csv(file: Path) -> tuple[list[tuple[str, int]], list[str] | None, int]:
    found, names = [], []
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            for row in reader:
                if [cell.strip().lower() for cell in row] in ([], ["path", "label"]):
                    continue
                line = f"{file}: line {reader.line_num}"
                if len(row) != 2:
                    raise UserError(f"{line}: holds {len(row)} columns instead of path,label")
                path = file.parent / row[0].strip()
                if not path.is_file() or _extension(str(path)) not in IMAGE_EXTENSIONS:
                    raise UserError(f"{line}: {path} is not an image file ({', '.join(IMAGE_EXTENSIONS)})")
                found.append(str(path))
                names.append(row[1].strip())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    if not found:
        raise UserError(f"{file}: holds no path,label rows")
    if all(name.isascii() and name.isdigit() for name in names):
        return list(zip(found, map(int, names))), None, 0
    classes = sorted(set(names))
    labels = {name: label for label, name in enumerate(classes)}
    return [(path, labels[name]) for path, name in zip(found, names)], classes, 0


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _pack_shard(task: tuple[Path, Callable[[], Iterator[tuple]], int | None, int]) -> None:
    path, read, resize, quality = task
    if not path.exists():
        _write_shard(path, _shrunk(read(), resize, quality))


def _shrunk(samples: Iterable[tuple[str, bytes, str, int]], resize: int | None, quality: int) -> Iterator[tuple]:
    """The samples with their shorter side reduced to `resize` pixels where it is longer."""
    for key, image, extension, label in samples:
        if resize:
            try:
                with Image.open(io.BytesIO(image)) as decoded:
                    scale = resize / min(decoded.size)
                    if scale < 1:
                        width, height = (max(1, round(side * scale)) for side in decoded.size)
                        content = io.BytesIO()
                        smaller = decoded.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
                        smaller.save(content, "JPEG", quality=quality)
                        image, extension = content.getvalue(), "jpg"
            except Exception as error:  # Pillow's decoders raise many kinds
                why = _undecodable(error)
                raise UserError(f"image '{key}' cannot be decoded: {why}: mend or remove it, then go on") from None
        yield key, image, extension, label


def _shard_path(destination: Path, prefix: str, number: int) -> Path:
    return destination / f"{prefix}-{number:06d}.tar"


def _save_json(path: Path, content: dict) -> None:
    with _replacing(path) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def _write_shard(path: Path, samples: Iterable[tuple[str, bytes, str, int]]) -> None:
    with _replacing(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, extension, label in samples:
            if extension not in IMAGE_EXTENSIONS or "." in key.rpartition("/")[2]:
                raise UserError(f"cannot pack '{key}.{extension}': keys have no dot, images are {IMAGE_EXTENSIONS}")
            for suffix, content in ((extension, image), ("cls", str(label).encode() if label >= 0 else None)):
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # time, owner and mode of a fresh TarInfo are constants
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    build_index(str(path))
