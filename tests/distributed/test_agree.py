"""What ranks compare before a run starts."""

from __future__ import annotations

import shutil

import pytest
from accelerate import Accelerator

from indistill.config import UserError
from indistill.distributed import agree as distributed_agree
from indistill.distributed.agree import agree, software_versions


def test_a_changed_source_file_is_another_version(tmp_path, monkeypatch):
    for folder in ("distributed", "losses"):
        (tmp_path / folder).mkdir()
    copy = shutil.copy(distributed_agree.__file__, tmp_path / "distributed")
    monkeypatch.setattr(distributed_agree, "__file__", copy)
    first = software_versions()
    assert software_versions() == first
    (tmp_path / "losses" / "new_loss.py").write_text("")
    second = software_versions()
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} == {"indistill"}


def test_who_differs_is_told(monkeypatch):
    told = (
        [{"seed": 1, "data": "a"}] * 9
        + [{"seed": 1, "data": "b"}, {"seed": 1, "data": "c"}]
        + [{"data": "b"}] * 2
    )
    monkeypatch.setattr(distributed_agree, "gather_object", lambda mine: told)
    with pytest.raises(
        UserError, match=r"seed: ranks 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. have 1, ranks 11, 12 have None: "
    ):
        agree({})
    told[11:] = []
    with pytest.raises(UserError, match=r"data: ranks 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. have a, rank 9 has b: "):
        agree({})
    told[9:] = []
    agree({})


def test_one_process_agrees_with_itself():
    Accelerator()
    agree({"seed": 1})
