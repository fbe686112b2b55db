"""The teacher, its data, and the targets to compute of them: what writing and verifying have in common.

The teacher sees as many images at once as in training on as many processes; the last image of a shard is
repeated to fill a batch. On CPUs the last bits of a convolution depend on the number of images, but not on
the images.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from indistill import config
from indistill.config import Config, UserError
from indistill.config.destinations import remove_parts
from indistill.config.files import read_bytes
from indistill.config.limits import MAX_MANIFEST_BYTES
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data import class_names, remote
from indistill.data.batch import Batch, Request
from indistill.data.class_names import Names
from indistill.data.dataset import ImageDataset
from indistill.data.loader import IndexedTraining, loader
from indistill.data.mixing import mixed
from indistill.data.training import open_training
from indistill.distributed import engine
from indistill.distributed.agree import agree
from indistill.losses.objective import Objective
from indistill.losses.standard import Standard
from indistill.models.network import Network
from indistill.models.stages import find_stages
from indistill.prune import Plan
from indistill.targets import records, standards
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import (
    REMEDY,
    VERSION,
    Manifest,
    StageInfo,
    Teacher,
    Weights,
    check_classes,
    decisive_config,
    parse_manifest,
    targets_root,
)
from indistill.targets.reader import weights_hashes
from indistill.targets.records import Field
from indistill.targets.stored import fields_of, needed
from indistill.training import lessons
from indistill.training.choose import cheaper_stored
from indistill.training.features import compute
from indistill.training.start import start_accelerator

_MANIFESTS = ("manifest.json", "manifest.partial.json")
_TIMEOUT_MINUTES = 24 * 60.0  # the ranks wait for each other only at the end, for hours


class Samples(NamedTuple):
    """Samples whose targets are computed together."""

    view: int
    size: int | None  # of the images; None: their full size
    ids: np.ndarray  # int64 [B]


class Computed(NamedTuple):
    """One field of a batch of samples."""

    values: Tensor  # [B, ...]
    undecoded: np.ndarray  # bool [B], whether an image of the sample's target could not be decoded


@dataclass
class Job:
    """The teacher, its data, and the targets to compute."""

    accelerator: Accelerator
    root: Path
    dataset: ImageDataset
    targets_of: LiveTargets
    pairs: list[int]  # the pairs that the warm-up trains
    manifest: Manifest
    standards: dict[str, Standard]  # what losses standardise by, that is not stored yet
    partners: tuple[int, np.ndarray] | None = None  # the last view, and the partners of all samples in it

    def batches(self, requests: Iterable[Samples]) -> Iterator[Batch]:
        """Load a batch of each; an image that cannot be decoded gets id -1.

        Where KD mixes images, every sample is followed by its partner.
        """
        with_partners = map(self._with_partners, requests) if self.dataset.mix else requests
        images = (
            Request(0, 0, 0, ids, stand_ins=False, views=view, size=size) for view, size, ids in with_partners
        )
        yield from loader(self.dataset, images, self.accelerator.device)

    def _with_partners(self, request: Samples) -> Samples:
        view, _, ids = request
        if self.partners is None or self.partners[0] != view:
            assert self.dataset.order is not None  # these are training images
            self.partners = view, self.dataset.order.partners(view // self.dataset.section.repeats)
        return request._replace(ids=np.stack([ids, self.partners[1][ids]], axis=1).reshape(-1))

    def compute(self, batch: Batch, names: Collection[str]) -> dict[str, Computed]:
        """Compute the fields of these names for a batch of `batches`."""
        undecoded = batch.ids.numpy() < 0
        if batch.mix is None:
            return self._outputs(batch.images, undecoded, names)
        of_warmup = [name for name in names if name.startswith("pair")]  # only KD mixes
        of_kd = [name for name in names if name not in of_warmup]
        classes = self.dataset.section.num_classes
        images, _ = mixed(batch.images, batch.labels, batch.mix, classes)
        either = undecoded[::2] | undecoded[1::2]
        return self._outputs(batch.images[::2], undecoded[::2], of_warmup) | self._outputs(
            images[::2], either, of_kd
        )

    def _outputs(self, images: Tensor, undecoded: np.ndarray, names: Collection[str]) -> dict[str, Computed]:
        """Compute fields of images [B, 3, S, S], uint8 or mixed."""
        if not names:
            return {}
        count = len(images)
        padding = images[-1:].expand(self.manifest.batch - count, -1, -1, -1)
        full = torch.cat([images, padding]).to(self.accelerator.device, non_blocking=True)
        outputs = self.targets_of.everything(full, self.pairs)
        return {name: Computed(outputs[records.bare(name)][:count], undecoded) for name in names}


def by_size(manifest: Manifest, view: int) -> dict[int | None, list[str]]:
    """The names of the fields that are stored in a view, by the size of the images."""
    names: dict[int | None, list[str]] = {}
    for name in manifest.fields_in(view):
        names.setdefault(records.size_of(name), []).append(name)
    return names


@contextlib.contextmanager
def errors_of_this_rank() -> Iterator[None]:
    """Report errors raised here from this rank instead of rank 0."""
    try:
        yield
    except UserError as error:
        error.found_by_one_rank = True
        raise
    except OSError as error:
        mistake = UserError(
            f"targets.dir: {error.filename or ''} cannot be written ({error.strerror}): make room and start "
            "again"
        )
        mistake.found_by_one_rank = True
        raise mistake from None


# --- preparing --------------------------------------------------------------------------------------------
def prepare(settings: Config) -> Job:
    """Create the teacher, the data and the manifest.

    Raises UserError if the targets cannot be stored, or if the directory has targets of another config.
    """
    world = Ranks.from_environment().world_size
    root = check_storable(settings, world)
    auto = settings.targets.source == "auto"
    live = {"targets": settings.targets.model_copy(update={"source": "live"})}
    settings = settings.model_copy(update=live | {"collective_timeout_minutes": _TIMEOUT_MINUTES})
    accelerator = start_accelerator(settings)
    names = engine.on_main(accelerator, lambda: class_names.of_training(settings.data))
    training = open_training(accelerator, settings)
    assert isinstance(training, IndexedTraining)  # check_storable refuses data.access: stream
    student, targets_of, plan = create_networks(accelerator, settings, training)
    timetable = Timetable.of(settings, training.steps_per_epoch, len(plan.pairs))
    phases = stored_phases(settings, student, targets_of=targets_of, timetable=timetable, auto=auto)
    views = views_of_fields(settings, training, targets_of=targets_of, timetable=timetable, phases=phases)
    pairs = sorted({pair for phase in timetable.curriculum.phases() for pair in phase.pairs})
    batch = settings.data.global_batch // world // settings.grad_accumulation
    fields = describe_fields(targets_of, settings, views=views, pairs=pairs, batch=batch)
    manifest = Manifest(
        version=VERSION,
        teacher=describe_teacher(settings, targets_of),
        config=decisive_config(settings),
        plan=json.loads(plan.to_json()),
        data=training.fingerprint,
        classes=names.names if names else None,
        samples=training.dataset.shards.sizes,
        fields=fields,
        batch=batch,
    )
    agree({"teacher": targets_of.fingerprint, "plan": plan.hash})
    stored = engine.on_main(accelerator, lambda: claim(Path(root), manifest))
    missing = missing_standards(accelerator, settings, stored=root, targets_of=targets_of, training=training)
    return Job(accelerator, Path(root), training.dataset, targets_of, pairs, stored, missing)


def missing_standards(
    accelerator: Accelerator,
    settings: Config,
    *,
    stored: str,
    targets_of: LiveTargets,
    training: IndexedTraining,
) -> dict[str, Standard]:
    """What the config's losses standardise by, with what is stored; {} if nothing is missing."""
    names = standards.wanted(settings.kd.losses, targets_of.kd_stages)
    every = sorted({name for of_loss in names.values() for name in of_loss})
    path = f"{stored}/{standards.FILE}"
    known = engine.on_main(accelerator, lambda: standards.read_all(path, REMEDY))
    if known.keys() >= set(every):
        return {}
    new = [name for name in every if name not in known]
    calibration = partial(training.loader, 0, device=accelerator.device)
    return known | compute(accelerator, new, targets_of, calibration)


def check_storable(settings: Config, world: int) -> str:
    """Return the directory of the targets. Raises UserError if they cannot be stored."""
    if reason := config.why_not_stored(settings):
        raise UserError(f"targets: {reason}")
    root = targets_root(settings)
    if remote.is_remote(root):
        raise UserError(f"targets.dir {root}: is not a local path: write to a local path, and copy the files")
    if settings.teacher is not None and settings.teacher.shard and world > 1:
        raise UserError(
            "targets: every process runs a whole teacher: set teacher.shard=false, or start one process"
        )
    return root


def create_networks(
    accelerator: Accelerator, settings: Config, training: IndexedTraining
) -> tuple[Network, LiveTargets, Plan]:
    """The student, whose stages choose what is stored, the teacher in its precision, and the pruning plan."""
    calibration = partial(training.loader, 0, device=accelerator.device)
    with tempfile.TemporaryDirectory() as scratch:  # the plan is in the manifest
        student, targets_of, plan, _ = lessons.networks(
            accelerator, settings, files=RunDir(Path(scratch)), calibration=calibration
        )
    # check_storable refuses `stage: heads`, and the source is live.
    assert isinstance(student, Network)
    assert isinstance(targets_of, LiveTargets)
    targets_of.hold_weights()
    return student, targets_of, plan


def stored_phases(
    settings: Config, student: Network, *, targets_of: LiveTargets, timetable: Timetable, auto: bool
) -> Collection[str]:
    """The names of the phases whose targets are stored: with `auto`, those in which reading is cheaper."""
    if not auto:
        return {phase.name for phase in timetable.curriculum.phases()}
    objective = Objective(settings.kd.losses, timetable.steps_per_epoch, settings.kd.relational_scope)
    phases = cheaper_stored(settings, student, live=targets_of, objective=objective, timetable=timetable)
    if not phases:
        raise UserError(
            "targets: auto: live targets are cheaper in every phase (see `indistill plan`): set targets: live"
        )
    return phases


def views_of_fields(
    settings: Config,
    training: IndexedTraining,
    *,
    targets_of: LiveTargets,
    timetable: Timetable,
    phases: Collection[str],
) -> dict[str, set[int]]:
    """The views in which training reads each field in the phases. Raises UserError if it reads none."""
    heads = len(targets_of.heads.stages) if targets_of.heads else 0

    def of_phase(phase: Phase) -> tuple[str, ...]:
        names = fields_of(phase, settings.kd.losses, targets_of.kd_stages, heads)
        return names if phase.name in phases else ()

    views = needed(timetable, of_phase, training)
    if not views:
        raise UserError(
            "targets: neither warmup nor kd.losses reads anything of the teacher: nothing is to be stored"
        )
    return views


def describe_fields(
    targets_of: LiveTargets, settings: Config, *, views: dict[str, set[int]], pairs: list[int], batch: int
) -> dict[str, Field]:
    """The format of each field's records, from outputs of the teacher on `batch` images, and the views."""
    assert targets_of.teacher is not None  # check_storable refuses a config without one
    device = targets_of.teacher.mean.device
    fields: dict[str, Field] = {}
    for size in {records.size_of(name) or settings.data.full_size: None for name in views}:
        images = torch.zeros(batch, 3, size, size, dtype=torch.uint8, device=device)
        outputs = targets_of.everything(images, pairs)
        for name in views:
            if records.size_of(name) in (None, size):
                field = records.describe(name, outputs[records.bare(name)], settings.targets)
                fields[name] = field.model_copy(update={"views": sorted(views[name])})
    return {name: fields[name] for name in views}


def describe_teacher(settings: Config, targets_of: LiveTargets) -> Teacher:
    assert targets_of.teacher is not None  # check_storable refuses a config without one
    net: Any = targets_of.teacher.net  # nn.Module does not declare timm's attributes
    return Teacher(
        feature_info=stages(net),
        head_hidden_size=net.head_hidden_size,
        fingerprint=targets_of.fingerprint,
        files={
            key: Weights(path=getattr(settings.teacher, key.removeprefix("teacher.")), sha256=value)
            for key, value in weights_hashes(settings).items()
            if value is not None  # the teacher has just been loaded from these files
        },
    )


def stages(net: nn.Module) -> list[StageInfo]:
    """The stages of a teacher by the keys of timm's `feature_info`; [] if losses cannot read any."""
    try:
        network_stages = find_stages(net)
    except UserError:
        return []
    return [
        {"module": stage.name, "num_chs": stage.channels, "reduction": stage.reduction}
        for stage in network_stages
    ]


def claim(root: Path, manifest: Manifest) -> Manifest:
    """The stored manifest, complete or partial, else this one.

    Raises UserError if the stored one describes other targets, or if the folder has other files instead.
    """
    for name in _MANIFESTS:
        if os.path.lexists(root / name):
            try:
                content = read_bytes(root / name, MAX_MANIFEST_BYTES)
            except OSError as error:
                raise UserError(f"{root / name}: cannot be read ({error.strerror}): {REMEDY}") from None
            stored = parse_manifest(content, str(root / name))
            names = Names("data.train", manifest.classes) if manifest.classes else None
            check_classes(str(root), stored, names)
            difference = stored.difference(manifest)
            if difference is None and stored.samples != manifest.samples:
                difference = "samples per shard"
            if difference:
                raise UserError(
                    f"{root} holds targets of another config ({difference}): choose another targets.dir, or "
                    "delete it"
                )
            return stored
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_parts(root, _MANIFESTS.__contains__)
        stray = next((path for path in root.iterdir() if not path.name.startswith(".")), None)
    except OSError as error:
        raise UserError(f"targets.dir {root}: cannot be written ({error.strerror}): choose another") from None
    if stray:
        raise UserError(
            f"targets.dir {root}: holds {stray.name}, but no targets: choose another, or empty it"
        )
    return manifest
