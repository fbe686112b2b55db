"""WebDataset tars with an index: counted, verified, read at random by offset, wherever they are.

A shard is an ordinary WebDataset tar: `{key}.jpg` and `{key}.cls` (the class number in ASCII), next to each other. Its
index, `<shard>.index.json`, holds the byte size of the tar and key, offset, size and label of every sample; it is built
once and saved beside the shard or, if a cache directory is given, there. A remote shard is fetched whole into that
directory, once per node.
"""

import contextlib
import copy
import glob
import hashlib
import os
import random
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

import numpy as np
from braceexpand import braceexpand

from indistill.config import UserError
from indistill.data.index import BLOCK, compressed, decoded, load_index, read_samples
from indistill.data.remote import CACHE_BYTES, base_name, cache_for, changed, is_remote, open_shard

OPEN_SHARDS = 256  # kept-open local shards per process, well under the usual limit of 1,024 descriptors


class Sample(NamedTuple):
    key: str
    image: bytes  # the encoded file
    label: int  # -1 where the shard holds none


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
        self._cache = cache_for(self.paths, cache_dir, cache_bytes)
        # Processes that start together build missing indices in different orders, so they share the work.
        shuffled = random.SystemRandom().sample(self.paths, len(self.paths))
        with ThreadPoolExecutor(16 if self._cache else 1) as pool:
            loaded = dict(
                zip(shuffled, pool.map(lambda path: load_index(path, cache_dir, self._cache), shuffled))
            )
        self._indices = [loaded[path] for path in self.paths]
        self.sizes = [len(index.keys) for index in self._indices]  # samples per shard
        digest = hashlib.sha256()
        for path, index in zip(self.paths, self._indices):
            # The name without its directory: a data set that has moved is still the same.
            digest.update(f"{base_name(path)}\0{index.bytes}\0{len(index.keys)}\0".encode())
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
        if compressed(path):
            raise UserError(
                f"{path}: a compressed shard cannot be read at random: set data.in_memory: true, "
                "or re-shard with `indistill shards pack`"
            )
        offset, size, key = int(index.offsets[row]), int(index.sizes[row]), decoded(index.keys[row])
        # The member's header comes along, as a proof that the tar is still the one that was indexed.
        file = self._open(shard)  # held, so that it stays open for the read
        data = os.pread(file.fileno(), BLOCK + size, offset - BLOCK)
        with contextlib.suppress(tarfile.HeaderError):
            if (
                tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape").size
                == size
                == len(data) - BLOCK
            ):
                return Sample(key, data[BLOCK:], int(index.labels[row]))
        raise UserError(changed(path, f"sample '{key}' is not where the index says"))

    def iterate(self, begin: int = 0, end: int | None = None) -> Iterator[Sample]:
        """The samples `begin` up to `end`, by default all, in id order; each shard is read from front to end."""
        end = len(self) if end is None else end
        for shard, path in enumerate(self.paths):
            first, last = self._first_ids[shard], self._first_ids[shard + 1]
            wanted = range(max(begin, first), min(end, last))
            if wanted and compressed(path):
                with open_shard(path, self._cache, self._indices[shard].bytes) as stream:
                    for sample_id, (key, _, image, label) in enumerate(read_samples(path, stream), first):
                        if sample_id in wanted:
                            yield Sample(key, image, label)
            else:
                yield from map(self.read, wanted)

    def pick(self, sample_ids: np.ndarray) -> Iterator[tuple[int, Sample]]:
        """(id, sample) of int64 [B] samples, shard by shard; a compressed shard is read from front to end."""
        shards_of_ids = self._shards_of(sample_ids)
        for shard in np.unique(shards_of_ids):
            wanted = sample_ids[shards_of_ids == shard].tolist()
            if compressed(self.paths[shard]):
                first, last, wanted = (
                    int(self._first_ids[shard]),
                    int(self._first_ids[shard + 1]),
                    set(wanted),
                )
                yield from ((i, s) for i, s in enumerate(self.iterate(first, last), first) if i in wanted)
            else:
                yield from ((i, self.read(i)) for i in wanted)

    @property
    def image_sizes(self) -> np.ndarray:
        """int64 [samples], bytes of each image."""
        return np.concatenate([index.sizes for index in self._indices])

    @property
    def labels(self) -> np.ndarray:
        """int64 [samples], -1 where a sample has none."""
        return np.concatenate([index.labels for index in self._indices])

    def where(self, sample_id: int) -> str:
        """The sample's shard and key, as messages name it."""
        shard = int(self._shards_of(sample_id))
        key = decoded(self._indices[shard].keys[sample_id - self._first_ids[shard]])
        return f"{base_name(self.paths[shard])}: sample {key}"

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return self._cache is not None

    def prefetch(self, sample_ids: np.ndarray) -> None:
        """Fetch the remote shards that hold these samples in the background. At once done for local shards."""
        if self._cache:
            shards = [
                shard for shard in np.unique(self._shards_of(sample_ids)) if is_remote(self.paths[shard])
            ]
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
        if is_remote(
            path
        ):  # opened for every read: an open file that the cache evicts would go on using the disk
            return self._cache.open(path, size)
        file = self._files.get(shard)
        if file is None:
            file = open_shard(path, None)
            if os.fstat(file.fileno()).st_size != size:
                raise UserError(changed(path, f"it no longer has the {size} bytes that its index says"))
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
                raise UserError(
                    f"{path}: * is for local files; list remote shards with braces, as {{000000..000127}}"
                )
            path = path.removeprefix("file://")
            place = path if is_remote(path) else os.path.join(root or "", path)
            if is_remote(place) or os.path.isfile(place):
                paths.append(place)
                continue
            found = sorted(glob.glob(os.path.join(glob.escape(root or ""), path)))
            # An index or a sidecar that the pattern takes in is no shard.
            found = [
                path
                for path in found
                if not path.endswith((".json", ".lock", ".part")) and os.path.isfile(path)
            ]
            if not found:
                raise UserError(f"{place}: no such shard: correct the path or data.root")
            paths += found
    if not paths:
        raise UserError("the list of shards is empty: name at least one")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice}: listed twice: every shard counts once")
    return paths
