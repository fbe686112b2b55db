"""Several students of one teacher: each computes what it would alone, and the teacher runs once."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import run_each_alone, run_ranks
from safetensors.torch import load_file

from indistill import config
from indistill.config import UserError, runs
from indistill.config.files import read_lines
from indistill.data.dataset import ImageDataset
from indistill.distributed import preemption
from indistill.models.network import Network
from indistill.training import runs as training_runs
from indistill.training.students import TeacherPass

STUDENTS = [
    {"name": "small", "student": {"name": "cnn32_student"}},
    {
        "name": "resnet",
        "student": {
            "name": "resnet10t",
            "kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8, "drop_path_rate": 0.2},
        },
        # Other stages at other times, and all their maps in KD.
        "warmup": {
            "curriculum": "sequential",
            "pairs": [[0, 0], [1, 3]],
            "durations": ["3 steps", "6 steps"],
        },
        "kd": {"losses": [{"name": "ce"}, {"name": "at"}, {"name": "pkt"}]},
        "optimizer": {"name": "momentum", "lr": 0.01},
        "clip_grad_norm": 1.0,
    },
    {"name": "alone", "student": {"name": "cnn32_student"}, "warmup": None, "ema": {"decay": 0.9}},
]


@pytest.fixture
def students_tree(tree):
    tree.pop("student")
    tree["students"] = copy.deepcopy(STUDENTS)
    tree["grad_accumulation"] = 2
    tree["kd"]["mix"] = {"mixup": 0.8}
    tree["students"][1]["kd"]["mix"] = {"mixup": 0.8}
    tree["checkpoint"] = {"every_steps": 4, "keep_last": 9}
    return tree


def write(folder: Path, tree: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(path: Path) -> None:
    training_runs.run(runs.load(path))


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]


def assert_same_runs(run_dir: Path, alone: Path) -> None:
    for name in ("small", "resnet", "alone"):
        assert len(losses(run_dir / name)) == 24
        assert losses(run_dir / name) == losses(alone / name)
        first, second = (load_file(folder / name / "student.safetensors") for folder in (run_dir, alone))
        assert first.keys() == second.keys()
        assert all(torch.equal(value, second[key]) for key, value in first.items())
        first, second = (
            json.loads((folder / name / "summary.json").read_text()) for folder in (run_dir, alone)
        )
        assert first["metrics"] == second["metrics"]


@pytest.mark.parametrize(
    ("world", "precision"), [pytest.param(None, "no", marks=pytest.mark.slow), (None, "bf16"), (2, "no")]
)
def test_each_student_is_what_it_would_be_alone(students_tree, tmp_path, world, precision):
    students_tree["mixed_precision"] = precision
    path = write(tmp_path, students_tree)
    run_ranks(run, world, path)
    run_ranks(run_each_alone, world, path, tmp_path / "alone")
    assert_same_runs(Path(students_tree["run_dir"]), tmp_path / "alone")


def test_the_teacher_runs_once_on_a_batch_which_is_loaded_once(students_tree, tmp_path, monkeypatch):
    students_tree["grad_accumulation"] = 1
    students_tree["kd"].pop("mix")  # where some have mixed images and some not, the teacher runs on both
    students_tree["students"][1]["kd"].pop("mix")
    students_tree["evaluate"] = {"similarity_samples": 0}
    students_tree["data"].pop("eval")
    passes, loads = [], []
    run_pass = TeacherPass._run
    monkeypatch.setattr(TeacherPass, "_run", lambda *a: (passes.append(a[2:]), run_pass(*a))[1])
    get = ImageDataset.__getitem__
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda *a: (loads.append(a[1]), get(*a))[1])
    forwards = []
    forward = Network.forward
    monkeypatch.setattr(
        Network, "forward", lambda net, *a, **k: (forwards.append(net.training), forward(net, *a, **k))[1]
    )
    run(write(tmp_path, students_tree))
    assert len(loads) == 24
    assert forwards.count(True) == 3 * 24
    # Once a batch, and once more where a student asks for more than before: at its first step, and as a phase
    # begins.
    assert len(passes) == forwards.count(False)
    assert 24 <= len(passes) <= 24 + 1 + 3 + 2
    # As deep as the third student needs it, which is in KD from the start.
    assert passes[0] == ([0], False) or passes[0][1]


def stop_at(path: Path, student: str, step: int) -> None:
    """Be asked to stop when a student has taken so many steps; the one before it is a step ahead."""
    with pytest.MonkeyPatch.context() as patch:
        reached = preemption.Agreement.reached

        def asked(agreement, done, told):
            asked.stopped |= done == step and preemption._process.status is not None
            return preemption.settle(asked.stopped and reached is not None)

        asked.stopped = False
        patch.setattr(preemption.Agreement, "reached", asked)
        with contextlib.suppress(preemption.Preempted):
            run(path)


def test_students_that_stopped_go_on_together(students_tree, tmp_path):
    path = write(tmp_path, students_tree)
    run_dir = Path(students_tree["run_dir"])
    run_ranks(stop_at, None, path, "small", 10)
    assert (run_dir / "status").read_text() == "requeue\n"
    for name in ("small", "resnet", "alone"):
        assert (run_dir / name / "checkpoints" / "step-00000010").exists()
    # One is further behind, as after a kill between two checkpoints.
    for step in ("step-00000010", "step-00000008"):
        (run_dir / "resnet" / "checkpoints" / step).rename(tmp_path / step)
    run_ranks(run, None, path)
    run_ranks(run_each_alone, None, path, tmp_path / "alone")
    assert_same_runs(run_dir, tmp_path / "alone")
    assert (run_dir / "status").read_text() == "done\n"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["students.resnet.seed=3"], "student resnet: seed is 3, and 0 for the first student: set it once"),
        (
            ["students.1.data.image_size=64"],
            "student resnet: data.image_size is 64, and 32 for the first student",
        ),
        (["students.1.kd.mix=null"], "student resnet: kd.mix"),
        (["teacher={name: cnn32_auxiliary}"], "student small: teacher: cnn32_auxiliary has no weights"),
        (["students.1.teacher.name=cnn32_student"], "student resnet: teacher.name"),
        (["teacher=null", "warmup=null", "kd.losses=[{name: ce}]"], "students share a teacher"),
        (["engine.name=deepspeed"], "engine: DeepSpeed trains one student"),
        (["teacher.shard=true"], "teacher.shard: students need the whole teacher"),
        (
            ["trackers=[tensorboard, mlflow]"],
            "student small: trackers: mlflow tracks one run at a time in a process",
        ),
        (["stages=[{name: a}]"], "students and stages exclude each other"),
        (["students.1.name=small"], "students.1.name: small is already in use"),
        (
            ["students.1.run_dir=here"],
            "student small_2|student resnet: run_dir is always the file.s run_dir/resnet",
        ),
    ],
)
def test_students_that_cannot_train_together_are_refused(students_tree, tmp_path, overrides, message):
    if "teacher=null" in overrides:
        students_tree["students"] = [{"name": "small", "student": {"name": "cnn32_student"}}]
    with pytest.raises(UserError, match=message):
        runs.load(write(tmp_path, students_tree), overrides)


def test_a_file_of_students_is_no_single_run(students_tree, tmp_path):
    with pytest.raises(
        UserError, match=r"has several students: give the config.yaml in the run directory of one"
    ):
        config.load(write(tmp_path, students_tree))
    with pytest.raises(UserError, match="--resume somewhere: several students go on"):
        training_runs.run(runs.load(write(tmp_path, students_tree)), "somewhere")
