"""Index a shard: the offset, size and label of each of its samples."""

import contextlib
import gzip
import itertools
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from indistill.config import UserError
from indistill.config.files import replace_text
from indistill.data.remote import ShardCache, base_name, cache_name, changed, is_remote, open_shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key ends at the first dot of the base name, and the rest is the extension.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
BLOCK = tarfile.BLOCKSIZE  # bytes: size of a member's header; contents are padded to a multiple of it
INDEX_VERSION = 1
MARK = b'{"version": '  # the beginning of every index


class Index(NamedTuple):
    """The samples of one shard. Arrays have one entry per sample, in the order of the tar."""

    bytes: int  # size of the shard
    keys: np.ndarray  # utf-8 bytes
    offsets: np.ndarray  # int64, first byte of the image; in a compressed shard, of the uncompressed stream
    sizes: np.ndarray  # int64, bytes of the image
    labels: np.ndarray  # int64, -1 for none


def compressed(path: str) -> bool:
    """Whether a shard is compressed with gzip, by its name."""
    return base_name(path).endswith((".gz", ".tgz")) and not path.startswith("pipe:")


# --- the index ----------------------------------------------------------------------------------------------
def load_index(path: str, cache_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """Load the shard's index; build and save it first if there is none.

    Raises UserError if it does not fit.
    """
    problem = None
    remote_cache = cache if is_remote(path) else None
    for file in index_files(path, cache_dir):
        if os.path.exists(file) or (remote_cache is not None and remote_cache.fetch_index(path, file)):
            index = parse_index(file)
            if is_remote(path) or index.bytes == (size := os.stat(path).st_size):
                return index
            problem = changed(path, f"it has {size} bytes, its index {file} says {index.bytes}")
    if problem:
        raise UserError(problem)
    return build_index(path, cache_dir, cache)


def build_index(path: str, cache_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """Index a shard and save the index. Raises UserError if the tar is damaged or a label is malformed."""
    try:
        with open_shard(path, cache) as stream:
            rows = [(key, *span, label) for key, span, _, label in read_samples(path, stream, load=False)]
            index = index_of(os.fstat(stream.fileno()).st_size, rows)
    except UserError:
        if cache:
            cache.discard(path)  # so that it is fetched again once it has been repaired
        raise
    _save_index(index_files(path, cache_dir)[0], index)
    return index


def index_of(size: int, rows: Sequence[tuple[str, int, int, int]]) -> Index:
    """The index of a shard of `size` bytes with the samples (key, offset, size, label)."""
    keys, offsets, sizes, labels = zip(*rows) if rows else ((), (), (), ())
    return make_index(size, keys, offsets=offsets, sizes=sizes, labels=labels)


def make_index(
    bytes: int,
    keys: Sequence[str],
    *,
    offsets: Sequence[int] | np.ndarray,
    sizes: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
) -> Index:
    """Convert lists, as they are stored in an index file, to an Index."""
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    return Index(bytes, encoded, *(np.array(numbers, dtype=np.int64) for numbers in (offsets, sizes, labels)))


def decoded(key: bytes) -> str:
    """A key of an index as text, decoded like the names in tarfile."""
    return key.decode("utf-8", "surrogateescape")


def index_files(path: str, cache_dir: str | None) -> list[str]:
    """The files that may hold the shard's index, the preferred one first."""
    if cache_dir is None:
        return [f"{path}.index.json"]
    cached = os.path.join(cache_dir, f"{cache_name(path)}.index.json")
    return [cached] if is_remote(path) else [cached, f"{path}.index.json"]


def parse_index(file: str) -> Index:
    """Read an index file. Raises UserError for anything else."""
    try:
        stored = json.loads(Path(file).read_bytes())
        if stored.pop("version") != INDEX_VERSION:
            raise ValueError
        return make_index(**stored)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: not an index that this version reads: delete the file, and it is built again"
        ) from None


def _save_index(file: str, index: Index) -> None:
    columns = {name: getattr(index, name).tolist() for name in ("offsets", "sizes", "labels")}
    keys = [decoded(key) for key in index.keys.tolist()]
    content = json.dumps({"version": INDEX_VERSION, "bytes": index.bytes, "keys": keys, **columns})
    try:
        os.makedirs(os.path.dirname(file) or ".", exist_ok=True)
        replace_text(file, content)
    except OSError as error:
        raise UserError(
            f"{file}: cannot save the index ({error.strerror}): set data.cache_dir to a writable directory"
        ) from None


# --- labels -------------------------------------------------------------------------------------------------
LABEL_REMEDY = "write it into KEY.cls, an integer in ASCII, beside the image KEY.jpg"


def parse_label(content: bytes) -> int | None:
    """The label in a .cls file; None if it is not a non-negative integer."""
    return int(content) if re.fullmatch(rb"\s*\d{1,9}\s*", content) else None


def malformed_label(key: str, content: bytes) -> str:
    """The error message for a .cls file that `parse_label` rejects."""
    return f"{key}.cls holds {content[:20]!r}: a label is a non-negative integer"


def label_problem(label: int, num_classes: int) -> str | None:
    """Why training rejects a sample with this label (-1: no label); None if it accepts it."""
    if label < 0:
        return f"has no label: {LABEL_REMEDY}"
    if label >= num_classes:
        return f"label {label} is none of the data.num_classes, 0 to {num_classes - 1}"
    return None


# --- reading tars -------------------------------------------------------------------------------------------
class _Member(NamedTuple):
    """An image or a label in a tar."""

    key: str
    extension: str
    offset: int  # of the content
    size: int
    content: bytes  # b"" for an image that is not loaded


def read_samples(
    path: str,
    stream: IO[bytes],
    *,
    load: bool = True,
    report: Callable[[str, str], None] | None = None,
    others: Counter[str] | None = None,
) -> Iterator[tuple[str, tuple[int, int], bytes, int]]:
    """Yield (key, (offset, size) of the image, image, label) of every sample of a shard, in one pass.

    load: whether to read images; without it they are b"". A sample without a label has -1.
    report: called with the key and the problem of every malformed sample; by default UserError is raised.
    others: counts the members that belong to no sample, by extension.

    Raises UserError for a damaged tar and for one without samples.
    """

    def refuse(key: str, problem: str) -> None:
        raise UserError(f"{path}: {problem}")

    report = report or refuse
    seen = set()
    for key, members in itertools.groupby(_members(path, stream, load, others), lambda member: member.key):
        repeated = key in seen
        seen.add(key)
        image, label = _image_and_label(key, members, report, repeated)
        if image is not None:
            yield key, (image.offset, image.size), image.content, -1 if label is None else label
        elif label is not None:
            report(key, f"sample '{key}' has a .cls but no image ({', '.join(IMAGE_EXTENSIONS)})")
    if not seen:
        refuse("", "holds no sample: a sample is {key}.jpg (jpeg, png, webp) and {key}.cls")


def _image_and_label(
    key: str, members: Iterable[_Member], report: Callable[[str, str], None], repeated: bool
) -> tuple[_Member | None, int | None]:
    """The image and the label among a sample's members. The label is None if missing, -1 if malformed.

    repeated: other members with this key came earlier, before those of another sample.
    """
    if repeated:
        report(key, f"the members of sample '{key}' are not next to each other: pack it again")
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


def _members(path: str, stream: IO[bytes], load: bool, others: Counter[str] | None) -> Iterator[_Member]:
    """Yield every image and label; without `load`, images have no content.

    `others` counts all other files.
    """
    damaged = f"{path}: the tar is cut or damaged"
    try:
        with contextlib.ExitStack() as stack:
            uncompressed: IO[bytes] | gzip.GzipFile = stream
            if compressed(path):
                uncompressed = stack.enter_context(gzip.open(stream))
            tar = stack.enter_context(tarfile.open(fileobj=uncompressed, mode="r:"))
            while member := tar.next():
                # Otherwise tarfile keeps every header. Its type stubs lack the attribute.
                tar.members.clear()  # type: ignore[attr-defined]
                match = KEY_AND_EXTENSION.match(member.name)
                if not member.isreg():
                    continue
                key, extension = (match[1], match[2].lower()) if match else ("", "")
                if extension != "cls" and extension not in IMAGE_EXTENSIONS:
                    if others is not None:
                        others[extension] += 1
                else:
                    content = _content(tar, member) if load or extension == "cls" else b""
                    yield _Member(key, extension, member.offset_data, member.size, content)
            if not _ends_at(uncompressed, tar.offset):
                raise UserError(f"{damaged} at byte {tar.offset}: fetch or pack it again")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{damaged} ({error}): fetch or pack it again") from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # the member is a regular file
    return file.read()


def _ends_at(stream: IO[bytes] | gzip.GzipFile, offset: int) -> bool:
    """Whether a tar ends at `offset`, where tarfile stopped: it takes a damaged header for the end."""
    stream.seek(offset)
    end = stream.read(BLOCK)
    if len(end) < BLOCK or any(end):
        return False
    return not any(any(block) for block in iter(lambda: stream.read(1 << 20), b""))
