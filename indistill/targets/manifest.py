"""Targets computed once: what `indistill targets` writes (targets.py) and a run with `targets: cached` reads.

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
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ValidationError

from indistill import config
from indistill.config import Config, UserError
from indistill.config.files import replace_text
from indistill.data import class_names, remote
from indistill.data.class_names import Names
from indistill.prune import PairPlan, Plan
from indistill.targets.records import Field, wanted_format

VERSION = 1

# What of a config decides the targets. Weights count by their content.
_KEYS = (
    "seed",
    "data.num_classes",
    "data.image_size",
    "data.augment",
    "data.interpolation",
    "teacher",
    "targets.pool",
)
_KEYS += ("warmup.pairs", "warmup.adapter", "warmup.prune")
_NOT = ("teacher.checkpoint", "teacher.heads", "teacher.shard", "teacher.precision")


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


def decisive_config(settings: Config) -> dict[str, Any]:
    """Dotted key to value, of those that decide the targets."""
    flat = config.flatten(settings)
    kept = {key: value for key, value in flat.items() if f"{key}.".startswith(tuple(f"{k}." for k in _KEYS))}
    kept = {key: value for key, value in kept.items() if key not in _NOT}
    augment = settings.data.augment
    if augment.recipe == "pad_crop" and augment.rand_augment is None:
        del kept["data.interpolation"]  # nothing is resized
    return kept | {"teacher.precision": settings.teacher.precision or settings.mixed_precision}


def targets_root(settings: Config) -> str:
    return settings.targets.dir or os.path.join(settings.run_dir, "targets")


def records_path(root: str, view: int, field: str, shard: int) -> str:
    return f"{root}/view-{view:03d}/{field}/shard-{shard:05d}.bin"


def manifest_exists(root: str) -> bool:
    """Whether targets are stored there, if only in part; a URL is taken at its word."""
    return remote.is_remote(root) or os.path.isdir(root)


def load_manifest(root: str) -> Manifest:
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
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: str) -> Manifest:
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError:
        raise UserError(
            f"{path}: damaged, or of another version: make the targets anew in another targets.dir"
        ) from None
    if manifest.version != VERSION:
        raise UserError(
            f"{path}: of version {manifest.version}, this one reads {VERSION}: make the targets anew"
        )
    return manifest


def save_manifest(path: Path, manifest: Manifest) -> None:
    replace_text(path, manifest.model_dump_json(indent=1) + "\n")


def check_manifest(root: str, manifest: Manifest, settings: Config, hashes: dict[str, str | None]) -> None:
    """Raise UserError, naming what differs, unless the targets are this config's.

    hashes: SHA-256 of the file that the config names under a key (teacher.checkpoint, ...), None where it is not here.
    """
    again = "run `indistill targets CONFIG` again, in another targets.dir, or set targets: live"
    stored, ours = manifest.config, decisive_config(settings)
    for key in dict.fromkeys((*ours, *stored)):
        # A run without the warm-up may take the other targets.
        if stored.get(key) != ours.get(key) and (settings.warmup or not key.startswith("warmup")):
            raise UserError(
                f"{root}: made with {key}: {stored.get(key)}, this run has {ours.get(key)}: {again}"
            )
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
            raise UserError(
                f"{root}: made with {key}: {stored and stored.path}, this run has {path}: {again}"
            )
        if here != stored.sha256 if here else path != stored.path:
            told = f"(SHA-256 {stored.sha256[:12]}), this run has {path} ({here[:12] if here else 'which is not here'})"
            raise UserError(f"{root}: made with {key}: {stored.path} {told}: {again}")


def check_classes(root: str, manifest: Manifest, names: Names | None) -> None:
    """Raise UserError if the targets were made for other class names than those of data.train."""
    if names is not None and manifest.classes is not None:
        remedy = "make the targets again in another targets.dir, or set targets: live"
        class_names.refuse_difference(
            names, Names(f"{root}/manifest.json", manifest.classes), "data.train", remedy
        )
