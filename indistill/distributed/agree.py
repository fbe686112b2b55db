"""What keeps a run of many processes sound: ranks that do not agree never start, a bad step leaves no trace."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate.utils import gather_object

from indistill import __version__, config
from indistill.config import Config, UserError, plugins

_RANKS_SHOWN = 8


def software_versions() -> dict[str, str]:
    """Name to version of what computes; of this package, and of losses of the user's own, the source files count."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    ours = f"{__version__} (source files {digest.hexdigest()[:12]})"
    versions = {"indistill": ours, "torch": torch.__version__, "timm": timm.__version__}
    return versions | plugins.source_hashes()


def setup(settings: Config) -> dict[str, Any]:
    """The software and every key of the config that all ranks must share: also those that a later start may change."""
    return software_versions() | config.flatten(settings, without=config.NODE_KEYS)


def agree(fields: dict[str, Any]) -> None:
    """Compare the fields of all ranks, each of which must call this (a collective).

    Raises UserError, on all of them, naming the first field that differs, both values and who holds them.
    """
    told = gather_object([fields])  # one per rank
    for name in dict.fromkeys(name for one in told for name in one):
        values = [str(one.get(name)) for one in told]
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            raise UserError(
                f"the ranks disagree on {name}: {_ranks(values, values[0])} {values[0]}, {_ranks(values, other)} "
                f"{other}: start all of them with the same config, code and files"
            )


def _ranks(values: list[str], value: str) -> str:
    ranks = [str(rank) for rank, of_rank in enumerate(values) if of_rank == value]
    shown = ", ".join(ranks[:_RANKS_SHOWN]) + ", ..." * (len(ranks) > _RANKS_SHOWN)
    return f"rank {shown} has" if len(ranks) == 1 else f"ranks {shown} have"
