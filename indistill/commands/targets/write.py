"""Run the teacher once over every view of the data set and store its outputs.

The work is a list of (view, shard) pairs, divided among the ranks. Files that exist are kept, so a stopped
job can continue on any number of processes: a file gets its name when it is complete, and the manifest is
written when all files exist.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from indistill.commands.targets.job import Job, Samples, by_size, errors_of_this_rank, prepare
from indistill.config import Config, UserError
from indistill.config.destinations import remove_parts
from indistill.config.files import replacing
from indistill.data.batch import Batch
from indistill.distributed import engine
from indistill.targets import standards
from indistill.targets.manifest import (
    Manifest,
    records_path,
    save_manifest,
)

PLAIN_SECONDS = 10.0  # between lines of progress in a log


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
