"""Packing: an image folder, a CSV or other shards into shards, in parallel, the same bytes every time."""

import csv
import functools
import hashlib
import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from indistill.config import UserError
from indistill.decode import BadImage, decode
from indistill.shards import (
    BLOCK,
    IMAGE_EXTENSIONS,
    ShardSet,
    build_index,
    load_index,
    parallel,
    replacing,
)

OVERHEAD_BYTES = 3 * BLOCK + BLOCK // 2  # of a sample: two headers, the label's block, half a block of padding


def pack(
    samples: Iterable[tuple[str, bytes, str, int]], destination: str | Path, prefix: str, samples_per_shard: int
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
        raise UserError(f"{left_over}: left from an earlier packing of more shards: delete what is no longer wanted")
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
) -> dict:
    """Pack a data set into shards of about `shard_bytes` with their indices and a `dataset.json`, which is returned.

    source: a folder with one sub-folder per class (labels are their places in sorted order), a CSV of path,label (paths
        relative to it; labels are numbers or, if any is not, names that are numbered in sorted order), or shards: a
        folder of them or patterns as `ShardSet` takes them. Images from files are shuffled once by `seed`, so that
        every shard mixes classes; shards keep their order.
    resize: pixels that a longer shorter side is reduced to, as JPEG of `quality`. All other images stay as they are.

    The same source and options give the same bytes whatever the number of workers. A packing that was interrupted goes
    on where it ended: finished shards are kept.
    Raises UserError for images that cannot be read and for a destination that holds another packing, naming them.
    """
    if shard_bytes < 1 or (resize is not None and resize < 1):
        raise UserError(f"shard_bytes ({shard_bytes}) and resize ({resize}) must be at least 1")
    origin = _find_source(source, seed, cache_dir)
    sizes, scale = origin.sizes, 1.0
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    record = destination / "dataset.json"
    plan = hashlib.sha256(repr((origin.identity, prefix, shard_bytes, resize, quality)).encode()).hexdigest()
    if record.exists():
        if json.loads(record.read_text()).get("plan") != plan:
            raise UserError(f"{destination}: holds another packing (see {record.name}): choose an empty directory")
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
    ignored: int = 0

    def part(self, begin: int, end: int) -> Callable[[], Iterator[tuple]]:
        return functools.partial(_read_shards, self.shards._slice(begin, end), begin, end, self.numbered)


def _read_files(items: list[tuple[str, str, int]]) -> Iterator[tuple[str, bytes, str, int]]:
    for key, path, label in items:
        yield key, Path(path).read_bytes(), _extension(path), label


def _read_shards(shards: ShardSet, begin: int, end: int, numbered: bool) -> Iterator[tuple[str, bytes, str, int]]:
    extensions = {b"\x89PNG": "png", b"RIFF": "webp"}  # what the content begins with
    for number, (key, image, label) in enumerate(shards.iterate(begin, end), begin):
        yield f"{key}_{number:08d}" if numbered else key, image, extensions.get(image[:4], "jpg"), label


def _find_source(source: str | Sequence[str], seed: int, cache_dir: str | None) -> _Files | _Shards:
    if isinstance(source, str) and source.lower().endswith(".csv"):
        return _list_files(*_read_csv(Path(source)), seed)
    if isinstance(source, str) and os.path.isdir(source):
        folder = Path(source)
        found = [path for pattern in ("*.tar", "*.tar.gz", "*.tgz") for path in folder.glob(pattern)]
        if not found:
            return _list_files(*_read_folder(folder), seed)
        source = sorted(map(str, found))
    shards = ShardSet(source, cache_dir=cache_dir)
    keys = np.concatenate([index.keys for index in shards._indices])
    sizes = np.concatenate([index.sizes for index in shards._indices])
    record = Path(shards.paths[0]).parent / "dataset.json"
    classes = json.loads(record.read_text()).get("classes") if record.exists() else None
    return _Shards(shards.fingerprint, shards, sizes, classes, len(np.unique(keys)) < len(keys))


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


def _read_folder(folder: Path) -> tuple[list[tuple[str, int]], list[str], int]:
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    files = [(path, label) for label, name in enumerate(classes) for path in sorted((folder / name).rglob("*"))]
    files = [(str(path), label) for path, label in files if path.is_file()]
    images = [(path, label) for path, label in files if _extension(path) in IMAGE_EXTENSIONS]
    if not images:
        raise UserError(f"{folder}: neither shards nor class folders with images ({', '.join(IMAGE_EXTENSIONS)}) in it")
    return images, classes, len(files) - len(images)


def _read_csv(file: Path) -> tuple[list[tuple[str, int]], list[str] | None, int]:
    found, names = [], []
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
                found.append(str(path))
                names.append(row[1].strip())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    if not found:
        raise UserError(f"{file}: holds no path,label rows")
    if all(name.isascii() and name.isdigit() for name in names):
        return list(zip(found, map(int, names))), None, 0
    classes = sorted(set(names))
    labels = {name: label for label, name in enumerate(classes)}
    return [(path, labels[name]) for path, name in zip(found, names)], classes, 0


def _extension(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def _pack_shard(task: tuple[Path, Callable[[], Iterator[tuple]], int | None, int]) -> None:
    path, read, resize, quality = task
    if not path.exists():
        _write_shard(path, _shrunk(read(), resize, quality))


def _shrunk(samples: Iterable[tuple[str, bytes, str, int]], resize: int | None, quality: int) -> Iterator[tuple]:
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
                pixels.resize((width, height), Image.Resampling.LANCZOS).save(content, "JPEG", quality=quality)
                image, extension = content.getvalue(), "jpg"
        yield key, image, extension, label


def _shard_path(destination: Path, prefix: str, number: int) -> Path:
    return destination / f"{prefix}-{number:06d}.tar"


def _save_json(path: Path, content: dict) -> None:
    with replacing(path) as stream:
        stream.write(json.dumps(content, indent=1).encode())


def _write_shard(path: Path, samples: Iterable[tuple[str, bytes, str, int]]) -> None:
    with replacing(path) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, extension, label in samples:
            if extension not in IMAGE_EXTENSIONS or "." in key.rpartition("/")[2]:
                raise UserError(f"cannot pack '{key}.{extension}': keys have no dot, images are {IMAGE_EXTENSIONS}")
            for suffix, content in ((extension, image), ("cls", str(label).encode() if label >= 0 else None)):
                if content is not None:
                    member = tarfile.TarInfo(f"{key}.{suffix}")  # time, owner and mode of a fresh TarInfo are constants
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    build_index(str(path))
