"""Open stored targets, check them against a run, and read records by sample."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from indistill.config import Config, UserError
from indistill.config.files import sha256
from indistill.data import class_names, remote
from indistill.distributed import engine
from indistill.targets.manifest import (
    Manifest,
    check_classes,
    check_manifest,
    load_manifest,
    records_path,
    targets_root,
)
from indistill.targets.records import intact

OPEN_FILES = 512  # memory maps per process, well under the usual limit of 65,530


# --- what the directory is -------------------------------------------------------------------------------------------
class Reader:
    """Records by view and sample. Safe after fork and through pickle: open files do not travel.

    Raises UserError for what is missing or damaged, naming the file.
    """

    def __init__(self, root: str, manifest: Manifest, cache_dir: str | None, cache_bytes: int) -> None:
        self.root, self.manifest = root, manifest
        self._cache = remote.cache_for([root], cache_dir, cache_bytes)
        self._first_ids = np.cumsum([0, *manifest.samples])  # [shards + 1]
        self._open: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def check(self, data: str, needed: dict[str, set[int]]) -> None:
        """Raise UserError unless these are targets of that data, with the fields in the views that are needed."""
        again = "run `indistill targets CONFIG` again, in another targets.dir, or set targets: live"
        if data != self.manifest.data:
            told = f"{self.manifest.data[:12]}, data.train has now {data[:12]}"
            raise UserError(f"{self.root}: made from other shards (fingerprint {told}): {again}")
        for name, views in needed.items():
            if name not in self.manifest.fields:
                stored = ", ".join(self.manifest.fields)
                raise UserError(f"{self.root}: holds {stored}, and not {name}, which this run reads: {again}")
            if missing := views - set(self.manifest.fields[name].views):
                raise UserError(
                    f"{self.root}: lacks {name} in view {min(missing)}, made for other durations: {again}"
                )

    @property
    def remote(self) -> bool:
        return self._cache is not None

    def read(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        """Records of samples int64 [B]: uint8 [B, bytes of a record] per field."""
        found = {}
        for field in fields:
            rows = self.rows(view, ids, field)
            for bad in np.flatnonzero(~intact(rows))[:1]:
                shard = self._shards_of(ids[bad])
                path, record = records_path(self.root, view, field, shard), ids[bad] - self._first_ids[shard]
                raise UserError(
                    f"{path}: record {record} is damaged, or its image could not be decoded when the targets were "
                    "made, and can be now: delete the file and run `indistill targets CONFIG` again"
                )
            found[field] = torch.from_numpy(rows)
        return found

    def rows(self, view: int, ids: np.ndarray, field: str) -> np.ndarray:
        """As `read` of one field, unchecked."""
        rows = np.empty((len(ids), self.manifest.fields[field].record.itemsize), dtype=np.uint8)
        shards = self._shards_of(ids)
        for shard in np.unique(shards):
            here = shards == shard
            rows[here] = self._map(view, field, int(shard))[ids[here] - self._first_ids[shard]]
        return rows

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        """Fetch the remote files that hold these records in the background."""
        files = [(field, int(shard)) for shard in np.unique(self._shards_of(ids)) for field in fields]
        self._cache.prefetch((records_path(self.root, view, *file), self._size(*file)) for file in files)

    def _shards_of(self, ids: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_ids, ids, side="right") - 1

    def _size(self, field: str, shard: int) -> int:
        return self.manifest.samples[shard] * self.manifest.fields[field].record.itemsize

    def _map(self, view: int, field: str, shard: int) -> np.ndarray:
        """A file's records, uint8 [N, bytes of a record], mapped into memory."""
        path, size = records_path(self.root, view, field, shard), self._size(field, shard)
        if path in self._open:
            return self._open[path]
        shape = (self.manifest.samples[shard], self.manifest.fields[field].record.itemsize)
        if (
            self._cache
        ):  # opened for every read: an open file that the cache evicts would go on using the disk
            with self._cache.open(path, size) as file:
                return np.memmap(file, np.uint8, "r", shape=shape)
        try:
            if (found := os.stat(path).st_size) != size:
                raise UserError(f"{path}: {found} bytes, not {size}: run `indistill targets CONFIG` again")
            records = np.memmap(path, np.uint8, "r", shape=shape)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: run `indistill targets CONFIG` again") from None
        if len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        self._open[path] = records
        return records


# --- targets that are stored -----------------------------------------------------------------------------------------
def open_targets(accelerator: Accelerator, settings: Config) -> Reader:
    """Raises UserError, naming what differs, unless the stored targets are this config's."""
    root = targets_root(settings)

    def read() -> Manifest:
        manifest = load_manifest(root)
        check_classes(root, manifest, class_names.of_training(settings.data))
        check_manifest(root, manifest, settings, weights_hashes(settings))
        return manifest

    section = settings.data
    return Reader(root, engine.on_main(accelerator, read), section.cache_dir, int(section.cache_bytes))


def weights_hashes(settings: Config) -> dict[str, str | None]:
    """By key of the config, the SHA-256 of the files that the teacher comes from; None for one that is not here."""
    files = {"teacher.checkpoint": settings.teacher.checkpoint, "teacher.heads": settings.teacher.heads}
    return {
        key: sha256(Path(file), ignore_metadata_order=True) if Path(file).is_file() else None
        for key, file in files.items()
        if file
    }
