"""`make` replaces and deletes only what it made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the Makefile beside a run and an environment."""
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    for name in ("runs/mine/student.safetensors", ".venv/bin/python", "indistill/__pycache__/a.pyc"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_clean_deletes_only_what_make_made(folder):
    make(folder, "clean")
    assert (folder / ".venv" / "bin" / "python").exists()  # another's: it lacks the mark
    (folder / ".venv" / ".ready").touch()
    make(folder, "clean")
    assert not (folder / ".venv").exists()
    assert not (folder / "indistill" / "__pycache__").exists()
    assert (folder / "runs" / "mine" / "student.safetensors").exists()


def test_setup_replaces_no_other_environment(folder):
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    result = make(folder, "setup")
    assert result.returncode == 2
    assert ".venv was not made by make: move it away" in result.stderr
    assert (folder / ".venv" / "bin" / "python").exists()


def commands(folder: Path, *arguments: str) -> str:
    """Return what `make` would run to create an environment and then a target."""
    shutil.rmtree(folder / ".venv")
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    return make(folder, "--dry-run", *arguments).stdout


def test_the_demo_needs_no_packages_of_tests(folder):
    said = commands(folder, "demo")
    assert "--editable '.[demo]'" in said
    assert "[dev]" not in said
    assert '[ -z "" ]' in said  # no index of its own for torch
    assert "--editable '.[dev]'" in make(folder, "--dry-run", "test").stdout


def test_torch_can_come_from_an_index_of_its_own(folder):
    said = commands(folder, "demo", "TORCH_INDEX=http://localhost/cpu")
    torch = said.index('--no-deps --index-url "http://localhost/cpu" torch torchvision')
    assert torch < said.index("--editable '.[demo]'")
