"""Parquet files with a column of images and one of labels, as data sets of the Hugging Face Hub have them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from indistill.config import UserError, in_one_line
from indistill.config.extras import need
from indistill.config.files import open_regular
from indistill.config.limits import MAX_CLASSES, MAX_CSV_ROWS, MAX_IMAGE_BYTES, MAX_ROW_GROUP_BYTES
from indistill.data import shards
from indistill.data.class_names import in_order
from indistill.data.lists import label_in
from indistill.data.remote import ShardCache, base_name, cache_for
from indistill.data.samples import extension_of, shown

_HUB = "hf://datasets/"
_LABELS = ("label", "labels", "cls", "class", "target")  # usual names of the column
_ROWS = 64  # read at once
# The name of a set, in the folder or before the number of the file: train-00000-of-00004-0123456789abcdef.
_NUMBER = re.compile(r"-?\d+(-of-\d+)?(-[0-9a-f]{16})?\.parquet$")

Row = tuple[str, tuple[str, bytes, str, int]]  # where it is, for messages; key, image, extension, label


class Group(NamedTuple):
    """Rows that are stored together in a file."""

    path: str
    number: int  # of the group in its file
    first: int  # number of its first row in the table
    before: int  # rows before it in the file
    rows: int
    bytes: int  # of the images

    def where(self, row: int) -> str:
        """A row of the table, counted from 0 in its file, for messages."""
        return f"{self.path}: row {self.before + row - self.first}"


class Table(NamedTuple):
    """Images and labels in the rows of Parquet files, in the order of the files."""

    groups: list[Group]
    column: str  # of the images
    labels: np.ndarray  # int64 [rows], -1: none
    classes: list[str] | None  # names by label, if the table has names
    cache: ShardCache | None

    @property
    def sizes(self) -> np.ndarray:
        """About as many bytes as each image has: the mean of its group, int64 [rows]."""
        return np.concatenate([np.full(group.rows, group.bytes // group.rows) for group in self.groups])

    @property
    def identity(self) -> str:
        """A hash of what is packed."""
        parts = [(base_name(group.path), *group[1:]) for group in self.groups]
        digest = hashlib.sha256(repr((self.column, parts)).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def slice(self, begin: int, end: int) -> Table:
        """The rows [begin, end), which keep their numbers in `groups`; less to send to another process."""
        groups = [group for group in self.groups if group.first < end and group.first + group.rows > begin]
        return self._replace(groups=groups, labels=self.labels[begin:end], classes=None)

    def rows(self, begin: int, end: int) -> Iterator[Row]:
        """Read the rows [begin, end) of a `slice` of the same. Raises UserError for one without an image."""
        for group in self.groups:
            with _opened(group.path, self.cache) as file:
                batches = file.iter_batches(_ROWS, row_groups=[group.number], columns=[self.column])
                images = (image for batch in batches for image in _images(batch.column(0)))
                for row, (image, name) in enumerate(images, group.first):
                    if begin <= row < end:
                        where, label = group.where(row), int(self.labels[row - begin])
                        yield where, _sample(where, row, image=image, name=name, label=label)
                    elif row >= end:
                        break


def is_table(source: str | Sequence[str]) -> bool:
    """Whether a source of `shards pack` is a table, by its name."""
    names = [source] if isinstance(source, str) else source
    return all(
        name.lower().endswith(".parquet")
        or (name.startswith(_HUB) and ".tar" not in name and ".tgz" not in name)
        for name in names
    )


class Wanted(NamedTuple):
    """The columns to read; None: the one that looks like it."""

    image: str | None = None
    label: str | None = None
    unlabelled: bool = False  # whether labels are left out


def read(
    source: str | Sequence[str], wanted: Wanted, *, given: Sequence[str] | None, cache_dir: str | None
) -> Table:
    """Find the rows of Parquet files, and read their labels.

    source: paths or URLs, as for `ShardSet`; of the Hub also with *, or a data set or a folder of it.
    given: the class names by label.

    Raises UserError for files and columns that cannot be packed.
    """
    need("hf", "Parquet", "pyarrow")
    patterns = [source] if isinstance(source, str) else source
    paths = shards.expand([path for pattern in patterns for path in _on_hub(pattern)])
    cache = cache_for(paths, cache_dir)
    groups: list[Group] = []
    labels: list[Any] = []
    columns: _Columns | None = None
    rows = 0
    for path in paths:
        with _opened(path, cache) as file:
            found = _columns(path, file.schema_arrow, wanted)
            if columns is not None and found != columns:
                raise UserError(
                    f"{path}: has other columns or classes than {paths[0]}: pack files of one data set "
                    "together"
                )
            columns = found
            groups += _groups(path, file.metadata, columns.image, rows)
            rows += file.metadata.num_rows
            if columns.label is not None:
                labels += file.read([columns.label]).column(0).to_pylist()
    if not groups or columns is None:
        raise UserError(f"{paths[0]}: holds no rows: name another file")
    if rows > MAX_CSV_ROWS:
        raise UserError(f"{paths[0]}: is one of {rows:,} rows, more than {MAX_CSV_ROWS:,}: pack fewer files")
    if columns.label is None and given is not None:
        raise UserError(f"{paths[0]}: is packed without labels: leave out --classes")
    numbers, classes = _numbered(labels or [None] * rows, columns, given, groups)
    return Table(groups, columns.image, numbers, classes, cache)


@contextlib.contextmanager
def _opened(path: str, cache: ShardCache | None) -> Iterator[Any]:
    """Open a Parquet file. Raises UserError for one that cannot be read, also in the block."""
    import pyarrow
    from pyarrow import parquet

    try:
        stream: IO[bytes] = open_regular(path) if cache is None or "://" not in path else cache.open(path)
        with stream, parquet.ParquetFile(stream) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror and error.filename:
            raise UserError(f"{path}: cannot be read ({error.strerror}): correct the path") from None
        reason = in_one_line(error, 200)
        raise UserError(f"{path}: is not a readable Parquet file ({reason}): copy it again") from None


def _groups(path: str, metadata: Any, column: str, first: int) -> Iterator[Group]:
    before = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        chunks = [group.column(i) for i in range(group.num_columns)]
        of_images = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] == column]
        size = sum(chunk.total_uncompressed_size for chunk in of_images)
        if size > MAX_ROW_GROUP_BYTES:
            raise UserError(
                f"{path}: has a row group of {size:,} bytes of images, more than {MAX_ROW_GROUP_BYTES:,} "
                "(MAX_ROW_GROUP_BYTES): write it again with fewer rows in a group"
            )
        if group.num_rows:
            yield Group(path, number, first + before, before, group.num_rows, size)
        before += group.num_rows


# --- the Hub ------------------------------------------------------------------------------------------------
def _on_hub(pattern: str) -> list[str]:
    """The files of the Hub that a pattern with * or the name of a data set stands for; others as they are."""
    if not pattern.startswith(_HUB) or ("*" not in pattern and pattern.endswith(".parquet")):
        return [pattern]
    import fsspec

    system, path = fsspec.core.url_to_fs(pattern)
    try:
        found = sorted(system.glob(path if "*" in path else f"{path.rstrip('/')}/**/*.parquet"))
    except Exception as error:  # the Hub's client has errors of its own
        raise UserError(
            f"{pattern}: cannot be listed ({in_one_line(error, 200)}): correct the name"
        ) from None
    if not found:
        raise UserError(f"{pattern}: holds no Parquet files: name the files that it has")
    files = [f"hf://{name}" for name in found]
    check_one_set(pattern, files)
    return files


def check_one_set(where: str, files: Sequence[str]) -> None:
    """Raise UserError for files that are several sets, such as train and test, by their names."""
    sets = dict.fromkeys(_NUMBER.sub("*.parquet", name) for name in files)
    if len(sets) > 1:
        raise UserError(f"{where}: holds several sets of files: name one of them: {shown([*sets])}")


# --- columns ------------------------------------------------------------------------------------------------
class _Columns(NamedTuple):
    image: str
    label: str | None  # None: no labels are packed
    names: list[str] | None  # of the classes, if the file has them


def _columns(path: str, schema: Any, wanted: Wanted) -> _Columns:
    """The columns of images and labels. Raises UserError for none, several, and those of another type."""
    names = list(map(str, schema.names))
    for option, name in (("--image-column", wanted.image), ("--label-column", wanted.label)):
        if name is not None and names.count(name) != 1:
            raise UserError(f"{path}: has no column {name!r}, but {shown(names)}: correct {option}")
    images = [name for name in names if _has_images(schema.field(name).type)]
    image = wanted.image or _only(
        images, f"{path}: has {{}} images among {shown(names)}: name it with --image-column"
    )
    if image not in images:
        raise UserError(
            f"{path}: the column {image!r} is {schema.field(image).type}, which holds no image files: choose "
            "another --image-column"
        )
    if wanted.unlabelled or names == [image]:
        return _Columns(image, None, None)
    features = _features(schema)
    known = [name for name in names if features.get(name, {}).get("_type") == "ClassLabel"]
    usual = [name for name in names if name.lower() in _LABELS]
    label = wanted.label or _only(
        known or usual,
        f"{path}: has {{}} labels among {shown(names)}: name it with --label-column, or set --unlabelled",
    )
    is_name = _check_label(path, label, schema.field(label).type)
    of_classes = features.get(label, {}).get("names")
    if is_name or not isinstance(of_classes, list):
        return _Columns(image, label, None)
    return _Columns(image, label, list(map(str, of_classes)))


def _only(found: Sequence[str], problem: str) -> str:
    """The only column that may be meant. Raises UserError with this text for none, and for several."""
    if len(found) == 1:
        return found[0]
    several = f"several columns ({shown(found)}) that may be" if found else "no known column of"
    raise UserError(problem.format(several))


def _check_label(path: str, name: str, kind: Any) -> bool:
    """Whether labels of an Arrow type are names, and not numbers. Raises UserError for other types."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        raise UserError(
            f"{path}: the column {name!r} has several labels for an image ({kind}), but an image has one, "
            "because losses for several are not built yet: choose another --label-column"
        )
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_name = types.is_string(value) or types.is_large_string(value)
    if not (is_name or types.is_integer(value) or types.is_floating(value)):
        raise UserError(
            f"{path}: the column {name!r} is {kind}: a label is an integer or a name: choose another "
            "--label-column"
        )
    return is_name


def _has_images(kind: Any) -> bool:
    """Whether values are files: bytes, or as in `datasets.Image` a struct of bytes and a path."""
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _has_images(kind.field(index).type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the library `datasets` wrote about each column; {} if it did not write the file."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, RecursionError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    return {}


# --- labels -------------------------------------------------------------------------------------------------
def _numbered(
    labels: Sequence[Any], columns: _Columns, given: Sequence[str] | None, groups: Sequence[Group]
) -> tuple[np.ndarray, list[str] | None]:
    """The label of each row, -1 for none, and the class names by label, if the rows have names."""
    names = columns.names or []
    if any(isinstance(label, str) for label in labels):
        names = in_order(label for label in labels if label)
        numbers = {name: number for number, name in enumerate(names)}
        labels = [numbers[label] if label else None for label in labels]
    most = len(names or given or ()) or MAX_CLASSES
    labels = [_whole(label) for label in labels]
    for row, label in enumerate(labels):
        if label is not None and (isinstance(label, float) or not -1 <= label < most):
            group = next(group for group in groups if row < group.first + group.rows)
            raise UserError(
                f"{group.where(row)}: label {label} is not from 0 to {most - 1}: correct the column "
                f"{columns.label!r}, or name all classes in --classes"
            )
    values = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    if not names or given is None:
        return values, names or (None if given is None else list(given))
    translated = np.array([*(label_in(given, name, groups[0].path) for name in names), -1])
    return translated[values], list(given)


def _whole(label: Any) -> Any:
    """A label as an integer, None for none: pandas writes 1.0 and NaN in a column with an empty cell."""
    if not isinstance(label, float):
        return label
    if math.isnan(label):
        return None
    return int(label) if label.is_integer() else label


# --- rows ---------------------------------------------------------------------------------------------------
def _images(column: Any) -> Iterator[tuple[bytes | None, str | None]]:
    """The image file and, if there is one, the name of each row."""
    for value in column:
        content = value.as_py()
        yield (content.get("bytes"), content.get("path")) if isinstance(content, dict) else (content, None)


def _sample(
    where: str, row: int, *, image: bytes | None, name: str | None, label: int
) -> tuple[str, bytes, str, int]:
    if not image:
        outside = f", but the name of a file, {name!r}" if name else ""
        raise UserError(f"{where}: holds no image{outside}: remove the row, or pack the files themselves")
    if len(image) > MAX_IMAGE_BYTES:
        raise UserError(
            f"{where}: its image has {len(image)} bytes, more than {MAX_IMAGE_BYTES} (MAX_IMAGE_BYTES): "
            "remove it"
        )
    stem = re.sub(r"[^\w-]+", "_", Path(name or "").stem, flags=re.ASCII)[:100]
    return f"{row:08d}_{stem}".rstrip("_"), image, extension_of(image), label
