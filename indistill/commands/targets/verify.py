"""Compute stored targets again, and compare."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from indistill.commands.targets.job import Job, Samples, by_size, errors_of_this_rank, prepare
from indistill.config import Config
from indistill.distributed import engine
from indistill.targets import records
from indistill.targets.manifest import (
    Manifest,
    load_manifest,
)
from indistill.targets.reader import Reader
from indistill.targets.records import Field

# Relative to a record's largest value: more than one step of its rounding, less than another image differs
# by.
TOLERANCE = 0.01


class Comparison(NamedTuple):
    """The result of recomputing one rank's share of the records."""

    wrong: list[str]  # a line for each record that differs
    records: int
    exact: int  # records that are equal bit for bit
    largest: float  # the largest relative difference of the others that are within the tolerance


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
