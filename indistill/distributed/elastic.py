"""Trains on as many ranks as the config can use, where the launcher may change the number of nodes.

Under torchrun with `--nnodes 1:4 --max-restarts N` a run goes on with the nodes that are left, and their
number of ranks need not divide `data.streams`. The first ranks then train as in a run of their own. The
others build nothing; they wait, and leave with success when the training is done. Every change of the nodes
ends all ranks and starts them anew.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from indistill.config.ranks import Ranks, shares_store, variables_of_first
from indistill.distributed import preemption, watchdog

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_SECONDS = 1.0
LEAVE_SECONDS = 30.0  # until the waiting ranks have noticed the end
_DONE = "indistill/done"


@contextlib.contextmanager
def training_ranks(divides: Callable[[int], bool], run_dir: Path, timeout_minutes: float) -> Iterator[None]:
    """Train within the context, on the largest number of ranks for which `divides` is true.

    The other ranks wait until the context ends on rank 0, and exit there. With a launcher that starts a fixed
    number of ranks once, all ranks train; they are refused where their number does not fit.
    """
    ranks = Ranks.from_environment()
    if ranks.may_change and ranks.is_main_process and shares_store():  # seen in torch 2.15
        print(
            "indistill: torchrun shares its store with the processes, which may not find each other when the "
            "nodes change: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on all nodes",
            file=sys.stderr,
            flush=True,
        )
    used = next((world for world in range(ranks.world_size, 0, -1) if divides(world)), ranks.world_size)
    if not ranks.may_change or used == ranks.world_size:
        yield
        return
    with watchdog.explaining(run_dir):
        store = _store(ranks, timeout_minutes)
    if ranks.rank >= used:
        _wait(store, ranks, used=used, run_dir=run_dir, timeout_minutes=timeout_minutes)
    os.environ |= variables_of_first(ranks, used)
    yield
    if ranks.is_main_process:
        _release(store, range(used, ranks.world_size))


def _store(ranks: Ranks, timeout_minutes: float) -> Store:
    """Connect all ranks; rank 0 hosts the store, which its process group will use as well."""
    import torch.distributed as dist

    timeout = timedelta(minutes=timeout_minutes)
    store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout))
    # A rank that rank 0 has counted may still wait for its first answer. If rank 0 ended now, that rank would
    # go on asking until the timeout.
    store.set(_here(ranks.rank), "")
    if ranks.is_main_process:
        store.wait([_here(rank) for rank in range(ranks.world_size)], timeout)
    return store


def _wait(store: Store, ranks: Ranks, *, used: int, run_dir: Path, timeout_minutes: float) -> None:
    """Wait for the end of the training, and exit."""
    print(
        f"indistill: rank {ranks.rank} waits until the nodes change or the run ends: of {ranks.world_size} "
        f"processes, {used} can train (data.streams)",
        flush=True,
    )
    watchdog.open(run_dir, timeout_minutes)
    watchdog.at("waiting for the ranks that train")
    try:
        while not store.check([_DONE]):
            watchdog.alive()
            time.sleep(POLL_SECONDS)
        store.set(_left(ranks.rank), "")
    except RuntimeError:  # DistError, or one of the protocol
        preemption.leave("waiting: lost the ranks that train")
    watchdog.close()
    sys.exit(0)


def _release(store: Store, waiting: range) -> None:
    """Have the waiting ranks leave before this process ends, and the store with it."""
    with contextlib.suppress(RuntimeError):  # one that is gone, or late
        store.set(_DONE, "")
        store.wait([_left(rank) for rank in waiting], timedelta(seconds=LEAVE_SECONDS))


def _here(rank: int) -> str:
    return f"indistill/here {rank}"


def _left(rank: int) -> str:
    return f"indistill/left {rank}"
