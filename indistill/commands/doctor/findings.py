"""The input and the result of a check of `indistill doctor`."""

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
Item = tuple[str, str] | tuple[str, str, str]  # level, finding and, unless the finding has it, the remedy
Said = Iterator[Item]

START_SECONDS = 120.0  # for all ranks to import torch, perhaps from a slow disk, and to connect
CHECK_SECONDS = 60.0  # for any other check, including its wait for other ranks
MOST_SHOWN = 8  # at most so many ranks in a line, and lines of a check


class Line(NamedTuple):
    """A finding of this process."""

    check: str
    level: str
    what: str
    remedy: str = ""


class Finding(NamedTuple):
    """A line, and the ranks that reported it."""

    check: str
    level: str
    what: str
    remedy: str
    ranks: list[int]
    hosts: list[str]


class Here:
    """The input of the checks: the configs (none: the machine alone), and this process among the others."""

    def __init__(self, stages: Sequence[tuple[str, Config]] = ()) -> None:
        self.stages = stages
        self.settings = [settings for _, settings in stages]
        self.ranks = Ranks.from_environment()
        self.rank, self.world = self.ranks.rank, self.ranks.world_size
        self.local_rank, self.local_world = self.ranks.local_rank, self.ranks.local_world_size
        self.host = socket.gethostname()
        self.hosts = {self.rank: self.host}
        self._store: dist.TCPStore | None = None
        self.met = False  # whether the ranks have formed a process group
        self.device = torch.device("cpu")
        self.found: list[Line] = []
        self.at = "", 0.0  # the running check, and when it started by time.monotonic

    @cached_property
    def machine(self) -> config.Machine:
        return self.settings[0].machine if self.settings else config.Machine()

    @cached_property
    def uses_deepspeed(self) -> bool:
        in_environment = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        return in_environment or any(
            isinstance(settings.engine, config.DeepSpeed) for settings in self.settings
        )

    @cached_property
    def by_data(self) -> list[Config]:
        """One config for each different section `data`; most stages and all students share one."""
        return list({settings.data.model_dump_json(): settings for settings in self.settings[::-1]}.values())

    # --- messages between ranks -----------------------------------------------------------------------------

    def connect(self, seconds: float) -> None:
        """Connect to the process group's store, on the first node. Raises dist.DistError."""
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        timeout = timedelta(seconds=seconds)
        self._store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    @property
    def store(self) -> dist.TCPStore:
        assert self._store is not None  # ranks send and receive only after `connect`
        return self._store

    def send(self, topic: str, value: Any) -> None:
        """Store a value as JSON for other ranks to receive."""
        self.store.set(f"doctor/{topic}/{self.rank}", json.dumps(value))

    def receive(self, topic: str, rank: int, seconds: float) -> Any:
        """Wait for the value that `rank` sends; None if it does not arrive in time."""
        key = f"doctor/{topic}/{rank}"
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except (dist.DistError, ValueError):  # ValueError: not JSON, from a stranger
            return None

    def all_ready(self) -> bool:
        """Whether every rank has called this. Rank 0 decides; it also sends all ranks the hosts."""
        if self.rank:
            self.send("ready", self.host)
            hosts = self.receive("go", 0, 2 * CHECK_SECONDS)
        else:
            end = time.monotonic() + CHECK_SECONDS
            hosts = [self.host]
            hosts += [self.receive("ready", rank, end - time.monotonic()) for rank in range(1, self.world)]
            hosts = None if None in hosts else hosts
            self.send("go", hosts)
        self.hosts |= dict(enumerate(hosts or ()))
        return hosts is not None

    def named(self, ranks: Sequence[int]) -> str:
        """Name ranks with their hosts, for example `rank 3 (node1)`."""
        names = [f"{rank} ({self.hosts.get(rank, 'host unknown')})" for rank in ranks]
        return f"{counted_word('rank', ranks)} {listed(names)}"


# --- text -----------------------------------------------------------------------------------------------
def size_text(number: float) -> str:
    """Bytes in kB, MB, GB or TB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def counted_word(word: str, counted: int | Sequence[object]) -> str:
    """The word in the plural, unless it counts one thing."""
    count = counted if isinstance(counted, int) else len(counted)
    if count == 1:
        return word
    return f"{word}es" if word.endswith("s") else f"{word}s"


def listed(names: Sequence[object]) -> str:
    """The first MOST_SHOWN names, separated by commas."""
    text = ", ".join(map(str, names[:MOST_SHOWN]))
    return f"{text}, ..." if len(names) > MOST_SHOWN else text
