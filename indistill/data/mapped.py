"""One file with the indices of all shards of a set, which the processes of a node map into their memory.

The JSON indices stay the format of record. Each process that parses those of a million samples needs a second
and 50 MB of its own. The mapped file is written once, after which all ranks and loader workers share its
pages. It names the sizes and times of the JSON files that it was made from, and is made again when they
differ. It may be deleted at any time.

The format is our own, because safetensors copies what it reads, and numpy maps one array of a file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from indistill.config import UserError, printable
from indistill.config.files import open_regular, read_json, replacing
from indistill.config.limits import MAX_LINE_CHARACTERS, MAX_RECORD_BYTES
from indistill.config.ranks import Ranks
from indistill.data.index import Index, check_bounds, check_sha256, warn
from indistill.data.remote import NoLock, base_name, is_remote, locked
from indistill.data.samples import compressed

log = logging.getLogger(__name__)

SUFFIX = ".indices.map"
MIN_JSON_BYTES = 2**22  # of the indices of a set that gets a mapped file: 100,000 samples
_MAGIC, _VERSION = int.from_bytes(b"indices\n", "little"), 1
# Of the columns after the header: of each shard the size, the samples and the length of keys; offsets, sizes
# and labels; hashes of the source, the content and each shard; texts, and a hash of both; keys.
_TYPES = ("<i8", "<i8", "S64", "u1", "S64", "u1")


class Source(NamedTuple):
    """What a mapped file is made from."""

    file: str  # where it is
    digest: str  # of the shards' names, and of the sizes and times of their indices
    json_bytes: int  # of all indices; 0 if one is missing


class _Stamp(NamedTuple):
    """Tells whether a name still leads to the same file."""

    device: int
    inode: int
    bytes: int
    mtime_ns: int


class MappedIndices(list[Index]):
    """The indices in a mapped file, in the order of the shards. Their arrays cannot be written to.

    Another process that gets them by pickle is sent the name of the file, and maps it too.
    """

    def __init__(self, file: str, stamp: _Stamp, indices: Sequence[Index]) -> None:
        super().__init__(indices)
        self.file = file
        self.stamp = stamp

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        try:
            same = _stamp(os.stat(self.file)) == self.stamp
        except OSError:
            same = False
        return (_map_again, (self.file, self.stamp)) if same else (list, (list(self),))


def shared_indices(
    paths: Sequence[str], find: Callable[[], Source], load: Callable[[], list[Index]]
) -> tuple[list[Index], str]:
    """The indices of shards, from the mapped file if there can be one, and their fingerprint.

    find: looks the source up, as it is now. load: parses the indices, and builds missing ones.
    """
    source = find()
    loaded = None
    if not source.json_bytes:  # without the lock, because processes share the work of building indices
        loaded = load()
        source = find()
    if source.json_bytes >= MIN_JSON_BYTES:
        try:
            found = _read(source, paths)
            if found is None:
                os.makedirs(os.path.dirname(source.file), mode=0o700, exist_ok=True)
                with locked(f"{source.file}.lock"):  # one process parses and writes, the others wait for it
                    found = _read(source, paths)
                    if found is None:
                        loaded = loaded or load()
                        _write(source, loaded, fingerprint_of(paths, loaded))
                        found = _read(source, paths)
            if found is not None:
                if loaded is None:
                    _warn_of_problems(paths, found[0])
                return found
        except (OSError, NoLock) as error:  # a folder that is read-only or full, or has no locks
            log.debug("%s: cannot be written: %s", source.file, error)
    loaded = loaded or load()
    return loaded, fingerprint_of(paths, loaded)


def source_of(paths: Sequence[str], index_files: Sequence[Sequence[str]], labels: str) -> Source:
    """Look up the indices of shards.

    index_files: of each shard, the files that may hold its index. labels: tells how labels are read.
    """
    folder = os.path.dirname(os.path.abspath(index_files[0][0]))
    names = [path if is_remote(path) else os.path.relpath(path, folder) for path in paths]
    seen: list[Any] = [names, labels]
    file = os.path.join(folder, _digest(seen)[:16] + SUFFIX)
    sizes = []
    for path, files in zip(paths, index_files):
        states = [_size_and_times(file) for file in files]
        seen.append([*states, None if is_remote(path) else _size_and_times(path)[0]])
        sizes.append(max(size for size, *_ in states))
    return Source(file, _digest(seen), sum(sizes) if all(sizes) else 0)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _size_and_times(file: str) -> tuple[int, int, int]:
    """Size and times of a file, 0 if it is not there. The last time shows edits that keep the other two."""
    try:
        found = os.stat(file)
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def fingerprint_of(paths: Sequence[str], indices: Sequence[Index]) -> str:
    """Identify a set of shards by its content: a hash in hexadecimal."""
    digest = hashlib.sha256()
    for path, index in zip(paths, indices):
        # The name without its directory, because a data set that was moved is still the same.
        digest.update(f"{base_name(path)}\0{index.bytes}\0{len(index.keys)}\0".encode())
        for array in (index.keys, index.offsets, index.sizes, index.labels):
            digest.update(array.data.cast("B"))
    return digest.hexdigest()


def _warn_of_problems(paths: Sequence[str], indices: Sequence[Index]) -> None:
    if Ranks.from_environment().is_main_process:
        for path, index in zip(paths, indices):
            if index.problem:
                warn(path, index.problem)


# --- the file -----------------------------------------------------------------------------------------------


def _write(source: Source, indices: Sequence[Index], fingerprint: str) -> None:
    """Write a mapped file. Raises OSError."""
    shards = [(index.bytes, len(index.keys), index.keys.itemsize) for index in indices]
    samples = [
        np.concatenate(column)
        for column in ([getattr(index, name) for index in indices] for name in ("offsets", "sizes", "labels"))
    ]
    problems = {str(shard): index.problem for shard, index in enumerate(indices) if index.problem}
    hashes = np.array([source.digest, fingerprint, *(index.sha256 or "" for index in indices)], "S64")
    texts = np.frombuffer(json.dumps(problems).encode(), np.uint8)
    columns = [
        np.array(shards).reshape(-1),
        np.concatenate(samples),
        hashes,
        texts,
        np.array([_hash(hashes, texts)], "S64"),
        np.concatenate([index.keys.view(np.uint8) for index in indices]),
    ]
    with replacing(source.file) as stream:
        stream.write(np.array([_MAGIC, _VERSION, *map(len, columns)], "<i8").tobytes())
        for column, kind in zip(columns, _TYPES):
            stream.write(column.astype(kind, copy=False).tobytes())


def _hash(*arrays: np.ndarray) -> bytes:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest().encode()


def _read(source: Source, paths: Sequence[str]) -> tuple[MappedIndices, str] | None:
    """The indices in a mapped file and their fingerprint; None if it is missing, outdated or damaged."""
    try:
        columns, stamp = _map(source.file)
        if columns is None or columns[2][:1].tolist() != [source.digest.encode()]:
            return None
        indices = _indices(columns)
        if len(indices) != len(paths):
            raise ValueError("it is of other shards")
        for path, index in zip(paths, indices):
            check_sha256(index.sha256)
            check_bounds(index, compressed(path))
        fingerprint = fingerprint_of(paths, indices)
        if columns[2][1] != fingerprint.encode() or columns[4].tolist() != [_hash(*columns[2:4])]:
            raise ValueError("its content has another hash")
        return MappedIndices(source.file, stamp, indices), fingerprint
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = printable(str(error))
        log.warning("%s: cannot be used, and is made again: %s", printable(source.file), reason)
        return None


def _map(file: str) -> tuple[list[np.ndarray] | None, _Stamp]:
    """The columns of a mapped file; None if another version wrote it.

    Raises OSError, and ValueError for a file that is cut or no mapped file.
    """
    with open_regular(file) as stream:
        stamp = _stamp(os.fstat(stream.fileno()))
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    header = np.frombuffer(content, "<i8", 2 + len(_TYPES)).tolist()
    if header[0] != _MAGIC:
        raise ValueError("it does not begin as such a file does")
    if header[1] != _VERSION:
        return None, stamp
    columns, begin = [], 8 * len(header)
    for count, kind in zip(header[2:], _TYPES):
        if count < 0:
            raise ValueError("a column has a negative length")
        columns.append(np.frombuffer(content, kind, count, begin))
        begin += columns[-1].nbytes
    if begin != len(content):
        raise ValueError("it is longer than its columns")
    return columns, stamp


def _indices(columns: list[np.ndarray]) -> list[Index]:
    """Cut the columns of a mapped file into indices of shards. Raises ValueError if they do not fit."""
    of_shards, of_samples, hashes, problems, _, keys = columns
    shards = of_shards.reshape(-1, 3).tolist()
    offsets, sizes, labels = of_samples.reshape(3, -1)
    if len(problems) > MAX_RECORD_BYTES:
        raise ValueError(f"its texts have more than {MAX_RECORD_BYTES} bytes (MAX_RECORD_BYTES)")
    texts = read_json(problems.tobytes())
    if not isinstance(texts, dict):
        raise ValueError("its texts are no mapping")
    if min(min(row) for row in shards) < 1 or len(hashes) != len(shards) + 2:
        raise ValueError("a shard has no samples or no keys")
    if sum(rows for _, rows, _ in shards) != len(offsets):
        raise ValueError("it has more samples or fewer than its shards")
    if sum(rows * width for _, rows, width in shards) != len(keys):
        raise ValueError("its keys do not fit its samples")
    indices = []
    first = first_key = 0
    for shard, ((size, rows, width), sha256) in enumerate(zip(shards, hashes[2:].tolist())):
        of_shard = slice(first, first + rows)
        names = keys[first_key : first_key + rows * width].view(f"S{width}")
        problem = str(texts.get(str(shard), ""))[:MAX_LINE_CHARACTERS]
        digest = sha256.decode("ascii") or None
        arrays = (names, offsets[of_shard], sizes[of_shard], labels[of_shard])
        indices.append(Index(size, *arrays, digest, problem))
        first += rows
        first_key += rows * width
    return indices


def _stamp(found: os.stat_result) -> _Stamp:
    return _Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _map_again(file: str, stamp: _Stamp) -> MappedIndices:
    """Map the file that another process has checked. Raises UserError if it is another one now."""
    try:
        columns, found = _map(file)
        if columns is not None and found == stamp:
            return MappedIndices(file, stamp, _indices(columns))
    except (OSError, ValueError):
        pass
    raise UserError(f"{file}: was replaced while a loader worker started: start the run again")
