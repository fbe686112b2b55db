"""`indistill targets`: run the teacher once over every view of the data set and store its outputs.

The work is a list of (view, shard) pairs, divided among the ranks. Files that exist are kept, so a stopped
job can continue on any number of processes: a file gets its name when it is complete, and the manifest is
written when all files exist.

The teacher sees as many images at once as in training on as many processes; the last image of a shard is
repeated to fill a batch. On CPUs the last bits of a convolution depend on the number of images, but not on
the images.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from indistill import config
from indistill.config import Config, UserError
from indistill.config.destinations import remove_parts
from indistill.config.files import read_bytes, replacing
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
    load_manifest,
    parse_manifest,
    records_path,
    save_manifest,
    targets_root,
)
from indistill.targets.reader import Reader, weights_hashes
from indistill.targets.records import Field
from indistill.targets.stored import fields_of, needed
from indistill.training import lessons
from indistill.training.choose import cheaper_stored
from indistill.training.features import compute
from indistill.training.start import start_accelerator

# Relative to a record's largest value: more than one step of its rounding, less than another image differs
# by.
TOLERANCE = 0.01
PLAIN_SECONDS = 10.0  # between lines of progress in a log
_MANIFESTS = ("manifest.json", "manifest.partial.json")
_TIMEOUT_MINUTES = 24 * 60.0  # the ranks wait for each other only at the end, for hours


class Comparison(NamedTuple):
    """The result of recomputing one rank's share of the records."""

    wrong: list[str]  # a line for each record that differs
    records: int
    exact: int  # records that are equal bit for bit
    largest: float  # the largest relative difference of the others that are within the tolerance


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


# --- writing ------------------------------------------------------------------------------------------------
def write(settings: Config) -> Manifest:
    """Compute and store the targets that do not exist yet.

    Raises UserError, before any work, if they cannot be stored or an input is missing.
    """
    job = prepare(settings)
    manifest = job.manifest
    rank = job.accelerator.process_index
    views = [view for view in range(manifest.views) if manifest.fields_in(view)]
    items = [(view, shard) for view in views for shard in range(len(manifest.samples))]
    missing = engine.on_main(job.accelerator, lambda: begin(job, items))
    mine = missing[rank :: job.accelerator.num_processes]
    batches = job.batches(requests_of(job, mine))
    samples = sum(len(by_size(manifest, view)) * manifest.samples[shard] for view, shard in mine)
    with errors_of_this_rank(), Count(samples, shown=rank == 0) as count:
        for view, shard in mine:
            write_shard(job, view, shard=shard, batches=batches, count=count)
    job.accelerator.wait_for_everyone()
    engine.on_main(job.accelerator, lambda: end(job, items))
    return manifest


def by_size(manifest: Manifest, view: int) -> dict[int | None, list[str]]:
    """The names of the fields that are stored in a view, by the size of the images."""
    names: dict[int | None, list[str]] = {}
    for name in manifest.fields_in(view):
        names.setdefault(records.size_of(name), []).append(name)
    return names


def requests_of(job: Job, items: Sequence[tuple[int, int]]) -> Iterator[Samples]:
    """The samples of each batch of the (view, shard) pairs; prefetches the next shard."""
    first_ids = np.cumsum([0, *job.manifest.samples])
    for i, (view, shard) in enumerate(items):
        for _, following in items[i + 1 : i + 2]:
            job.dataset.shards.prefetch(first_ids[following : following + 1])
        ids = np.arange(first_ids[shard], first_ids[shard + 1])
        for size in by_size(job.manifest, view):
            for start in range(0, len(ids), job.manifest.batch):
                yield Samples(view, size, ids[start : start + job.manifest.batch])


def begin(job: Job, items: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the (view, shard) pairs whose files are missing; save the manifest for later jobs.

    Raises UserError if the disk is too small.
    """
    missing = [item for item in items if not is_stored(job, *item)]
    print(job.manifest.table(), flush=True)
    if len(missing) < len(items):
        print(f"indistill: {len(items) - len(missing)} of {len(items)} shards are stored already", flush=True)
    size = 0
    for view, shard in missing:
        fields = job.manifest.fields_in(view).values()
        size += job.manifest.samples[shard] * sum(field.record.itemsize for field in fields)
    free = shutil.disk_usage(job.root).free
    if size > free:
        raise UserError(
            f"targets.dir {job.root}: needs {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: lower "
            "data.augment.views or targets.pool, set targets.features: int8 or targets.top_k, or choose "
            "another targets.dir"
        )
    if missing:
        save_manifest(job.root / "manifest.partial.json", job.manifest)
        (job.root / "manifest.json").unlink(missing_ok=True)
    return missing


def end(job: Job, items: list[tuple[int, int]]) -> None:
    """Save the manifest. Raises UserError if a file of another rank is not visible here."""
    for view, shard in items:
        if not is_stored(job, view, shard):
            path = records_path(str(job.root), view, "*", shard)
            raise UserError(
                f"{path}: another process has written it, but it is not visible here: put targets.dir on a "
                "file system that all nodes share"
            )
    if job.standards:
        standards.write(job.root / standards.FILE, job.standards)
    save_manifest(job.root / "manifest.json", job.manifest)
    (job.root / "manifest.partial.json").unlink(missing_ok=True)


def is_stored(job: Job, view: int, shard: int) -> bool:
    """Whether the files of all fields exist with their full size."""
    with contextlib.suppress(FileNotFoundError):
        return all(
            os.stat(records_path(str(job.root), view, name, shard)).st_size
            == field.record.itemsize * job.manifest.samples[shard]
            for name, field in job.manifest.fields_in(view).items()
        )
    return False


def write_shard(job: Job, view: int, *, shard: int, batches: Iterator[Batch], count: Count) -> None:
    """Write one file per field; all of them appear at the end."""
    fields = job.manifest.fields_in(view)
    paths = {name: Path(records_path(str(job.root), view, name, shard)) for name in fields}
    with contextlib.ExitStack() as stack:
        files = {}
        for name, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(path.parent, path.name.__eq__)
            files[name] = stack.enter_context(replacing(path))
        for names in by_size(job.manifest, view).values():
            left = job.manifest.samples[shard]
            while left:
                batch = next(batches)
                for bad in batch.replaced:
                    print(
                        f"indistill: no targets for {bad}: it cannot be decoded", file=sys.stderr, flush=True
                    )
                for name, computed in job.compute(batch, names).items():
                    encoded = fields[name].encode(computed.values)
                    encoded[computed.undecoded] = np.zeros((), encoded.dtype)
                    files[name].write(encoded.tobytes())
                    done = len(computed.values)
                left -= done
                count.add(done)


class Count(contextlib.AbstractContextManager):
    """Shows how many of `total` images are done: a bar in a terminal, a line every 10 s in a log."""

    def __init__(self, total: int, shown: bool) -> None:
        self.total = total
        self.done = 0
        self.bar = tqdm(total=total, unit="image", disable=None if shown else True)  # None: in a log
        self._plain = shown and self.bar.disable
        self._printed = time.monotonic()

    def add(self, images: int) -> None:
        """Count images."""
        self.done += images
        self.bar.update(images)
        now = time.monotonic()
        if self._plain and (now - self._printed >= PLAIN_SECONDS or self.done == self.total):
            self._printed = now
            print(
                f"indistill: targets of {self.done:,} of {self.total:,} images", file=sys.stderr, flush=True
            )

    def __exit__(self, *error: object) -> None:
        self.bar.close()


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


# --- verifying ----------------------------------------------------------------------------------------------
def verify(settings: Config, count: int) -> bool:
    """Recompute the records of `count` random samples and print those that differ.

    Returns whether all agree.
    """
    job = prepare(settings)
    stored = engine.on_main(job.accelerator, lambda: load_manifest(str(job.root)))
    requests = random_requests(stored, settings.seed, count)
    mine = requests[job.accelerator.process_index :: job.accelerator.num_processes]
    with errors_of_this_rank():
        comparison = recompute(job, stored, mine)
    parts_of_ranks: list[Comparison] = gather_object([comparison])
    wrong = [line for part in parts_of_ranks for line in part.wrong]
    if job.accelerator.is_main_process:
        for line in wrong:
            print(line)
        recomputed = sum(part.records for part in parts_of_ranks)
        exact = sum(part.exact for part in parts_of_ranks)
        largest = max(part.largest for part in parts_of_ranks)
        print(
            f"{recomputed} records recomputed: {exact} are the same bit for bit, the others differ by at "
            f"most {largest:.1e} of their largest value, {len(wrong)} are wrong"
        )
    return not wrong


def random_requests(stored: Manifest, seed: int, count: int) -> list[Samples]:
    """Draw `count` different (view, sample) pairs; returns them as batches, once for each size."""
    samples = sum(stored.samples)
    total = stored.views * samples
    drawn = random.Random(seed).sample(range(total), min(count, total))  # nosec B311  # a sample to check, the same for a seed
    requests = []
    for view in range(stored.views):
        ids = np.array(sorted(i % samples for i in drawn if i // samples == view), dtype=np.int64)
        requests += [
            Samples(view, size, ids[start : start + stored.batch])
            for size in by_size(stored, view)
            for start in range(0, len(ids), stored.batch)
        ]
    return requests


def recompute(job: Job, stored: Manifest, requests: Sequence[Samples]) -> Comparison:
    """Compare the stored records of each request with what the teacher computes now."""
    reader = Reader(str(job.root), stored, None, 0)
    wrong = []
    count = 0
    exact = 0
    largest = 0.0
    for (view, size, ids), batch in zip(requests, job.batches(requests)):
        for name, computed in job.compute(batch, by_size(stored, view)[size]).items():
            rows = reader.rows(view, ids, name)
            field = stored.fields[name]
            problems, same, difference = compare(field, computed.values, rows, computed.undecoded)
            count += len(rows)
            exact += same
            largest = max(largest, difference)
            for row, problem in problems:
                wrong.append(f"view {view}, {job.dataset.shards.where(ids[row])}: {name}: {problem}")
    return Comparison(wrong, count, exact, largest)


def compare(
    field: Field, tensor: Tensor, rows: np.ndarray, undecoded: np.ndarray
) -> tuple[list[tuple[int, str]], int, float]:
    """Compare stored records with recomputed targets.

    tensor [B, ...] is computed by the teacher, rows uint8 [B, bytes of a record] are stored, undecoded is
    bool [B]. Returns the problems by row, the number of records that are equal bit for bit, and the largest
    relative difference
    of the other records without a problem.
    """
    problems = []
    again = torch.from_numpy(records.rows_of(field.encode(tensor)))
    intact = records.intact(rows)
    equal = (again.numpy() == rows).all(axis=1)
    ours, theirs = (field.decode(encoded).double().flatten(1) for encoded in (again, torch.from_numpy(rows)))
    if field.format == "top_k":
        ours = ours.softmax(1)
        theirs = theirs.softmax(1)
    off = ((ours - theirs).abs().amax(1) / ours.abs().amax(1).clamp_min(1e-30)).numpy()
    for row in range(len(rows)):
        if undecoded[row]:
            if rows[row].any():
                problems.append((row, "stored, but its image cannot be decoded"))
        elif not rows[row].any() and not intact[row]:
            problems.append((row, "missing, but its image can be decoded"))
        elif not intact[row]:
            problems.append((row, "damaged"))
        elif not off[row] <= TOLERANCE:
            problems.append((row, f"differs by {off[row]:.1e} of its largest value"))
    close = ~undecoded & intact & (off <= TOLERANCE)
    return problems, int((equal & ~undecoded).sum()), float(off[close & ~equal].max(initial=0.0))


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
