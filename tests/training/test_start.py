"""The run directory at the start of a run."""

from __future__ import annotations

import os

import pytest
import torch
from accelerate.utils import set_seed

from indistill import config
from indistill.config import UserError
from indistill.training import parts
from indistill.training.start import open_run_dir


@pytest.fixture
def settings(tree):
    return config.parse(tree, "tree")


def test_the_same_config_is_not_written_again(settings):
    file = open_run_dir(settings).config
    before = file.stat()
    assert open_run_dir(settings).config == file
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_config_that_cannot_be_written_leaves_the_old_one(settings, monkeypatch):
    """As on a full disk: a config file that is cut would have the run refused at every start."""
    file = open_run_dir(settings).config
    before = file.read_text()
    changed = settings.model_copy(update={"max_hours": 2.0})  # an operational key: the run goes on with it

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
            open_run_dir(changed)
    assert file.read_text() == before
    open_run_dir(changed)
    assert config.load(file).max_hours == 2.0
    assert [path.name for path in file.parent.iterdir() if path.name.endswith(".part")] == []


def test_a_random_teacher_does_not_start_with_the_weights_of_its_student(settings):
    """As a control it must know nothing, not what the student knows; it is the same with each call."""
    network = settings.student.model_dump() | {"random": True}
    settings = settings.model_copy(update={"teacher": config.Teacher(**network)})
    set_seed(settings.seed)
    student = parts.create_student(settings).state_dict()
    teachers = [parts.create_teacher(settings).net.state_dict() for _ in range(2)]
    assert student.keys() == teachers[0].keys()
    drawn = [key for key, value in student.items() if value.ndim > 1]  # the rest begins as zeros or ones
    assert drawn
    assert not any(torch.equal(student[key], teachers[0][key]) for key in drawn)
    assert all(torch.equal(value, teachers[1][key]) for key, value in teachers[0].items())
