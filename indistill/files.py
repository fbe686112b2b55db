"""Content hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

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
