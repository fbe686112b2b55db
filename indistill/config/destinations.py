"""What a command may overwrite and delete: files of the kind that it writes, its own unfinished files."""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from indistill.config.base import UserError

_HEAD_BYTES = 4096  # of a file, in which its mark is looked for
_PART = re.compile(r"(.+)\.\d+\.[0-9a-f]{8}\.part", re.DOTALL)  # as `files.replacing` names them


def check_kind(path: str | Path, mark: bytes, *, kind: str, remedy: str) -> None:
    """Raise UserError if `path` exists and is not a file of the `kind` that a command writes there.

    mark: what every file of that kind has in its first 4 KiB.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # else a FIFO would wait

    try:
        with open(path, "rb", opener=opener) as stream:
            ours = stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and mark in stream.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:  # a directory or a socket, or a file that cannot be read
        raise UserError(f"{path}: cannot be written ({error.strerror}): {remedy}") from None
    if not ours:
        raise UserError(f"{path}: exists and is not {kind}: {remedy}")


def remove_parts(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Delete the unfinished files that a killed process left in a folder (`files.replacing`).

    is_ours: whether the caller writes a file of this name there. All other files stay.
    """
    for path in folder.iterdir():
        name = finished_name(path.name)
        if name != path.name and is_ours(name):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()


def finished_name(name: str) -> str:
    """Return the name that an unfinished file (`files.replacing`) will have; other names stay as they are."""
    match = _PART.fullmatch(name)
    return match[1] if match else name
