"""WebDataset tars with an index, local or remote, from which single samples are read at their offsets.

A shard is an ordinary WebDataset tar with `{key}.jpg` and `{key}.cls` (the class number in ASCII) next to
each other. Its index, `<shard>.index.json`, contains the size of the tar in bytes and the key, offset, size
and label of every sample. It is built once and saved in the cache directory or, without one, beside the
shard. A remote shard is fetched as a whole into the cache directory, once per node.
"""

from __future__ import annotations

import contextlib
import copy
import glob
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple, NoReturn, TypeVar

import numpy as np

from indistill.config import UserError, printable
from indistill.config.files import denied
from indistill.config.limits import MAX_SHARDS
from indistill.data.braces import expand_braces
from indistill.data.index import Index, decoded, index_files, index_to_pack, load_index, numbered
from indistill.data.labels import Classes
from indistill.data.mapped import SUFFIX, Source, fingerprint_of, shared_indices, source_of
from indistill.data.remote import CACHE_BYTES, base_name, cache_for, changed, is_remote, open_shard
from indistill.data.samples import CLS, compressed, samples_of, tar_of
from indistill.data.tar import BLOCK
from indistill.data.urls import check_url, without_file
from indistill.data.wildcards import expand_wildcards

OPEN_SHARDS = 256  # local shards kept open per process, well below the usual limit of 1,024 descriptors

_Loaded = TypeVar("_Loaded")


class Sample(NamedTuple):
    key: str
    image: bytes  # the encoded file
    label: int  # -1: none


class ShardSet:
    """Shards in order, as one sequence of samples. A sample's id is its index in that sequence.

    urls: local paths, `http(s)://` or any `fsspec` URL, `pipe:COMMAND`. Braces are expanded; `*` in local
        paths is expanded and sorted. Relative paths are relative to `root`.
    cache_dir: directory for indices and remote shards. By default an index is saved beside its shard; remote
        shards need the directory.
    cache_bytes: limit for remote shards in the cache. It should fit the shards of one window of the sample
        order.
    labels: how labels are read, if not from KEY.cls.
    rewrite_keys: also read images and labels that belong to no sample, because of dots in their names.
        `rewritten` has their keys then, by name.

    Safe after fork, in threads and with pickle: reads state their offset, and open files are not pickled.
    Raises UserError for a missing, cut, damaged or changed shard and for malformed labels, naming the shard.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        root: str | None = None,
        *,
        cache_dir: str | None = None,
        cache_bytes: int = CACHE_BYTES,
        rewrite_keys: bool = False,
        labels: Classes | None = None,
    ):
        self.paths = expand(urls, root)
        self._labels = labels
        self._cache = cache_for(self.paths, cache_dir, cache_bytes)

        self.rewritten: list[dict[str, str]] = [{}] * len(self.paths)  # of each shard
        if rewrite_keys:
            loaded = self._load(lambda path: index_to_pack(path, cache_dir, self._cache, labels or CLS))
            self._indices, self.rewritten = (list(column) for column in zip(*loaded))
            self.fingerprint = fingerprint_of(self.paths, self._indices)
        else:
            self._indices, self.fingerprint = self._shared(cache_dir)
        self.sizes = [len(index.keys) for index in self._indices]  # samples per shard
        self._first_ids = np.cumsum([0, *self.sizes])  # [shards + 1]
        self._files: dict[int, IO[bytes]] = {}
        self.label_map: np.ndarray | None = None  # int64: what each label of the shards is read as

    def _shared(self, cache_dir: str | None) -> tuple[list[Index], str]:
        """The indices of all shards, which processes of a node share if they are large, and a hash."""
        labels = self._labels
        section = None if labels is None else labels.section

        def find() -> Source:
            how = (
                "" if labels is None else f"{labels.section.key}.{labels.section.field} {labels.fingerprint}"
            )
            return source_of(self.paths, [index_files(path, cache_dir, section) for path in self.paths], how)

        def load_one(path: str) -> Index:
            index = load_index(path, cache_dir, cache=self._cache, label=section)
            return index if labels is None else numbered(path, index, labels)

        return shared_indices(self.paths, find, lambda: self._load(load_one))

    def _load(self, load_one: Callable[[str], _Loaded]) -> list[_Loaded]:
        """Load the indices of the shards one by one.

        Each process builds missing ones in another order, so processes that start together share the work.
        """
        shuffled = random.SystemRandom().sample(self.paths, len(self.paths))
        if self._cache is None:  # in this thread: of another one, the C library may keep the memory
            loaded = dict(zip(shuffled, map(load_one, shuffled)))
        else:
            with ThreadPoolExecutor(16) as pool:
                loaded = dict(zip(shuffled, pool.map(load_one, shuffled)))
        return [loaded[path] for path in self.paths]

    def relabel(self, label_map: Sequence[int]) -> None:
        """Read each label as its entry in `label_map`. Raises UserError for a label that has none."""
        labels = self.labels
        for sample_id in np.flatnonzero(labels >= len(label_map))[:1]:
            raise UserError(
                f"{self.where(sample_id)}: label {labels[sample_id]} has no entry among the "
                f"{len(label_map)} of the label map: complete the map"
            )
        self.label_map = np.array(label_map, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, sample_id: int) -> Sample:
        """Read one sample at its offset.

        Raises UserError if the shard is compressed or does not fit its index.
        """
        if not 0 <= sample_id < len(self):
            raise IndexError(f"no sample {sample_id} among {len(self)}")
        shard = int(self._shards_of(sample_id))
        path = self.paths[shard]
        index = self._indices[shard]
        row = sample_id - self._first_ids[shard]
        if compressed(path):
            refuse_compressed(path)
        offset = int(index.offsets[row])
        size = int(index.sizes[row])
        key = decoded(index.keys[row])
        file = self._open(shard)  # a reference, so that it stays open for the read
        # With the member's header, which shows that the tar is still the one that was indexed.
        data = os.pread(file.fileno(), BLOCK + size, offset - BLOCK)
        with contextlib.suppress(tarfile.HeaderError):
            header = tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape")
            if header.size == size == len(data) - BLOCK:
                return Sample(key, data[BLOCK:], self._read_as(int(index.labels[row])))
        raise UserError(changed(path, f"sample '{key}' is not where the index says"))

    def iterate(self, begin: int = 0, end: int | None = None) -> Iterator[Sample]:
        """Read the samples [begin, end), by default all, in the order of their ids."""
        end = len(self) if end is None else end
        for shard, path in enumerate(self.paths):
            first, last = self._first_ids[shard], self._first_ids[shard + 1]
            ids = range(max(begin, first), min(end, last))
            if ids and compressed(path):
                for sample_id, sample in enumerate(self._uncompressed(shard), first):
                    if sample_id in ids:
                        yield sample
            else:
                yield from map(self.read, ids)

    def _uncompressed(self, shard: int) -> Iterator[Sample]:
        """Read a compressed shard to its end. Raises UserError if it does not fit its index."""
        path = self.paths[shard]
        index = self._indices[shard]
        indexed = list(zip(index.offsets.tolist(), index.sizes.tolist(), index.labels.tolist()))
        row = -1
        with open_shard(path, self._cache, index.bytes, index.sha256) as stream:
            samples = samples_of(tar_of(path, stream), keys=self.rewritten[shard], labels=self._labels or CLS)
            for row, (key, span, image, label) in enumerate(samples):
                if row >= len(indexed) or indexed[row] != (*span, label):
                    raise UserError(changed(path, f"sample '{key}' is not where the index says"))
                yield Sample(key, image, self._read_as(label))
        if row + 1 < len(indexed):
            raise UserError(changed(path, f"it has {row + 1} samples, its index says {len(indexed)}"))

    def pick(self, sample_ids: np.ndarray) -> Iterator[tuple[int, Sample]]:
        """Read samples int64 [B] shard by shard, as (id, sample). A compressed shard is read completely."""
        shards_of_ids = self._shards_of(sample_ids)
        for shard in np.unique(shards_of_ids):
            ids = sample_ids[shards_of_ids == shard].tolist()
            if compressed(self.paths[shard]):
                picked = set(ids)
                first = int(self._first_ids[shard])
                samples = enumerate(self.iterate(first, int(self._first_ids[shard + 1])), first)
                yield from ((sample_id, sample) for sample_id, sample in samples if sample_id in picked)
            else:
                yield from ((sample_id, self.read(sample_id)) for sample_id in ids)

    @property
    def image_sizes(self) -> np.ndarray:
        """Bytes of each image: int64 [samples]."""
        return np.concatenate([index.sizes for index in self._indices])

    @property
    def labels(self) -> np.ndarray:
        """Labels, -1 for none: int64 [samples]."""
        labels = np.concatenate([index.labels for index in self._indices])
        return labels if self.label_map is None else np.where(labels < 0, -1, self.label_map[labels])

    def _read_as(self, label: int) -> int:
        return label if self.label_map is None or label < 0 else int(self.label_map[label])

    def where(self, sample_id: int) -> str:
        """The sample's shard and key, for messages."""
        shard = int(self._shards_of(sample_id))
        key = decoded(self._indices[shard].keys[sample_id - self._first_ids[shard]])
        return printable(f"{base_name(self.paths[shard])}: sample {key}")

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return self._cache is not None

    def prefetch(self, sample_ids: np.ndarray) -> None:
        """Fetch the remote shards that contain these samples in the background."""
        if self._cache:
            shards = np.unique(self._shards_of(sample_ids))
            remote_shards = [shard for shard in shards if is_remote(self.paths[shard])]
            wanted = ((self.paths[shard], self._indices[shard]) for shard in remote_shards)
            self._cache.prefetch((path, index.bytes, index.sha256) for path, index in wanted)

    def _slice(self, begin: int, end: int) -> ShardSet:
        """A copy with only the shards of samples [begin, end), which keep their ids: less to pickle."""
        low, high = self._shards_of(np.array([begin, end - 1]))
        part = copy.copy(self)
        part.paths = self.paths[low : high + 1]
        part.sizes = self.sizes[low : high + 1]
        part._indices = self._indices[low : high + 1]
        part.rewritten = self.rewritten[low : high + 1]
        part._first_ids = self._first_ids[low : high + 2]
        return part

    def _shards_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_ids, sample_ids, side="right") - 1

    def _open(self, shard: int) -> IO[bytes]:
        path = self.paths[shard]
        size = self._indices[shard].bytes
        if self._cache is not None and is_remote(path):
            # Opened for every read: an open file that the cache evicts would keep using the disk.
            return self._cache.open(path, size, self._indices[shard].sha256)
        file = self._files.get(shard)
        if file is None:
            file = open_shard(path, None)
            if os.fstat(file.fileno()).st_size != size:
                raise UserError(changed(path, f"it no longer has the {size} bytes that its index says"))
            if len(self._files) >= OPEN_SHARDS:
                oldest, *_ = self._files
                self._files.pop(oldest, None)  # closed when the last thread that reads from it drops it
            self._files[shard] = file
        return file


def refuse_compressed(path: str) -> NoReturn:
    """Raise UserError for a shard in which single samples cannot be found."""
    raise UserError(
        f"{path}: a compressed shard cannot be read at random: set data.in_memory: true, "
        "or pack it again with `indistill shards pack`"
    )


def expand(urls: str | Sequence[str], root: str | None = None) -> list[str]:
    """Expand patterns to shard paths: braces in their order, `*` sorted, relative ones below `root`.

    Raises UserError for a pattern without shards, a shard listed twice and a URL that may not be opened.
    """
    paths: list[str] = []
    root = without_file(root or "")
    for url in [urls] if isinstance(urls, str) else urls:
        for path in expand_braces(url):
            if "://" in without_file(path) and "*" in path:
                raise UserError(
                    f"{path}: * is for local files; list remote shards with braces, as {{000000..000127}}"
                )
            for shard in _matches(without_file(path), root):
                if shard.startswith("pipe:") and shard != path:
                    raise UserError(f"{path}: leads to {shard}, which would run a command: correct the path")
                check_url(shard)
                paths.append(shard)
        if len(paths) > MAX_SHARDS:
            raise UserError(f"{url}: brings the list of shards to more than {MAX_SHARDS:,}: shorten the list")
    if not paths:
        raise UserError("the list of shards is empty: name at least one")
    for twice, number in Counter(paths).items():
        if number > 1:
            raise UserError(f"{twice}: listed twice: list every shard once")
    return paths


def _matches(pattern: str, root: str) -> list[str]:
    """The shards that a path or pattern without braces names; a URL or command is returned as it is."""
    path = pattern if is_remote(pattern) else os.path.join(root, pattern)
    if is_remote(path) or os.path.isfile(path):
        return [path]
    not_shards = (".json", ".lock", ".part", SUFFIX)  # indices and other files beside shards
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder: name the shards in it, as {os.path.join(path, '*.tar')}")
    matches = expand_wildcards(os.path.join(glob.escape(root), pattern))
    if not matches:  # brackets may belong to the name of a folder
        matches = expand_wildcards(path.replace("[", "[[]"))
    shards = [match for match in matches if not match.endswith(not_shards) and os.path.isfile(match)]
    if not shards and (denied(path) or denied(os.path.dirname(path) or ".")):
        raise UserError(f"{path}: permission denied: change the permissions of the file or its folder")
    if not shards:
        raise UserError(f"{path}: no such shard: correct the path or data.root")
    return shards
