"""Which ranks train, where the launcher may change the number of nodes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from indistill.distributed import elastic


@pytest.fixture
def launched(monkeypatch):
    """The first of four ranks on two nodes, started by torchrun with --max-restarts."""
    variables = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


def says(capsys) -> str:
    with elastic.training_ranks(lambda world: world == 4, Path("run"), 1.0):
        assert os.environ["WORLD_SIZE"] == "4"
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "warned"),
    [
        ("TORCHELASTIC_USE_AGENT_STORE", "True", True),
        ("TORCHELASTIC_USE_AGENT_STORE", "False", False),
        ("TORCHELASTIC_MAX_RESTARTS", "0", False),
    ],
)
def test_a_store_that_a_lost_node_may_have_is_named(launched, capsys, name, value, warned):
    launched.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    launched.setenv(name, value)
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in says(capsys)) == warned


def test_a_fixed_number_that_does_not_fit_is_left_to_the_check_of_the_batch(launched):
    launched.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    with elastic.training_ranks(lambda world: world == 2, Path("run"), 1.0):
        assert os.environ["WORLD_SIZE"] == "4"
