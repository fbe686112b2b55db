"""Expand the braces of shard patterns, counted before the first path is made."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from braceexpand import braceexpand

from indistill.config import UserError
from indistill.config.limits import MAX_BRACE_DEPTH, MAX_SHARDS, MAX_SHARDS_CHARACTERS

_PARTS = re.compile(r"\\.|[{},]|[^\\{},]+|\\", re.DOTALL)
_RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_LONG_RANGE = re.compile(r"-?\d+\.\.-?\d+(\.\.-?\d+)?|[-.\d]{64}")
_RANGE_CHARACTERS = 64  # of a text in braces that are looked at, to see whether it is a range
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](\.\.-?\d+)?")


def expand_braces(pattern: str) -> list[str]:
    """Expand the braces and `~` of a pattern, in order.

    Raises UserError for braces that do not match, and for more shards than MAX_SHARDS.
    """
    try:
        os.fsencode(pattern)
        expanded = os.path.expanduser(pattern)
    except ValueError as error:
        raise UserError(f"{pattern}: is not a path: {error}: correct it") from None
    number, length = _count(expanded)
    if number > MAX_SHARDS:
        raise UserError(f"{pattern}: names more than {MAX_SHARDS:,} shards: correct the braces")
    if number > 1 and number * length > MAX_SHARDS_CHARACTERS:
        raise UserError(
            f"{pattern}: names {number:,} shards, in more than {MAX_SHARDS_CHARACTERS:,} characters: correct "
            "the braces"
        )
    try:
        return list(braceexpand(expanded))
    except ValueError as error:
        raise UserError(f"{pattern}: {error}: correct the braces") from None


@dataclass
class _Open:
    """What has been read of an open brace, or of the pattern itself."""

    paths: int = 0  # of the alternatives before the last comma
    longest: int = 0  # of these paths, in characters
    product: int = 1  # paths of the alternative that is being read
    length: int = 0  # of these paths
    text: str = ""  # the beginning of its own text, which may be a range


def _count(pattern: str) -> tuple[int, int]:
    """The number and length of the paths that a pattern expands to, or more; MAX_SHARDS + 1 if too many."""
    stack = [_Open()]
    for part in _PARTS.findall(pattern):
        if part == "{":
            stack.append(_Open())
            if len(stack) > MAX_BRACE_DEPTH:
                raise UserError(f"{pattern}: more than {MAX_BRACE_DEPTH} braces in each other: remove some")
            continue
        here = stack[-1]
        if part == "," and len(stack) > 1:
            here.paths, here.longest = here.paths + here.product, max(here.longest, here.length)
            here.product, here.length = 1, 0
        elif part == "}":
            if len(stack) == 1:
                raise UserError(f"{pattern}: a }} without a {{ before it: correct the braces")
            inner = stack.pop()
            here = stack[-1]
            paths = inner.paths + inner.product * _length(inner.text)
            here.product = min(here.product * paths, MAX_SHARDS + 1)
            here.length += 1 + max(inner.longest, inner.length)  # the brace may be literal
        here.length += len(part)
        here.text = (here.text + part)[:_RANGE_CHARACTERS]
    return stack[0].product, stack[0].length


def _length(text: str) -> int:
    """The number of items in the braces around a text without commas."""
    if match := _RANGE.fullmatch(text):
        first, last, step = (int(number or 1) for number in match.groups())
        return abs(last - first) // (step or 1) + 1
    if _LONG_RANGE.fullmatch(text):
        return MAX_SHARDS + 1
    return 52 if _LETTERS.fullmatch(text) else 1  # there are 52 letters
