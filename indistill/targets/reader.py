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
    AGAIN,
    REMEDY,
    Manifest,
    check_classes,
    check_manifest,
    load_manifest,
    records_path,
    targets_root,
)
from indistill.targets.records import intact

OPEN_FILES = 512  # memory maps per process, well under the usual limit of 65,530


# --- records by sample --------------------------------------------------------------------------------------
class Reader:
    """Reads records by view and sample. Safe after fork and through pickle: open files are not copied.

    Raises UserError for a missing or damaged file, naming it.
    """

    def __init__(self, root: str, manifest: Manifest, cache_dir: str | None, cache_bytes: int) -> None:
        self.root = root
        self.manifest = manifest
        self._cache = remote.cache_for([root], cache_dir, cache_bytes)
        self._first_ids = np.cumsum([0, *manifest.samples])  # [shards + 1]
        self._open: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def check(self, data: str, samples: list[int] | None, needed: dict[str, set[int]]) -> None:
        """Raise UserError unless these are the targets of this data, with all `needed` fields in the needed
        views.

        data: fingerprint of the shards. samples: per shard, if they are known.
        """
        if data != self.manifest.data:
            fingerprints = f"{self.manifest.data[:12]}, data.train has now {data[:12]}"
            raise UserError(f"{self.root}: made from other shards (fingerprint {fingerprints}): {REMEDY}")
        if samples is not None and samples != self.manifest.samples:
            raise UserError(
                f"{self.root}/manifest.json: damaged (samples: not those of data.train): {REMEDY}"
            )
        for name, views in needed.items():
            if name not in self.manifest.fields:
                stored = ", ".join(self.manifest.fields)
                raise UserError(
                    f"{self.root}: contains {stored}, but not {name}, which this run reads: {REMEDY}"
                )
            if missing := views - set(self.manifest.fields[name].views):
                raise UserError(
                    f"{self.root}: lacks {name} in view {min(missing)}, made for other durations: {REMEDY}"
                )

    @property
    def remote(self) -> bool:
        """Whether files are fetched from a URL."""
        return self._cache is not None

    def read(self, views: int | np.ndarray, ids: np.ndarray, fields: Sequence[str]) -> dict[str, Tensor]:
        """Read and check the records of samples int64 [B] in one view, or each in its own: uint8 [B, bytes of
        a record] per field.
        """
        records = {}
        views = np.broadcast_to(views, ids.shape)
        for field in fields:
            rows = self.rows(views, ids, field)
            for bad in np.flatnonzero(~intact(rows))[:1]:
                shard = int(self._shards_of(ids[bad]))
                path = records_path(self.root, int(views[bad]), field, shard)
                raise UserError(
                    f"{path}: record {ids[bad] - self._first_ids[shard]} is damaged, or its image could not "
                    f"be decoded when the targets were made, and can be now: delete the file and {AGAIN}"
                )
            records[field] = torch.from_numpy(rows)
        return records

    def rows(self, views: int | np.ndarray, ids: np.ndarray, field: str) -> np.ndarray:
        """Read the records of one field like `read`, without checking them."""
        rows = np.empty((len(ids), self.manifest.fields[field].record.itemsize), dtype=np.uint8)
        shards = self._shards_of(ids)
        for view in np.unique(views):
            of_view = np.broadcast_to(views == view, ids.shape)
            for shard in np.unique(shards[of_view]):
                here = of_view & (shards == shard)
                rows[here] = self._map(int(view), field, int(shard))[ids[here] - self._first_ids[shard]]
        return rows

    def prefetch(self, view: int, ids: np.ndarray, fields: Sequence[str]) -> None:
        """Fetch the remote files with these records in the background."""
        assert self._cache is not None  # callers ask `remote` first
        files = [(field, int(shard)) for shard in np.unique(self._shards_of(ids)) for field in fields]
        self._cache.prefetch(
            (records_path(self.root, view, *file), self._size(*file), None) for file in files
        )

    def _shards_of(self, ids: np.ndarray | int) -> np.ndarray:
        return np.searchsorted(self._first_ids, ids, side="right") - 1

    def _size(self, field: str, shard: int) -> int:
        return self.manifest.samples[shard] * self.manifest.fields[field].record.itemsize

    def _map(self, view: int, field: str, shard: int) -> np.ndarray:
        """A file's records, uint8 [N, bytes of a record], mapped into memory."""
        path = records_path(self.root, view, field, shard)
        if path in self._open:
            return self._open[path]
        size = self._size(field, shard)
        shape = (self.manifest.samples[shard], self.manifest.fields[field].record.itemsize)
        # Opened for every read: an open file that the cache evicts would still use the disk.
        if self._cache is not None:
            with self._cache.open(path, size) as file:
                return np.memmap(file, np.uint8, "r", shape=shape)
        try:
            if (actual := os.stat(path).st_size) != size:
                raise UserError(f"{path}: {actual} bytes, not {size}: {AGAIN}")
            records = np.memmap(path, np.uint8, "r", shape=shape)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: {AGAIN}") from None
        if len(self._open) >= OPEN_FILES:
            self._open.pop(next(iter(self._open)))
        self._open[path] = records
        return records


# --- a run's stored targets ---------------------------------------------------------------------------------
def open_targets(accelerator: Accelerator, settings: Config) -> Reader:
    """Open a run's stored targets. Raises UserError, naming the difference, if another config made them."""
    root = targets_root(settings)

    def read() -> Manifest:
        manifest = load_manifest(root)
        check_classes(root, manifest, class_names.of_training(settings.data))
        check_manifest(root, manifest, settings, weights_hashes(settings))
        return manifest

    section = settings.data
    return Reader(root, engine.on_main(accelerator, read), section.cache_dir, int(section.cache_bytes))


def weights_hashes(settings: Config) -> dict[str, str | None]:
    """SHA-256 of the teacher's files, by key of the config; None for a file that is not here."""
    assert settings.teacher is not None  # a config with stored targets has one
    files = {"teacher.checkpoint": settings.teacher.checkpoint, "teacher.heads": settings.teacher.heads}
    return {
        key: sha256(Path(file), ignore_metadata_order=True) if Path(file).is_file() else None
        for key, file in files.items()
        if file
    }
