"""WebDataset tars with an index: counted, verified, read at random by offset, wherever they are.

A shard is an ordinary WebDataset tar: `{key}.jpg` and `{key}.cls` (the class number in ASCII), next to each other. Its
index, `<shard>.index.json`, holds the byte size of the tar and key, offset, size and label of every sample; it is built
once and saved beside the shard or, if a cache directory is given, there. A remote shard is fetched whole into that
directory, once per node.
"""

import contextlib
import copy
import glob
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from braceexpand import braceexpand
from tqdm import tqdm

from indistill.config import UserError
from indistill.config.files import replacing
from indistill.decode import BadImage, decode
from indistill.distributed import preemption
from indistill.remote import CACHE_BYTES, ShardCache, base_name, cache_for, cache_name, changed, is_remote, open_shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key reaches to the first dot of the base name, what follows is the extension.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
BLOCK = tarfile.BLOCKSIZE  # bytes: what a tar is padded to, and the size of a member's header
INDEX_VERSION = 1
OPEN_SHARDS = 256  # kept-open local shards per process, well under the usual limit of 1,024 descriptors


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
        self._cache = cache_for(self.paths, cache_dir, cache_bytes)
        # Processes that start together build missing indices in different orders, so they share the work.
        shuffled = random.SystemRandom().sample(self.paths, len(self.paths))
        with ThreadPoolExecutor(16 if self._cache else 1) as pool:
            loaded = dict(zip(shuffled, pool.map(lambda path: load_index(path, cache_dir, self._cache), shuffled)))
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
        raise UserError(changed(path, f"sample '{key}' is not where the index says"))

    def iterate(self, begin: int = 0, end: int | None = None) -> Iterator[Sample]:
        """The samples `begin` up to `end`, by default all, in id order; each shard is read from front to end."""
        end = len(self) if end is None else end
        for shard, path in enumerate(self.paths):
            first, last = self._first_ids[shard], self._first_ids[shard + 1]
            wanted = range(max(begin, first), min(end, last))
            if wanted and _compressed(path):
                with open_shard(path, self._cache, self._indices[shard].bytes) as stream:
                    for sample_id, (key, _, image, label) in enumerate(_samples(path, stream), first):
                        if sample_id in wanted:
                            yield Sample(key, image, label)
            else:
                yield from map(self.read, wanted)

    def pick(self, sample_ids: np.ndarray) -> Iterator[tuple[int, Sample]]:
        """(id, sample) of int64 [B] samples, shard by shard; a compressed shard is read from front to end."""
        shards_of_ids = self._shards_of(sample_ids)
        for shard in np.unique(shards_of_ids):
            wanted = sample_ids[shards_of_ids == shard].tolist()
            if _compressed(self.paths[shard]):
                first, last, wanted = int(self._first_ids[shard]), int(self._first_ids[shard + 1]), set(wanted)
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
        key = _decoded(self._indices[shard].keys[sample_id - self._first_ids[shard]])
        return f"{base_name(self.paths[shard])}: sample {key}"

    @property
    def remote(self) -> bool:
        """Whether any shard has to be fetched."""
        return self._cache is not None

    def prefetch(self, sample_ids: np.ndarray) -> None:
        """Fetch the remote shards that hold these samples in the background. At once done for local shards."""
        if self._cache:
            shards = [shard for shard in np.unique(self._shards_of(sample_ids)) if is_remote(self.paths[shard])]
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
        if is_remote(path):  # opened for every read: an open file that the cache evicts would go on using the disk
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
                raise UserError(f"{path}: * is for local files; list remote shards with braces, as {{000000..000127}}")
            path = path.removeprefix("file://")
            place = path if is_remote(path) else os.path.join(root or "", path)
            if is_remote(place) or os.path.isfile(place):
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


def _compressed(path: str) -> bool:
    return base_name(path).endswith((".gz", ".tgz")) and not path.startswith("pipe:")


# --- the index -------------------------------------------------------------------------------------------------------
def load_index(path: str, cache_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """The shard's index, built and saved first if there is none. Raises UserError if it does not fit the shard."""
    problem = None
    for file in index_files(path, cache_dir):
        if os.path.exists(file) or (is_remote(path) and cache.fetch_index(path, file)):
            index = _parse_index(file)
            if is_remote(path) or index.bytes == (size := os.stat(path).st_size):
                return index
            problem = changed(path, f"it has {size} bytes, its index {file} says {index.bytes}")
    if problem:
        raise UserError(problem)
    return build_index(path, cache_dir, cache)


def build_index(path: str, cache_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """Read the headers of a shard, save its index. Raises UserError if the tar is damaged or a label is malformed."""
    try:
        with open_shard(path, cache) as stream:
            rows = [(key, *place, label) for key, place, _, label in _samples(path, stream, load=False)]
            index = _index(os.fstat(stream.fileno()).st_size, *zip(*rows))
    except UserError:
        if cache:
            cache.discard(path)  # so that it is fetched again when it has been mended
        raise
    _save_index(index_files(path, cache_dir)[0], index)
    return index


def _index(
    bytes: int, keys: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> Index:
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    return Index(bytes, encoded, *(np.array(numbers, dtype=np.int64) for numbers in (offsets, sizes, labels)))


def _decoded(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")  # as tarfile decodes names


def index_files(path: str, cache_dir: str | None) -> list[str]:
    """Where the shard's index may be, the preferred place first."""
    if cache_dir is None:
        return [f"{path}.index.json"]
    cached = os.path.join(cache_dir, f"{cache_name(path)}.index.json")
    return [cached] if is_remote(path) else [cached, f"{path}.index.json"]


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
        with replacing(file) as stream:
            stream.write(content.encode())
    except OSError as error:
        raise UserError(
            f"{file}: cannot save the index ({error.strerror}): set data.cache_dir to a writable place"
        ) from None


# --- labels ----------------------------------------------------------------------------------------------------------
_LABEL_REMEDY = "write it into KEY.cls, a whole number in ASCII, beside the image KEY.jpg"


def parse_label(content: bytes) -> int | None:
    """The label in a .cls file; None if that is not a whole number from 0 on."""
    return int(content) if re.fullmatch(rb"\s*\d{1,9}\s*", content) else None


def malformed_label(key: str, content: bytes) -> str:
    return f"{key}.cls holds {content[:20]!r}: a label is a whole number from 0 on"


def label_problem(label: int, num_classes: int) -> str | None:
    """Why training refuses a sample with this label, -1 being none; None if it does not."""
    if label < 0:
        return f"has no label: {_LABEL_REMEDY}"
    if label >= num_classes:
        return f"label {label} is none of the data.num_classes, 0 to {num_classes - 1}"
    return None


# --- reading tars ----------------------------------------------------------------------------------------------------
def _samples(
    path: str,
    stream: IO[bytes],
    load: bool = True,
    report: Callable[[str, str], None] | None = None,
    others: Counter[str] | None = None,
):
    """(key, (offset, size) of the image, image or None without `load`, label) of every sample, in one pass.

    report(key, problem) is called for every malformed sample; by default it raises UserError. `others` counts the
    members that belong to no sample, by extension.
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

    for member_key, extension, offset, size, content in _members(path, stream, load, others):
        if member_key != key:
            yield from finished()
            key, image, label = member_key, None, None
            if key in seen:
                report(key, f"the members of sample '{key}' are not next to each other: pack it anew")
            seen.add(key)
        if extension == "cls":
            if label is not None:
                report(key, f"sample '{key}' has two labels")
            label = parse_label(content)
            if label is None:
                label = -1
                report(key, malformed_label(key, content))
        elif image is not None:
            report(key, f"sample '{key}' has two images")
        else:
            image = offset, size, content
    yield from finished()
    if not seen:
        refuse("", "holds no sample, a sample being {key}.jpg (jpeg, png, webp) and {key}.cls")


def _members(
    path: str, stream: IO[bytes], load: bool, others: Counter[str] | None = None
) -> Iterator[tuple[str, str, int, int, bytes | None]]:
    """(key, extension, offset, size, content) of every image and label; without `load` images come without content.

    `others` counts all other files by extension.
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
                if not member.isreg():
                    continue
                key, extension = (match[1], match[2].lower()) if match else ("", "")
                if extension != "cls" and extension not in IMAGE_EXTENSIONS:
                    if others is not None:
                        others[extension] += 1
                else:
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


class Content(NamedTuple):
    """What `verify` found in shards."""

    bad: list[BadMember]
    images: int
    labels: Counter[int]  # images by label; those without one are not in it
    others: Counter[str]  # members that are neither images nor labels, by extension

    def summary(self) -> str:
        """One line of counts, and one more if there are images that training refuses whatever its classes."""
        labelled = self.labels.total()
        span = f" ({min(self.labels)} to {max(self.labels)}, {len(self.labels)} different)" if self.labels else ""
        line = f"{self.images} images, {labelled} labelled{span}, {self.images - labelled} unlabelled"
        others = ", ".join(f"{n} {name or 'without extension'}" for name, n in sorted(self.others.items()))
        line += f"; other members: {others}" if others else ""
        if self.images > labelled:
            line += f"\ntraining refuses unlabelled images: {_LABEL_REMEDY}"
        return line


def verify(
    urls: str | Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    workers: int = 1,
    progress: bool = False,
    num_classes: int | None = None,
) -> Content:
    """Read every member, decode every image, compare with the index if there is one.

    Returns all that is wrong, and what is there. With `num_classes`, labels that training would refuse are wrong.
    """
    tasks = [(path, cache_dir, num_classes) for path in expand(urls, root, allow_pipe)]
    whole = Content([], 0, Counter(), Counter())
    for part in parallel(_verify_shard, tasks, workers, progress):
        whole = Content(*(total + more for total, more in zip(whole, part)))
    return whole


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
    return dict(zip(paths, parallel(_index_shard, [(path, cache_dir) for path in paths], workers, progress)))


def _verify_shard(task: tuple[str, str | None, int | None]) -> Content:
    path, cache_dir, num_classes = task
    cache = cache_for([path], cache_dir)
    bad: list[BadMember] = []
    rows: list[tuple] = []
    labels, others = Counter[int](), Counter[str]()

    def report(key: str, problem: str) -> None:
        bad.append(BadMember(path, key, problem))

    try:
        with open_shard(path, cache) as stream:
            for key, place, image, label in _samples(path, stream, report=report, others=others):
                rows.append((key, *place, label))
                labels.update([label] if label >= 0 else [])
                malformed = bool(bad) and bad[-1].key == key  # a label that is not a number is told
                problem = None if num_classes is None or malformed else label_problem(label, num_classes)
                if problem:
                    report(key, problem)
                try:
                    decode(image, "image")
                except BadImage as error:
                    report(key, str(error).removeprefix("image: "))
            size = os.fstat(stream.fileno()).st_size
        for file in filter(os.path.exists, index_files(path, cache_dir)):
            if not all(map(np.array_equal, _parse_index(file), _index(size, *zip(*rows)))):
                report("", f"{file} does not fit the shard: run `indistill shards index` on it")
    except UserError as error:
        report("", str(error))
    return Content(bad, len(rows), labels, others)


def _index_shard(task: tuple[str, str | None]) -> int:
    path, cache_dir = task
    cache = cache_for([path], cache_dir)
    if cache:
        cache.discard(path)  # the index is to be that of the shard as it now is
    return len(build_index(path, cache_dir, cache).keys)


def parallel(function: Callable, tasks: Sequence, workers: int, progress: bool) -> Iterator:
    """function(task) for each task, in order."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they are
            pool = stack.enter_context(ProcessPoolExecutor(workers, spawn))
            with preemption.signals_blocked(signal.SIGINT):  # this process ends them (preemption.leave)
                results = pool.map(function, tasks)
        else:
            results = map(function, tasks)
        yield from tqdm(results, total=len(tasks), unit="shard", disable=not progress)
