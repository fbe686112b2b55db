"""`indistill targets`: the teacher run once over every view of the data set, and what it gave written (manifest.py).

The work is a list of (view, shard), dealt to the ranks. What is there is kept, so a job that was stopped goes on, on
any number of processes; a file has its name when it is whole, and the manifest is written when all files are there.

The teacher sees as many images at once as in training on as many processes, and the last of a shard again to fill a
batch: on CPUs, a convolution's last bits depend on how many images there are, and not on which.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from indistill import config
from indistill.config import Config, UserError
from indistill.config.files import replacing
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data import class_names, remote
from indistill.data.batch import Batch, Request
from indistill.data.class_names import Names
from indistill.data.dataset import ImageDataset
from indistill.data.loader import IndexedTraining, loader
from indistill.distributed import engine
from indistill.distributed.agree import agree
from indistill.losses.objective import Objective
from indistill.models.stages import find_stages
from indistill.targets import records
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import (
    VERSION,
    Manifest,
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
from indistill.training import parts
from indistill.training.choose import cheaper_stored
from indistill.training.start import start_accelerator

SAME = 0.01  # of a record's largest value: more than one step of its rounding, less than any other image's difference
_TIMEOUT_MINUTES = 24 * 60.0  # the ranks wait for each other only at the end


@dataclass
class Job:
    accelerator: Accelerator
    root: Path
    dataset: ImageDataset
    targets_of: LiveTargets
    pairs: list[int]  # of the warm-up, that are trained
    manifest: Manifest

    def tensors(self, images: Tensor) -> dict[str, Tensor]:
        """Every field of uint8 images [B, 3, S, S]: [B, ...] each."""
        count, batch = len(images), self.manifest.batch
        full = torch.cat([images, images[-1:].expand(batch - count, -1, -1, -1)])
        found = self.targets_of.everything(full.to(self.accelerator.device, non_blocking=True), self.pairs)
        return {name: found[name][:count] for name in self.manifest.fields}

    def batches(self, requests: Iterable[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        """The images of samples int64 [B] in a view, for each request; id -1 for what cannot be decoded."""
        asked = (Request(view, 0, 0, ids, stand_ins=False) for view, ids in requests)
        yield from loader(self.dataset, asked, self.accelerator.device)


# --- writing ---------------------------------------------------------------------------------------------------------
def write(settings: Config) -> Manifest:
    """Compute what is not there yet. Raises UserError, before any work, for what cannot be stored, or not there."""
    job = prepare(settings)
    manifest, rank, world = job.manifest, job.accelerator.process_index, job.accelerator.num_processes
    views = [view for view in range(manifest.views) if manifest.fields_in(view)]
    everything = [(view, shard) for view in views for shard in range(len(manifest.samples))]
    todo = engine.on_main(job.accelerator, lambda: begin(job, everything))
    mine, first_ids = todo[rank::world], np.cumsum([0, *manifest.samples])

    def requests() -> Iterator[tuple[int, np.ndarray]]:
        for place, (view, shard) in enumerate(mine):
            for _, following in mine[place + 1 : place + 2]:
                job.dataset.shards.prefetch(first_ids[following : following + 1])
            ids = np.arange(first_ids[shard], first_ids[shard + 1])
            yield from (
                (view, ids[start : start + manifest.batch]) for start in range(0, len(ids), manifest.batch)
            )

    batches = job.batches(requests())
    samples = sum(manifest.samples[shard] for _, shard in mine)
    # Without a terminal a line every 10 s.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with one_rank_tells(), tqdm(total=samples, unit="image", disable=rank != 0, mininterval=interval) as bar:
        for view, shard in mine:
            write_shard(job, view, shard, batches, bar)
    job.accelerator.wait_for_everyone()
    engine.on_main(job.accelerator, lambda: end(job, everything))
    job.accelerator.end_training()
    return manifest


def begin(job: Job, everything: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Leave the manifest for those who go on, and return what is missing. Raises UserError where there is no room."""
    todo = [item for item in everything if not is_there(job, *item)]
    print(job.manifest.table(), flush=True)
    if len(todo) < len(everything):
        print(f"indistill: {len(everything) - len(todo)} of {len(everything)} shards are there", flush=True)
    space, free = 0, shutil.disk_usage(job.root).free
    for view, shard in todo:
        fields = job.manifest.fields_in(view).values()
        space += job.manifest.samples[shard] * sum(field.record.itemsize for field in fields)
    if space > free:
        raise UserError(
            f"targets.dir {job.root}: {space / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free: lower "
            "data.augment.views or targets.pool, set targets.features: int8 or targets.top_k, or choose another"
        )
    if todo:
        save_manifest(job.root / "manifest.partial.json", job.manifest)
        (job.root / "manifest.json").unlink(missing_ok=True)
    return todo


def end(job: Job, everything: list[tuple[int, int]]) -> None:
    for view, shard in everything:
        if not is_there(job, view, shard):
            path = records_path(str(job.root), view, "*", shard)
            raise UserError(
                f"{path}: written by another process, not seen by this: put targets.dir where all nodes see"
            )
    save_manifest(job.root / "manifest.json", job.manifest)
    (job.root / "manifest.partial.json").unlink(missing_ok=True)


def is_there(job: Job, view: int, shard: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return all(
            os.stat(records_path(str(job.root), view, name, shard)).st_size
            == field.record.itemsize * job.manifest.samples[shard]
            for name, field in job.manifest.fields_in(view).items()
        )
    return False


def write_shard(job: Job, view: int, shard: int, batches: Iterator[Batch], bar: tqdm) -> None:
    """One file per field, all of which appear at the end."""
    fields = job.manifest.fields_in(view)
    paths = {name: Path(records_path(str(job.root), view, name, shard)) for name in fields}
    with contextlib.ExitStack() as stack:
        files = {}
        for name, path in paths.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in path.parent.glob(f"{path.name}.*part"):  # of a job that was killed
                part.unlink(missing_ok=True)
            files[name] = stack.enter_context(replacing(path))
        left = job.manifest.samples[shard]
        while left:
            batch = next(batches)
            for name in batch.replaced:
                print(f"indistill: no targets of {name}", file=sys.stderr, flush=True)
            undecoded = batch.ids.numpy() < 0
            tensors = job.tensors(batch.images)
            for name, field in fields.items():
                records = field.encode(tensors[name])
                records[undecoded] = np.zeros((), records.dtype)
                files[name].write(records.tobytes())
            left -= len(batch.ids)
            bar.update(len(batch.ids))


@contextlib.contextmanager
def one_rank_tells() -> Iterator[None]:
    """What stops this rank is told by it, and not by the first."""
    try:
        yield
    except UserError as error:
        error.found_by_one_rank = True
        raise
    except OSError as error:
        told = UserError(
            f"targets.dir: {error.filename or ''} cannot be written: {error.strerror}: make room, start again"
        )
        told.found_by_one_rank = True
        raise told from None


# --- verifying -------------------------------------------------------------------------------------------------------
def verify(settings: Config, count: int) -> bool:
    """Recompute the records of `count` random samples and views; print what differs. Is all of it right?"""
    job = prepare(settings)
    rank, world = job.accelerator.process_index, job.accelerator.num_processes
    stored = engine.on_main(job.accelerator, lambda: load_manifest(str(job.root)))
    samples = sum(stored.samples)
    chosen = random.Random(settings.seed).sample(
        range(stored.views * samples), min(count, stored.views * samples)
    )
    requests = []
    for view in range(stored.views):
        ids = np.array(
            sorted(place % samples for place in chosen if place // samples == view), dtype=np.int64
        )
        requests += [(view, ids[start : start + stored.batch]) for start in range(0, len(ids), stored.batch)]
    reader = Reader(str(job.root), stored, None, 0)
    mine, records, exact, largest = [], 0, 0, 0.0
    with one_rank_tells():
        for (view, ids), batch in zip(requests[rank::world], job.batches(requests[rank::world])):
            undecoded = batch.ids.numpy() < 0
            tensors = job.tensors(batch.images)
            for name, field in stored.fields_in(view).items():
                rows = reader.rows(view, ids, name)
                problems, same, difference = compare(field, tensors[name], rows, undecoded)
                records += len(rows)
                exact, largest = exact + same, max(largest, difference)
                mine += [
                    f"view {view}, {job.dataset.shards.where(ids[row])}: {name}: {what}"
                    for row, what in problems
                ]
    told = gather_object([(mine, records, exact, largest)])
    wrong = [line for lines, *_ in told for line in lines]
    if rank == 0:
        for line in wrong:
            print(line)
        print(
            f"{sum(part[1] for part in told)} records recomputed: {sum(part[2] for part in told)} the same bit for "
            f"bit, the others within {max(part[3] for part in told):.1e} of their largest value, but {len(wrong)} wrong"
        )
    job.accelerator.end_training()
    return not wrong


def compare(
    field: Field, tensor: Tensor, rows: np.ndarray, undecoded: np.ndarray
) -> tuple[list[tuple[int, str]], int, float]:
    """What is wrong, by row; how many records are the same to the bit; how far off the others are, relatively.

    tensor [B, ...] is the teacher's, rows uint8 [B, bytes of a record] what is stored, undecoded bool [B].
    """
    problems, again = [], torch.from_numpy(records.rows_of(field.encode(tensor)))
    intact, exact = records.intact(rows), (again.numpy() == rows).all(axis=1)
    ours, theirs = (field.decode(records).double().flatten(1) for records in (again, torch.from_numpy(rows)))
    if field.format == "top_k":
        ours, theirs = ours.softmax(1), theirs.softmax(1)
    off = ((ours - theirs).abs().amax(1) / ours.abs().amax(1).clamp_min(1e-30)).numpy()
    for row in range(len(rows)):
        if undecoded[row]:
            if rows[row].any():
                problems.append((row, "stored, though its image cannot be decoded"))
        elif not intact[row]:
            what = "none, though its image can be decoded" if not rows[row].any() else "damaged"
            problems.append((row, what))
        elif not off[row] <= SAME:
            problems.append((row, f"off by {off[row]:.1e} of its largest value"))
    close = ~undecoded & intact & (off <= SAME)
    return problems, int((exact & ~undecoded).sum()), float(off[close & ~exact].max(initial=0.0))


# --- what both begin with --------------------------------------------------------------------------------------------
def prepare(settings: Config) -> Job:
    """Teacher, data and manifest. Raises UserError for what cannot be stored, and for a directory of other targets."""
    if reason := config.why_not_stored(settings):
        raise UserError(f"targets: {reason}")
    root, world = targets_root(settings), Ranks.from_environment().world_size
    if remote.is_remote(root):
        raise UserError(
            f"targets.dir {root}: is written to a file system: give a path, and copy what is there"
        )
    if settings.teacher.shard and world > 1:
        raise UserError(
            "targets: every process runs a whole teacher: set teacher.shard=false, or start one process"
        )
    auto = settings.targets.source == "auto"
    live = {"targets": settings.targets.model_copy(update={"source": "live"})}
    settings = settings.model_copy(update=live | {"collective_timeout_minutes": _TIMEOUT_MINUTES})
    accelerator = start_accelerator(settings)
    rank, accumulation = accelerator.process_index, settings.grad_accumulation
    names = engine.on_main(accelerator, lambda: class_names.of_training(settings.data))
    training = IndexedTraining(settings.data, settings.seed, rank, world, accumulation)
    agree({"data": training.fingerprint})
    calibration = partial(training.loader, 0, device=accelerator.device)
    with tempfile.TemporaryDirectory() as scratch:  # the plan is in the manifest
        student, targets_of, plan = parts.networks(
            accelerator, settings, files=RunDir(Path(scratch)), calibration=calibration
        )
    targets_of.hold_weights()

    timetable = Timetable.of(settings, training.steps_per_epoch, len(plan.pairs))
    heads, losses = len(targets_of.heads.stages) if targets_of.heads else 0, settings.kd.losses
    phases = {phase.name for phase in timetable.curriculum.phases()}
    if auto:
        objective = Objective(losses, timetable.steps_per_epoch, settings.kd.relational_scope)
        phases = cheaper_stored(
            settings, student, live=targets_of, objective=objective, timetable=timetable
        )
        if not phases:
            raise UserError(
                "targets: auto: in no phase would reading be cheaper, as `indistill plan` shows: all are live"
            )

    def of_phase(phase: Phase) -> tuple[str, ...]:
        return fields_of(phase, losses, targets_of.kd_stages, heads) if phase.name in phases else ()

    views = needed(timetable, of_phase, settings.data.augment.views)
    if not views:
        raise UserError(
            "targets: neither warmup nor kd.losses reads anything of the teacher: nothing is to be stored"
        )
    pairs = sorted({pair for phase in timetable.curriculum.phases() for pair in phase.pairs})
    batch = settings.data.global_batch // world // accumulation
    images = torch.zeros(batch, *config.input_size(settings), dtype=torch.uint8, device=accelerator.device)
    found = targets_of.everything(images, pairs)
    hashes = weights_hashes(settings)
    manifest = Manifest(
        version=VERSION,
        teacher=Teacher(
            feature_info=stages(targets_of),
            head_hidden_size=targets_of.teacher.net.head_hidden_size,
            fingerprint=targets_of.fingerprint,
            files={
                key: Weights(path=getattr(settings.teacher, key.removeprefix("teacher.")), sha256=value)
                for key, value in hashes.items()
            },
        ),
        config=decisive_config(settings),
        plan=json.loads(plan.to_json()),
        data=training.fingerprint,
        classes=names and names.names,
        samples=training.dataset.shards.sizes,
        fields={
            name: records.describe(name, found[name], settings.targets).model_copy(
                update={"views": sorted(seen)}
            )
            for name, seen in views.items()
        },
        batch=batch,
    )
    agree({"teacher": targets_of.fingerprint, "plan": plan.hash})
    manifest = engine.on_main(accelerator, lambda: claim(Path(root), manifest))
    return Job(accelerator, Path(root), training.dataset, targets_of, pairs, manifest)


def stages(targets_of: LiveTargets) -> list[dict[str, object]]:
    try:
        found = find_stages(targets_of.teacher.net)
    except UserError:  # no loss has read any
        return []
    return [
        {"module": stage.name, "num_chs": stage.channels, "reduction": stage.reduction} for stage in found
    ]


def claim(root: Path, manifest: Manifest) -> Manifest:
    """That of the targets that are there, wholly or in part, or else this one. Raises UserError if they are others."""
    for name in ("manifest.json", "manifest.partial.json"):
        if (root / name).exists():
            stored = parse_manifest((root / name).read_bytes(), str(root / name))
            check_classes(str(root), stored, manifest.classes and Names("data.train", manifest.classes))
            if difference := stored.difference(manifest):
                raise UserError(
                    f"{root} holds targets of another config ({difference}): choose another targets.dir, or delete it"
                )
            return stored
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"targets.dir {root}: cannot be written ({error.strerror}): choose another") from None
    return manifest
