"""Chains of runs: what a stage's config is, and that the stages train as runs of their own would."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import load, written_out
from conftest import kill_at_checkpoint
from safetensors.torch import load_file, save_file

from indistill.commands.cli import main
from indistill.config import UserError, runs
from indistill.training import runs as training_runs
from indistill.training.loop import train

NAMES = ["teacher", "auxiliary", "student"]


def test_a_stage_needs_a_teacher_with_weights_as_a_run_does(chain):
    chain["stages"][2]["teacher"] = {"name": "resnet10t"}
    with pytest.raises(
        UserError, match=r"stage student: teacher: resnet10t has no weights: set pretrained: true"
    ):
        load(chain)
    chain["stages"][2]["teacher"] = {"stage": "teacher", "random": True}
    with pytest.raises(UserError, match=r"stage student: teacher: random: true excludes"):
        load(chain)


# --- how they train -----------------------------------------------------------------------------------------


def weights(run_dir: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(run_dir) / "student.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def whole(data_dir, tmp_path_factory):
    """The run directory of a chain that ran through; made by the first test that needs it."""
    made: dict[str, Any] = {}

    def of(chain: dict[str, Any]) -> Path:
        if not made:
            run_dir = tmp_path_factory.mktemp("whole") / "run"
            made.update(
                run_dir=run_dir, summaries=training_runs.run(load({**chain, "run_dir": str(run_dir)}))
            )
            assert list(made["summaries"]) == NAMES
            for name, summary in made["summaries"].items():
                assert summary == json.loads((run_dir / name / "summary.json").read_text())
        return made["run_dir"]

    return of


@pytest.fixture
def done(chain, whole) -> dict[str, Any]:
    """A chain whose run directory holds a copy of the finished one."""
    shutil.copytree(whole(chain), chain["run_dir"])
    for name in ("auxiliary", "student"):  # the teachers' paths are part of a config
        saved = Path(chain["run_dir"]) / name / "config.yaml"
        saved.write_text(saved.read_text().replace(str(whole(chain)), chain["run_dir"]))
    return chain


def times(run_dir: str) -> dict[Path, int]:
    """When each file was written, but for `status`, which tells of the last start whatever it did."""
    files = [path for path in Path(run_dir).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.name != "status"}


def test_a_chain_is_its_stages_run_one_by_one(chain, whole, tmp_path):
    reference = whole(chain)
    assert [
        json.loads((reference / n / "summary.json").read_text())["step"] for n in ("teacher", "auxiliary")
    ] == [
        5,
        6,
    ]
    chain["run_dir"] = str(tmp_path / "single")
    for name, settings in written_out(chain):
        train(settings)
        assert same(weights(settings.run_dir), weights(reference / name))
    assert not same(weights(reference / "teacher"), weights(reference / "auxiliary"))


def test_finished_stages_are_kept(done, capsys):
    before = times(done["run_dir"])
    load(done)
    main(["train", str(Path(done["run_dir"]).with_suffix(".yaml"))])
    assert times(done["run_dir"]) == before
    *told, metrics = capsys.readouterr().out.splitlines()
    summaries = {
        name: json.loads(Path(f"{done['run_dir']}/{name}/summary.json").read_text()) for name in NAMES
    }
    assert json.loads(metrics) == {name: summary["metrics"] for name, summary in summaries.items()}
    assert all("finished before, kept" in line for line in told)
    assert [line.split()[2:6] for line in told] == [
        ["teacher", "(1", "of", "3):"],
        ["auxiliary", "(2", "of", "3):"],
        ["student", "(3", "of", "3):"],
    ]


def run_chain(tree: dict[str, Any]) -> None:
    training_runs.run(runs.load(tree["chain"]))


def test_a_chain_killed_in_its_second_stage_goes_on_bit_for_bit(chain, whole, capfd):
    load(chain)
    stage = {
        "chain": str(Path(chain["run_dir"]).with_suffix(".yaml")),
        "run_dir": f"{chain['run_dir']}/auxiliary",
    }
    kill_at_checkpoint(run_chain, stage, step=2)
    teacher = times(f"{chain['run_dir']}/teacher")
    capfd.readouterr()
    run_chain(stage)
    assert times(f"{chain['run_dir']}/teacher") == teacher
    told = capfd.readouterr().out
    assert "stage teacher (1 of 3): finished before" in told
    assert f"resumed from {stage['run_dir']}/checkpoints/step-0000000" in told
    for name in NAMES:
        assert same(weights(f"{chain['run_dir']}/{name}"), weights(whole(chain) / name))


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
def test_a_stage_whose_teacher_changed_is_refused(done, finished):
    run_dir = Path(done["run_dir"])
    if not finished:
        (run_dir / "student" / "summary.json").unlink()
    changed = weights(run_dir / "auxiliary")
    changed["fc2.bias"] = changed["fc2.bias"] + 1
    save_file(changed, run_dir / "auxiliary" / "student.safetensors")
    before = times(run_dir)
    message = r"stage student began with other weights than are now in .*/auxiliary/student.safetensors \(t"
    with pytest.raises(UserError, match=message):
        training_runs.run(load(done))
    assert times(run_dir) == before

    shutil.rmtree(run_dir / "student")  # as the message says
    assert training_runs.run(load(done))["student"]["step"] == 7


def test_a_stage_redone_to_the_same_weights_changes_nothing(done):
    """The file differs all the same: safetensors writes its metadata in random order."""
    shutil.rmtree(Path(done["run_dir"]) / "teacher")
    before = times(done["run_dir"])
    assert training_runs.run(load(done))["teacher"]["step"] == 5
    after = times(done["run_dir"])
    assert {path: after[path] for path in before} == before


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100], ids=["empty", "cut", "no header"])
def test_a_damaged_teacher_is_told_in_one_line(done, content):
    shutil.rmtree(Path(done["run_dir"]) / "student")
    (Path(done["run_dir"]) / "auxiliary" / "student.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"teacher.checkpoint: .* is not a readable checkpoint"):
        training_runs.run(load(done))


def test_a_stage_that_began_outside_the_chain_is_not_trusted(done):
    (Path(done["run_dir"]) / "student" / "inputs.json").unlink()
    with pytest.raises(UserError, match="stage student began with other weights"):
        training_runs.run(load(done))


def test_a_changed_stage_is_refused_before_any_work(done):
    shutil.rmtree(Path(done["run_dir"]) / "teacher")
    before = times(done["run_dir"])
    with pytest.raises(
        UserError, match=r"student holds a run of another config \(optimizer.lr: 0.002 -> 0.5\)"
    ):
        training_runs.run(load(done, "stages.student.optimizer.lr=0.5"))
    assert times(done["run_dir"]) == before


def test_networks_that_do_not_fit_are_refused_before_the_first_stage(chain):
    names = {"stages.auxiliary.student.name=cnn32_student", "stages.student.student.name=cnn32_auxiliary"}
    with pytest.raises(
        UserError, match=r"^stage student: student stage 0 has 16 channels, more than the 8 of teacher"
    ):
        training_runs.run(load(chain, *names))
    assert not (Path(chain["run_dir"]) / "teacher").exists()


def test_resume_of_a_chain(done):
    with pytest.raises(UserError, match=r"--resume somewhere: .*train the config.yaml in its run directory"):
        training_runs.run(load(done), resume="somewhere")
    with pytest.raises(UserError, match=r"--resume never: stage \w+ has begun already"):
        training_runs.run(load(done), resume="never")
    fresh = copy.deepcopy(done) | {"run_dir": done["run_dir"] + "-fresh", "stages": done["stages"][:1]}
    assert list(training_runs.run(load(fresh), resume="never")) == ["teacher"]


def test_heads_are_trained_and_teach(chain):
    teacher, _, student = chain["stages"]
    heads = {"name": "heads", "stage": "heads", "teacher": {"stage": "teacher"}, "duration": "3 steps"}
    student["teacher"] = {"stage": "teacher", "heads": {"stage": "heads"}}
    student["kd"] = {"losses": [{"name": "dih"}]}
    chain["stages"] = [teacher, heads, student]
    assert [s["step"] for s in training_runs.run(load(chain)).values()] == [5, 3, 7]
    inputs = {
        n: json.loads(Path(f"{chain['run_dir']}/{n}/inputs.json").read_text()) for n in ("heads", "student")
    }
    assert {name: set(files) for name, files in inputs.items()} == {
        "heads": {"teacher.checkpoint"},
        "student": {"teacher.checkpoint", "teacher.heads"},
    }
    file = Path(chain["run_dir"]) / "heads" / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")  # another weight
    with pytest.raises(UserError, match=r"stage student began with other weights .* \(teacher.heads\)"):
        training_runs.run(load(chain))
