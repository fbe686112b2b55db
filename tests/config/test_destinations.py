"""A command overwrites and deletes only files of the kind that it writes itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from indistill.commands.report import charts
from indistill.commands.targets.job import claim
from indistill.config import UserError
from indistill.config.destinations import check_kind, remove_parts
from indistill.config.files import replacing


def test_only_a_file_of_the_kind_is_overwritten(tmp_path):
    def check(name: str) -> None:
        check_kind(tmp_path / name, b"MARK", kind="a thing", remedy="choose another")

    check("new")
    check("no-folder/new")
    (tmp_path / "ours").write_bytes(b"x" * 4000 + b"MARK")
    check("ours")
    (tmp_path / "other").write_bytes(b"x" * 4094 + b"MARK")
    with pytest.raises(UserError, match="other: exists and is not a thing: choose another"):
        check("other")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name in ("empty", "fifo", "device"):
        with pytest.raises(UserError, match=f"{name}: exists and is not a thing: choose another"):
            check(name)
    (tmp_path / "folder").mkdir()
    for name in ("folder", "ours/below"):
        with pytest.raises(UserError, match=rf"{name}: cannot be written \(.*\): choose another"):
            check(name)


def test_every_report_has_the_mark_near_its_beginning():
    page = charts.page("'" * 255, "", {"charts": [], "runs": {}}).encode()
    assert charts.MARK in page[:4096]


def test_unfinished_files_are_those_that_replacing_leaves(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", killed)
        for name in ("ours", "other"):
            with pytest.raises(ZeroDivisionError), replacing(tmp_path / name) as stream:
                stream.write(bytes(1 // 0))
    (tmp_path / "ours.part").touch()
    (tmp_path / "ours.1.0123abcd.part").mkdir()
    assert len(list(tmp_path.iterdir())) == 4
    remove_parts(tmp_path, "ours".__eq__)
    left = sorted(path.name.split(".")[0] for path in tmp_path.iterdir())
    assert left == ["other", "ours", "ours"]  # the last two: none of `replacing`


def test_targets_are_not_written_among_other_files(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex, but no targets: choose another, or empty it"):
        claim(tmp_path, None)  # type: ignore[arg-type]
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / ".DS_Store").touch()
    Path(tmp_path / "manifest.partial.json.1.0123abcd.part").touch()  # of a job that was killed at its start
    assert claim(tmp_path, None) is None  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [".DS_Store"]
