"""Made-up input for a parser, which must take it or refuse it with a UserError of one printable line.

`make fuzz` tries each parser for FUZZ_SECONDS. Without that variable, each run tries the same EXAMPLES.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, example, given, seed, settings
from hypothesis import strategies as st

from indistill.config import UserError

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0"))
EXAMPLES = 30
_DIRECTIONS = {
    "LRE",
    "RLE",
    "LRO",
    "RLO",
    "PDF",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
}  # marks of the writing direction
HANG_SECONDS = 60  # that one input may take; ordinary ones take milliseconds
EXTRA_MEMORY = 2**30  # bytes that a parser may take, as in tests/hostile
_SETTINGS = settings(
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
    derandomize=not SECONDS,
)


class Hangs(BaseException):
    """An input took longer than HANG_SECONDS. Not an Exception, which a parser may take for its own."""


def fuzz(
    parse: Callable[[Any], object],
    inputs: st.SearchStrategy[Any],
    *,
    ordinary: Sequence[Any],
    first: Sequence[Any] = (),
) -> None:
    """Call `parse` with ordinary inputs, which it must take, those in `first`, and those of a strategy."""
    for value in ordinary:
        parse(value)
    end = time.monotonic() + SECONDS
    peak = _peak()

    def check(value: Any) -> None:
        if SECONDS and time.monotonic() > end:
            return
        with _time_limit():
            try:
                parse(value)
            except UserError as error:
                message = str(error)
                assert not any(map(_unsafe, message)), message
                assert 0 < len(message) < 10_000, message
        assert _peak() - peak < EXTRA_MEMORY, "fills memory"

    for value in first:
        check = example(value)(check)
    for number in itertools.count():
        test = given(inputs)(check)
        if SECONDS:
            test = seed(time.time_ns())(test)
        settings(_SETTINGS, max_examples=1000 if SECONDS else EXAMPLES)(test)()
        if time.monotonic() > end:
            print(f"rounds: {number + 1}")
            return


def _unsafe(character: str) -> bool:
    """Whether a character ends a line, changes a terminal or the order of text, or cannot be written."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(character) in _DIRECTIONS


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs(f"more than {HANG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- bytes --------------------------------------------------------------------------------------------------
_PIECES = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [b"\0", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80" + b"\xff" * 11, b"\n", b"\x1b[2J", b"-1"]
    ),
)
_EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "cut", "repeat"]),
    st.floats(0, 1),
    _PIECES,
    st.integers(1, 600),
)


def _edited(content: bytes, edits: list[tuple[str, float, bytes, int]]) -> bytes:
    for kind, where, piece, length in edits:
        at = int(where * len(content))
        if kind == "replace":
            content = content[:at] + piece + content[at + len(piece) :]
        elif kind == "insert":
            content = content[:at] + piece + content[at:]
        elif kind == "delete":
            content = content[:at] + content[at + length :]
        elif kind == "cut":
            content = content[:at]
        else:
            content = content[: at + length] + content[at:]
    return content


def mutated(*originals: bytes) -> st.SearchStrategy[bytes]:
    """One of the originals with one to six edits."""
    return st.builds(_edited, st.sampled_from(originals), st.lists(_EDIT, min_size=1, max_size=6))


# --- JSON and YAML ------------------------------------------------------------------------------------------
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\x1b[2J", "a\nb", "\r", "\ud800", "../../x", "/dev/zero", "pipe:true", "9" * 400, "x" * 70_000]
    ),
)
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**53, 2**63, 2**64, 10**400]),
    st.floats(),
    TEXTS,
)
VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
BAD_JSON = [
    b"", b"null", b"{}", b"[]", b"0", b'"a"', b"\xff\xfe", b"NaN", b"[" * 100_000, b'{"a":' * 100_000,
    b"9" * 5000,
    b"-1e999", b'{"a": 1, "a": 2}', b'["\\ud800"]',
]  # fmt: skip


def places(tree: Any) -> list[tuple[Any, ...]]:
    """The keys that lead to each value in a tree."""
    found: list[tuple[Any, ...]] = [()]
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        found += [(key, *place) for place in places(value)]
    return found


def _changed(tree: Any, place: Sequence[Any], change: str, value: Any) -> Any:
    """A copy of a tree with another value at a place, or without it."""
    if not place:
        return value
    copy = tree.copy()
    key, *rest = place
    if change == "delete" and not rest:
        del copy[key]
    elif change == "add" and not rest and isinstance(copy, dict):
        copy[str(value)[:30]] = value
    elif change == "repeat" and not rest and isinstance(copy, list):
        copy.insert(key, copy[key])
    else:
        copy[key] = _changed(copy[key], rest, change, value)
    return copy


def changed_trees(original: Any) -> st.SearchStrategy[Any]:
    """The original with one to three values that are others, missing, added or repeated."""

    def change(tree: Any, changes: list[tuple[float, str, Any]]) -> Any:
        for where, kind, value in changes:
            all_places = places(tree)
            tree = _changed(tree, all_places[int(where * (len(all_places) - 1))], kind, value)
        return tree

    kinds = st.sampled_from(["set", "set", "delete", "add", "repeat"])
    changes = st.lists(st.tuples(st.floats(0, 1), kinds, VALUES), min_size=1, max_size=3)
    return st.builds(change, st.just(original), changes)


def encoded(tree: Any) -> bytes:
    """A tree as JSON, which may hold NaN and halves of characters."""
    return json.dumps(tree).encode()


def mutated_json(original: Any) -> st.SearchStrategy[bytes]:
    """The original as JSON with other values in it, or with other bytes."""
    return changed_trees(original).map(encoded) | mutated(encoded(original))
