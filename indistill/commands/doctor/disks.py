"""Check the disks of the run directory, the checkpoints and the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Said, size_text
from indistill.commands.plan.memory import state_bytes
from indistill.config import UserError
from indistill.config.run_dir import has_begun
from indistill.data import remote
from indistill.data.urls import without_file
from indistill.training import optim, parts
from indistill.training.mirror.fetch import check_mirror


def run_dir(here: Here) -> Said:
    """Check that the run directory can be written, and has no run of another config."""
    for settings in here.settings:
        begun = has_begun(settings)  # raises UserError if the run is of another config
        if problem := _unwritable(settings.run_dir):
            yield FAIL, f"{settings.run_dir}: cannot be written ({problem})", "choose another run_dir"
        else:
            resumed = ", and has this run, which would resume" if begun else ""
            yield OK, f"{settings.run_dir}: can be written{resumed}"


def checkpoints(here: Here) -> Said:
    """Compare the free disk space with the checkpoints that the run keeps."""
    for settings in here.settings:
        if here.rank or settings.student is None:
            continue
        section = settings.student.model_copy(update={"pretrained": False, "checkpoint": None})
        student = parts.create_student(settings.model_copy(update={"student": section}))
        weights = sum(value.nbytes for value in student.state_dict().values())
        one = weights * (1 if settings.ema is None else 2)
        one += state_bytes(optim.create(student, settings.optimizer))
        # One more exists while it is written.
        kept = one * (settings.checkpoint.keep_last + settings.checkpoint.keep_best + 1)
        free = shutil.disk_usage(existing_parent(settings.run_dir)).free
        what = f"{size_text(one)} each, up to {size_text(kept)} at a time; "
        what += f"{settings.run_dir} has {size_text(free)} free"
        if kept <= free:
            yield OK, what
            continue
        level = FAIL if 2 * one > free else WARN
        yield level, what, "make room, or lower checkpoint.keep_last and keep_best"


def cache_dir(here: Here) -> Said:
    """Check that the cache can be written, and has space for data.cache_bytes."""
    for settings in here.by_data:
        section = settings.data
        folder = section.cache_dir
        if not folder:
            continue
        if problem := _unwritable(folder):
            yield FAIL, f"{folder}: cannot be written ({problem})", "choose another data.cache_dir"
            continue
        cached = Path(folder, "remote-shards")
        free = shutil.disk_usage(existing_parent(folder)).free
        files = [file for file in cached.iterdir() if file.is_file()] if cached.is_dir() else []
        have = sum(file.stat().st_size for file in files)
        what = f"{folder}: can be written, {size_text(free)} free"
        urls = [section.train] if isinstance(section.train, str) else section.train
        if not any(remote.is_remote(without_file(os.path.join(section.root or "", url))) for url in urls):
            yield OK, what
            continue
        what += f" and {size_text(have)} of shards, of {size_text(section.cache_bytes)} (data.cache_bytes)"
        if free + have < section.cache_bytes:
            yield WARN, what, f"use a larger disk, or data.cache_bytes={0.9 * (free + have):.1e}"
        else:
            yield OK, what


def mirror(here: Here) -> Said:
    """Check that files of the mirror can be written, read and deleted, on each node."""
    for settings in here.settings:
        if settings.mirror is None or here.local_rank:
            continue
        try:
            check_mirror(settings)
        except UserError as error:
            yield FAIL, str(error), "mend that, choose another mirror, or remove the key"
        else:
            yield OK, f"{settings.mirror}: can be written, read and deleted"


def existing_parent(path: str) -> Path:
    """The path itself or its nearest existing parent; a run creates the rest."""
    absolute = Path(path).absolute()
    return next(folder for folder in [absolute, *absolute.parents] if folder.exists())


def _unwritable(path: str) -> str | None:
    """The reason why a directory cannot be written; None if it can."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(path)) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None
