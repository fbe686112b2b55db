"""Checks that all ranks agree on software, config and data before a run starts."""

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
    """Versions of indistill, torch and timm, and hashes of the sources of indistill and of the plugins."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    own = f"{__version__} (source files {digest.hexdigest()[:12]})"
    versions = {"indistill": own, "torch": torch.__version__, "timm": timm.__version__}
    return versions | plugins.source_hashes()


def setup(settings: Config) -> dict[str, Any]:
    """Software versions and config keys that all ranks must share, even keys that a restart may change."""
    return software_versions() | config.flatten(settings, without=config.NODE_KEYS)


def agree(fields: dict[str, Any]) -> None:
    """Compare the fields of all ranks (collective).

    Raises UserError, on all ranks, naming the first field that differs, two values and the ranks that have
    them.
    """
    gathered = gather_object([fields])  # one per rank
    for name in dict.fromkeys(name for one in gathered for name in one):
        values = [str(one.get(name)) for one in gathered]
        other = next((value for value in values if value != values[0]), None)
        if other is not None:
            raise UserError.of_all_ranks(
                f"the ranks disagree on {name}: {_ranks(values, values[0])} {values[0]}, "
                f"{_ranks(values, other)} {other}: start all of them with the same config, code and files"
            )


def _ranks(values: list[str], value: str) -> str:
    ranks = [str(rank) for rank, of_rank in enumerate(values) if of_rank == value]
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    shown = ranks[:_RANKS_SHOWN] + (["..."] if len(ranks) > _RANKS_SHOWN else [])
    return f"ranks {', '.join(shown)} have"
