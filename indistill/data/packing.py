"""Packing: an image folder, a CSV or other shards into shards, in parallel, the same bytes every time."""

import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from indistill.config import UserError
from indistill.config.files import replace_text, replacing
from indistill.data import class_names
from indistill.data.decode import BadImage, decode
from indistill.data.index import BLOCK, IMAGE_EXTENSIONS, build_index, load_index
from indistill.data.shards import ShardSet
from indistill.data.verify import parallel

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
OVERHEAD_BYTES = (
    3 * BLOCK + BLOCK // 2
)  # of a sample: two headers, the label's block, half a block of padding


def pack(
    samples: Iterable[tuple[str, bytes, str, int]],
    destination: str | Path,
    prefix: str,
    samples_per_shard: int,
) -> list[Path]:
    """Write (key, encoded image, extension, label) samples as `<prefix>-000000.tar`, ... with their indices.

    The same samples give the same bytes. A label of -1 writes no .cls. Returns the shards' paths.
    """
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}: it must be at least 1")
    paths, samples = [], iter(samples)
    while pending := list(itertools.islice(samples, samples_per_shard)):
        paths.append(_shard_path(destination, prefix, len(paths)))
        _write_shard(paths[-1], pending)
    left_over = _shard_path(destination, prefix, len(paths))
    if left_over.exists():
        raise UserError(
            f"{left_over}: left from an earlier packing of more shards: delete what is no longer wanted"
        )
    return paths


def pack_source(
    source: str | Sequence[str],
    destination: str | Path,
    prefix: str = "shard",
    shard_bytes: int = 100_000_000,
    resize: int | None = None,
    quality: int = 90,
    seed: int = 0,
    workers: int = 1,
    cache_dir: str | None = None,
    progress: bool = False,
    classes: Sequence[str] | None = None,
) -> dict:
    """Pack a data set into shards of about `shard_bytes` with their indices and a `dataset.json`, which is returned.

    source: a folder with one sub-folder per class (labels are their places in the order of `classes.in_order`), a CSV
        of path,label (paths relative to it; labels are numbers or, if any is not, names in sorted order), or shards: a
        folder of them or patterns as `ShardSet` takes them. Images from files are shuffled once by `seed`, so that
        every shard mixes classes; shards keep their order.
    classes: class names in the order of their labels, for a source that may lack some of them: a second split then has
        the labels of the first. Labels that are numbers without names stay, and must be places in this list.
    resize: pixels that a longer shorter side is reduced to, as JPEG of `quality`. All other images stay as they are.

    The same source and options give the same bytes whatever the number of workers. A packing that was interrupted goes
    on where it ended: finished shards are kept.
    Raises UserError for images that cannot be read and for a destination that holds another packing, naming them.
    """
    if shard_bytes < 1 or (resize is not None and resize < 1):
        raise UserError(f"shard_bytes ({shard_bytes}) and resize ({resize}) must be at least 1")
    origin = _find_source(source, seed, cache_dir, classes)
    sizes, scale = origin.sizes, 1.0
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    record = destination / class_names.RECORD
    wanted = (origin.identity, prefix, shard_bytes, resize, quality)
    wanted += () if classes is None else (tuple(classes),)
    plan = hashlib.sha256(repr(wanted).encode()).hexdigest()
    if record.exists():
        if json.loads(record.read_text()).get("plan") != plan:
            raise UserError(
                f"{destination}: holds another packing (see {record.name}): choose an empty directory"
            )
    elif stray := next(destination.glob("*.tar*"), None):
        raise UserError(f"{stray}: not of this packing: choose an empty directory")
    _save_json(record, {"plan": plan, "complete": False})
    for part in destination.glob("*.part"):  # of a packing that was killed
        part.unlink()

    if resize:  # how much smaller images become, from the first ones
        tried = min(len(sizes), 64)
        shrunk = _shrunk(origin.part(0, tried)(), resize, quality)
        scale = sum(len(image) for _, image, _, _ in shrunk) / max(sizes[:tried].sum(), 1)
    sizes = (sizes * scale).astype(np.int64) + OVERHEAD_BYTES
    shards = max(1, round(sizes.sum() / shard_bytes))
    # Image i goes where its first byte lies in a row of equal shards; one larger than a shard leaves none empty.
    of_shard = (np.cumsum(sizes) - sizes) * shards // sizes.sum()
    cuts = [0, *(np.flatnonzero(np.diff(of_shard)) + 1).tolist(), len(sizes)]
    paths = [_shard_path(destination, prefix, number) for number in range(len(cuts) - 1)]
    tasks = [(path, origin.part(*cut), resize, quality) for path, cut in zip(paths, itertools.pairwise(cuts))]
    for _ in parallel(_pack_shard, tasks, workers, progress):
        pass

    indices = [load_index(str(path)) for path in paths]
    labels = np.concatenate([index.labels for index in indices])
    image_bytes = np.concatenate([index.sizes for index in indices])
    summary = {
        "plan": plan,
        "complete": True,
        "shards": len(paths),
        "urls": f"{prefix}-{{{0:06d}..{len(paths) - 1:06d}}}.tar",
        "samples": len(labels),
        "mean_bytes": round(float(image_bytes.mean()), 1),
        "unlabelled": int((labels < 0).sum()),
        "class_counts": np.bincount(labels[labels >= 0], minlength=len(origin.classes or [])).tolist(),
        "classes": origin.classes,
        "ignored_files": origin.ignored,
    }
    _save_json(record, summary)
    return summary


class _Files(NamedTuple):
    """Images that are files."""

    identity: str
    items: list[tuple[str, str, int]]  # key, path, label
    sizes: np.ndarray  # int64 [items], bytes
    classes: list[str] | None
    ignored: int  # files that are no images

    def part(self, begin: int, end: int) -> Callable[[], Iterator[tuple]]:
        return functools.partial(_read_files, self.items[begin:end])


class _Shards(NamedTuple):
    """Images that are in shards."""

    identity: str
    shards: ShardSet
    sizes: np.ndarray
    classes: list[str] | None
    numbered: bool  # keys repeat, as they may in different shards, so they are made unique
    relabel: dict[int, int]  # old label to new; empty if they stay
    ignored: int = 0

    def part(self, begin: int, end: int) -> Callable[[], Iterator[tuple]]:
        return functools.partial(
            _read_shards, self.shards._slice(begin, end), begin, end, self.numbered, self.relabel
        )


def _read_files(items: list[tuple[str, str, int]]) -> Iterator[tuple[str, bytes, str, int]]:
    for key, path, label in items:
        yield key, Path(path).read_bytes(), _extension(path), label


def _read_shards(
    shards: ShardSet, begin: int, end: int, numbered: bool, relabel: dict[int, int]
) -> Iterator[tuple[str, bytes, str, int]]:
    extensions = {b"\x89PNG": "png", b"RIFF": "webp"}  # what the content begins with
    for number, (key, image, label) in enumerate(shards.iterate(begin, end), begin):
        key = f"{key}_{number:08d}" if numbered else key
        yield key, image, extensions.get(image[:4], "jpg"), relabel.get(label, label)


def _find_source(
    source: str | Sequence[str], seed: int, cache_dir: str | None, given: Sequence[str] | None
) -> _Files | _Shards:
    if isinstance(source, str) and source.lower().endswith(".csv"):
        return _list_files(*_read_csv(Path(source), given), seed)
    if isinstance(source, str) and os.path.isdir(source):
        folder = Path(source)
        found = [path for pattern in ("*.tar", "*.tar.gz", "*.tgz") for path in folder.glob(pattern)]
        if not found:
            return _list_files(*_read_folder(folder, given), seed)
        source = sorted(map(str, found))
    shards = ShardSet(source, cache_dir=cache_dir)
    keys = np.concatenate([index.keys for index in shards._indices])
    names, relabel = _names_of_shards(shards, given)
    return _Shards(
        shards.fingerprint, shards, shards.image_sizes, names, len(np.unique(keys)) < len(keys), relabel
    )


def _names_of_shards(
    shards: ShardSet, given: Sequence[str] | None
) -> tuple[list[str] | None, dict[int, int]]:
    """Class names of packed shards, and how their labels change (old to new) where the names are `given`."""
    found = class_names.merged(class_names.beside(shards.paths), "source")
    used = np.unique(shards.labels)
    if given is None:
        return found and found.names, {}
    if found is None:
        for label in used[used >= len(given)][:1]:
            where = shards.where(int(np.flatnonzero(shards.labels == label)[0]))
            raise UserError(
                f"{where}: label {label} is beyond the {len(given)} names of --classes: name all classes"
            )
        return list(given), {}
    relabel = {}
    for label in used[used >= 0].tolist():
        if label >= len(found.names):
            raise UserError(f"{found.where}: has no name for label {label} of its shards: pack them anew")
        relabel[label] = _label_in(given, found.names[label], found.where)
    return list(given), relabel


def _label_in(given: Sequence[str], name: str, where: str) -> int:
    try:
        return given.index(name)
    except ValueError:
        listed = class_names.shown(given)
        raise UserError(
            f"{where}: class {name!r} is not in --classes ({listed}): add it, or leave it out"
        ) from None


def _list_files(found: list[tuple[str, int]], classes: list[str] | None, ignored: int, seed: int) -> _Files:
    """found: (path, label) in an order that does not depend on the machine."""
    items = []
    for number, (path, label) in enumerate(found):
        # The number makes keys unique; a key has no dot.
        items.append((f"{number:08d}_{Path(path).stem.replace('.', '_')}", path, label))
    items = [items[i] for i in np.random.RandomState(seed).permutation(len(items))]
    sizes = np.array([os.path.getsize(path) for _, path, _ in items], dtype=np.int64)
    identity = hashlib.sha256(sizes.tobytes())
    for key, _, label in items:
        identity.update(f"{key}\0{label}\0".encode("utf-8", "surrogateescape"))
    return _Files(identity.hexdigest(), items, sizes, classes, ignored)


def _read_folder(folder: Path, given: Sequence[str] | None) -> tuple[list[tuple[str, int]], list[str], int]:
    here = class_names.folders_in(folder)
    classes = here if given is None else list(given)
    labels = {name: _label_in(classes, name, str(folder)) for name in here}
    files = [(path, labels[name]) for name in here for path in sorted((folder / name).rglob("*"))]
    files = [(str(path), label) for path, label in files if path.is_file()]
    images = [(path, label) for path, label in files if _extension(path) in IMAGE_EXTENSIONS]
    if not images:
        raise UserError(
            f"{folder}: neither shards nor class folders with images ({', '.join(IMAGE_EXTENSIONS)}) in it"
        )
    return images, classes, len(files) - len(images)


def _read_csv(file: Path, given: Sequence[str] | None) -> tuple[list[tuple[str, int]], list[str] | None, int]:
    found, names, lines = [], [], []
    try:
        with open(file, newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            for row in reader:
                if [cell.strip().lower() for cell in row] in ([], ["path", "label"]):
                    continue
                line = f"{file}: line {reader.line_num}"
                if len(row) != 2:
                    raise UserError(f"{line}: holds {len(row)} columns instead of path,label")
                path = file.parent / row[0].strip()
                if not path.is_file() or _extension(str(path)) not in IMAGE_EXTENSIONS:
                    raise UserError(f"{line}: {path} is not an image file ({', '.join(IMAGE_EXTENSIONS)})")
                if not row[1].strip():
                    raise UserError(f"{line}: has no label: add it, or remove the line")
                found.append(str(path))
                names.append(row[1].strip())
                lines.append(line)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    if not found:
        raise UserError(f"{file}: holds no path,label rows")
    _refuse_several_labels(found, names, lines, set(given or ()))
    labels, classes = _number(names, lines, given)
    return [(path, labels[name]) for path, name in zip(found, names)], classes, 0


def _number(
    names: Sequence[str], lines: Sequence[str], given: Sequence[str] | None
) -> tuple[dict[str, int], list[str] | None]:
    """The label of each name in a CSV, and the class names in the order of the labels (None: labels are numbers)."""
    numbers = all(name.isascii() and name.isdigit() for name in names)
    if given is None and not numbers and all(map(_NUMBER.fullmatch, names)):
        name, line = next((name, line) for name, line in zip(names, lines) if not name.isdigit())
        raise UserError(
            f"{line}: label {name!r} is not a whole number from 0 on, as labels that are numbers have to be"
        )
    if given is None and numbers:
        return {name: int(name) for name in names}, None
    classes = sorted(set(names)) if given is None else list(given)
    labels = {name: label for label, name in enumerate(classes)}
    if numbers and not labels.keys() >= set(names):  # places in the list, not names of it
        labels = {name: int(name) for name in names if int(name) < len(classes)}
    for name, line in zip(names, lines):
        if name not in labels:
            listed = class_names.shown(classes)
            raise UserError(
                f"{line}: class {name!r} is not in --classes ({listed}): add it, or remove the line"
            )
    return labels, classes


def _refuse_several_labels(
    paths: Sequence[str], names: Sequence[str], lines: Sequence[str], known: set[str]
) -> None:
    """Raise UserError, naming the line, if an image in a CSV seems to have more than one label.

    `known` names are single classes, whatever they look like.
    """
    parts = {name: [name] if name in known else _parts(name) for name in set(names)}
    seen = Counter(
        part for of_name in parts.values() for part in set(of_name)
    )  # in how many labels each occurs
    first: dict[str, int] = {}
    for row, (path, name, line) in enumerate(zip(paths, names, lines)):
        several = len(parts[name]) > 1 and (
            any(mark in name for mark in ";|")
            or name[0] + name[-1] in ("[]", "()", "{}")
            # A comma may be part of a name, such as "tank, army tank", of which not all parts occur elsewhere.
            or all(part.isdigit() or seen[part] > 1 for part in parts[name])
        )
        if several:
            raise UserError(
                f"{line}: {name!r} looks like several labels, and an image has one: keep one; if it is the name of one "
                "class, list it in a file for --classes"
            )
        earlier = first.setdefault(path, row)
        if names[earlier] != name:
            raise UserError(
                f"{line}: {path} has the label {name!r} here and {names[earlier]!r} above ({lines[earlier]}): an image "
                "has one label: keep one of the lines"
            )


def _parts(name: str) -> list[str]:
    """What a label would consist of if it were a list: the text between separators, or numbers between spaces."""
    inner = name[1:-1] if name[:1] + name[-1:] in ("[]", "()", "{}") else name
    parts = [part.strip(" '\"") for part in re.split(r"[;|,]", inner)]
    if len(parts) == 1 and re.fullmatch(r"\d+(\s+\d+)+", inner.strip()):
        parts = inner.split()
    return [part for part in parts if part]


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _pack_shard(task: tuple[Path, Callable[[], Iterator[tuple]], int | None, int]) -> None:
    path, read, resize, quality = task
    if not path.exists():
        _write_shard(path, _shrunk(read(), resize, quality))


def _shrunk(
    samples: Iterable[tuple[str, bytes, str, int]], resize: int | None, quality: int
) -> Iterator[tuple]:
    """The samples with their shorter side reduced to `resize` pixels where it is longer, upright."""
    for key, image, extension, label in samples:
        if resize:
            try:
                pixels = Image.fromarray(decode(image, f"image '{key}'"))
            except BadImage as bad:
                raise UserError(f"{bad}: mend or remove it, then go on") from None
            scale = resize / min(pixels.size)
            if scale < 1:
                width, height = (max(1, round(side * scale)) for side in pixels.size)
                content = io.BytesIO()
                pixels.resize((width, height), Image.Resampling.LANCZOS).save(
                    content, "JPEG", quality=quality
                )
                image, extension = content.getvalue(), "jpg"
        yield key, image, extension, label


def _shard_path(destination: Path, prefix: str, number: int) -> Path:
    return destination / f"{prefix}-{number:06d}.tar"


def _save_json(path: Path, content: dict) -> None:
    replace_text(path, json.dumps(content, indent=1))


def _write_shard(path: Path, samples: Iterable[tuple[str, bytes, str, int]]) -> None:
    with replacing(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, extension, label in samples:
            if extension not in IMAGE_EXTENSIONS or "." in key.rpartition("/")[2]:
                raise UserError(
                    f"cannot pack '{key}.{extension}': keys have no dot, images are {IMAGE_EXTENSIONS}"
                )
            for suffix, content in ((extension, image), ("cls", str(label).encode() if label >= 0 else None)):
                if content is not None:
                    member = tarfile.TarInfo(
                        f"{key}.{suffix}"
                    )  # time, owner and mode of a fresh TarInfo are constants
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    build_index(str(path))
