"""Bring a node without the run, or behind it, to the state of the mirror."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from indistill.config import Config, UserError, in_one_line, run_lock, tree
from indistill.config.files import read_bytes, read_json, replace_text
from indistill.config.limits import MAX_CONFIG_BYTES, MAX_RECORD_BYTES
from indistill.config.read import load_recorded
from indistill.config.run_dir import RunDir, checkpoint_of, is_record
from indistill.data import remote
from indistill.training.checkpoint import damaged
from indistill.training.mirror.store import (
    Store,
    complete_checkpoints,
    mark_of,
    say,
    step_of,
    tried,
)


def check_mirror(settings: Config) -> None:
    """Write, read and delete a file. Raises UserError if one is not possible, or for another run's."""
    if settings.mirror is None:
        return
    store = Store(settings.mirror)
    name, content = f"check-{os.urandom(8).hex()}", os.urandom(2**10)
    doing = "written"
    try:
        store.write(name, content)
        doing = "read"
        same = store.read(name) == content
        doing = "deleted"
        store.delete([name])
        gone = name not in store.names()
    except Exception as error:  # every fsspec backend has its own exceptions
        reason = in_one_line(error, 300, with_type=not isinstance(error, OSError))
        raise UserError(f"mirror: {store.url} cannot be {doing} ({reason})") from None
    if not same:
        raise UserError(f"mirror: {store.url}: a file that was written there is another one when it is read")
    if not gone:
        raise UserError(f"mirror: {store.url}: a file that was deleted there is still there")
    if (owner := tried(store, store.owner)) is not None:
        check_owner(store, owner, RunDir.of(settings), settings)


def fetch_run(settings: Config) -> None:
    """Bring a run directory that is empty, or behind, to the state of the mirror.

    Call it on every rank, before the directory is read: of the ranks that see it one downloads, and the
    others wait. Raises UserError if the mirror cannot be read, or holds another run.
    """
    if settings.mirror is None:
        return
    store, files = Store(settings.mirror), RunDir.of(settings)
    owner = tried(store, store.owner)
    if owner is None:
        return
    check_owner(store, owner, files, settings)
    if not _missing(store, files):
        return
    try:
        files.path.mkdir(parents=True, exist_ok=True)
        with remote.locked(f"{files.path}/.mirror.lock"):
            if missing := _missing(store, files):
                replace_text(files.mirror, json.dumps({"run": owner["run"]}) + "\n")
                download(store, files, missing)
    except OSError as error:
        raise UserError(
            f"run_dir {files.path}: cannot be written ({error.strerror}): choose another"
        ) from None


def _missing(store: Store, files: RunDir) -> set[str]:
    """The files of the mirror that a run directory needs which is behind it; none if it is not behind."""
    names = tried(store, store.names)
    there = complete_checkpoints(names)
    here = [path.name for path in files.saved_checkpoints()]
    newest_there, newest_here = (max(map(step_of, steps), default=-1) for steps in (there, here))
    lacks = not files.config.exists() or (files.summary.name in names and not files.summary.exists())
    if newest_there < newest_here or (newest_there == newest_here and not lacks):
        return set()
    wanted = set(there) - set(here)
    return {name for name in names if is_record(name) or checkpoint_of(name) in wanted}


def download(store: Store, files: RunDir, names: Collection[str]) -> None:
    """Download records, then checkpoints, the newest last: until it has its name, the directory is behind.

    A checkpoint that is damaged is passed over, and no longer marked on the mirror. Raises UserError if all
    of them are damaged.
    """
    checkpoints = complete_checkpoints(names)
    if checkpoints:
        say(f"mirror: downloading {', '.join(checkpoints)} from {store.url}", out=sys.stdout)
    for name in sorted(name for name in names if is_record(name)):
        tried(store, partial(store.download, name, files.path / f".mirror-{name}"))
        (files.path / f".mirror-{name}").replace(files.path / name)
    files.checkpoints.mkdir(exist_ok=True)
    damage = {step: _download_checkpoint(store, files, step, names) for step in checkpoints}
    reasons = {step: reason for step, reason in damage.items() if reason is not None}
    for step, reason in reversed(reasons.items()):
        if len(reasons) == len(checkpoints):
            raise UserError(f"mirror: {store.url}: {step} is damaged ({reason}), and no other to go on from")
        say(f"mirror: {store.url}: {step} is damaged ({reason}) and passed over")
    if reasons:
        tried(store, lambda: store.delete([mark_of(step) for step in reasons]))


def _download_checkpoint(store: Store, files: RunDir, step: str, names: Collection[str]) -> str | None:
    """Download a checkpoint and give it its name; return what is wrong with it, or None."""
    part = files.checkpoints / f".partial-{step}"
    damage = None
    for _ in range(2):  # it may have been damaged on its way
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name in sorted(names):
            if checkpoint_of(name) == step:
                tried(store, partial(store.download, name, part / name.rpartition("/")[2]))
        damage = damaged(part)
        if damage is None:
            part.rename(files.checkpoints / step)
            return None
    shutil.rmtree(part, ignore_errors=True)
    return damage


def check_owner(store: Store, owner: dict[str, Any], files: RunDir, settings: Config) -> None:
    """Raise UserError if the mirror holds another run than the run directory, or one of another config.

    As in a run directory, a run that was refused before its first logged line does not count.
    """
    if not tried(store, store.has_begun):
        return
    mine = record_of(files).get("run")
    if mine != owner["run"] and (mine is not None or files.saved_checkpoints()):
        raise UserError(
            f"mirror: {store.url} holds another run than {files.path} ({run_lock.described(owner)}): choose "
            "another mirror, or an empty run_dir to go on with the run of the mirror"
        )
    if owner.get("config") in (None, tree.fingerprint(settings)):
        return
    difference = None
    if content := tried(store, lambda: store.read(files.config.name, MAX_CONFIG_BYTES)):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(UserError):
            path = Path(folder, files.config.name)
            path.write_bytes(content)
            difference = tree.difference(load_recorded(path), settings)
    raise UserError(
        f"mirror: {store.url} holds a run of another config ({difference or 'its fingerprint differs'}): "
        "choose another mirror"
    )


def record_of(files: RunDir) -> dict[str, str]:
    """What a run directory says of itself: `run`, and `start` of rank 0; empty if it has had no mirror."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(record := read_json(read_bytes(files.mirror, MAX_RECORD_BYTES)), dict):
            return {name: str(value) for name, value in record.items()}
    return {}
