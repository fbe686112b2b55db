"""Files that exist and may not be read are not said to be missing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from indistill.commands.cli import main
from indistill.commands.export import source
from indistill.commands.report import read
from indistill.config import UserError, plugins
from indistill.config.files import denied
from indistill.config.run_dir import RunDir
from indistill.data import shards
from indistill.models import timm_model


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextlib.contextmanager
def as_a_user() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("of_folder", [False, True])
def test_permissions_and_absence_are_told_apart(folder, of_folder):
    (folder / "inner").mkdir()
    file = folder / "inner" / "file"
    file.touch()
    (folder / "inner" if of_folder else file).chmod(0)
    with as_a_user():
        assert denied(file)
        assert not denied(folder / "nowhere")
    (folder / "inner").chmod(0o755)
    file.chmod(0o644)
    with as_a_user():
        assert not denied(file)


@pytest.mark.parametrize(
    "use",
    [
        lambda folder: timm_model._read_state_dict(str(folder / "file"), "teacher"),
        lambda folder: plugins.load_file(str(folder / "file")),
        lambda folder: shards.expand(str(folder / "file.tar"), None),
        lambda folder: shards.expand(str(folder / "*.tar"), None),
        lambda folder: RunDir(folder.parent).saved_checkpoints(),
        lambda folder: source.find(folder),
        lambda folder: read.run_dirs(folder),
    ],
)
def test_whatever_opens_a_file_says_so(folder: Path, use: Callable[[Path], object]):
    inner = folder / "checkpoints"
    inner.mkdir()
    for name in ("file", "file.tar", "config.yaml"):
        (inner / name).touch()
    inner.chmod(0)
    with as_a_user(), pytest.raises(UserError, match=r"(?i)permission denied") as error:
        use(inner)
    assert "\n" not in str(error.value)


def test_the_command_line_says_it_in_one_line(folder, capsys):
    (folder / "shard.tar").write_bytes(b"\0" * 10240)
    (folder / "shard.tar").chmod(0)
    with as_a_user(), pytest.raises(SystemExit) as exit_:
        main(["shards", "index", "--workers", "1", str(folder / "shard.tar")])
    assert exit_.value.code == 2
    *_, line = capsys.readouterr().err.strip().splitlines()  # below the progress
    assert line.startswith(f"indistill: error: {folder}/shard.tar: cannot be opened: Permission denied")
