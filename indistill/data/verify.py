"""Verify shards, and index many of them in parallel."""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import IO, NamedTuple

import numpy as np
from tqdm import tqdm

from indistill.config import UserError, in_one_line
from indistill.config.destinations import check_kind
from indistill.data.decode import BadImage, decode
from indistill.data.index import (
    MARK,
    Index,
    build_index,
    forget_labels,
    index_files,
    index_of,
    parse_index,
    sha256_of,
)
from indistill.data.remote import cache_for, open_shard
from indistill.data.samples import LABEL_REMEDY, Others, label_problem, samples_of, tar_of
from indistill.data.shards import expand
from indistill.distributed import preemption

log = logging.getLogger(__name__)


class BadMember(NamedTuple):
    """A problem that `verify` found."""

    shard: str
    key: str  # "" if the problem is the shard itself
    problem: str


class Content(NamedTuple):
    """What `verify` found in shards."""

    bad: list[BadMember]
    images: int
    labels: Counter[int]  # images by label, without unlabelled ones
    others: Counter[str]  # members that are neither images nor labels, by extension

    def summary(self) -> str:
        """One line of counts, and a second one if there are images without labels."""
        labelled = self.labels.total()
        span = ""
        if self.labels:
            span = f" ({min(self.labels)} to {max(self.labels)}, {len(self.labels)} different)"
        line = f"{self.images} images, {labelled} labelled{span}, {self.images - labelled} unlabelled"
        if self.others:
            counts = [f"{count} {name or 'without extension'}" for name, count in sorted(self.others.items())]
            line += f"; other members: {', '.join(counts)}"
        if self.images > labelled:
            line += (
                "\nlosses that read labels refuse images without one; data.num_classes: 0 trains without "
                f"labels; else {LABEL_REMEDY}, or name in data.label the text or JSON that has it"
            )
        return line


def verify(
    urls: str | Sequence[str],
    root: str | None = None,
    *,
    cache_dir: str | None = None,
    workers: int = 1,
    progress: bool = False,
    num_classes: int | None = None,
) -> Content:
    """Read every member, decode every image, and compare the index, if there is one, with the shard.

    urls, root, cache_dir: as for `ShardSet`. With `num_classes`, labels that training rejects are
        reported.
    """
    tasks = [(path, cache_dir, num_classes) for path in expand(urls, root)]
    whole = Content([], 0, Counter(), Counter())
    for part in parallel(_verify_shard, tasks, workers, progress):
        whole = Content(*(total + more for total, more in zip(whole, part)))
    return whole


def index(
    urls: str | Sequence[str],
    root: str | None = None,
    *,
    cache_dir: str | None = None,
    workers: int = 1,
    progress: bool = False,
    hashed: bool = False,
) -> dict[str, int]:
    """Build the index of every shard again, `hashed` with its SHA-256. Returns shard -> number of samples.

    Raises UserError for shards that cannot be indexed, after it has indexed all others.
    """
    paths = expand(urls, root)
    tasks = [(path, cache_dir, hashed) for path in paths]
    counts = dict(zip(paths, parallel(_index_shard, tasks, workers, progress)))
    faults = [fault for fault in counts.values() if isinstance(fault, str)]
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        for fault in faults:
            log.error("%s", fault)
        raise UserError(f"{len(faults)} of {len(paths)} shards cannot be indexed: see the lines above")
    return {path: count for path, count in counts.items() if isinstance(count, int)}


def _verify_shard(task: tuple[str, str | None, int | None]) -> Content:
    path, cache_dir, num_classes = task
    cache = cache_for([path], cache_dir)
    bad: list[BadMember] = []
    rows: list[tuple[str, int, int, int]] = []
    labels, others = Counter[int](), Others()

    def report(key: str, problem: str) -> None:
        bad.append(BadMember(path, key, problem))

    try:
        with open_shard(path, cache) as stream:
            for key, span, image, label in samples_of(tar_of(path, stream), report=report, others=others):
                rows.append((key, *span, label))
                if label >= 0:
                    labels[label] += 1
                malformed = bool(bad) and bad[-1].key == key  # it is reported already
                if num_classes is not None and not malformed:
                    problem = label_problem(key, label, num_classes=num_classes)
                    if problem is not None:
                        report(key, problem)
                try:
                    decode(image, "image")
                except BadImage as error:
                    report(key, str(error).removeprefix("image: "))
            if others.problem:
                report("", others.problem)
            for file in _indices_that_differ(path, cache_dir, stream, rows):
                report("", f"{file} does not fit the shard: run `indistill shards index` on it")
    except UserError as error:
        report("", str(error))
    except Exception as error:  # whatever is wrong with one shard must not end the others
        report("", in_one_line(error, with_type=True))
    return Content(bad, len(rows), labels, others.extensions)


def _indices_that_differ(
    path: str, cache_dir: str | None, stream: IO[bytes], rows: Sequence[tuple[str, int, int, int]]
) -> Iterator[str]:
    """Yield the index files of an open shard that do not fit it; `rows` are its samples."""
    size = os.fstat(stream.fileno()).st_size
    stored = {file: parse_index(file) for file in index_files(path, cache_dir) if os.path.exists(file)}
    sha256 = sha256_of(stream) if any(index.sha256 for index in stored.values()) else None
    for file, index in stored.items():
        # An index of an earlier version does not name what looks like a sample and is none.
        actual = index_of(size, rows, sha256 if index.sha256 else None)._replace(problem=index.problem)
        if not all(np.array_equal(getattr(index, name), getattr(actual, name)) for name in Index._fields):
            yield file


def _index_shard(task: tuple[str, str | None, bool]) -> int | str:
    """Index a shard; returns the number of its samples, or why it cannot be indexed."""
    path, cache_dir, hashed = task
    cache = cache_for([path], cache_dir)
    try:
        file = index_files(path, cache_dir)[0]
        check_kind(file, MARK, kind="an index", remedy="move it away, or set --cache-dir")
        if cache:
            cache.discard(path)  # so that the shard as it is now gets indexed
        forget_labels(path, cache_dir)
        return len(build_index(path, cache_dir, cache=cache, hashed=hashed).keys)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever is wrong with one shard must not end the others
        return f"{path}: cannot be indexed: {in_one_line(error, with_type=True)}"


def parallel(function: Callable, tasks: Sequence, workers: int, progress: bool) -> Iterator:
    """Yield function(task) for each task, in order, computed by `workers` processes."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
            pool = stack.enter_context(ProcessPoolExecutor(workers, spawn, preemption.end_with_parent))
            with preemption.signals_blocked(
                signal.SIGINT
            ):  # this process ends its workers (preemption.leave)
                results = pool.map(function, tasks)
        else:
            results = map(function, tasks)
        try:
            yield from tqdm(results, total=len(tasks), unit="shard", disable=None if progress else True)
        except BrokenProcessPool:
            raise UserError(
                "one of the --workers was killed, perhaps for its memory: run it again with fewer, or with "
                "--workers 1 to see which shard it reads"
            ) from None
