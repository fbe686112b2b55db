"""The lowest versions that pyproject.toml allows, and those that are installed by default."""

from __future__ import annotations

import tomllib
from pathlib import Path

from floors import floors
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


def test_every_package_that_is_used_has_a_floor():
    """Only type stubs and the extras of this package have none."""
    without = {requirement.name for requirement in requirements()} - floors().keys()
    assert {name for name in without if not name.startswith("types-")} == {"indistill"}


def test_the_floors_are_what_the_specifiers_allow():
    for requirement in requirements():
        if requirement.name in floors():
            assert str(requirement.specifier) == f">={floors()[requirement.name]}"


def test_the_pinned_versions_are_allowed():
    lines = (ROOT / "constraints.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines)
    for requirement in requirements():
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, requirement
