"""Index a shard: the offset, size and label of each of its samples."""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

import numpy as np

from indistill.config import UserError, printable
from indistill.config.files import read_bytes, read_json, replace_text
from indistill.config.limits import (
    MAX_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_INDEX_BRACKETS,
    MAX_INDEX_BYTES,
    MAX_INDEX_NUMBERS,
    MAX_KEYS_BYTES,
    MAX_LABEL_BYTES,
    MAX_LINE_CHARACTERS,
    MAX_SHARD_SAMPLES,
)
from indistill.config.ranks import Ranks
from indistill.data.remote import ShardCache, base_name, cache_name, changed, is_remote, open_shard
from indistill.data.tar import BLOCK, Tar

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MOST_SHOWN = 5  # names in a message
INDEX_VERSION = 1
INDEX_SUFFIX = ".index.json"
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


def compressed(path: str) -> bool:
    """Whether a shard is compressed with gzip or zstd, by its name."""
    return base_name(path).endswith((".gz", ".tgz", ".zst")) and not path.startswith("pipe:")


# --- the index ----------------------------------------------------------------------------------------------
def load_index(
    path: str, cache_dir: str | None = None, cache: ShardCache | None = None, *, save: bool = True
) -> Index:
    """Load the shard's index; build it first if there is none, and `save` it.

    Raises UserError if it does not fit.
    """
    index = _fitting_index(path, cache_dir, cache)
    if index is None:
        return build_index(path, cache_dir, cache) if save else read_index(path, cache)
    if index.problem and Ranks.from_environment().is_main_process:
        _warn(path, index.problem)
    return index


def _warn(path: str, problem: str) -> None:
    log.warning("%s", printable(f"{path}: {problem}"))


def _fitting_index(path: str, cache_dir: str | None, cache: ShardCache | None) -> Index | None:
    """The shard's index that is saved, if any. Raises UserError if it does not fit."""
    problem = None
    remote_cache = cache if is_remote(path) else None
    for file in index_files(path, cache_dir):
        index = _stored_index(path, file, remote_cache)
        if index is not None:
            if is_remote(path) or index.bytes == (size := os.stat(path).st_size):
                return index
            problem = changed(path, f"it has {size} bytes, its index {file} says {index.bytes}")
    if problem:
        raise UserError(problem)
    return None


def _stored_index(path: str, file: str, cache: ShardCache | None) -> Index | None:
    """The index in `file`, where that of a remote shard is fetched to; None if there is none."""
    if os.path.exists(file):
        try:
            return parse_index(file)
        except UserError:
            if cache is None:
                raise  # a copy in the cache is fetched again instead
    return None if cache is None else cache.fetch_index(path, file, parse_index)


def build_index(
    path: str,
    cache_dir: str | None = None,
    cache: ShardCache | None = None,
    *,
    hashed: bool = False,
) -> Index:
    """Index a shard and save the index. Raises UserError if the tar is damaged or a label is malformed.

    hashed: record the shard's SHA-256, so that it is checked when the shard is fetched.
    """
    index = read_index(path, cache, hashed=hashed)
    _save_index(index_files(path, cache_dir)[0], index)
    return index


def read_index(path: str, cache: ShardCache | None, *, hashed: bool = False) -> Index:
    """The index of a shard, read from the shard as `build_index` does, but not saved."""
    with _errors_named(path, cache), open_shard(path, cache) as stream:
        others = Others()
        rows = _rows(read_samples(path, stream, load=False, others=others))
        if others.problem:
            _warn(path, others.problem)
        sha256 = sha256_of(stream) if hashed else None
        return index_of(os.fstat(stream.fileno()).st_size, rows, sha256)._replace(problem=others.problem)


def index_to_pack(path: str, cache_dir: str | None, cache: ShardCache | None) -> tuple[Index, dict[str, str]]:
    """A shard's index, also of images and labels that belong to no sample because of dots in their names.

    Returns the keys of the latter in it, too, by name. The index is read from the shard, and not saved.
    """
    stored = _fitting_index(path, cache_dir, cache)
    size, sha256 = (None, None) if stored is None else (stored.bytes, stored.sha256)
    with _errors_named(path, cache), open_shard(path, cache, size, sha256) as stream:
        others = Others()
        rows = _rows(read_samples(path, stream, load=False, others=others, may_be_empty=True))
        keys = _keys_without_dots(others.unread, {key for key, *_ in rows})
        if keys or not rows:
            stream.seek(0)
            rows = _rows(read_samples(path, stream, load=False, keys=keys))
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
    return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


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
    if sha256 is not None and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise ValueError("sha256 is not a SHA-256 in hexadecimal")
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


def decoded(key: bytes) -> str:
    """A key of an index as text, decoded like the names in tarfile."""
    return key.decode("utf-8", "surrogateescape")


def index_files(path: str, cache_dir: str | None) -> list[str]:
    """The files that may hold the shard's index, the preferred one first."""
    if cache_dir is None:
        return [path + INDEX_SUFFIX]
    cached = os.path.join(cache_dir, cache_name(path) + INDEX_SUFFIX)
    return [cached] if is_remote(path) else [cached, path + INDEX_SUFFIX]


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
        return _checked(stored, compressed(file.removesuffix(INDEX_SUFFIX)))
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
    if stored.keys() - {"sha256", "problem"} != {"bytes", *names}:
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
    return index._replace(problem=problem)


def _save_index(file: str, index: Index) -> None:
    columns: dict[str, Any] = {name: getattr(index, name).tolist() for name in ("offsets", "sizes", "labels")}
    keys = [decoded(key) for key in index.keys.tolist()]
    if index.sha256 is not None:
        columns["sha256"] = index.sha256
    if index.problem:
        columns["problem"] = index.problem[:MAX_LINE_CHARACTERS]
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


# --- labels -------------------------------------------------------------------------------------------------
LABEL_REMEDY = "write it into KEY.cls, an integer in ASCII, beside the image KEY.jpg"


def parse_label(content: bytes) -> int | None:
    """The label in a .cls file; None if it is not a non-negative integer."""
    fits = len(content) <= MAX_LABEL_BYTES
    return int(content) if fits and re.fullmatch(rb"\s*\d{1,9}\s*", content) else None


def malformed_label(key: str, content: bytes) -> str:
    """The error message for a .cls file that `parse_label` rejects."""
    if len(content) > MAX_LABEL_BYTES:
        return f"{key}.cls has more than {MAX_LABEL_BYTES} bytes (MAX_LABEL_BYTES): a label is an integer"
    return f"{key}.cls holds {content[:20]!r}: a label is a non-negative integer"


def label_problem(key: str, label: int, num_classes: int) -> str | None:
    """Why training rejects a sample with this label (-1: no label); None if it accepts it."""
    if label < 0:
        return f"has no label, because there is no {key}.cls: {LABEL_REMEDY}"
    if label >= num_classes:
        return f"label {label} is none of the data.num_classes, 0 to {num_classes - 1}"
    return None


def shown(names: Sequence[str]) -> str:
    """List the first few names, for a message."""
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(map(repr, names[:MOST_SHOWN])) + more


class Others:
    """What a shard has beside its samples."""

    def __init__(self) -> None:
        self.extensions = Counter[str]()  # of members that are neither images nor labels
        self.unread: list[str] = []  # members that look like images or labels; set when all are read
        self._alike: dict[str, str] = {}  # name that ends like that of an image or a label -> key

    def add(self, key: str, name: str, extension: str) -> None:
        """Count a member that is neither an image nor a label by WebDataset's rule."""
        known = extension in self.extensions or len(self.extensions) < MAX_EXTENSIONS
        self.extensions[extension if known else "of further kinds"] += 1
        _, dot, last = extension.rpartition(".")
        alike = (
            dot and last in (*IMAGE_EXTENSIONS, "cls") and key.rpartition("/")[2] and not _META.match(name)
        )
        if alike and len(self._alike) < MAX_SHARD_SAMPLES:
            self._alike[name] = key

    def end(self, keys: Container[str]) -> None:
        """Find what looks like images or labels and belongs to none of the samples `keys`."""
        self.unread = [name for name, key in self._alike.items() if key not in keys]

    @property
    def problem(self) -> str:
        """Describes `unread`; empty if there is none."""
        if not self.unread:
            return ""
        return (
            "images or labels belong to no sample, because the key of a name ends at its first dot: "
            f"{len(self.unread)} ({shown(self.unread)}): rename them, with one dot each, or run "
            "`indistill shards pack` on the shard, which does so"
        )


# --- reading tars -------------------------------------------------------------------------------------------
_META = re.compile(r"__[^/]*__/")  # WebDataset's folder for what belongs to no sample
SAMPLE = "a sample is {key}.jpg (jpeg, png, webp) and {key}.cls"
_TOO_MANY = f"holds more than {MAX_SHARD_SAMPLES} samples (MAX_SHARD_SAMPLES): pack smaller shards"


class ImageOrLabel(NamedTuple):
    """An image or a label in a tar."""

    key: str
    extension: str
    offset: int  # of the content; -1: of an image that is reported already
    size: int
    content: bytes  # b"" for an image that is not loaded; of a label at most MAX_LABEL_BYTES + 1 bytes


def read_samples(
    path: str,
    stream: IO[bytes],
    *,
    load: bool = True,
    report: Callable[[str, str], None] | None = None,
    others: Others | None = None,
    may_be_empty: bool = False,
    keys: Mapping[str, str] = {},
) -> Iterator[tuple[str, tuple[int, int], bytes, int]]:
    """Yield the samples of a shard from its file, as `samples_of` does."""
    tar = Tar(path, stream, gzipped=compressed(path), strict=True)
    return samples_of(tar, load=load, report=report, others=others, may_be_empty=may_be_empty, keys=keys)


def samples_of(
    tar: Tar,
    *,
    load: bool = True,
    report: Callable[[str, str], None] | None = None,
    others: Others | None = None,
    may_be_empty: bool = False,
    keys: Mapping[str, str] = {},
) -> Iterator[tuple[str, tuple[int, int], bytes, int]]:
    """Yield (key, (offset, size) of the image, image, label) of every sample of a shard, in one pass.

    load: whether to read images; without it they are b"". A sample without a label has -1.
    report: called with the key and the problem of every malformed sample; by default UserError is raised.
    others: counts the members that belong to no sample.
    keys: of images and labels, by name, that would belong to none.

    Raises UserError for a damaged tar and, unless it `may_be_empty`, for one without samples.
    """

    def refuse(key: str, problem: str) -> None:
        raise UserError(f"{tar.path}: {problem}")

    report = report or refuse
    others = others or Others()
    seen = set()
    members = images_and_labels(tar, load=load, report=report, others=others, keys=keys)
    for key, group in itertools.groupby(members, lambda member: member.key):
        repeated = key in seen
        seen.add(key)
        if len(seen) > MAX_SHARD_SAMPLES:
            refuse("", _TOO_MANY)
        image, label = _image_and_label(key, group, report, repeated)
        if image is not None and image.offset >= 0:
            yield key, (image.offset, image.size), image.content, -1 if label is None else label
        elif image is None and label is not None:
            report(key, f"sample '{key}' has a .cls but no image ({', '.join(IMAGE_EXTENSIONS)})")
    others.end(seen)
    if not seen and not may_be_empty:
        refuse("", f"holds no sample: {others.problem or SAMPLE}")


def _image_and_label(
    key: str, members: Iterable[ImageOrLabel], report: Callable[[str, str], None], repeated: bool
) -> tuple[ImageOrLabel | None, int | None]:
    """The image and the label among a sample's members. The label is None if missing, -1 if malformed.

    repeated: other members with this key came earlier, before those of another sample.
    """
    if repeated:
        remedy = "unpack the shard, and write it again with `tar --sort=name`"
        report(key, f"the members of sample '{key}' are not next to each other: {remedy}")
    image, label = None, None
    for member in members:
        if member.extension == "cls":
            if label is not None:
                report(key, f"sample '{key}' has two labels")
            label = parse_label(member.content)
            if label is None:
                label = -1
                report(key, malformed_label(key, member.content))
        elif image is not None:
            report(key, f"sample '{key}' has two images")
        else:
            image = member
    return image, label


def images_and_labels(
    tar: Tar,
    *,
    load: bool,
    report: Callable[[str, str], None],
    others: Others | None = None,
    keys: Mapping[str, str] = {},
) -> Iterator[ImageOrLabel]:
    """Yield every image and label; without `load`, images have no content.

    report: called with the key and the problem of an image that is too large and of a link that cannot be
        followed; the image then has the offset -1, and the label is left out.
    others: counts all other files.
    keys: as for `samples_of`.
    """
    for member in tar:
        # WebDataset's rule: the key ends at the first dot of the base name, and the rest is the extension.
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        key = f"{folder}{slash}{stem}"
        if member.name in keys:
            key, extension = keys[member.name], extension.rpartition(".")[2]
        is_label = extension == "cls"
        if not stem or _META.match(member.name) or not (is_label or extension in IMAGE_EXTENSIONS):
            if others is not None:
                others.add(key, member.name, extension)
            continue
        try:
            _, offset, size, _ = tar.follow(member)
            if size > MAX_IMAGE_BYTES and not is_label:
                size_limit = f"more than {MAX_IMAGE_BYTES} (MAX_IMAGE_BYTES)"
                raise LookupError(f"{key}.{extension} has {size} bytes, {size_limit}")
        except LookupError as error:
            report(key, str(error))
            if not is_label:
                yield ImageOrLabel(key, extension, -1, 0, b"")
            continue
        most = MAX_LABEL_BYTES + 1 if is_label else size if load else 0
        yield ImageOrLabel(key, extension, offset, size, tar.content(most))
