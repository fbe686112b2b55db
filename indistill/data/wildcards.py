"""Expand the wildcards of paths, within limits: `glob` follows `/*/../*/..` as long as there are names."""

from __future__ import annotations

import fnmatch
import glob
import os

from indistill.config import UserError
from indistill.config.limits import MAX_LISTED_NAMES, MAX_NAME_BYTES, MAX_SHARDS_CHARACTERS


def expand_wildcards(pattern: str) -> list[str]:
    """Return the existing paths that a pattern with `*`, `?` and `[...]` names, sorted, as `glob.glob` does.

    Raises UserError for a pattern that names too many paths, or too many folders on the way to them.
    """
    paths = ["/" if pattern.startswith("/") else ""]
    listed = 0
    *folders, last = pattern.split("/")
    for part in (*filter(None, folders), last):  # the last one may be empty: then only a folder fits
        found: list[str] = []
        characters = 0
        for path in paths:
            names = _names(path) if glob.has_magic(part) else [part]
            listed += len(names) + 1
            below = [os.path.join(path, name) for name in _matching(names, part)]
            found += [one for one in below if len(one) <= MAX_NAME_BYTES]  # a longer one cannot exist
            characters += sum(map(len, below))
            if listed > MAX_LISTED_NAMES or characters > MAX_SHARDS_CHARACTERS:
                raise UserError(f"{pattern}: leads to too many files and folders: correct the pattern")
        paths = found
    return sorted(filter(os.path.lexists, paths))


def _names(folder: str) -> list[str]:
    """The names in a folder; none if it is not a folder, or cannot be read."""
    try:
        return os.listdir(folder or ".")
    except OSError:
        return []


def _matching(names: list[str], part: str) -> list[str]:
    """The names that a part of a pattern matches; hidden ones only if it begins with a dot, as in a shell."""
    if not glob.has_magic(part):
        return names
    matching = fnmatch.filter(names, part)
    return matching if part.startswith(".") else [name for name in matching if not name.startswith(".")]
