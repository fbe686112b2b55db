"""Wildcards name what `glob` finds, and not more than a limit."""

from __future__ import annotations

import glob
from pathlib import Path

import pytest

from indistill.config import UserError
from indistill.data import wildcards
from indistill.data.wildcards import expand_wildcards

PATTERNS = (
    "*",
    "*/*",
    "a/*.tar",
    "./[ab]/x-?.tar",
    ".*",
    "*/",
    "a/none",
    "a/x-1.tar",
    "a/x-1.tar/",
    "a/../*",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a/x-1.tar", "a/x-2.tar", "a/.x.tar", "b/x-1.tar", ".c/x-1.tar", "[d]/x.tar", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_glob(folder: Path, pattern: str):
    for whole in (pattern, f"{folder}/{pattern}"):
        assert expand_wildcards(whole) == sorted(glob.glob(whole))


def test_an_escaped_folder(folder: Path):
    assert expand_wildcards(f"{glob.escape('[d]')}/*.tar") == ["[d]/x.tar"]


def test_too_many_names(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wildcards, "MAX_LISTED_NAMES", 100)
    with pytest.raises(UserError, match="leads to too many files and folders"):
        expand_wildcards("*/../" * 10 + "*.tar")
    assert expand_wildcards("*/" * 5000 + "*.tar") == []
