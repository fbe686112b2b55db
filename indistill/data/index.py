"""Index a shard: the offset, size and label of each of its samples."""

import contextlib
import gzip
import json
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from indistill.config import UserError
from indistill.config.files import replace_text
from indistill.data.remote import ShardCache, base_name, cache_name, changed, is_remote, open_shard

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
# WebDataset's rule: the key reaches to the first dot of the base name, what follows is the extension.
KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
BLOCK = tarfile.BLOCKSIZE  # bytes: what a tar is padded to, and the size of a member's header
INDEX_VERSION = 1


class Index(NamedTuple):
    """What one shard holds. Arrays have one entry per sample, in the order of the tar."""

    bytes: int  # size of the shard
    keys: np.ndarray  # utf-8 bytes
    offsets: np.ndarray  # int64, where the image begins; in a compressed shard within the uncompressed stream
    sizes: np.ndarray  # int64, bytes of the image
    labels: np.ndarray  # int64, -1 for none


def compressed(path: str) -> bool:
    return base_name(path).endswith((".gz", ".tgz")) and not path.startswith("pipe:")


# --- the index -------------------------------------------------------------------------------------------------------
def load_index(path: str, cache_dir: str | None = None, cache: ShardCache | None = None) -> Index:
    """The shard's index, built and saved first if there is none. Raises UserError if it does not fit the shard."""
    problem = None
    for file in index_files(path, cache_dir):
        if os.path.exists(file) or (is_remote(path) and cache.fetch_index(path, file)):
            index = parse_index(file)
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
            rows = [(key, *place, label) for key, place, _, label in read_samples(path, stream, load=False)]
            index = make_index(os.fstat(stream.fileno()).st_size, *zip(*rows))
    except UserError:
        if cache:
            cache.discard(path)  # so that it is fetched again when it has been mended
        raise
    _save_index(index_files(path, cache_dir)[0], index)
    return index


def make_index(
    bytes: int, keys: Sequence[str], offsets: Sequence[int], sizes: Sequence[int], labels: Sequence[int]
) -> Index:
    encoded = np.array([key.encode("utf-8", "surrogateescape") for key in keys], dtype=np.bytes_)
    return Index(bytes, encoded, *(np.array(numbers, dtype=np.int64) for numbers in (offsets, sizes, labels)))


def decoded(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")  # as tarfile decodes names


def index_files(path: str, cache_dir: str | None) -> list[str]:
    """Where the shard's index may be, the preferred place first."""
    if cache_dir is None:
        return [f"{path}.index.json"]
    cached = os.path.join(cache_dir, f"{cache_name(path)}.index.json")
    return [cached] if is_remote(path) else [cached, f"{path}.index.json"]


def parse_index(file: str) -> Index:
    try:
        stored = json.loads(Path(file).read_bytes())
        if stored.pop("version") != INDEX_VERSION:
            raise ValueError
        return make_index(**stored)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: not an index that this version reads: delete it and it is built anew"
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
            f"{file}: cannot save the index ({error.strerror}): set data.cache_dir to a writable place"
        ) from None


# --- labels ----------------------------------------------------------------------------------------------------------
LABEL_REMEDY = "write it into KEY.cls, a whole number in ASCII, beside the image KEY.jpg"


def parse_label(content: bytes) -> int | None:
    """The label in a .cls file; None if that is not a whole number from 0 on."""
    return int(content) if re.fullmatch(rb"\s*\d{1,9}\s*", content) else None


def malformed_label(key: str, content: bytes) -> str:
    return f"{key}.cls holds {content[:20]!r}: a label is a whole number from 0 on"


def label_problem(label: int, num_classes: int) -> str | None:
    """Why training refuses a sample with this label, -1 being none; None if it does not."""
    if label < 0:
        return f"has no label: {LABEL_REMEDY}"
    if label >= num_classes:
        return f"label {label} is none of the data.num_classes, 0 to {num_classes - 1}"
    return None


# --- reading tars ----------------------------------------------------------------------------------------------------
def read_samples(
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
            if compressed(path):
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
            if (
                len(end) < BLOCK
                or any(end)
                or any(any(rest) for rest in iter(lambda: stream.read(1 << 20), b""))
            ):
                raise UserError(
                    f"{path}: the tar is cut or damaged at byte {tar.offset}: fetch or pack it anew"
                )
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the tar is cut or damaged ({error}): fetch or pack it anew") from None
