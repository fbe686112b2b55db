"""What the table cannot say: a check that fails with exit code 1, and commands that are allowed to run."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import Inputs, run

LIMIT = 2**40


def test_doctor_names_a_command_and_does_not_run_it(data_dir: Path, tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, data_dir)
    tree = inputs.tree()
    tree["data"] |= {"root": None, "train": "pipe:echo", "eval": "pipe:echo", "cache_dir": str(tmp_path)}
    outcome = run(["doctor", inputs.write(tree)], tmp_path, LIMIT)
    assert (outcome.code, outcome.programs) == (1, [])
    assert "pipe:echo: runs a command" in outcome.out
    assert "Traceback" not in outcome.out + outcome.err


@pytest.mark.parametrize("workers", [1, 2])  # 2: in processes that are started anew
@pytest.mark.parametrize("by_option", [True, False])
def test_what_is_allowed_runs(data_dir: Path, tmp_path: Path, workers: int, by_option: bool) -> None:
    urls = [f"pipe:cat {data_dir}/train-{number:06d}.tar" for number in range(2)]
    options = ["--workers", str(workers), "--cache-dir", str(tmp_path / "cache")]
    options += ["--allow-pipe"] if by_option else []
    environment = {} if by_option else {"INDISTILL_ALLOW_PIPE": "1"}
    outcome = run(["shards", "verify", *urls, *options], tmp_path, LIMIT, environment)
    assert outcome.code == 0, outcome.err
    assert "0 bad members" in outcome.out
    assert len([line for line in outcome.programs if "cat " in line]) == (2 if workers == 1 else 0)
