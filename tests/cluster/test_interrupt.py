"""Ctrl-C as people press it: real processes, started by hand, by torchrun and by accelerate launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_ranks, unused_port

from indistill import checkpoint, cli, preemption
from indistill.metrics import read_lines

# The command line, but the third step waits for the signal: the machine may be slow, and so may the launcher.
WAITING = """
import os, sys, time
from pathlib import Path
from indistill import cli, preemption, train
make_mix = train.make_mix
calls = []

def waiting(*arguments):
    inner = make_mix(*arguments)

    def mix(batch, phase):
        calls.append(1)
        if len(calls) == 3:
            Path(sys.argv[2]).with_name("reached-" + os.environ.get("RANK", "0")).touch()
            while not preemption.asked():
                time.sleep(0.01)
        return inner(batch, phase)

    return mix

train.make_mix = waiting
cli.main(sys.argv[1:])
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "{port}",
]  # fmt: skip
ACCELERATE_ONE = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
ACCELERATE_ONE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def in_a_terminal(arguments: list[str]) -> subprocess.Popen:
    """A process group of its own, which a terminal would send SIGINT to; a test's own shell may ignore that signal."""
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


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    ("launcher", "world", "to_group"),
    [
        ([], 1, True),
        (TORCHRUN, 2, True),
        (TORCHRUN, 2, False),
        (ACCELERATE, 2, True),
        (ACCELERATE, 2, False),
        (ACCELERATE_ONE, 1, True),
    ],
    ids=["alone", "torchrun-group", "torchrun", "accelerate-group", "accelerate", "accelerate-one-group"],
)
def test_ctrl_c_leaves_a_checkpoint(tree, tmp_path, launcher, world, to_group):
    """Loader workers are in the group, too. What follows has the losses of a run that never stopped."""
    tree["data"] |= {"in_memory": False, "workers": 1}
    tree["checkpoint"], run_dir = {"every_steps": None}, Path(tree["run_dir"])
    script, path = tmp_path / "waiting.py", tmp_path / "config.yaml"
    script.write_text(WAITING)
    path.write_text(json.dumps(tree))
    process = in_a_terminal([*launcher, str(script), "train", str(path)])
    try:
        wait_for(*(tmp_path / f"reached-{rank}" for rank in range(world)), process=process)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGINT)
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    print(told, process.returncode)
