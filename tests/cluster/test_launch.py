"""The same command line under torchrun and under accelerate launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import unused_port

from indistill import Trainer
from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir
from indistill.targets.manifest import load_manifest

REPOSITORY = Path(__file__).resolve().parents[2]

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}", "-m"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "{port}", "-m",
    ],
}  # fmt: skip


def launch(launcher: str, *arguments: str) -> None:
    """Run `indistill ARGUMENTS` as two processes; check their number and that they succeed."""
    command = [part.format(port=unused_port()) for part in LAUNCHERS[launcher]]
    result = subprocess.run(
        [sys.executable, "-m", *command, "indistill", *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("indistill: 2 processes on cpu") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes(tree, tmp_path: Path, launcher: str):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    launch(launcher, "train", str(path), "duration=15 steps", "--resume", "never")
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert (summary["world_size"], summary["step"]) == (2, 15)


def test_targets_by_accelerate_launch(tree, tmp_path: Path):
    path = tmp_path / "config.yaml"
    overrides = ["data.augment.views=2", f"targets={{source: cached, dir: {tmp_path}/t}}"]
    path.write_text(json.dumps(tree))
    launch("accelerate launch", "targets", str(path), *overrides)
    manifest = load_manifest(f"{tmp_path}/t")
    assert (manifest.views, sum(manifest.samples)) == (2, 192)
    assert Trainer(path, *overrides).verify_targets(64)


# A program under a launcher, as docs/api.md has it.
PROGRAM = """
import json, os, sys
from pathlib import Path

from indistill import Trainer

trainer = Trainer(*sys.argv[1:], "duration=6 steps", "warmup=null")
summary = trainer.train()
scores = [trainer.evaluate(), trainer.evaluate(trainer.settings.run_dir + "/checkpoints/step-00000006")]
trainer.write_targets()
told = [summary["world_size"], summary["metrics"], scores, trainer.verify_targets(8)]
(Path(sys.argv[1]).parent / f"rank{os.environ['RANK']}.json").write_text(json.dumps(told))
"""


def test_a_program_calls_one_command_after_the_other(tree, tmp_path: Path):
    path, program = tmp_path / "config.yaml", tmp_path / "program.py"
    path.write_text(json.dumps(tree))
    program.write_text(PROGRAM)
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(unused_port())]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, str(program), str(path), "data.augment.views=1"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        world_size, metrics, scores, agree = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert world_size == 2
        assert agree
        for of_call in scores:
            assert of_call.items() <= metrics.items()
            assert "top1" in of_call


def test_torchrun_tells_of_a_mistake_by_its_exit_code(tree, tmp_path: Path):
    """The exit code tells a scheduler not to start the run again."""
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    variables = {"PYTHON": sys.executable, "PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": str(unused_port())}
    result = subprocess.run(
        [REPOSITORY / "launch" / "torchrun.sh", path, "data.train=none.tar"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 2
    assert result.stderr.count("indistill: error: ") == 1
    word, reason = (Path(tree["run_dir"]) / "status").read_text().splitlines()
    assert word == "failed"
    assert f"indistill: error: {reason}\n" in result.stderr


def test_torchrun_passes_sigterm_on(tree, tmp_path: Path):
    """The signal goes only to launch/torchrun.sh, as from Kubernetes; SIGUSR1 to it is harmless."""
    path, run_dir = tmp_path / "config.yaml", Path(tree["run_dir"])
    path.write_text(json.dumps(tree | {"checkpoint": {"every_steps": None}}))
    variables = {"PYTHON": sys.executable, "PET_NPROC_PER_NODE": "2", "PET_MASTER_PORT": str(unused_port())}
    process = subprocess.Popen(
        [REPOSITORY / "launch" / "torchrun.sh", path, "duration=1000000 steps", "warmup.durations=null"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
        cwd=REPOSITORY,
    )
    try:
        while len(read_lines(run_dir / "metrics.jsonl")) < 3:
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 75
    finally:
        process.kill()
    assert (run_dir / "status").read_text() == "requeue\n"
    (saved,) = RunDir(run_dir).saved_checkpoints()
    assert saved.name == f"step-{read_lines(run_dir / 'metrics.jsonl')[-1]['step']:08d}"
