"""A source distribution and a wheel are built and installed; what they install stands alone."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import BytesParser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_imports import OPTIONAL

import indistill
from indistill.commands import cli
from indistill.config.extras import EXTRAS

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
MODULES = {
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "indistill").rglob("*.py")  # follows no links
}
# Recipes and launch files have their name in the package, and their place in the repository.
DATA = {
    f"indistill/commands/{name}/{path.relative_to(REPOSITORY / folder).as_posix()}": path
    for name, folder in (("recipes", "configs"), ("launch", "launch"))
    for path in (REPOSITORY / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
FILES = {*MODULES, *DATA, "indistill/py.typed"}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
# Imports every module of the package in the current folder, as if no extra were installed.
IMPORT = f"""
import importlib, json, pkgutil, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)}))  # None: an import of it fails
import indistill
from indistill.commands import cli
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
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("indistill", "configs", "launch"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored, symlinks=True)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
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


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


def install(archive: Path, folder: Path) -> Path:
    """Install an archive, without its dependencies, into an empty folder."""
    installer = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["uv", "pip"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder)]
    subprocess.run(
        [*installer, "install", *options, str(archive)], check=True, capture_output=True, text=True
    )
    return folder


def run(command: list[str | Path], installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that imports the installed package, in a folder without the repository."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def packaged(names: list[str]) -> set[str]:
    return {name for name in names if name.startswith("indistill/") and not name.endswith("/")}


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return BytesParser().parsebytes(archive.read(name))


def test_the_source_distribution_has_every_file_of_the_package(source_distribution):
    with tarfile.open(source_distribution) as archive:
        names = [PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix() for member in archive]
    assert {name for name in packaged(names) if PurePosixPath(name).suffix} == FILES


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert packaged(names) == FILES
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"indistill"}


def test_recipes_and_launch_files_are_those_of_the_repository(installed):
    assert len(DATA) > 20
    for name, original in DATA.items():
        assert (installed / name).read_bytes() == original.read_bytes()
        assert os.access(installed / name, os.X_OK) == os.access(original, os.X_OK)


def test_the_source_distribution_installs_the_same_files(source_distribution, installed, tmp_path):
    install(source_distribution, tmp_path)
    contents = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in (folder / "indistill").rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        for folder in (tmp_path, installed)
    ]
    assert contents[0] == contents[1]


def test_every_module_of_the_wheel_can_be_imported_in_an_empty_folder(installed, tmp_path):
    result = run([sys.executable, "-c", IMPORT], installed, tmp_path)
    assert result.returncode == 0, result.stderr
    loaded = {name: Path(file) for name, file in json.loads(result.stdout.splitlines()[-1]).items()}
    assert loaded["indistill"] == installed / "indistill" / "__init__.py"
    assert {path.relative_to(installed).as_posix() for path in loaded.values()} == MODULES


def test_the_command_is_installed_and_says_the_version(installed, tmp_path):
    result = run([installed / "bin" / "indistill", "--version"], installed, tmp_path)
    assert result.stdout == f"indistill {indistill.__version__}\n", result.stderr


def test_the_metadata_is_complete(wheel):
    found = metadata(wheel)
    assert found["Version"] == indistill.__version__
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Author"]
    assert {text.split(", ")[0] for text in found.get_all("Project-URL")} == {
        "Repository", "Documentation", "Changelog", "Issues",
    }  # fmt: skip
    assert not any(text.startswith("License ::") for text in found.get_all("Classifier"))  # the old form


def test_links_of_the_long_description_lead_to_files_of_the_repository(wheel):
    text = metadata(wheel).get_payload()
    links = re.findall(r"(!?)\[[^]]*\]\(([^)\s]+)\)", text)
    address = PROJECT["urls"]["Repository"]
    ours = [(image, link) for image, link in links if link.startswith(address)]
    assert all(link.startswith("https://") for _, link in links)
    assert len(ours) > 30
    for image, link in ours:
        page, _, path = link.removeprefix(f"{address}/").partition("/main/")
        assert page == ("raw" if image else "blob")
        assert (REPOSITORY / path.partition("#")[0]).exists(), link


def test_the_extras_have_the_packages_that_messages_name():
    extras = PROJECT["optional-dependencies"]
    listed = {
        extra: {canonicalize_name(Requirement(text).name) for text in texts}
        for extra, texts in extras.items()
        if extra not in ("docs", "dev")
    }
    assert listed == {extra: set(packages.values()) for extra, packages in EXTRAS.items()}
    assert set(extras) == {"s3", "gcs", "hf", "zstd", "demo", "deepspeed", "export", "docs", "dev"}


# The demo as it is, but for the length of its runs.
DEMO = """
from indistill import config
from indistill.commands import demo
load = config.load
short = ["duration=2 steps", "warmup=null", "evaluate.retrieval=false"]
config.load = lambda path, overrides=(): load(path, [*overrides, *short])
demo.print_table = lambda runs, summaries, seconds: print(*summaries, sep="\\n")
demo.main()
"""


def test_the_demo_works_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    result = run([sys.executable, "-c", DEMO], installed, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "\nteacher\nstudent alone\nstudent with InDistill + KD\n" in result.stdout
    runs = tmp_path / "runs" / "demo"
    for name in ("teacher", "alone", "indistill"):
        assert (runs / name / "student.safetensors").exists()
        assert (runs / name / "report.html").exists()


def test_the_demo_without_its_extra_names_it_and_deletes_nothing(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "runs" / "demo" / "data" / "digits-train-000000.tar"
    mine.parent.mkdir(parents=True)
    mine.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo"])
    assert stopped.value.code == 2
    assert "the demo needs scikit-learn: pip install 'indistill[demo]'" in capsys.readouterr().err
    assert mine.exists()


def test_the_demo_replaces_only_what_a_demo_made(tmp_path, monkeypatch, capsys):
    mine = tmp_path / "runs" / "demo" / "teacher" / "student.safetensors"
    mine.parent.mkdir(parents=True)
    mine.touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo"])
    assert stopped.value.code == 2
    assert "runs/demo/teacher: the demo would replace it" in capsys.readouterr().err
    assert mine.exists()
