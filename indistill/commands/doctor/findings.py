"""What a check of `indistill doctor` is given, and what it finds."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from indistill import config
from indistill.config import Config
from indistill.config.ranks import Ranks

OK, WARN, FAIL = "ok", "warn", "FAIL"
Item = (
    tuple[str, str] | tuple[str, str, str]
)  # level, what, and what to do about it where that does not say so
Said = Iterator[Item]

START_SECONDS = 120.0  # for all ranks to import torch, from a file system that may be cold, and to meet
CHECK_SECONDS = 60.0  # for any other check, with its wait for other ranks
MOST_SHOWN = 8  # ranks in a line, and lines of a check


class Line(NamedTuple):
    check: str
    level: str
    what: str
    remedy: str = ""


class Finding(NamedTuple):
    """A line and the ranks that have it."""

    check: str
    level: str
    what: str
    remedy: str
    ranks: list[int]
    hosts: list[str]


class Here:
    """What the checks look at: configs (none: the machine alone), and this process among the others."""

    def __init__(self, stages: Sequence[tuple[str, Config]] = ()) -> None:
        self.stages, self.settings = stages, [settings for _, settings in stages]
        self.ranks = Ranks.from_environment()
        self.rank, self.world = self.ranks.rank, self.ranks.world_size
        self.local_rank, self.local_world = self.ranks.local_rank, self.ranks.local_world_size
        self.host = socket.gethostname()
        self.hosts = {self.rank: self.host}
        self.store: dist.TCPStore | None = None
        self.met = False  # the ranks, in a process group
        self.device = torch.device("cpu")
        self.found: list[Line] = []
        self.at = "", 0.0  # the check under way, and since when by time.monotonic

    @cached_property
    def machine(self) -> config.Machine:
        return self.settings[0].machine if self.settings else config.Machine()

    @cached_property
    def uses_deepspeed(self) -> bool:
        asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        return asked or any(isinstance(settings.engine, config.DeepSpeed) for settings in self.settings)

    @cached_property
    def by_data(self) -> list[Config]:
        """The first config of each section `data`: most stages and all students share one."""
        return list({settings.data.model_dump_json(): settings for settings in self.settings[::-1]}.values())

    # --- what ranks tell each other -----------------------------------------------------------------------------

    def connect(self, seconds: float) -> None:
        """To the store where the process group meets, on the first node. Raises dist.DistError."""
        address, port, timeout = (
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timedelta(seconds=seconds),
        )
        self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def tell(self, topic: str, value: Any) -> None:
        self.store.set(f"doctor/{topic}/{self.rank}", json.dumps(value))

    def hear(self, topic: str, rank: int, seconds: float) -> Any:
        """None if that rank has not told it by then."""
        key = f"doctor/{topic}/{rank}"
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except dist.DistError:
            return None

    def all_ready(self) -> bool:
        """Whether every rank has come this far. Rank 0 decides; all know each other's hosts then."""
        if self.rank:
            self.tell("ready", self.host)
            hosts = self.hear("go", 0, 2 * CHECK_SECONDS)
        else:
            end = time.monotonic() + CHECK_SECONDS
            hosts = [self.host] + [
                self.hear("ready", rank, end - time.monotonic()) for rank in range(1, self.world)
            ]
            hosts = None if None in hosts else hosts
            self.tell("go", hosts)
        self.hosts |= dict(enumerate(hosts or ()))
        return hosts is not None

    def named(self, ranks: Sequence[int]) -> str:
        """As in: rank 3 (node1)."""
        names = [f"{rank} ({self.hosts.get(rank, 'host unknown')})" for rank in ranks[:MOST_SHOWN]]
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}" + ", ..." * (len(ranks) > MOST_SHOWN)


# --- the node -----------------------------------------------------------------------------------------------
def size_text(number: float) -> str:
    unit, least = next(
        ((u, n) for u, n in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if number >= n), ("kB", 1e3)
    )
    return f"{number / least:.3g} {unit}"
