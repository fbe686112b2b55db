"""Index a shard: the offset, size and label of each of its samples."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from indistill.config import Label, UserError, printable
from indistill.config.files import read_bytes, read_json, replace_text
from indistill.config.limits import (
    MAX_IMAGE_BYTES,
    MAX_INDEX_BRACKETS,
    MAX_INDEX_BYTES,
    MAX_INDEX_NUMBERS,
    MAX_KEYS_BYTES,
    MAX_LINE_CHARACTERS,
)
from indistill.config.ranks import Ranks
from indistill.data.labels import Classes, Texts
from indistill.data.remote import ShardCache, base_name, cache_name, changed, is_remote, open_shard
from indistill.data.samples import CLS, Labels, Others, compressed, samples_of, tar_of
from indistill.data.tar import BLOCK

log = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX_SUFFIX = ".index.json"
_ANY_SUFFIX = re.compile(r"(\.label-[0-9a-f]{8})?\.index\.json$")
MARK = b'{"version": '  # the beginning of every index


class Index(NamedTuple):
    """The samples of one shard. Arrays have one entry per sample, in the order of the tar."""

    bytes: int  # size of the shard
    keys: np.ndarray  # utf-8 bytes
    offsets: np.ndarray  # int64, first byte of the image; in a compressed shard, of the uncompressed stream
    sizes: np.ndarray  # int64, bytes of the image
    labels: np.ndarray  # int64, -1 for none
    sha256: str | None = None  # of the shard, in hexadecimal; None: not recorded
    problem: str = ""  # what looks like a sample in the shard and is none (`Others.problem`)
    texts: tuple[str, ...] | None = None  # in which labels are positions; None: labels are numbers


# --- the index ----------------------------------------------------------------------------------------------
def load_index(
    path: str,
    cache_dir: str | None = None,
    *,
    cache: ShardCache | None = None,
    save: bool = True,
    label: Label | None = None,
) -> Index:
    """Load the shard's index; build it first if there is none, and `save` it.

    label: where its labels are; None: in KEY.cls. Each has an index of its own. Raises UserError if it does
        not fit.
    """
    index = _fitting_index(path, cache_dir, cache, label)
    if index is None:
        if save:
            return build_index(path, cache_dir, cache=cache, label=label)
        return read_index(path, cache, label=label)
    if index.problem and Ranks.from_environment().is_main_process:
        warn(path, index.problem)
    return index


def warn(path: str, problem: str) -> None:
    """Name what looks like a sample in a shard and is none."""
    log.warning("%s", printable(f"{path}: {problem}"))


def _fitting_index(
    path: str, cache_dir: str | None, cache: ShardCache | None, label: Label | None = None
) -> Index | None:
    """The shard's index that is saved, if any. Raises UserError if it does not fit."""
    problem = None
    remote_cache = cache if is_remote(path) else None
    for file in index_files(path, cache_dir, label):
        index = stored_index(path, file, remote_cache)
        if index is not None:
            if is_remote(path) or index.bytes == (size := os.stat(path).st_size):
                return index
            problem = changed(path, f"it has {size} bytes, its index {file} says {index.bytes}")
    if problem:
        raise UserError(problem)
    return None


def stored_index(path: str, file: str, cache: ShardCache | None) -> Index | None:
    """The index in `file`, where that of a remote shard is fetched to; None if there is none."""
    if os.path.exists(file):
        try:
            return parse_index(file)
        except UserError:
            if cache is None:
                raise  # a copy in the cache is fetched again instead
    if cache is None:
        return None
    suffix = file[match.start() :] if (match := _ANY_SUFFIX.search(file)) else INDEX_SUFFIX
    return cache.fetch_index(path, file, parse_index, suffix)


def build_index(
    path: str,
    cache_dir: str | None = None,
    *,
    cache: ShardCache | None = None,
    hashed: bool = False,
    label: Label | None = None,
) -> Index:
    """Index a shard and save the index. Raises UserError if the tar is damaged or a label is malformed.

    hashed: record the shard's SHA-256, so that it is checked when the shard is fetched. label: as for
    `load_index`.
    """
    index = read_index(path, cache, hashed=hashed, label=label)
    _save_index(index_files(path, cache_dir, label)[0], index)
    return index


def read_index(
    path: str, cache: ShardCache | None, *, hashed: bool = False, label: Label | None = None
) -> Index:
    """The index of a shard, read from the shard as `build_index` does, but not saved."""
    texts = None if label is None else Texts(label)
    with _errors_named(path, cache), open_shard(path, cache) as stream:
        others = Others()
        rows = _rows(samples_of(tar_of(path, stream), load=False, others=others, labels=texts or CLS))
        if others.problem:
            warn(path, others.problem)
        sha256 = sha256_of(stream) if hashed else None
        index = index_of(os.fstat(stream.fileno()).st_size, rows, sha256)
    return index._replace(problem=others.problem, texts=None if texts is None else tuple(texts.known))


def numbered(path: str, index: Index, classes: Classes) -> Index:
    """An index whose labels are classes. Raises UserError, naming the sample, for a text that is none."""
    texts = index.texts or ()
    numbers = np.full(len(texts) + 1, -1, dtype=np.int64)  # the last one is for no label, -1
    for position, text in enumerate(texts):
        try:
            numbers[position] = classes.number(text)
        except ValueError as error:
            row = int(np.flatnonzero(index.labels == position)[0])
            raise UserError(f"{base_name(path)}: sample '{decoded(index.keys[row])}' {error}") from None
    return index._replace(labels=numbers[index.labels], texts=None)


def index_to_pack(
    path: str, cache_dir: str | None, cache: ShardCache | None, labels: Labels = CLS
) -> tuple[Index, dict[str, str]]:
    """A shard's index, also of images and labels that belong to no sample because of dots in their names.

    Returns the keys of the latter in it, too, by name. The index is read from the shard, and not saved.
    """
    stored = _fitting_index(path, cache_dir, cache)
    size, sha256 = (None, None) if stored is None else (stored.bytes, stored.sha256)
    with _errors_named(path, cache), open_shard(path, cache, size, sha256) as stream:
        others = Others()
        rows = _rows(
            samples_of(tar_of(path, stream), load=False, others=others, may_be_empty=True, labels=labels)
        )
        keys = _keys_without_dots(others.unread, {key for key, *_ in rows})
        if keys or not rows:
            stream.seek(0)
            rows = _rows(samples_of(tar_of(path, stream), load=False, keys=keys, labels=labels))
        return index_of(os.fstat(stream.fileno()).st_size, rows, sha256), keys


def _keys_without_dots(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """A key for each name of an image or a label that differs from those `taken`."""
    keys: dict[str, str] = {}  # name without its extension -> key
    for stem in (name.rpartition(".")[0] for name in names):
        if stem not in keys:
            folder, slash, base = stem.rpartition("/")
            key = folder + slash + base.replace(".", "_")
            while key in taken:
                key += "_"
            taken.add(key)
            keys[stem] = key
    return {name: keys[name.rpartition(".")[0]] for name in names}


@contextlib.contextmanager
def _errors_named(path: str, cache: ShardCache | None) -> Iterator[None]:
    """Name a shard that cannot be indexed; its copy in the cache is deleted."""
    try:
        yield
    except (UserError, ValueError, OSError) as error:
        if cache:
            cache.discard(path)  # so that it is fetched again once it has been repaired
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be indexed: {error}") from None


def _rows(samples: Iterable[tuple[str, tuple[int, int], bytes, int]]) -> list[tuple[str, int, int, int]]:
    return [(key, *span, label) for key, span, _, label in samples]


def sha256_of(stream: IO[bytes]) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    stream.seek(0)
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]  # IO lacks readinto


def index_of(size: int, rows: Sequence[tuple[str, int, int, int]], sha256: str | None = None) -> Index:
    """The index of a shard of `size` bytes with the samples (key, offset, size, label)."""
    keys, offsets, sizes, labels = zip(*rows) if rows else ((), (), (), ())
    return make_index(size, keys, offsets=offsets, sizes=sizes, labels=labels, sha256=sha256)


def make_index(
    bytes: int,
    keys: Sequence[str],
    *,
    offsets: Sequence[int] | np.ndarray,
    sizes: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    sha256: str | None = None,
) -> Index:
    """Convert lists, as they are stored in an index file, to an Index.

    Raises ValueError for keys that would take too much memory, and for a text that is no SHA-256.
    """
    check_sha256(sha256)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    padded = len(encoded) * max(map(len, encoded), default=0)
    if padded > MAX_KEYS_BYTES:
        raise ValueError(
            f"its keys, padded to the longest, have {padded} bytes, more than {MAX_KEYS_BYTES} "
            "(MAX_KEYS_BYTES)"
        )
    names = np.array(encoded, dtype=np.bytes_)
    starts, lengths, classes = (np.array(column, dtype=np.int64) for column in (offsets, sizes, labels))
    return Index(bytes, names, starts, lengths, classes, sha256)


def check_sha256(sha256: Any) -> None:
    """Raise ValueError for what is neither a SHA-256 nor None."""
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise ValueError("sha256 is not a SHA-256 in hexadecimal")


def decoded(key: bytes) -> str:
    """A key of an index as text, decoded like the names in tarfile."""
    return key.decode("utf-8", "surrogateescape")


def index_files(path: str, cache_dir: str | None, label: Label | None = None) -> list[str]:
    """The files that may hold the shard's index, the preferred one first. label: as for `load_index`."""
    suffix = _suffix(label)
    if cache_dir is None:
        return [path + suffix]
    cached = os.path.join(cache_dir, cache_name(path) + suffix)
    return [cached] if is_remote(path) else [cached, path + suffix]


def forget_labels(path: str, cache_dir: str | None) -> None:
    """Delete the indices of a shard with labels from elsewhere, so that they are built again."""
    for file in index_files(path, cache_dir):
        base = file.removesuffix(INDEX_SUFFIX)
        for other in glob.glob(f"{glob.escape(base)}.label-*{INDEX_SUFFIX}"):
            if _ANY_SUFFIX.sub("", other) == base:
                os.unlink(other)


def _suffix(label: Label | None) -> str:
    """How the name of an index ends: with a hash of where its labels are, if they are not in KEY.cls."""
    if label is None:
        return INDEX_SUFFIX
    digest = hashlib.sha256(json.dumps([label.key, label.field]).encode()).hexdigest()
    return f".label-{digest[:8]}{INDEX_SUFFIX}"


def parse_index(file: str) -> Index:
    """Read an index file. Raises UserError for anything else."""
    reason = ""
    try:
        content = read_bytes(file, MAX_INDEX_BYTES)
        if content.count(b"[") + content.count(b"{") > MAX_INDEX_BRACKETS:  # each takes 20 times its size
            raise ValueError(f"more than {MAX_INDEX_BRACKETS} brackets (MAX_INDEX_BRACKETS)")
        if content.count(b",") > MAX_INDEX_NUMBERS:  # each takes up to 20 times its size
            raise ValueError(f"more than {MAX_INDEX_NUMBERS} entries (MAX_INDEX_NUMBERS)")
        stored = read_json(content)
        if not isinstance(stored, dict) or stored.pop("version", None) != INDEX_VERSION:
            raise ValueError(f"not of version {INDEX_VERSION}")
        return _checked(stored, compressed(_ANY_SUFFIX.sub("", file)))
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    raise UserError(
        f"{file}: not an index that this version reads: delete the file, and it is built again ({reason})"
    )


def _checked(stored: dict[str, Any], packed: bool) -> Index:
    """The content of an index file as an Index. Raises ValueError for what none of ours contains.

    packed: the shard is compressed, and offsets are those of the uncompressed tar.
    """
    names = ("keys", "offsets", "sizes", "labels")
    if stored.keys() - {"sha256", "problem", "texts"} != {"bytes", *names}:
        raise ValueError(f"its keys are not version, bytes, {', '.join(names)}")
    problem = stored.get("problem", "")
    if type(problem) is not str or len(problem) > MAX_LINE_CHARACTERS:
        raise ValueError(f"problem is no text of at most {MAX_LINE_CHARACTERS} characters")
    lists = {name: stored[name] for name in names}
    for name, column in lists.items():
        kind = str if name == "keys" else int
        if type(column) is not list or set(map(type, column)) != {kind}:  # bool is an int, too
            raise ValueError(f"{name} is not a list of {'texts' if kind is str else 'integers'}")
        if kind is int and not -1 <= min(column) <= max(column) < 2**62:
            raise ValueError(f"{name} has a number that is negative or too large")
    if len(set(map(len, lists.values()))) > 1:
        raise ValueError("its lists differ in length")
    if type(stored["bytes"]) is not int:
        raise ValueError("bytes is not an integer")
    index = make_index(stored["bytes"], **lists, sha256=stored.get("sha256"))
    check_bounds(index, packed)
    return index._replace(problem=problem, texts=_checked_texts(stored.get("texts"), index.labels))


def check_bounds(index: Index, packed: bool) -> None:
    """Raise ValueError for numbers that none of our indices contains. packed: as for `_checked`."""
    if not 0 <= index.bytes < 2**62:
        raise ValueError("the size of the shard is negative or too large")
    if index.labels.min() < -1 or max(index.offsets.max(), index.labels.max()) >= 2**62:
        raise ValueError("an offset or a label is negative or too large")
    order = np.argsort(index.offsets, kind="stable")  # links lead to bytes elsewhere, and several to the same
    begins = index.offsets[order]
    ends = begins + index.sizes[order]
    same = (begins[1:] == begins[:-1]) & (ends[1:] == ends[:-1])
    if index.sizes.min() < 0 or index.sizes.max() > MAX_IMAGE_BYTES:
        raise ValueError(f"a size is not from 0 to {MAX_IMAGE_BYTES} (MAX_IMAGE_BYTES)")
    if begins[0] < BLOCK or not (same | (begins[1:] >= ends[:-1] + BLOCK)).all():
        raise ValueError("the images overlap")
    if not packed and ends[-1] > index.bytes:
        raise ValueError("an image ends behind the end of the shard")


def _checked_texts(texts: Any, labels: np.ndarray) -> tuple[str, ...] | None:
    if texts is None:
        return None
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise ValueError("texts is not a list of texts")
    if labels.max() >= len(texts):
        raise ValueError("a label is the position of no text")
    return tuple(texts)


def _save_index(file: str, index: Index) -> None:
    columns: dict[str, Any] = {name: getattr(index, name).tolist() for name in ("offsets", "sizes", "labels")}
    keys = [decoded(key) for key in index.keys.tolist()]
    if index.sha256 is not None:
        columns["sha256"] = index.sha256
    if index.problem:
        columns["problem"] = index.problem[:MAX_LINE_CHARACTERS]
    if index.texts is not None:
        columns["texts"] = index.texts
    content = json.dumps({"version": INDEX_VERSION, "bytes": index.bytes, "keys": keys, **columns})
    if len(content) > MAX_INDEX_BYTES:
        raise UserError(
            f"{file}: would have {len(content)} bytes, more than {MAX_INDEX_BYTES} (MAX_INDEX_BYTES): "
            "pack smaller shards"
        )
    try:
        os.makedirs(os.path.dirname(file) or ".", mode=0o700, exist_ok=True)
        replace_text(file, content)
    except OSError as error:
        raise UserError(
            f"{file}: cannot save the index ({error.strerror}): set data.cache_dir to a writable directory"
        ) from None
