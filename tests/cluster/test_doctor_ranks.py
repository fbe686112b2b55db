"""`indistill doctor` on two ranks: what they compare, and how rank 0 names a rank that differs or is gone."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from conftest import preload, start, unused_port
from torch import distributed

from indistill.commands import cli
from indistill.commands.doctor import findings, inputs, node, ranks, software
from indistill.commands.doctor import run as doctor_run
from indistill.commands.doctor.findings import OK, Here, Said

preload("indistill.commands.doctor.run")
HOST = socket.gethostname()


def examine(path: str, how: str, start_seconds: float, check_seconds: float) -> None:
    """Run `indistill doctor CONFIG --json` with its output in files; `how` is the fault of rank 1."""
    rank = os.environ["RANK"]
    inputs.LOOK_SECONDS, findings.START_SECONDS, findings.CHECK_SECONDS = 0.1, start_seconds, check_seconds
    if rank == "1" and how == "differs":
        clock, exists = time.time, os.path.exists
        time.time = lambda: clock() + 5.0
        torch.__version__ = "0.1"
        doctor_run.os.path.exists = lambda path: "indistill-doctor" not in str(path) and exists(path)
        node._quota = lambda: 0.5
    if how in ("hangs", "dies"):
        last = {"hangs": hangs, "dies": dies}[how]
        doctor_run.ALONE = (software.versions, ranks.start, *[last] * (rank == "1"))
    with open(f"{path}.out-{rank}", "w") as out, open(f"{path}.err-{rank}", "w") as err:
        os.dup2(err.fileno(), 2)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(["doctor", path, "--json"])
    sys.exit("doctor came back")


def hangs(here: Here) -> Said:
    time.sleep(60)
    yield OK, "at last"


def dies(here: Here) -> Said:
    os._exit(3)


def run(
    tree, tmp_path: Path, how: str = "", ranks=(0, 1), agent=False, seconds=(60.0, 60.0)
) -> tuple[list[int], Any]:
    """Return the exit codes and the output of rank 0."""
    path, port = tmp_path / "config.yaml", unused_port()
    path.write_text(json.dumps(tree))
    variables, served = {}, None
    if agent:  # as under torchrun, whose agent holds the store
        served = distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        variables = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [
        start(examine_with, variables, str(path), how, *seconds, rank=rank, world=2, port=port)
        for rank in ranks
    ]
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    del served
    assert Path(f"{path}.out-1").read_text() == "" if 1 in ranks else True
    return codes, json.loads(Path(f"{path}.out-0").read_text())


def examine_with(variables: dict[str, str], *arguments: Any) -> None:
    os.environ.update(variables)
    examine(*arguments)


def lines(output: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [line for line in output["lines"] if line["check"] == check]


def test_two_ranks(tree, tmp_path):
    codes, output = run(tree, tmp_path, agent=True)
    assert codes == [0, 0]
    assert (output["ok"], output["processes"]) == (True, 2)
    assert {line["level"] for line in output["lines"]} <= {"ok", "warn"}
    (line,) = lines(output, "start")
    assert (line["what"], line["ranks"], line["hosts"]) == ("2 processes on cpu, gloo, ddp", [0, 1], [HOST])
    (line,) = lines(output, "agreement")
    assert line["what"] == f"2 ranks on 1 node ({HOST}): the same software and config"
    (line,) = lines(output, "all reduce")
    assert line["what"].startswith("gloo: sums are right, 17 MB take ")
    (line,) = lines(output, "clocks")
    within, bound = (float(part.split()[0]) for part in line["what"].removeprefix("within ").split("± "))
    assert (line["level"], within <= bound < 1000) == (
        "ok",
        True,
    )  # both ranks have the same clock, so the difference is 0
    (line,) = lines(output, "one file system")
    assert (line["level"], line["ranks"]) == ("ok", [0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "config.yaml.err-0", "config.yaml.err-1", "config.yaml.out-0", "config.yaml.out-1",
    ]  # fmt: skip


def test_a_rank_that_differs_is_named(tree, tmp_path):
    codes, output = run(tree, tmp_path, "differs")
    assert codes == [1, 0]
    (line,) = lines(output, "agreement")
    assert (line["level"], line["ranks"]) == ("FAIL", [0, 1])
    assert f"torch: rank 0 has {torch.__version__}, rank 1 has 0.1: start all of them" in line["what"]
    (line,) = lines(output, "clocks")
    assert line["level"] == "warn"
    assert line["what"].startswith(f"rank 1 ({HOST}) is ")
    seconds, bound = float(line["what"].split()[4]), float(line["what"].split("± ")[1].split()[0]) / 1e3
    assert abs(seconds - 5.0) <= bound + 0.001
    assert "s ahead of rank 0" in line["what"]
    (line,) = [line for line in lines(output, "one file system") if line["level"] == "FAIL"]
    assert line["ranks"] == [1]
    (line,) = [
        line for line in lines(output, "cores") if line["level"] == "warn" and "0.5 of" in line["what"]
    ]
    assert line["ranks"] == [1]


def test_a_missing_rank_is_named_in_time(tree, tmp_path):
    began = time.monotonic()
    codes, output = run(tree, tmp_path, ranks=[0], seconds=(3.0, 60.0))
    assert codes == [1]
    assert time.monotonic() - began < 60
    (line,) = lines(output, "start")
    assert line["what"].startswith(
        "not finished within 3 s: of 2 processes rank 1 (host unknown) did not connect to 127.0.0.1:"
    )


def test_a_rank_that_hangs_or_dies_is_named(tree, tmp_path):
    codes, output = run(tree, tmp_path, "hangs", seconds=(60.0, 3.0))
    assert codes == [1, 0]
    (line,) = lines(output, "hangs")
    assert (line["level"], line["what"], line["ranks"]) == ("FAIL", "not finished within 3 s", [1])
    codes, output = run(tree, tmp_path, "dies", seconds=(60.0, 3.0))
    assert codes == [1, 3]
    (line,) = lines(output, "ranks")
    assert line["what"] == f"rank 1 ({HOST}) does not answer"
