"""Run directories that another start, another program or another user has been at."""

from __future__ import annotations

import json
import os
from pathlib import Path

from hostile import Case, Inputs

from indistill.config import run_lock
from indistill.config.run_dir import CheckpointDir, RunDir


def run_dir(inputs: Inputs) -> RunDir:
    path = inputs.folder / "run"
    path.mkdir(exist_ok=True)
    return RunDir(path)


def no_run(inputs: Inputs) -> list[str]:
    (run_dir(inputs).path / "thesis.tex").write_text("mine")
    return inputs.train()


def still_no_run(inputs: Inputs) -> None:
    assert [path.name for path in run_dir(inputs).path.iterdir()] == ["thesis.tex"]


def taken(inputs: Inputs) -> list[str]:
    """This process, which lives, has the lock."""
    run_lock.take(run_dir(inputs).path, lambda _: None)
    return inputs.train()


def still_taken(inputs: Inputs) -> None:
    assert [path.name for path in run_dir(inputs).path.iterdir()] == [run_dir(inputs).lock.name]
    run_lock.release_all()


def strange_files(inputs: Inputs) -> list[str]:
    """An empty config, what a file manager and NFS leave, a folder of the user's, half a checkpoint."""
    files = run_dir(inputs)
    files.config.touch()
    for name in (".hidden", ".partial-step-00000001", "step-00000001"):
        (files.checkpoints / name).mkdir(parents=True)
        (files.checkpoints / name / "file").write_text("mine")
    for name in (".DS_Store", ".nfs0001"):
        (files.checkpoints / name).touch()
    (files.checkpoints / "step-00000001" / "file").rename(files.checkpoints / "step-00000001.txt")
    (files.checkpoints / "step-00000001").rmdir()
    return inputs.train()


def strange_files_stay(inputs: Inputs) -> None:
    names = {path.name for path in run_dir(inputs).checkpoints.iterdir()}
    assert names == {".DS_Store", ".nfs0001", ".hidden", "step-00000001.txt", "step-00000002"}


def pipes(inputs: Inputs) -> list[str]:
    """Pipes instead of a config and of a checkpoint's state: nothing ever comes out of them."""
    files = run_dir(inputs)
    os.mkfifo(files.config)
    state = CheckpointDir(files.checkpoint(2)).state
    state.parent.mkdir(parents=True)
    os.mkfifo(state)
    return inputs.train()


def endless_config(inputs: Inputs) -> list[str]:
    run_dir(inputs).config.symlink_to("/dev/zero")
    return inputs.train()


def forged(inputs: Inputs) -> list[str]:
    """A run with a checkpoint whose manifest is a pipe that nobody writes to."""
    files = run_dir(inputs)
    Path(inputs.write(inputs.tree())).rename(files.config)
    checkpoint = CheckpointDir(files.checkpoint(2))
    checkpoint.path.mkdir(parents=True)
    os.mkfifo(checkpoint.manifest)
    return ["export", str(files.path), str(inputs.folder / "exported")]


def escaping(inputs: Inputs) -> list[str]:
    """A checkpoint whose manifest names a file outside of it, and one of the system's."""
    forged(inputs)
    checkpoint = CheckpointDir(run_dir(inputs).checkpoint(2))
    checkpoint.manifest.unlink()
    entry = {"bytes": 0, "sha256": ""}
    names = (checkpoint.model.name, checkpoint.state.name, "/dev/zero", "../../config.yaml")
    for name in names[:2]:
        (checkpoint.path / name).touch()
    empty = {"bytes": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    checkpoint.manifest.write_text(
        json.dumps(dict.fromkeys(names[:2], empty) | dict.fromkeys(names[2:], entry))
    )
    return ["export", str(run_dir(inputs).path), str(inputs.folder / "exported")]


CASES = [
    Case("run_dir: a folder that is no run", no_run, error="no run of indistill", after=still_no_run),
    Case("run_dir: another start is at work", taken, error="another start of this run", after=still_taken),
    Case("run_dir: strange files", strange_files, after=strange_files_stay),
    Case("run_dir: pipes in it", pipes, error="config.yaml: Not a regular file, and no checkpoint says"),
    Case("run_dir: config.yaml without end", endless_config, output="it is written again"),
    Case(
        "run_dir: the manifest of a checkpoint is a pipe",
        forged,
        error="damaged .*manifest.json: cannot be read .Not a regular file",
    ),
    Case("run_dir: a manifest that names other files", escaping, error="/dev/zero.*should match pattern"),
]
