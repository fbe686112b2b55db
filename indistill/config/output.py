"""What leaves the process as text: printable, whatever names from outside it contains."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from indistill.config.base import printable

_COLOUR = re.compile(
    r"\x1b\[[\d;]*m"
)  # of libraries; lost, because what follows ESC is not looked at further
# What tqdm writes: moves alone, or a bar between them.
_MOVES = re.compile(r"(\x1b\[A|[\r\n])*")
_BAR = re.compile(r"([\r\n]*)(.*?)([\r\n]*)", re.DOTALL)


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Show other characters than printable ones as escapes on standard output and error, whoever writes them.

    Tracebacks, warnings, log lines and libraries' messages pass through here, too, and quote what they were
    given: an ESC in a file name would change the terminal. A line break stays one, so a message that must be
    one line makes its names `printable` itself, as UserError does.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout = _Printable(sys.stdout)
    sys.stderr = _Printable(sys.stderr, bars=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Printable:
    """A text stream that writes printable characters only; with `bars` also the moves of progress bars."""

    def __init__(self, stream: TextIO, bars: bool = False) -> None:
        self._stream = stream
        self._bars = bars

    def write(self, text: str) -> int:
        text = _COLOUR.sub("", text)
        begin = end = ""
        if self._bars and _MOVES.fullmatch(text):
            begin, text = text, ""
        elif self._bars and (parts := _BAR.fullmatch(text)):
            begin, text, end = parts.groups()
        self._stream.write(f"{begin}{printable(text, lines=True)}{end}")
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
