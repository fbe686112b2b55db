"""Targets computed once: what `indistill targets` writes (precompute.py) and a run with `targets: cached` reads.

A directory holds `manifest.json` and, for each field, data shard and view of the data set, of those that the run reads,
a file of fixed-size records, `view-000/logits/shard-00012.bin`, one per sample in the order of the shard. A phase reads
the fields it needs, and a remote cache fetches no others. Fields are

    pair1, pair2, ...   maps of the warm-up's pairs, pruned
    stage2, ...         whole maps of teacher stages that KD reads
    embedding, logits, head1, head2, ...

A record ends with the CRC-32 of its other bytes. That of a sample that could not be decoded is all zeros, which is no
valid record; training never asks for it, since the loader puts another sample in its place.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from indistill import config
from indistill.config import Config, UserError
from indistill.data import class_names, remote
from indistill.data.class_names import Names
from indistill.prune import PairPlan, Plan

VERSION = 1
OPEN_FILES = 512  # memory maps per process, well under the usual limit of 65,530
_TINY = torch.finfo(torch.float32).tiny  # what a probability of 0 is taken for: a logarithm of -87
_TORCH = {"<f4": torch.float32, "<u2": torch.bfloat16, "|i1": torch.int8, "<i2": torch.int16, "<i4": torch.int32}

# What of a config decides the targets. Weights count by their content.
_KEYS = ("seed", "data.num_classes", "data.image_size", "data.augment", "data.interpolation", "teacher", "targets.pool")
_KEYS += ("warmup.pairs", "warmup.adapter", "warmup.prune")
_NOT = ("teacher.checkpoint", "teacher.heads", "teacher.shard", "teacher.precision")


# --- one field -------------------------------------------------------------------------------------------------------


class Field(BaseModel):
    """How the records of one field are made, from a tensor [B, *shape] of the teacher's and back."""

    format: Literal["float32", "bf16", "int8", "top_k"]
    shape: tuple[int, ...]  # of one sample
    dtype: str  # what the teacher gave: values that are stored exactly come back as that
    channels_last: bool  # likewise; sums over a map depend on it in their last bits
    top_k: int | None = None
    views: list[int] = []  # in which the config's run reads it, and in which it is stored

    @property
    def record(self) -> np.dtype:
        match self.format:
            case "float32":
                parts = [("values", "<f4", self.shape)]
            case "bf16":  # numpy has none
                parts = [("values", "<u2", self.shape)]
            case "int8":
                parts = [("values", "|i1", self.shape), ("scales", "<f4", self.shape[:1])]
            case "top_k":
                number = "<i2" if self.shape[0] <= 2**15 else "<i4"
                parts = [("probabilities", "<f4", (self.top_k,)), ("classes", number, (self.top_k,)), ("tail", "<f4")]
        return np.dtype([*parts, ("crc32", "<u4")])

    def encode(self, tensor: Tensor) -> np.ndarray:
        """[B, *shape] to B records."""
        records = np.empty(len(tensor), self.record)
        match self.format:
            case "float32":
                parts = {"values": tensor.float()}
            case "bf16":
                parts = {"values": tensor.to(torch.bfloat16).contiguous().view(torch.int16)}
            case "int8":
                values = tensor.float()
                scales = values.abs().amax(dim=(2, 3)) / 127  # [B, C]
                divisors = torch.where(scales > 0, scales, 1)[:, :, None, None]
                parts = {"values": (values / divisors).round().clamp(-127, 127).to(torch.int8), "scales": scales}
            case "top_k":
                probabilities = tensor.double().softmax(dim=1)  # [B, classes]
                largest, classes = probabilities.topk(self.top_k, dim=1)
                tail = probabilities.scatter(1, classes, 0.0).sum(dim=1)
                parts = {"probabilities": largest, "classes": classes, "tail": tail}
        for name, part in parts.items():
            records[name] = part.cpu().numpy() if self.format != "bf16" else part.cpu().numpy().view("<u2")
        records["crc32"] = _checksums(rows_of(records))
        return records

    def decode(self, records: Tensor) -> Tensor:
        """Records as uint8 [B, bytes of a record], on any device, to [B, *shape] there.

        Of the classes that `top_k` left out each gets the same share of the tail; the logits are log-probabilities.
        """
        parts = {}
        for name in self.record.names[:-1]:
            dtype, offset = self.record.fields[name]
            base = dtype.base.str
            # A copy, because a slice is not aligned.
            part = records[:, offset : offset + dtype.itemsize].clone(memory_format=torch.contiguous_format)
            parts[name] = part.view(_TORCH[base]).view(len(records), *dtype.shape)
        match self.format:
            case "float32":
                values = parts["values"].to(getattr(torch, self.dtype))
            case "bf16":
                values = parts["values"].float()
            case "int8":
                values = parts["values"].float() * parts["scales"][:, :, None, None]
            case "top_k":
                left_out = max(self.shape[0] - self.top_k, 1)
                values = (parts["tail"][:, None] / left_out).expand(-1, *self.shape)  # [B, classes]
                values = values.scatter(1, parts["classes"].long(), parts["probabilities"]).clamp_min(_TINY).log()
        return values.contiguous(memory_format=torch.channels_last) if self.channels_last else values

    def blank(self, samples: int, device: torch.device) -> Tensor:
        return torch.zeros(samples, *self.shape, dtype=getattr(torch, self.dtype), device=device)


def describe(name: str, tensor: Tensor, section: config.Targets) -> Field:
    """The field that stores such tensors [B, ...] as the config wants it."""
    kind, top_k = wanted_format(name, tensor.dim() == 4, section)
    channels_last = (
        tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
    )
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Field(format=kind, shape=tensor.shape[1:], dtype=dtype, channels_last=channels_last, top_k=top_k)


def wanted_format(name: str, is_map: bool, section: config.Targets) -> tuple[str, int | None]:
    """Format and top_k: what the config wants of a field. An embedding is small, and stays as it is."""
    if is_map:
        return section.features, None
    return ("float32", None) if name == "embedding" or section.top_k is None else ("top_k", section.top_k)


def rows_of(records: np.ndarray) -> np.ndarray:
    """Records [B] as uint8 [B, bytes of a record]."""
    return records.view(np.uint8).reshape(len(records), -1)


def _checksums(rows: np.ndarray) -> np.ndarray:
    return np.array([zlib.crc32(row[:-4]) for row in rows], dtype="<u4")


def intact(rows: np.ndarray) -> np.ndarray:
    """Which of the records, uint8 [B, bytes of a record], fit their checksums: bool [B]."""
    return _checksums(rows) == np.ascontiguousarray(rows[:, -4:]).view("<u4")[:, 0]


# --- what the directory is -------------------------------------------------------------------------------------------


class Weights(BaseModel):
    path: str
    sha256: str


class Teacher(BaseModel):
    """What has to be known of a teacher that is not here. For models/stages.py it is the network."""

    forward_intermediates: ClassVar[None] = None
    feature_info: list[dict[str, Any]]  # of its stages: module, num_chs, reduction
    head_hidden_size: int  # of its embedding
    fingerprint: str  # of its weights, and of its intermediate classifiers'
    files: dict[str, Weights]  # those that the config named, by its key


class Manifest(BaseModel):
    """`manifest.json`: what the targets were made from, and how they lie there."""

    version: int
    teacher: Teacher
    config: dict[str, Any]  # of the keys that decide the targets
    plan: dict[str, Any]
    data: str  # fingerprint of the shards
    classes: list[str] | None = None  # names of the labels, where packing kept them
    samples: list[int]  # per shard
    fields: dict[str, Field]
    batch: int  # images that the teacher saw at once, on which last bits depend

    @property
    def views(self) -> int:
        return self.config["data.augment.views"]

    def pruning(self) -> Plan:
        pairs = [PairPlan(**pair) for pair in self.plan["pairs"]]
        return Plan(self.plan["criterion"], self.plan["mode"], pairs, tuple(self.plan.get("importance", ())))

    def difference(self, other: Manifest) -> str | None:
        """The first thing in which they are of different targets, as `what: this -> other`."""
        mine, theirs = (_told(manifest) for manifest in (self, other))
        for key in dict.fromkeys((*mine, *theirs)):
            if mine.get(key) != theirs.get(key):
                return f"{key}: {mine.get(key)} -> {theirs.get(key)}"
        return None

    def fields_in(self, view: int) -> dict[str, Field]:
        return {name: field for name, field in self.fields.items() if view in field.views}

    @property
    def heads(self) -> int:
        """How many intermediate classifiers are stored."""
        return sum(name.startswith("head") for name in self.fields)

    def table(self) -> str:
        """Bytes of each field: of a record, and in all."""
        samples, lines, total = sum(self.samples), [], 0
        for name, field in self.fields.items():
            size = field.record.itemsize * samples * len(field.views)
            lines.append(
                f"{name:<10} {field.record.itemsize:>9,} B a sample {len(field.views):>4} views {size / 1e9:>10.3f} GB"
            )
            total += size
        return "\n".join([*lines, f"{samples:,} samples: {total / 1e9:.3f} GB"])


def _told(manifest: Manifest) -> dict[str, Any]:
    """What identifies the targets, by names that a message may show."""
    fields = {f"field {name}": field.model_dump(mode="json") for name, field in manifest.fields.items()}
    return {
        **manifest.config,
        "teacher weights": manifest.teacher.fingerprint,
        "plan": manifest.plan["hash"],
        "data.train": manifest.data,
        **fields,
    }


def decisive(settings: Config) -> dict[str, Any]:
    """Dotted key to value, of those that decide the targets."""
    flat = config.flatten(settings)
    kept = {key: value for key, value in flat.items() if f"{key}.".startswith(tuple(f"{k}." for k in _KEYS))}
    kept = {key: value for key, value in kept.items() if key not in _NOT}
    augment = settings.data.augment
    if augment.recipe == "pad_crop" and augment.rand_augment is None:
        del kept["data.interpolation"]  # nothing is resized
    return kept | {"teacher.precision": settings.teacher.precision or settings.mixed_precision}


def directory(settings: Config) -> str:
    return settings.targets.dir or os.path.join(settings.run_dir, "targets")


def place(root: str, view: int, field: str, shard: int) -> str:
    return f"{root}/view-{view:03d}/{field}/shard-{shard:05d}.bin"


def exists(root: str) -> bool:
    """Whether targets are stored there, if only in part; a URL is taken at its word."""
    return remote.is_remote(root) or os.path.isdir(root)


def load(root: str) -> Manifest:
    """Raises UserError for a directory that holds none, or whose job has not ended."""
    path = f"{root}/manifest.json"
    try:
        with remote.open_stream(path) as stream:
            text = stream.read()
    except Exception as error:  # every fsspec backend has exceptions of its own
        begun = " yet: it has begun" if os.path.exists(f"{root}/manifest.partial.json") else ""
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: no stored targets there{begun} ({reason}): run `indistill targets CONFIG`, or set targets: live"
        ) from None
    return parse(text, path)


def parse(text: bytes, path: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError:
        raise UserError(
            f"{path}: damaged, or of another version: make the targets anew in another targets.dir"
        ) from None
    if manifest.version != VERSION:
        raise UserError(f"{path}: of version {manifest.version}, this one reads {VERSION}: make the targets anew")
    return manifest


def save(path: Path, manifest: Manifest) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(manifest.model_dump_json(indent=1) + "\n")
    partial.replace(path)


def check(root: str, manifest: Manifest, settings: Config, hashes: dict[str, str | None]) -> None:
    """Raise UserError, naming what differs, unless the targets are this config's.

    hashes: SHA-256 of the file that the config names under a key (teacher.checkpoint, ...), None where it is not here.
    """
    again = "run `indistill targets CONFIG` again, in another targets.dir, or set targets: live"
    stored, ours = manifest.config, decisive(settings)
    for key in dict.fromkeys((*ours, *stored)):
        # A run without the warm-up may take the other targets.
        if stored.get(key) != ours.get(key) and (settings.warmup or not key.startswith("warmup")):
            raise UserError(f"{root}: made with {key}: {stored.get(key)}, this run has {ours.get(key)}: {again}")
    for name, field in manifest.fields.items():
        ours = wanted_format(name, len(field.shape) == 3, settings.targets)
        if (field.format, field.top_k) != ours:
            key = "targets.features" if len(field.shape) == 3 else "targets.top_k"
            told = (field.format, ours[0]) if len(field.shape) == 3 else (field.top_k, ours[1])
            raise UserError(f"{root}: made with {key}: {told[0]}, this run has {told[1]}: {again}")
    for key in dict.fromkeys((*hashes, *manifest.teacher.files)):
        stored, here = manifest.teacher.files.get(key), hashes.get(key)
        path = getattr(settings.teacher, key.removeprefix("teacher."))
        if stored is None or path is None:
            raise UserError(f"{root}: made with {key}: {stored and stored.path}, this run has {path}: {again}")
        if here != stored.sha256 if here else path != stored.path:
            told = f"(SHA-256 {stored.sha256[:12]}), this run has {path} ({here[:12] if here else 'which is not here'})"
            raise UserError(f"{root}: made with {key}: {stored.path} {told}: {again}")


def check_classes(root: str, manifest: Manifest, names: Names | None) -> None:
    """Raise UserError if the targets were made for other class names than those of data.train."""
    if names is not None and manifest.classes is not None:
        remedy = "make the targets again in another targets.dir, or set targets: live"
        class_names.refuse_difference(names, Names(f"{root}/manifest.json", manifest.classes), "data.train", remedy)


class Reader:
    """Records by view and sample. Safe after fork and through pickle: open files do not travel.

    Raises UserError for what is missing or damaged, naming the file.
    """

    def __init__(self, root: str, manifest: Manifest, cache_dir: str | None, cache_bytes: int) -> None:
        self.root, self.manifest = root, manifest
        self._cache = remote.cache_for([root], cache_dir, cache_bytes)
        self._first_ids = np.cumsum([0, *manifest.samples])  # [shards + 1]
        self._open: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def check(self, data: str, needed: dict[str, set[int]]) -> None:
        """Raise UserError unless these are targets of that data, with the fields in the views that are needed."""
        again = "run `indistill targets CONFIG` again, in another targets.dir, or set targets: live"
        if data != self.manifest.data:
            told = f"{self.manifest.data[:12]}, data.train has now {data[:12]}"
            raise UserError(f"{self.root}: made from other shards (fingerprint {told}): {again}")
        for name, views in needed.items():
            if name not in self.manifest.fields:
                stored = ", ".join(self.manifest.fields)
                raise UserError(f"{self.root}: holds {stored}, and not {name}, which this run reads: {again}")
            if missing := views - set(self.manifest.fields[name].views):
                raise UserError(f"{self.root}: lacks {name} in view {min(missing)}, made for other durations: {again}")

    @property
    def remote(self) -> bool:
        return self._cache is not None

    def read(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        """Records of samples int64 [B]: uint8 [B, bytes of a record] per field."""
        found = {}
        for field in fields:
            rows = self.rows(view, ids, field)
            for bad in np.flatnonzero(~intact(rows))[:1]:
                shard = self._shards_of(ids[bad])
                path, record = place(self.root, view, field, shard), ids[bad] - self._first_ids[shard]
                raise UserError(
                    f"{path}: record {record} is damaged, or its image could not be decoded when the targets were "
                    "made, and can be now: delete the file and run `indistill targets CONFIG` again"
                )
            found[field] = torch.from_numpy(rows)
        return found

    def rows(self, view: int, ids: np.ndarray, field: str) -> np.ndarray:
        """As `read` of one field, unchecked."""
        rows = np.empty((len(ids), self.manifest.fields[field].record.itemsize), dtype=np.uint8)
        shards = self._shards_of(ids)
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._map(view, field, int(shard))[ids[here] - self._first_ids[shard]]
        return rows

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        """Fetch the remote files that hold these records in the background."""
        files = [(field, int(shard)) for shard in np.unique(self._shards_of(ids)) for field in fields]
        self._cache.prefetch((place(self.root, view, *file), self._size(*file)) for file in files)

    def _shards_of(self, ids: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_ids, ids, side="right") - 1

    def _size(self, field: str, shard: int) -> int:
        return self.manifest.samples[shard] * self.manifest.fields[field].record.itemsize

    def _map(self, view: int, field: str, shard: int) -> np.ndarray:
        """A file's records, uint8 [N, bytes of a record], mapped into memory."""
        path, size = place(self.root, view, field, shard), self._size(field, shard)
        if path in self._open:
            return self._open[path]
        shape = (self.manifest.samples[shard], self.manifest.fields[field].record.itemsize)
        if self._cache:  # opened for every read: an open file that the cache evicts would go on using the disk
            with self._cache.open(path, size) as file:
                return np.memmap(file, np.uint8, "r", shape=shape)
        try:
            if (found := os.stat(path).st_size) != size:
                raise UserError(f"{path}: {found} bytes, not {size}: run `indistill targets CONFIG` again")
            records = np.memmap(path, np.uint8, "r", shape=shape)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: run `indistill targets CONFIG` again") from None
        if len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        self._open[path] = records
        return records
