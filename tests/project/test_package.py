"""What is installed from a source distribution or a wheel is all of the package."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from test_imports import OPTIONAL

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = {
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "indistill").rglob("*")
    if path.suffix == ".py" or path.name == "py.typed"
}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# Imports every module of the package in the current folder, as if no extra were installed.
IMPORT = f"""
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))  # None: an import of it fails
import indistill
modules = ["indistill", *(module.name for module in pkgutil.walk_packages(indistill.__path__, "indistill."))]
print(json.dumps({{name: importlib.import_module(name).__file__ for name in modules}}))
"""


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a "wheel" or "sdist" of `source` in `folder`, without the network; returns the archive."""
    folder.mkdir()
    command = [sys.executable, "-c", BUILD, f"build_{kind}", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory) -> Path:
    """A source distribution, built from a copy: setuptools writes beside what it builds."""
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "repository"
    shutil.copytree(
        REPOSITORY / "indistill", copy / "indistill", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    return build("sdist", copy, folder / "dist")


@pytest.fixture(scope="module")
def wheel(source_distribution, tmp_path_factory) -> Path:
    """A wheel, built from the source distribution as `python -m build` does."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(source_distribution) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return build("wheel", source, folder / "dist")


def packaged(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("indistill/") and not name.endswith("/")}


def test_the_source_distribution_has_every_file_of_the_package(source_distribution):
    with tarfile.open(source_distribution) as archive:
        names = [PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix() for member in archive]
    assert packaged(names) - {"indistill"} >= FILES


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert packaged(names) == FILES
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"indistill"}


def test_every_module_of_the_wheel_can_be_imported_in_an_empty_folder(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    loaded = {name: Path(file) for name, file in json.loads(result.stdout.splitlines()[-1]).items()}
    assert loaded["indistill"] == tmp_path / "indistill" / "__init__.py"
    assert {path.relative_to(tmp_path).as_posix() for path in loaded.values()} == FILES - {
        "indistill/py.typed"
    }
