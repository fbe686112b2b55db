"""Ctrl-C on real processes, started by hand, by torchrun and by accelerate launch."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_ranks, unused_port

from indistill.config import runs
from indistill.config.files import read_lines
from indistill.training import runs as training_runs

# The command line with a third step that waits for the signal, because machine and launcher may be slow.
WAITING = """
import os, sys, time
from pathlib import Path
from indistill.commands import cli
from indistill.distributed import preemption
from indistill.training import loop
rank = os.environ.get("RANK", "0")  # each group of ranks has its own numbering
make_mix = loop.make_mix
calls = []

def waiting(*arguments):
    inner = make_mix(*arguments)

    def mix(batch, phase):
        calls.append(1)
        if len(calls) == 3:
            Path(sys.argv[2]).with_name("reached-" + rank).touch()
            while not preemption.asked():
                time.sleep(0.01)
        return inner(batch, phase)

    return mix

loop.make_mix = waiting
cli.main(sys.argv[1:])
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "{port}",
]  # fmt: skip

RATES = (("slow", 1e-4), ("fast", 1e-3))


def in_a_terminal(arguments: list[str]) -> subprocess.Popen:
    """Start a process group of its own, as a terminal does; the test's own shell may ignore SIGINT."""
    return subprocess.Popen(
        [sys.executable, *(part.format(port=unused_port()) for part in arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(*paths: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not all(path.exists() for path in paths):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, paths
        time.sleep(0.02)


def losses(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the status of each run at or below a folder."""
    return {
        str(file.parent.relative_to(run_dir)): [
            (x["step"], x["loss"]) for x in read_lines(file) if "loss" in x
        ]
        for file in run_dir.rglob("metrics.jsonl")
    }


def train(path: Path, run_dir: Path) -> None:
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as on a command line, so that the loader's workers start at once
    training_runs.run(runs.load(path, [f"run_dir={run_dir}"]))


@pytest.mark.parametrize(
    ("launcher", "world", "to_group", "students"),
    [
        ([], 1, True, None),
        (TORCHRUN, 2, True, "disjoint"),
        pytest.param(ACCELERATE, 2, False, "equal", marks=pytest.mark.slow),
    ],
    ids=["alone", "torchrun", "accelerate"],
)
def test_ctrl_c_leaves_a_checkpoint(tree, tmp_path, launcher, world, to_group, students):
    """Cases: a run with loader workers, which are in the group too; students on groups of ranks or all ranks.

    The signal goes to the whole group, as from a terminal, or only to the launcher, as from `kill`. Started
    again, each run has the losses of a run that never stopped, bit for bit.
    """
    tree["data"] |= {"in_memory": bool(students), "workers": 2}
    tree["checkpoint"], run_dir = {"every_steps": None}, Path(tree["run_dir"])
    if students:
        both = [
            {"name": name, "student": {"name": "cnn32_student"}, "optimizer": {"lr": lr}}
            for name, lr in RATES
        ]
        tree |= {"students": both, "student_groups": students}
        del tree["student"]
    script, path = tmp_path / "waiting.py", tmp_path / "config.yaml"
    script.write_text(WAITING)
    path.write_text(json.dumps(tree))
    process = in_a_terminal([*launcher, str(script), "train", str(path)])
    try:
        wait_for(*(tmp_path / f"reached-{rank}" for rank in range(world)), process=process)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        _, output = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (run_dir / "status").read_text() == "requeue\n"
    assert "indistill: SIGINT: stopping with a checkpoint when this step ends" in output
    assert re.search(
        r"^indistill: stopped at step \d of 24: run the same command again to continue from there$",
        output,
        re.M,
    )
    assert "leaves at once" not in output
    if not launcher:
        assert process.returncode == 130
        assert len(output.splitlines()) == 2  # torchrun adds a traceback of its own

    run_ranks(train, world if launcher else None, path, run_dir)
    run_ranks(train, world if launcher else None, path, tmp_path / "whole")
    assert losses(run_dir) == losses(tmp_path / "whole")
    assert all(len(of_run) == 24 for of_run in losses(run_dir).values())
    assert len(losses(run_dir)) == (2 if students else 1)
    starts = [
        line
        for file in run_dir.rglob("history.jsonl")
        for line in read_lines(file)
        if line["event"] == "start"
    ]
    assert {line["step"] > 0 for line in starts} == {
        False,
        True,
    }  # it resumed from the checkpoint that Ctrl-C left
