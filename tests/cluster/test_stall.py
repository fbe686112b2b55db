"""If one of two ranks stalls or dies, it is named, and the other exits with one line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
from conftest import start, unused_port
from torch import distributed

from indistill.commands import cli
from indistill.data.loader import IndexedTraining
from indistill.distributed import preemption
from indistill.training import loop, mix

TIMEOUT_MINUTES = 0.4


def train_and_fail(path: str, how: str) -> None:
    """Run `indistill train` with stderr in a file; at step 20, in KD, rank 1 gets no data, or dies."""
    rank = int(os.environ["RANK"])
    loader = IndexedTraining.loader

    def failing_loader(self, first_step, *arguments, **keywords):
        for step, batch in enumerate(loader(self, first_step, *arguments, **keywords), start=first_step + 1):
            if rank == 1 and step == 20:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
            yield batch

    IndexedTraining.loader = failing_loader
    make_mix = mix.make_mix

    def noting_mix(*arguments):
        options = distributed.group.WORLD._get_backend(arguments[1].device).options
        Path(f"{path}.timeout-{rank}").write_text(str(options._timeout.total_seconds()))
        return make_mix(*arguments)

    loop.make_mix = noting_mix
    sys.stderr = open(f"{path}.stderr-{rank}", "w", buffering=1)  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)
    cli.main(["train", path])


def run(tree, tmp_path: Path, how: str) -> tuple[list[int], list[str]]:
    path = tmp_path / "config.yaml"
    tree |= {"collective_timeout_minutes": TIMEOUT_MINUTES, "checkpoint": {"every_steps": 5}}
    path.write_text(json.dumps(tree))
    port = unused_port()
    processes = [start(train_and_fail, str(path), how, rank=rank, world=2, port=port) for rank in range(2)]
    for process in processes:
        process.join(timeout=300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    seconds = [float(Path(f"{path}.timeout-{rank}").read_text()) for rank in range(2)]
    assert seconds == pytest.approx([60 * TIMEOUT_MINUTES] * 2, abs=1e-3)
    return codes, [Path(f"{path}.stderr-{rank}").read_text() for rank in range(2)]


def test_a_rank_that_waits_for_data_is_named_before_the_timeout(tree, tmp_path):
    codes, (stderr, other) = run(tree, tmp_path, "waits")
    assert codes == [preemption.EXIT_CODE] * 2
    named, left = [line for line in stderr.splitlines() if line.startswith("indistill:")]
    pattern = (
        r"indistill: rank 1 \((.+)\) has been in step 20, phase kd, waiting for data, "
        r"for (\d+) s; rank 0 waits for it"
    )
    host, seconds = re.fullmatch(pattern, named).groups()
    assert host == socket.gethostname()
    assert 30 * TIMEOUT_MINUTES - 3 <= int(seconds) < 60 * TIMEOUT_MINUTES
    assert left.startswith("indistill: rank 0 leaves at once: step 20, phase kd, training: ")
    assert left.endswith("the same command goes on from " + f"{tree['run_dir']}/checkpoints/step-00000015")
    assert "indistill: rank 1 leaves at once: step 20, phase kd, waiting for data: " in other
    assert (Path(tree["run_dir"]) / "status").read_text() == "requeue\n"


@pytest.mark.parametrize("engine", ["ddp", "deepspeed"])
def test_a_rank_that_dies_ends_the_other_in_one_line(tree, tmp_path, engine):
    tree["engine"] = {"name": engine}
    codes, (stderr, _) = run(tree, tmp_path, "dies")
    assert codes == [preemption.EXIT_CODE, -signal.SIGKILL]
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("indistill:")]
    assert line.startswith(
        "indistill: rank 0 leaves at once: step 20, phase kd, training: lost the other processes: "
    )
    assert "Connection closed by peer" in line or "Connection reset by peer" in line
    assert line.endswith("step-00000015")
    errors = Path(tree["run_dir"]) / "errors" / "rank-0.txt"
    assert str(errors) in line
    assert "indistill/training/loop.py" in errors.read_text()
    assert (Path(tree["run_dir"]) / "status").read_text() == "requeue\n"
