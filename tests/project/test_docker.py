"""The images' recipe, as far as it can be read without building it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILE = REPOSITORY / "docker" / "Dockerfile"
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent)


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Of each stage what it builds upon, and its instructions with their arguments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            origin, _, name = rest.partition(" AS ")
            found[name] = (origin, instructions := [])
        elif line:
            instructions.append((word, rest))
    return found


def history(name: str) -> list[tuple[str, str]]:
    """What has led to a stage, from its base image on."""
    if name not in stages():
        return []
    origin, instructions = stages()[name]
    return history(origin) + instructions


def copied(name: str) -> list[str]:
    """What a stage's history has from the repository."""
    copies = [rest.split() for word, rest in history(name) if word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint for this platform")
def test_hadolint_finds_nothing():
    result = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_what_is_copied_is_there_and_reaches_the_builder():
    everything, *exceptions = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if not line.startswith("#")
    ]
    assert everything == "*"
    sources = {source for name in stages() for source in copied(name)}
    assert {f"!{source}" for source in sources} == {line for line in exceptions if line.startswith("!")}
    assert all((REPOSITORY / source).exists() for source in sources)


def test_everything_from_outside_is_pinned():
    (outside,) = {origin for origin, _ in stages().values()} - stages().keys()
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", outside)
    installs = [
        rest for name in stages() for word, rest in stages()[name][1] if word == "RUN" and " install " in rest
    ]
    assert len(installs) == 4
    for install in installs:
        assert "constraints.txt" in install or re.search(r" uv==[\d.]+$", install)


@pytest.mark.parametrize("packages", ["cuda-packages", "cpu-packages"])
def test_a_change_of_the_source_keeps_the_layers_of_packages(packages):
    assert copied(packages) == ["pyproject.toml", "constraints.txt"]


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_an_image_runs_the_command_as_somebody(image):
    last = dict(history(image))
    assert last["USER"] == "1000"
    assert last["ENTRYPOINT"] == '["indistill"]'
    assert "indistill" in tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("name", ["job", "spot", "pytorchjob"])
def test_kubernetes_finds_its_files_in_the_image(name):
    text = (REPOSITORY / "launch" / "kubernetes" / f"{name}.yaml").read_text()
    (folder,) = set(re.findall(r"workingDir: (\S+)", text))
    assert folder == dict(history("cuda"))["WORKDIR"]
    (group,) = set(re.findall(r"fsGroup: (\d+)", text))
    assert group == dict(history("cuda"))["USER"]
    used = set(re.findall(r"\b(?:launch|configs)/[\w./]+", str(list(yaml.safe_load_all(text)))))
    assert used
    assert {path.partition("/")[0] for path in used} <= set(copied("cuda"))
