"""Rank and world size, read from the environment. No other module reads these variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from indistill.config.base import UserError


@dataclass(frozen=True)
class Ranks:
    """Rank and world size of this process; the defaults are those of a process without a launcher."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    missing: tuple[str, ...] = ("RANK", "LOCAL_RANK")  # of these two, the variables that are not set
    # Whether the launcher may start the ranks again in other numbers: torchrun with --max-restarts.
    may_change: bool = False

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read the variables of torchrun or `accelerate launch`. Raises UserError for a malformed value.

        Do not cache the result: groups.py changes the variables while a group of ranks trains its student.
        """
        world_size = _integer("WORLD_SIZE", default=1, least=1)
        return cls(
            rank=_integer("RANK", default=0, least=0),
            world_size=world_size,
            local_rank=_integer("LOCAL_RANK", default=0, least=0),
            local_world_size=_integer("LOCAL_WORLD_SIZE", default=world_size, least=1),
            missing=tuple(name for name in ("RANK", "LOCAL_RANK") if name not in os.environ),
            may_change=_integer("TORCHELASTIC_MAX_RESTARTS", default=0, least=0) > 0,
        )

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    @property
    def leads_node(self) -> bool:
        """Whether this is the first rank of its node."""
        return self.is_main_process or (self.has_local_rank and self.local_rank == 0)

    @property
    def launched(self) -> bool:
        """Whether a launcher has given this process a rank."""
        return "RANK" not in self.missing

    @property
    def has_local_rank(self) -> bool:
        """Whether a launcher has given this process a place on its node."""
        return "LOCAL_RANK" not in self.missing


def shares_store() -> bool:
    """Whether the processes of several nodes meet in the store of torchrun's own processes."""
    nodes = _integer("GROUP_WORLD_SIZE", default=1, least=1)
    return nodes > 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def variables(rank: int, world_size: int) -> dict[str, str]:
    """Return the environment variables that give a process this rank and world size."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size)}


def variables_of_first(ranks: Ranks, world_size: int) -> dict[str, str]:
    """Return the environment variables of a rank in the world of the first `world_size` of all ranks."""
    on_node = min(ranks.local_world_size, world_size - (ranks.rank - ranks.local_rank))
    return variables(ranks.rank, world_size) | {"LOCAL_WORLD_SIZE": str(on_node)}


def _integer(name: str, *, default: int, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if text.strip().isdecimal() and int(text) >= least:
        return int(text)
    raise UserError(
        f"{name}={text} in the environment: expected an integer of at least {least}: unset {name}, or start "
        "with torchrun or accelerate launch"
    )
