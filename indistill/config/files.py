"""Read and write files safely: atomic replacement, JSON lines, SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_MAX_HEADER_BYTES = 100_000_000  # of safetensors, by its specification


def sha256(path: Path) -> str:
    """SHA-256 of a file's content.

    The header of a safetensors file is sorted first, because the library writes its metadata in random order.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header = file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
            with contextlib.suppress(ValueError):  # damaged: for train to tell
                header = json.dumps(json.loads(header), sort_keys=True).encode()
            digest.update(header)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON objects; one that was cut by a kill is left out."""
    lines = []
    if path.exists():
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


# --- the index -------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its place whole and at once. Several processes may write the same one."""
    temporary = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        with open(temporary, "wb") as stream:
            yield stream
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
