"""Verify shards, and index many of them in parallel."""

import contextlib
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from indistill.config import UserError
from indistill.data.decode import BadImage, decode
from indistill.data.index import (
    LABEL_REMEDY,
    build_index,
    index_files,
    label_problem,
    make_index,
    parse_index,
    read_samples,
)
from indistill.data.remote import cache_for, open_shard
from indistill.data.shards import expand
from indistill.distributed import preemption


class BadMember(NamedTuple):
    shard: str
    key: str  # "" if it is the shard itself
    problem: str


class Content(NamedTuple):
    """What `verify` found in shards."""

    bad: list[BadMember]
    images: int
    labels: Counter[int]  # images by label; those without one are not in it
    others: Counter[str]  # members that are neither images nor labels, by extension

    def summary(self) -> str:
        """One line of counts, and one more if there are images that training refuses whatever its classes."""
        labelled = self.labels.total()
        span = (
            f" ({min(self.labels)} to {max(self.labels)}, {len(self.labels)} different)"
            if self.labels
            else ""
        )
        line = f"{self.images} images, {labelled} labelled{span}, {self.images - labelled} unlabelled"
        others = ", ".join(f"{n} {name or 'without extension'}" for name, n in sorted(self.others.items()))
        line += f"; other members: {others}" if others else ""
        if self.images > labelled:
            line += f"\ntraining refuses unlabelled images: {LABEL_REMEDY}"
        return line


def verify(
    urls: str | Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    workers: int = 1,
    progress: bool = False,
    num_classes: int | None = None,
) -> Content:
    """Read every member, decode every image, compare with the index if there is one.

    Returns all that is wrong, and what is there. With `num_classes`, labels that training would refuse are wrong.
    """
    tasks = [(path, cache_dir, num_classes) for path in expand(urls, root, allow_pipe)]
    whole = Content([], 0, Counter(), Counter())
    for part in parallel(_verify_shard, tasks, workers, progress):
        whole = Content(*(total + more for total, more in zip(whole, part)))
    return whole


def index(
    urls: str | Sequence[str],
    root: str | None = None,
    cache_dir: str | None = None,
    allow_pipe: bool = False,
    workers: int = 1,
    progress: bool = False,
) -> dict[str, int]:
    """Build the index of every shard anew. Returns samples per shard."""
    paths = expand(urls, root, allow_pipe)
    return dict(zip(paths, parallel(_index_shard, [(path, cache_dir) for path in paths], workers, progress)))


def _verify_shard(task: tuple[str, str | None, int | None]) -> Content:
    path, cache_dir, num_classes = task
    cache = cache_for([path], cache_dir)
    bad: list[BadMember] = []
    rows: list[tuple] = []
    labels, others = Counter[int](), Counter[str]()

    def report(key: str, problem: str) -> None:
        bad.append(BadMember(path, key, problem))

    try:
        with open_shard(path, cache) as stream:
            for key, place, image, label in read_samples(path, stream, report=report, others=others):
                rows.append((key, *place, label))
                labels.update([label] if label >= 0 else [])
                malformed = bool(bad) and bad[-1].key == key  # a label that is not a number is told
                problem = None if num_classes is None or malformed else label_problem(label, num_classes)
                if problem:
                    report(key, problem)
                try:
                    decode(image, "image")
                except BadImage as error:
                    report(key, str(error).removeprefix("image: "))
            size = os.fstat(stream.fileno()).st_size
        for file in filter(os.path.exists, index_files(path, cache_dir)):
            if not all(map(np.array_equal, parse_index(file), make_index(size, *zip(*rows)))):
                report("", f"{file} does not fit the shard: run `indistill shards index` on it")
    except UserError as error:
        report("", str(error))
    return Content(bad, len(rows), labels, others)


def _index_shard(task: tuple[str, str | None]) -> int:
    path, cache_dir = task
    cache = cache_for([path], cache_dir)
    if cache:
        cache.discard(path)  # the index is to be that of the shard as it now is
    return len(build_index(path, cache_dir, cache).keys)


def parallel(function: Callable, tasks: Sequence, workers: int, progress: bool) -> Iterator:
    """function(task) for each task, in order."""
    with contextlib.ExitStack() as stack:
        if workers > 1:
            spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they are
            pool = stack.enter_context(ProcessPoolExecutor(workers, spawn))
            with preemption.signals_blocked(signal.SIGINT):  # this process ends them (preemption.leave)
                results = pool.map(function, tasks)
        else:
            results = map(function, tasks)
        yield from tqdm(results, total=len(tasks), unit="shard", disable=not progress)
