"""Rank and world size as a launcher sets them, missing or malformed; only one file reads them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import indistill
from indistill.commands import cli
from indistill.config import UserError
from indistill.config.ranks import Ranks, variables, variables_of_first

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher():
    ranks = Ranks.from_environment()
    assert ranks == Ranks()
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.local_world_size) == (0, 1, 0, 1)
    assert ranks.is_main_process
    assert not ranks.launched
    assert not ranks.has_local_rank


def test_a_launched_process(monkeypatch):
    for name, value in zip(NAMES, ("5", "8", "1", "4", "0")):
        monkeypatch.setenv(name, value)
    ranks = Ranks.from_environment()
    assert ranks == Ranks(5, 8, 1, 4, missing=())
    assert not ranks.may_change
    assert not ranks.is_main_process
    assert ranks.launched
    assert ranks.has_local_rank


def test_a_launcher_with_restarts_may_change_the_number_of_nodes(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert Ranks.from_environment().may_change


def test_a_change_of_the_environment_counts(monkeypatch):
    """As for a group of ranks: rank and world size change, the place on the node stays."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    for name, value in variables(2, 4).items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment() == Ranks(2, 4, 3, local_world_size=4, missing=())


@pytest.mark.parametrize(("first", "here"), [(2, 2), (4, 4), (6, 2)])
def test_the_first_of_all_ranks(first, here):
    """Two nodes of four ranks; the last rank that takes part."""
    last = Ranks(first - 1, 8, (first - 1) % 4, 4)
    expected = {"RANK": str(first - 1), "WORLD_SIZE": str(first), "LOCAL_WORLD_SIZE": str(here)}
    assert variables_of_first(last, first) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", ["abc", "", "-1", "1.0"])
def test_a_malformed_value_is_one_error(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=f"^{name}={value} in the environment: expected an integer of at least [01]: "
    ):
        Ranks.from_environment()
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "any.yaml"])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"indistill: error: {name}={value} in the environment: ")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_WORLD_SIZE"])
def test_there_is_at_least_one_process(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=f"^{name}=0 in the environment: expected an integer of at least 1: "):
        Ranks.from_environment()


def test_no_other_file_names_the_variables():
    package = Path(indistill.__file__).parent
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in NAMES
    }
    assert files == {"config/ranks.py"}
