"""Pack an image folder, a CSV file or other shards into shards, in parallel, with reproducible bytes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from indistill.config import Label, UserError, records
from indistill.config.destinations import remove_parts
from indistill.config.files import replace_text, replacing
from indistill.config.limits import MAX_CLASSES, MAX_IMAGE_BYTES
from indistill.data import class_names, folders, lists, tables
from indistill.data.decode import BadImage, decode
from indistill.data.index import build_index, load_index
from indistill.data.labels import Classes
from indistill.data.lists import label_in
from indistill.data.samples import IMAGE_EXTENSIONS, extension_of, shown, without_extension
from indistill.data.shards import ShardSet
from indistill.data.tar import BLOCK
from indistill.data.urls import is_remote
from indistill.data.verify import parallel

_PREFIX = re.compile(r"[^/\\{}:.~][^/\\{}:]{0,199}")  # with the rest of a part's name at most 255 characters
Take = Literal["folders", "tars"]
OVERHEAD_BYTES = 3 * BLOCK + BLOCK // 2  # per sample: two headers, the label's block, half a block of padding

Sample = tuple[str, bytes, str, int]  # key, encoded image, extension, label (-1: none)
_Read = tuple[str, Sample]  # where the sample comes from, for messages


def pack(
    samples: Iterable[Sample],
    destination: str | Path,
    prefix: str,
    samples_per_shard: int,
) -> list[Path]:
    """Write samples as `<prefix>-000000.tar`, ... with their indices. Returns the paths of the shards.

    The same samples give the same bytes. Raises UserError if an earlier packing left more shards.
    """
    _check_prefix(prefix)
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    paths: list[Path] = []
    remaining = iter(samples)
    while pending := list(itertools.islice(remaining, samples_per_shard)):
        paths.append(_shard_path(destination, prefix, len(paths)))
        _write_shard(paths[-1], pending)
    left_over = _shard_path(destination, prefix, len(paths))
    if left_over.exists():
        raise UserError(
            f"{left_over}: left by an earlier packing of more shards: delete the shards that you do not need"
        )
    return paths


class Reading(NamedTuple):
    """How a source is read. `pack_source` sets the fields that are arguments of its own."""

    classes: Sequence[str] | None = None
    images: str | None = None  # folder with the images of a list; None: that of the list
    encoding: str | None = None  # of a list; None: UTF-8
    take: Take | None = None  # which to pack of a folder that has class folders and tars
    follow_links: bool = False
    unlabelled: bool = False  # whether folders in a folder are no classes, and a table's labels are left out
    image_column: str | None = None  # of a table; None: the one that looks like it
    label_column: str | None = None
    label: Label | None = None  # where labels of shards are; None: numbers in KEY.cls


def pack_source(
    source: str | Sequence[str],
    destination: str | Path,
    *,
    prefix: str = "shard",
    shard_bytes: int = 100_000_000,
    resize: int | None = None,
    quality: int = 90,
    seed: int = 0,
    workers: int = 1,
    cache_dir: str | None = None,
    progress: bool = False,
    classes: Sequence[str] | None = None,
    follow_links: bool = False,
    reading: Reading | None = None,
) -> dict[str, Any]:
    """Pack a data set into shards of about `shard_bytes`. Returns the content of their `dataset.json`.

    source: a folder with one sub-folder per class, labelled in the order of `class_names.in_order`, or with
        images alone, which get no labels; a list, as `lists.read` describes it; Parquet files, as
        `tables.read` does; or shards, as a folder or as patterns for `ShardSet`. Files are shuffled by
        `seed`; shards and Parquet files keep their order.
    classes: class names in the order of their labels, for a source that may lack some of them, so that a
        second split has the labels of the first. Labels that are numbers without names stay; they must be
        less than its length.
    follow_links: also pack what links in a source folder name outside of it; else they are counted on stderr.
    resize: pixels to which a longer shorter side is reduced, as JPEG of `quality`. Other images are not
        changed.

    Independent of `workers`, the same source and options give the same bytes. An interrupted packing is
    continued. Raises UserError for unreadable images and for a destination with another packing or in a
    source folder.
    """
    _check_options(prefix, shard_bytes, resize)
    with _named_errors(destination):
        reading = (reading or Reading())._replace(classes=classes, follow_links=follow_links)
        origin = _find_source(source, reading, seed, cache_dir)
        _check_apart(origin, source, destination)
        packing = _Packing(origin, Path(destination), prefix, shard_bytes, resize, quality)
        return packing.run(classes, workers, progress)


@contextlib.contextmanager
def _named_errors(destination: str | Path) -> Iterator[None]:
    """Turn an error of the disk into a UserError that names its file."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or destination}: {error.strerror or error}: correct it and start again; shards "
            "that are finished are kept"
        ) from None


def _check_apart(
    origin: _Files | _Rows | _Shards, source: str | Sequence[str], destination: str | Path
) -> None:
    """Raise UserError if a packing would become a class of the folder that it packs."""
    packed = Path(os.path.realpath(destination))
    if (
        isinstance(origin, _Files)
        and os.path.isdir(str(source))
        and Path(os.path.realpath(str(source))) in (packed, *packed.parents)
    ):
        raise UserError(f"{destination}: is in the source folder {source}: choose a folder outside of it")


def _check_sizes(origin: _Files) -> None:
    """Raise UserError for an image that no shard may hold."""
    for number in np.flatnonzero(origin.sizes > MAX_IMAGE_BYTES)[:1]:
        _, path, _ = origin.items[number]
        raise UserError(
            f"{path}: has {origin.sizes[number]} bytes, more than {MAX_IMAGE_BYTES} (MAX_IMAGE_BYTES): "
            "reduce or remove it, or set --resize"
        )


def _check_options(prefix: str, shard_bytes: int, resize: int | None) -> None:
    if shard_bytes < 1 or (resize is not None and resize < 1):
        raise UserError(f"shard_bytes ({shard_bytes}) and resize ({resize}) must be at least 1")
    _check_prefix(prefix)


def _check_prefix(prefix: str) -> None:
    if not (_PREFIX.fullmatch(prefix) and prefix.isprintable()):
        raise UserError(
            f"--prefix {prefix!r}: must be a plain file name of at most 200 characters, without / \\ {{ }} "
            "or :, and not begin with . or ~: choose another"
        )


class _Packing(NamedTuple):
    """A source and the options that determine its shards."""

    origin: _Files | _Rows | _Shards
    destination: Path
    prefix: str
    shard_bytes: int
    resize: int | None
    quality: int

    def run(self, classes: Sequence[str] | None, workers: int, progress: bool) -> dict[str, Any]:
        """Write the shards that are missing and `dataset.json`. Returns the content of the latter."""
        if isinstance(self.origin, _Files) and self.resize is None:
            _check_sizes(self.origin)
        plan = self.plan(classes)
        self.begin(plan)
        cuts = self.cuts()
        paths = [_shard_path(self.destination, self.prefix, number) for number in range(len(cuts) - 1)]
        tasks = [
            (path, self.origin.part(*cut), self.resize, self.quality)
            for path, cut in zip(paths, itertools.pairwise(cuts))
        ]
        if others := list(itertools.chain(*parallel(_pack_shard, tasks, workers, progress))):
            folders.note(
                f"{self.destination}: GIF, BMP or TIFF under the name of another type, which other programs "
                f"may not read: {len(others)} ({shown(others)})"
            )
        record = {"plan": plan, "complete": True} | self.summary(paths)
        if record["samples"] != len(self.origin.sizes):
            raise UserError(
                f"{self.destination}: has {record['samples']:,} of the source's {len(self.origin.sizes):,} "
                "images: the source was changed meanwhile: delete the folder, and pack it again"
            )
        _save_json(self.destination / class_names.RECORD, record)
        return record

    def plan(self, classes: Sequence[str] | None) -> str:
        """A hash of the source and the options; a packing continues only one with the same hash."""
        options: tuple[Any, ...] = (
            self.origin.identity,
            self.prefix,
            self.shard_bytes,
            self.resize,
            self.quality,
        )
        if classes is not None:
            options += (tuple(classes),)
        return hashlib.sha256(repr(options).encode()).hexdigest()

    def begin(self, plan: str) -> None:
        """Prepare the destination.

        Raises UserError if it contains anything but an interrupted packing of this plan.
        """
        self.destination.mkdir(parents=True, exist_ok=True)
        record = self.destination / class_names.RECORD
        if record.exists():
            remedy = "choose an empty directory"
            if records.load(record, class_names.DatasetRecord, remedy).plan != plan:
                raise UserError(
                    f"{self.destination}: holds another packing (see {record.name}): "
                    "choose an empty directory"
                )
        elif stray := next(self.destination.glob("*.tar*"), None):
            raise UserError(f"{stray}: not of this packing: choose an empty directory")
        _save_json(record, {"plan": plan, "complete": False})
        ours = re.compile(rf"{re.escape(self.prefix)}-\d{{6,}}\.tar(\.index\.json)?|{re.escape(record.name)}")
        remove_parts(self.destination, lambda name: ours.fullmatch(name) is not None)

    def cuts(self) -> list[int]:
        """Index of the first image of each shard, then the number of images."""
        sizes = self.origin.sizes
        scale = 1.0
        if self.resize:  # estimate from the first images how much smaller they become
            tried = min(len(sizes), 64)
            shrunk = _shrunk(self.origin.part(0, tried)(), self.resize, self.quality)
            scale = sum(len(image) for _, image, _, _ in shrunk) / max(sizes[:tried].sum(), 1)
        sizes = (sizes * scale).astype(np.int64) + OVERHEAD_BYTES
        shards = max(1, round(sizes.sum() / self.shard_bytes))
        # Lay all images end to end and cut the bytes into equal shards: the first byte of an image decides
        # where it goes. If an image is larger than a shard, no shard stays empty.
        shard_of = (np.cumsum(sizes) - sizes) * shards // sizes.sum()
        return [0, *(np.flatnonzero(np.diff(shard_of)) + 1).tolist(), len(sizes)]

    def summary(self, paths: Sequence[Path]) -> dict[str, Any]:
        """The counts and class names of the finished shards."""
        indices = [load_index(str(path)) for path in paths]
        labels = np.concatenate([index.labels for index in indices])
        image_bytes = np.concatenate([index.sizes for index in indices])
        classes = self.origin.classes
        return {
            "shards": len(paths),
            "urls": f"{self.prefix}-{{{0:06d}..{len(paths) - 1:06d}}}.tar",
            "samples": len(labels),
            "mean_bytes": round(float(image_bytes.mean()), 1),
            "unlabelled": int((labels < 0).sum()),
            "class_counts": np.bincount(labels[labels >= 0], minlength=len(classes or [])).tolist(),
            "classes": classes,
            "ignored_files": self.origin.ignored,
        }


class _Files(NamedTuple):
    """Image files to pack."""

    identity: str
    items: list[tuple[str, str, int]]  # key, path, label
    sizes: np.ndarray  # int64 [items], bytes
    classes: list[str] | None
    ignored: int  # files that are not images

    def part(self, begin: int, end: int) -> Callable[[], Iterator[_Read]]:
        return functools.partial(_read_files, self.items[begin:end])


class _Shards(NamedTuple):
    """Images in shards to pack."""

    identity: str
    shards: ShardSet
    sizes: np.ndarray
    classes: list[str] | None
    numbered: bool  # keys occur in several shards, so a number is added to make them unique
    relabel: dict[int, int]  # old label -> new label; empty if labels stay
    ignored: int = 0

    def part(self, begin: int, end: int) -> Callable[[], Iterator[_Read]]:
        return functools.partial(
            _read_shards,
            self.shards._slice(begin, end),
            begin,
            end=end,
            numbered=self.numbered,
            relabel=self.relabel,
        )


class _Rows(NamedTuple):
    """Images in the rows of a table to pack."""

    identity: str
    table: tables.Table
    sizes: np.ndarray
    classes: list[str] | None
    ignored: int = 0

    def part(self, begin: int, end: int) -> Callable[[], Iterator[_Read]]:
        return functools.partial(self.table.slice(begin, end).rows, begin, end)


def _read_files(items: list[tuple[str, str, int]]) -> Iterator[_Read]:
    for key, path, label in items:
        yield path, (key, Path(path).read_bytes(), folders.extension(path), label)


def _read_shards(
    shards: ShardSet, begin: int, *, end: int, numbered: bool, relabel: dict[int, int]
) -> Iterator[_Read]:
    for number, (key, image, label) in enumerate(shards.iterate(begin, end), begin):
        key = f"{key}_{number:08d}" if numbered else key
        sample = key, image, extension_of(image), relabel.get(label, label)
        yield shards.where(number), sample


def _find_source(
    source: str | Sequence[str], reading: Reading, seed: int, cache_dir: str | None
) -> _Files | _Rows | _Shards:
    """Find the images of a source of `pack_source`."""
    is_folder = isinstance(source, str) and os.path.isdir(source)
    is_list = isinstance(source, str) and lists.is_list(source)
    files = (_tables_in(Path(str(source)), reading.take) if is_folder and not is_list else []) or source
    is_table = tables.is_table(files)
    if is_list and is_remote(str(source)):
        raise UserError(f"{source}: a list is read from a local file: fetch it, and name the copy")
    _check_reading(source, reading, is_list=is_list, is_table=is_table, is_folder=is_folder)
    if is_table:
        return _find_rows(files, reading, cache_dir)
    if is_list:
        walk = (
            folders.Walk(Path(reading.images), reading.follow_links) if reading.images is not None else None
        )
        return _list_files(*lists.read(Path(str(source)), reading.classes, walk, reading.encoding), seed)
    if is_folder:
        folder = Path(str(source))
        tars = [] if reading.unlabelled and reading.label is None else _tars_in(folder, reading.take)
        if not tars and reading.label is not None:
            raise UserError(f"{source}: contains no tars: leave out --label")
        if not tars:
            return _list_files(*_read_folder(folder, reading), seed)
        # With the folder in front even if it is ".": a file may be named like a command, `pipe:x.tar`.
        source = sorted(os.path.join(folder, path.name) for path in tars)
    return _find_shards(source, reading, cache_dir)


def _check_reading(
    source: str | Sequence[str], reading: Reading, *, is_list: bool, is_table: bool, is_folder: bool
) -> None:
    """Raise UserError for an option that has no effect on this kind of source."""
    if not is_list and (reading.images is not None or reading.encoding is not None):
        raise UserError(f"{source}: is not a list of labels: leave out --images and --encoding")
    if not is_table and (reading.image_column is not None or reading.label_column is not None):
        raise UserError(f"{source}: is no Parquet file: leave out --image-column and --label-column")
    if reading.label is not None and (is_list or is_table):
        raise UserError(f"{source}: is no tar: leave out --label")
    if reading.unlabelled and (is_list or not (is_table or is_folder or reading.label is not None)):
        raise UserError(
            f"{source}: is no folder of images and no Parquet file: leave out --unlabelled; images of shards "
            "without .cls, and of lists without labels, have none without it"
        )


def _find_rows(files: str | Sequence[str], reading: Reading, cache_dir: str | None) -> _Rows:
    columns = tables.Wanted(reading.image_column, reading.label_column, reading.unlabelled)
    table = tables.read(files, columns, given=reading.classes, cache_dir=cache_dir)
    return _Rows(table.identity, table, table.sizes, table.classes)


def _find_shards(source: str | Sequence[str], reading: Reading, cache_dir: str | None) -> _Shards:
    how = None if reading.label is None else Classes(reading.label, num_classes=0)
    shards = ShardSet(source, cache_dir=cache_dir, rewrite_keys=True, labels=how)
    if how is not None and not reading.unlabelled:
        for sample_id in np.flatnonzero(shards.labels < 0)[:1]:
            raise UserError(
                f"{shards.where(sample_id)}: has no {how.missing}: correct --label, or set --unlabelled to "
                "pack images that lack it without labels"
            )
    if rewritten := list(itertools.chain.from_iterable(shards.rewritten)):
        folders.note(
            f"{shards.paths[0]}: images and labels with several dots in their names, which are packed with _ "
            f"instead: {len(rewritten)} ({shown(rewritten)})"
        )
    for sample_id in np.flatnonzero(shards.labels >= MAX_CLASSES)[:1]:  # classes are counted in a list
        label = shards.labels[sample_id]
        raise UserError(f"{shards.where(sample_id)}: label {label} is not below {MAX_CLASSES} (MAX_CLASSES)")
    classes, relabel = _names_of_shards(shards, reading.classes, named=how is None)
    # One array of them all would pad each to the longest.
    keys = set(itertools.chain.from_iterable(index.keys.tolist() for index in shards._indices))
    numbered = len(keys) < len(shards)
    return _Shards(shards.fingerprint, shards, shards.image_sizes, classes, numbered, relabel)


def _tables_in(folder: Path, take: Take | None) -> list[str]:
    """The Parquet files in a source folder that has nothing else to pack, in order."""
    found = sorted(path.name for path in folder.glob("*.parquet") if not folders.hidden(path.name))
    if not found or take is not None or _tars_in(folder, None) or folders.first_with_images(folder):
        return []
    files = [os.path.join(folder, name) for name in found]
    tables.check_one_set(str(folder), files)
    return files


def _tars_in(folder: Path, take: Take | None) -> list[Path]:
    """The shards in a source folder; none if its class folders are to be packed."""
    patterns = ("*.tar", "*.tar.gz", "*.tgz", "*.tar.zst")
    tars = [path for pattern in patterns for path in folder.glob(pattern) if not folders.hidden(path.name)]
    if take == "folders":
        return []
    if take == "tars" and not tars:
        raise UserError(f"{folder}: contains no shards ({', '.join(patterns)}): name another folder")
    if take is None and tars and (name := folders.first_with_images(folder)) is not None:
        raise UserError(
            f"{folder}: contains class folders ({name}) and tars ({min(tars).name}): set --take folders or "
            "--take tars to pack one of them, or move the other away"
        )
    return tars


def _names_of_shards(
    shards: ShardSet, given: Sequence[str] | None, *, named: bool
) -> tuple[list[str] | None, dict[int, int]]:
    """Class names of packed shards and, if names are `given`, how their labels change (old -> new).

    named: whether names beside the shards are those of their labels.
    """
    recorded = class_names.merged(class_names.beside(shards.paths), "source") if named else None
    used = np.unique(shards.labels)
    if given is None:
        return recorded and recorded.names, {}
    if recorded is None:
        for label in used[used >= len(given)][:1]:
            where = shards.where(int(np.flatnonzero(shards.labels == label)[0]))
            raise UserError(
                f"{where}: label {label} has no name among the {len(given)} of --classes: name all classes"
            )
        return list(given), {}
    relabel = {}
    for label in used[used >= 0].tolist():
        if label >= len(recorded.names):
            raise UserError(f"{recorded.where}: has no name for label {label} of its shards: pack them again")
        relabel[label] = label_in(given, recorded.names[label], recorded.where)
    return list(given), relabel


def _list_files(images: list[tuple[str, int]], classes: list[str] | None, ignored: int, seed: int) -> _Files:
    """Shuffle the images, given as (path, label) in an order that does not depend on the machine."""
    items = []
    for number, (path, label) in enumerate(images):
        # The number makes keys unique. A key contains no dot.
        items.append((f"{number:08d}_{Path(path).stem.replace('.', '_')}", path, label))
    items = [items[i] for i in np.random.RandomState(seed).permutation(len(items))]
    sizes = np.array([os.path.getsize(path) for _, path, _ in items], dtype=np.int64)
    identity = hashlib.sha256(sizes.tobytes())
    for key, _, label in items:
        identity.update(f"{key}\0{label}\0".encode("utf-8", "surrogateescape"))
    return _Files(identity.hexdigest(), items, sizes, classes, ignored)


def _read_folder(folder: Path, reading: Reading) -> tuple[list[tuple[str, int]], list[str] | None, int]:
    """The images (path, label) in class folders, the class names, and the number of other files.

    Images in a folder without folders, or with `unlabelled` in any, have the label -1. A link counts only if
    it names something below the folder, or with `follow_links`.
    """
    names = [] if reading.unlabelled else class_names.folders_in(folder)
    walk = folders.Walk(folder, reading.follow_links)
    classes: list[str] | None = None
    if names:
        classes = names if reading.classes is None else list(reading.classes)
        labels = {name: label_in(classes, name, str(folder)) for name in names}
        images = [(path, labels[name]) for name, paths in walk.classes(names).items() for path in paths]
    else:
        images = [(path, -1) for path in walk.below()]
    if not images:
        raise UserError(
            walk.links_out()
            or f"{folder}: contains neither shards nor class folders with images "
            f"({', '.join(IMAGE_EXTENSIONS)}): name another folder, or set --unlabelled if its folders are "
            "no classes"
        )
    if not names and reading.classes is not None:
        raise UserError(f"{folder}: is packed without labels: leave out --classes, or use class folders")
    if not names and not reading.unlabelled:
        folders.note(f"{folder}: has no class folders: its images are packed without labels")
    walk.print_notes()
    return images, classes, walk.ignored


def _pack_shard(task: tuple[Path, Callable[[], Iterator[_Read]], int | None, int]) -> list[str]:
    """Write a shard that is missing. Returns its images of types that have no extension in shards."""
    path, read, resize, quality = task
    return [] if path.exists() else _write_shard(path, _shrunk(read(), resize, quality))


def _shrunk(read: Iterable[_Read], resize: int | None, quality: int) -> Iterator[Sample]:
    """Reduce the shorter side of each image to `resize` pixels where it is longer, and make it upright."""
    for where, (key, image, extension, label) in read:
        if resize:
            try:
                pixels = Image.fromarray(decode(image, where))
            except BadImage as bad:
                raise UserError(f"{bad}: repair or remove it, then run the command again") from None
            scale = resize / min(pixels.size)
            if scale < 1:
                width, height = (max(1, round(side * scale)) for side in pixels.size)
                content = io.BytesIO()
                reduced = pixels.resize((width, height), Image.Resampling.LANCZOS)
                reduced.save(content, "JPEG", quality=quality)
                image, extension = content.getvalue(), "jpg"
        yield key, image, extension, label


def _shard_path(destination: Path, prefix: str, number: int) -> Path:
    return destination / f"{prefix}-{number:06d}.tar"


def _save_json(path: Path, content: dict) -> None:
    replace_text(path, json.dumps(content, indent=1))


def _write_shard(path: Path, samples: Iterable[Sample]) -> list[str]:
    """Write a shard and its index. Returns the names of its images that are GIF, BMP or TIFF."""
    others = []
    with replacing(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, extension, label in samples:
            if extension not in IMAGE_EXTENSIONS or "." in key.rpartition("/")[2]:
                raise UserError(
                    f"cannot pack '{key}.{extension}': use keys without a dot, images of {IMAGE_EXTENSIONS}"
                )
            if without_extension(image):
                others.append(f"{key}.{extension}")
            members = [(extension, image)]
            if label >= 0:
                members.append(("cls", str(label).encode()))
            for suffix, content in members:
                member = tarfile.TarInfo(f"{key}.{suffix}")  # with constant time, owner and mode
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    build_index(str(path))
    return others
