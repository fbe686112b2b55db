"""Stored targets: the format that `indistill targets` writes and `targets: cached` reads.

A directory contains `manifest.json` and, for each field, data shard and view that the run reads, a file of
fixed-size records, `view-000/logits/shard-00012.bin`, one per sample in the order of the shard. A phase reads
only the fields that it needs, and a remote cache fetches no others. Fields are

    pair1, pair2, ...   pruned maps of the warm-up's pairs
    stage2, ...         unpruned maps of teacher stages that KD reads
    tokens              the last patch tokens, on their grid
    embedding, logits, head1, head2, ...

With progressive resolution they are of one size of the images each: logits-128px, logits-160px, ...

A record ends with the CRC-32 of its other bytes. The record of a sample that could not be decoded is all
zeros, which is never a valid record; training does not read it, since the loader replaces the sample by
another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError, model_validator
from pydantic import Field as Bounds
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from indistill import config
from indistill.config import Config, UserError, in_one_line, records
from indistill.config.files import read_bytes, replace_text
from indistill.config.limits import MAX_MANIFEST_BYTES, MAX_STAGES, MAX_TEACHER_BATCH, MAX_VIEWS
from indistill.config.records import Count, PlanRecord, Width
from indistill.config.run_dir import RunDir
from indistill.data import class_names, remote
from indistill.data.class_names import Names
from indistill.prune import Plan
from indistill.targets.records import Field, bare, wanted_format

VERSION = 1
_FIELD = r"^(embedding|logits|tokens|(pair|stage|head)\d{1,4})(-\d{1,5}px)?\z"
FieldName = Annotated[str, Bounds(pattern=_FIELD)]  # of a folder

# The end of every error message about stored targets that have to be computed again.
AGAIN = "run `indistill targets CONFIG` again"
REMEDY = f"{AGAIN}, in another targets.dir, or set targets: live"

# Keys, and sections, of the config that decide the targets.
_KEYS = (
    "seed",
    "data.num_classes",
    "data.image_size",
    "data.augment",
    "data.interpolation",
    "teacher",
    "targets.pool",
    "warmup.pairs",
    "warmup.adapter",
    "warmup.prune",
)
# Keys of these sections that do not: weights are compared by content, precision by its effective value.
_EXCLUDED = ("teacher.checkpoint", "teacher.heads", "teacher.shard", "teacher.precision")


# --- the manifest -------------------------------------------------------------------------------------------
class Weights(BaseModel):
    """A file of weights."""

    path: str
    sha256: str


class StageInfo(TypedDict):
    """A stage of a teacher, by the keys of timm's `feature_info`."""

    module: str
    num_chs: Width
    reduction: PositiveFloat | PositiveInt


class Teacher(BaseModel):
    """Facts about a teacher that is not loaded; stands in for the network where only its stages matter."""

    forward_intermediates: ClassVar[None] = None  # models/stages.py requires the name
    feature_info: Annotated[list[StageInfo], Bounds(max_length=MAX_STAGES)]
    head_hidden_size: Width  # of its embedding
    fingerprint: str  # of its weights, and of its intermediate classifiers'
    files: dict[str, Weights]  # that the config named, by its key


class Manifest(BaseModel):
    """`manifest.json`: the origin of the targets, and the layout of their files."""

    version: int
    teacher: Teacher
    config: dict[str, Any]  # values that decide the targets, by dotted key
    plan: PlanRecord
    data: str  # fingerprint of the shards
    classes: list[str] | None = None  # names of the labels, if the packed shards have them
    samples: list[Count]  # per shard
    fields: dict[FieldName, Field]
    # Images in a batch of the teacher, on which last bits depend.
    batch: Annotated[int, Bounds(ge=1, le=MAX_TEACHER_BATCH)]

    @model_validator(mode="after")
    def _fits(self) -> Manifest:
        """Check that the parts agree with each other, in particular the channels of each field."""
        if self.version != VERSION:
            return self  # `parse_manifest` refuses it by its version
        views = self.config.get("data.augment.views")
        if not isinstance(views, int) or not 0 < views <= MAX_VIEWS:
            raise ValueError(f"config: data.augment.views is {views}")
        plan = self.pruning()
        of_stage = {f"stage{i}": stage["num_chs"] for i, stage in enumerate(self.teacher.feature_info)}
        widths = of_stage | {"embedding": self.teacher.head_hidden_size}
        for name, field in self.fields.items():
            if bare(name) == "tokens":
                widths.setdefault("tokens", field.shape[0])  # which nothing else records
        for i, pair in enumerate(plan.pairs, start=1):
            widths[f"pair{i}"] = pair.teacher_width if pair.kept is None else len(pair.kept)
        classes = self.config.get("data.num_classes")
        for name, field in self.fields.items():
            is_map = name.startswith(("pair", "stage", "tokens"))
            width = widths.get(bare(name)) if is_map or bare(name) == "embedding" else classes
            if field.shape[0] != width or (len(field.shape) == 3) != is_map:
                raise ValueError(f"fields: {name} has shape {field.shape}, not {width} channels")
            if any(view >= views for view in field.views):
                raise ValueError(f"fields: {name} is in view {max(field.views)} of {views}")
        return self

    @property
    def views(self) -> int:
        return self.config["data.augment.views"]

    def pruning(self) -> Plan:
        """The pruning plan of the targets."""
        return Plan.of_record(self.plan)

    def difference(self, other: Manifest) -> str | None:
        """The first difference, as `name: this -> other`; None if both describe the same targets."""
        this = _identity(self)
        that = _identity(other)
        for name in dict.fromkeys((*this, *that)):
            if this.get(name) != that.get(name):
                return f"{name}: {this.get(name)} -> {that.get(name)}"
        return None

    def fields_in(self, view: int) -> dict[str, Field]:
        """The fields that are stored in a view, by name."""
        return {name: field for name, field in self.fields.items() if view in field.views}

    @property
    def heads(self) -> int:
        """The number of intermediate classifiers whose logits are stored."""
        return len({bare(name) for name in self.fields if name.startswith("head")})

    def table(self) -> str:
        """The bytes of each field, per record and in total, as text."""
        samples = sum(self.samples)
        lines: list[str] = []
        total = 0
        for name, field in self.fields.items():
            record = field.record.itemsize
            views = len(field.views)
            size = record * samples * views
            lines.append(f"{name:<10} {record:>9,} B a sample {views:>4} views {size / 1e9:>10.3f} GB")
            total += size
        return "\n".join([*lines, f"{samples:,} samples: {total / 1e9:.3f} GB"])


def _identity(manifest: Manifest) -> dict[str, Any]:
    """The identity of the targets, keyed by names suitable for error messages."""
    fields = {f"field {name}": field.model_dump(mode="json") for name, field in manifest.fields.items()}
    return {
        **manifest.config,
        "teacher weights": manifest.teacher.fingerprint,
        "plan": manifest.plan.hash,
        "data.train": manifest.data,
        **fields,
    }


def decisive_config(settings: Config) -> dict[str, Any]:
    """The config values that determine the targets, by dotted key."""
    assert settings.teacher is not None  # a config with stored targets has one
    prefixes = tuple(f"{key}." for key in _KEYS)
    values = {
        key: value
        for key, value in config.flatten(settings).items()
        if f"{key}.".startswith(prefixes) and key not in _EXCLUDED
    }
    if settings.kd.mixing:  # the order decides which images are mixed with each other
        flat = config.flatten(settings)
        values |= {key: value for key, value in flat.items() if key.startswith("kd.mix.")}
        data = settings.data
        values |= {"data.streams": data.streams, "data.window": data.window, "data.repeats": data.repeats}
    if not settings.data.augment.resizes:
        del values["data.interpolation"]
    return values | {"teacher.precision": settings.teacher.precision or settings.mixed_precision}


# --- its files ----------------------------------------------------------------------------------------------
def targets_root(settings: Config) -> str:
    """The directory or URL of a run's stored targets."""
    return settings.targets.dir or str(RunDir.of(settings).targets)


def records_path(root: str, view: int, field: str, shard: int) -> str:
    """The file with the records of one field, view and data shard."""
    return f"{root}/view-{view:03d}/{field}/shard-{shard:05d}.bin"


def manifest_exists(root: str) -> bool:
    """Whether targets are stored there, completely or in part; a URL is not checked."""
    return remote.is_remote(root) or os.path.isdir(root)


def load_manifest(root: str) -> Manifest:
    """Read `manifest.json`. Raises UserError if there is none, for instance before the job has finished."""
    path = f"{root}/manifest.json"
    try:
        if remote.is_remote(path):
            with remote.open_stream(path) as stream:
                text = stream.read(MAX_MANIFEST_BYTES + 1)
        else:
            text = read_bytes(path, MAX_MANIFEST_BYTES)
    except Exception as error:  # every fsspec backend has exceptions of its own
        partly = ", only a part of them" if os.path.exists(f"{root}/manifest.partial.json") else ""
        reason = in_one_line(error, 200)
        raise UserError(
            f"{path}: no stored targets there{partly} ({reason}): run `indistill targets CONFIG`, or "
            "set targets: live"
        ) from None
    return parse_manifest(text, path)


def parse_manifest(text: bytes, path: str) -> Manifest:
    """The content of `manifest.json`. Raises UserError if it is damaged or has another version."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise UserError(f"{path}: larger than {MAX_MANIFEST_BYTES:,} bytes: {REMEDY}")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        reason = records.first_problem(error)
        raise UserError(f"{path}: damaged, or of another version ({reason}): {REMEDY}") from None
    if manifest.version != VERSION:
        raise UserError(f"{path}: version {manifest.version}, but this program reads {VERSION}: {REMEDY}")
    return manifest


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest atomically."""
    replace_text(path, manifest.model_dump_json(indent=1) + "\n")


# --- whether they are a run's -------------------------------------------------------------------------------
def check_manifest(root: str, manifest: Manifest, settings: Config, hashes: dict[str, str | None]) -> None:
    """Raise UserError, naming the difference, unless these are the targets of this config.

    hashes: SHA-256 of the file that the config names under a key (teacher.checkpoint, ...), None if it is not
    here.
    """
    stored = manifest.config
    ours = decisive_config(settings)
    for key in dict.fromkeys((*ours, *stored)):
        # A run without the warm-up may use the other targets.
        if stored.get(key) != ours.get(key) and (settings.warmup or not key.startswith("warmup")):
            raise _mismatch(root, key, stored.get(key), ours.get(key))
    for name, field in manifest.fields.items():
        is_map = len(field.shape) == 3
        kind, top_k = wanted_format(name, is_map, settings.targets)
        if is_map and field.format != kind:
            raise _mismatch(root, "targets.features", field.format, kind)
        if (field.format, field.top_k) != (kind, top_k):
            raise _mismatch(root, "targets.top_k", field.top_k, top_k)
    for key in dict.fromkeys((*hashes, *manifest.teacher.files)):
        _check_file(
            root, key, stored=manifest.teacher.files.get(key), settings=settings, sha256=hashes.get(key)
        )


def _check_file(root: str, key: str, *, stored: Weights | None, settings: Config, sha256: str | None) -> None:
    """Raise UserError unless a teacher's file is the stored one: by its content, or by its path if it is not
    here.
    """
    path = getattr(settings.teacher, key.removeprefix("teacher."))
    if stored is None or path is None:
        raise _mismatch(root, key, stored and stored.path, path)
    if sha256 is None and path != stored.path:
        raise _mismatch(
            root, key, f"{stored.path} (SHA-256 {stored.sha256[:12]})", f"{path} (which is not here)"
        )
    if sha256 is not None and sha256 != stored.sha256:
        raise _mismatch(root, key, f"{stored.path} (SHA-256 {stored.sha256[:12]})", f"{path} ({sha256[:12]})")


def _mismatch(root: str, key: str, stored: object, ours: object) -> UserError:
    return UserError(f"{root}: made with {key}: {stored}, this run has {ours}: {REMEDY}")


def check_classes(root: str, manifest: Manifest, names: Names | None) -> None:
    """Raise UserError if the targets were computed for other class names than those of data.train."""
    if names is not None and manifest.classes is not None:
        stored = Names(f"{root}/manifest.json", manifest.classes)
        class_names.refuse_difference(names, stored, "data.train", REMEDY)
