"""Check the disks of the run directory, the checkpoints and the cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Said, size_text
from indistill.commands.plan.memory import state_bytes
from indistill.config.run_dir import has_begun
from indistill.data import remote
from indistill.models import timm_model
from indistill.training import optim


def run_dir(here: Here) -> Said:
    """Writable, and of this config if there is a run in it."""
    for settings in here.settings:
        begun = has_begun(settings)  # UserError if it is another config's
        if problem := _unwritable(settings.run_dir):
            yield FAIL, f"{settings.run_dir}: cannot be written ({problem})", "choose another run_dir"
        else:
            yield (
                OK,
                f"{settings.run_dir}: can be written" + ", and holds this run, which would go on" * begun,
            )


def checkpoints(here: Here) -> Said:
    """The disk's space against what `checkpoint` keeps of the student, built as training builds it."""
    for settings in here.settings:
        if here.rank or settings.student is None:
            continue
        section = settings.student.model_copy(update={"pretrained": False, "checkpoint": None})
        student = timm_model.create(section, settings.data.num_classes, settings.data.image_size, "student")
        weights = sum(value.nbytes for value in student.state_dict().values())
        one = weights * (1 + (settings.ema is not None))
        one += state_bytes(optim.create(student, settings.optimizer))
        kept = one * (
            settings.checkpoint.keep_last + settings.checkpoint.keep_best + 1
        )  # and one being written
        free = shutil.disk_usage(existing_parent(settings.run_dir)).free
        what = f"{size_text(one)} each, up to {size_text(kept)} at a time; {settings.run_dir} has {size_text(free)} free"
        if kept > free:
            yield (
                FAIL if 2 * one > free else WARN,
                what,
                "make room, or lower checkpoint.keep_last and keep_best",
            )
        else:
            yield OK, what


def cache_dir(here: Here) -> Said:
    for section in [settings.data for settings in here.by_data if settings.data.cache_dir]:
        if problem := _unwritable(section.cache_dir):
            yield FAIL, f"{section.cache_dir}: cannot be written ({problem})", "choose another data.cache_dir"
            continue
        cached = Path(section.cache_dir, "remote-shards")
        free = shutil.disk_usage(existing_parent(section.cache_dir)).free
        have = (
            sum(file.stat().st_size for file in cached.iterdir() if file.is_file()) if cached.is_dir() else 0
        )
        what = f"{section.cache_dir}: can be written, {size_text(free)} free"
        urls = [section.train] if isinstance(section.train, str) else section.train
        if not any(remote.is_remote(os.path.join(section.root or "", url)) for url in urls):
            yield OK, what
            continue
        what += f" and {size_text(have)} of shards, of {size_text(section.cache_bytes)} (data.cache_bytes)"
        if free + have < section.cache_bytes:
            yield WARN, what, f"a larger disk, or data.cache_bytes={0.9 * (free + have):.1e}"
        else:
            yield OK, what


def existing_parent(path: str) -> Path:
    """The path, or what there is of it: a run makes the rest."""
    whole = Path(path).absolute()
    return next(place for place in [whole, *whole.parents] if place.exists())


def _unwritable(path: str) -> str | None:
    """Why nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=existing_parent(path)) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None
