"""WebDataset tars with an index: counted, verified, read at random by offset.

A shard is an ordinary WebDataset tar: `{key}.jpg` and `{key}.cls` (the class number in ASCII), next to each other. Its
index, `<shard>.index.json`, holds the byte size of the tar and key, offset, size and label of every sample; it is built
once and saved beside the shard or, where that cannot be written, in the cache directory.
"""

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from braceexpand import braceexpand

from indistill.config import UserError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key reaches to the first dot of the base name, what follows is the extension.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
INDEX_VERSION = 1
OPEN_SHARDS = 256  # kept-open shards per process, well under the usual limit of 1,024 descriptors
BLOCK = tarfile.BLOCKSIZE  # bytes: what a tar is padded to, and the size of a member's header


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

    urls: paths, braces expanded, `*` for local files expanded and sorted, relative to `root`.
    cache_dir: where an index goes; by default beside its shard, if that directory can be written.

    Safe after fork, in threads and through pickle: reads name their offset, and open files do not travel.
    Raises UserError for a missing, cut, damaged or changed shard and for malformed labels, naming the shard.
    """

    def __init__(self, urls: str | Sequence[str], root: str | None = None, cache_dir: str | None = None):
        self.paths = expand(urls, root)
        indices = [load_index(path, cache_dir) for path in self.paths]
        self.sizes = [len(index.keys) for index in indices]  # samples per shard
        digest = hashlib.sha256()
        for path, index in zip(self.paths, indices):
            # The name without its directory: a data set that has moved is still the same.
            digest.update(f"{os.path.basename(path)}\0{index.bytes}\0{len(index.keys)}\0".encode())
            for array in index[1:]:
                digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()
        self._first_ids = np.cumsum([0, *self.sizes])  # [shards + 1]
        self._indices = indices
        self._files: dict[int, IO[bytes]] = {}

    def __len__(self) -> int:
        return int(self._first_ids[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def read(self, sample_id: int) -> Sample:
        """One sample, by one read at its offset. UserError if the shard is compressed or not as it was indexed."""
        if not 0 <= sample_id < len(self):
            raise IndexError(f"no sample {sample_id} among {len(self)}")
        shard = int(np.searchsorted(self._first_ids, sample_id, side="right")) - 1
        path, index, row = self.paths[shard], self._indices[shard], sample_id - self._first_ids[shard]
        if _compressed(path):
            raise UserError(
                f"{path}: a compressed shard cannot be read at random: set data.in_memory: true, "
                "or re-shard with `indistill shards pack`"
            )
        offset, size, key = int(index.offsets[row]), int(index.sizes[row]), index.keys[row].decode()
        # The member's header comes along, as a proof that the tar is still the one that was indexed.
        data = os.pread(self._open(shard).fileno(), BLOCK + size, offset - BLOCK)
        with contextlib.suppress(tarfile.HeaderError):
            if tarfile.TarInfo.frombuf(data[:BLOCK], "utf-8", "surrogateescape").size == size == len(data) - BLOCK:
                return Sample(key, data[BLOCK:], int(index.labels[row]))
        raise UserError(_changed(path, f"sample '{key}' is not where the index says"))

    def iterate(self) -> Iterator[Sample]:
        """All samples in id order, each shard read once from front to end."""
        for shard, path in enumerate(self.paths):
            if _compressed(path):
                for key, _, image, label in _samples(path):
                    yield Sample(key, image, label)
            else:
                for sample_id in range(self._first_ids[shard], self._first_ids[shard + 1]):
                    yield self.read(sample_id)

    def _open(self, shard: int) -> IO[bytes]:
        file = self._files.get(shard)
        if file is None:
            path = self.paths[shard]
            file = open(path, "rb", buffering=0)  # noqa: SIM115 (kept open)
            if os.fstat(file.fileno()).st_size != self._indices[shard].bytes:
                raise UserError(_changed(path, "its size is not what the index says"))
            if len(self._files) >= OPEN_SHARDS:
                # The oldest closes when the last thread that reads from it lets go of it.
                self._files.pop(next(iter(self._files)), None)
            self._files[shard] = file
        return file


def expand(urls: str | Sequence[str], root: str | None = None) -> list[str]:
    """The shard paths that the patterns stand for: braces in their order, `*` sorted, all below `root` if relative."""
    paths = []
    for url in [urls] if isinstance(urls, str) else urls:
        for pattern in braceexpand(os.path.expanduser(url)):
            pattern = os.path.join(root or "", pattern)
            found = sorted(glob.glob(pattern)) if any(c in pattern for c in "*?[") else [pattern]
            # An index or a sidecar that the pattern takes in is no shard.
            found = [path for path in found if not path.endswith(".json")]
            if not found:
                raise UserError(f"no shard matches {pattern}: correct the pattern or data.root")
            paths += found
    if not paths:
        raise UserError("the list of shards is empty: name at least one")
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: no such shard: correct the path or data.root")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"{twice}: listed twice: every shard counts once")
    return paths


# --- the index -------------------------------------------------------------------------------------------------------


def load_index(path: str, cache_dir: str | None = None) -> Index:
    """The shard's index, built and saved first if there is none. Raises UserError if it does not fit the shard."""
    size = os.stat(path).st_size
    for file in _index_files(path, cache_dir):
        with contextlib.suppress(FileNotFoundError):
            with open(file, "rb") as stream:
                content = stream.read()
            try:
                stored = json.loads(content)
                if stored.pop("version") != INDEX_VERSION:
                    continue
                index = _index(**stored)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{file}: not an index of this program: delete it, it is built anew") from None
            if index.bytes != size:
                raise UserError(_changed(path, f"it has {size} bytes, its index {file} says {index.bytes}"))
            return index
    index = build_index(path)
    _save_index(path, index, cache_dir)
    return index


def build_index(path: str) -> Index:
    """Read the headers of a shard. Raises UserError if it is cut or damaged or a label is malformed."""
    rows = [(key, offset, size, label) for key, (offset, size), _, label in _samples(path, load=False)]
    keys, offsets, sizes, labels = zip(*rows) if rows else ([], [], [], [])
    return _index(os.stat(path).st_size, keys, offsets, sizes, labels)


def _index(
    bytes: int, keys: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> Index:
    encoded = np.array([key.encode() for key in keys], dtype=np.bytes_)
    return Index(bytes, encoded, *(np.array(numbers, dtype=np.int64) for numbers in (offsets, sizes, labels)))


def _index_files(path: str, cache_dir: str | None) -> list[str]:
    """Where the shard's index may be, the preferred place first."""
    beside = f"{path}.index.json"
    if cache_dir is None:
        return [beside]
    # Shards of one name in two directories have two indices.
    digest = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:16]
    return [os.path.join(cache_dir, f"{digest}-{os.path.basename(path)}.index.json"), beside]


def _save_index(path: str, index: Index, cache_dir: str | None) -> None:
    columns = {name: column.tolist() for name, column in index._asdict().items() if name not in ("bytes", "keys")}
    keys = [key.decode() for key in index.keys.tolist()]
    content = json.dumps({"version": INDEX_VERSION, "bytes": index.bytes, "keys": keys, **columns})
    file = _index_files(path, cache_dir)[0]
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


# --- reading tars ----------------------------------------------------------------------------------------------------


def _compressed(path: str) -> bool:
    return path.endswith((".gz", ".tgz"))


def _changed(path: str, how: str) -> str:
    return f"{path}: the shard is cut or changed: {how}; restore it, or if it is meant to be so, delete its index"


def _samples(path: str, load: bool = True) -> Iterator[tuple]:
    """(key, (offset, size) of the image, image or None without `load`, label) of every sample, in one pass."""
    seen = set()
    key, image, label = None, None, None

    def finished() -> Iterator[tuple]:
        if image is not None:
            yield key, image[:2], image[2], -1 if label is None else label
        elif label is not None:
            raise UserError(f"{path}: sample '{key}' has a .cls but no image ({', '.join(IMAGE_EXTENSIONS)})")

    for member_key, extension, offset, size, content in _members(path, load):
        if member_key != key:
            yield from finished()
            if member_key in seen:
                raise UserError(
                    f"{path}: the members of sample '{member_key}' are not next to each other: pack it anew"
                )
            seen.add(member_key)
            key, image, label = member_key, None, None
        if extension == "cls":
            if label is not None:
                raise UserError(f"{path}: sample '{key}' has two labels")
            label = _label(path, key, content)
        elif image is not None:
            raise UserError(f"{path}: sample '{key}' has two images")
        else:
            image = offset, size, content
    yield from finished()
    if not seen:
        raise UserError(f"{path}: holds no sample, a sample being {{key}}.jpg (png, webp) and {{key}}.cls")


def _label(path: str, key: str, content: bytes) -> int:
    text = content.strip()
    if not (text.isdigit() and int(text) < 2**31):
        raise UserError(f"{path}: {key}.cls holds {content[:20]!r}: a label is a whole number from 0 on")
    return int(text)


def _members(path: str, load: bool) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """(key, extension, offset, size, content) of every image and label; without `load` images come without content.

    tarfile takes a cut or a damaged header for the end of the archive: what lies behind the last member tells.
    """
    opener = gzip.open if _compressed(path) else open
    try:
        with opener(path, "rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
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


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(
    samples: Iterable[tuple[str, bytes, str, int]], destination: str | Path, prefix: str, samples_per_shard: int
) -> list[Path]:
    """Write (key, encoded image, extension, label) samples as `<prefix>-000000.tar`, ... with their indices.

    The same samples give the same bytes. A label of -1 writes no .cls. Returns the shards' paths.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    paths, pending = [], []

    def flush() -> None:
        if pending:
            paths.append(destination / f"{prefix}-{len(paths):06d}.tar")
            _write_shard(paths[-1], pending)
            pending.clear()

    for sample in samples:
        pending.append(sample)
        if len(pending) == samples_per_shard:
            flush()
    flush()
    return paths


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
    _save_index(str(path), build_index(str(path)), None)
