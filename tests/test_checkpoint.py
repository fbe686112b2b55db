"""Which checkpoints exist, which one counts, and what is said of a bad one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from indistill import checkpoint, config
from indistill.config import UserError
from indistill.train import train


def run(tree, resume="auto"):
    return train(config.parse(tree, "test"), resume)


@pytest.fixture
def finished(tree):
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 2, "keep_best": 0}
    run(tree)
    return tree, Path(tree["run_dir"]) / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_nothing_else_is_left(finished):
    _, folder = finished
    assert names(folder) == ["step-00000020", "step-00000024"]
    assert names(folder / "step-00000024") == [
        "model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json",
    ]  # fmt: skip


def test_the_best_is_kept(tree, monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.6, 0.7])
    monkeypatch.setattr("indistill.evaluate.accuracy", lambda *_: {"top1": next(scores), "top5": 1.0})
    tree["evaluate"] = {"every": "5 steps"}  # 5, 10, 15, 20 and the end
    tree["checkpoint"] = {"every_steps": None, "keep_last": 1, "keep_best": 1}
    run(tree)
    folder = Path(tree["run_dir"]) / "checkpoints"
    assert names(folder) == ["step-00000010", "step-00000024"]
    assert json.loads((folder / "step-00000010" / "state.json").read_text())["scores"]["top1"] == 0.9


def test_saving_by_the_clock(tree):
    tree["checkpoint"] = {"every_steps": None, "every_minutes": 1e-9, "keep_last": 99}
    tree["log"]["every_steps"] = 6
    run(tree)
    saved = [int(name.split("-")[1]) for name in names(Path(tree["run_dir"]) / "checkpoints")]
    assert saved == [4, 6, 8, 12, 13, 18, 24]  # the logged steps: every sixth, and the phases' ends


def test_an_unfinished_save_does_not_count(finished):
    tree, folder = finished
    partial = folder / ".partial-step-00000099"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    (folder / "step-00000098").mkdir()  # not even a state
    assert sorted(path.name for path in checkpoint.complete(folder)) == ["step-00000020", "step-00000024"]
    run(tree)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "state.json"])
def test_a_damaged_checkpoint_is_named(finished, name):
    tree, folder = finished
    path = folder / "step-00000024" / name
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"step-00000024.*damaged.*delete it") as caught:
        run(tree)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["plan", "data", "config"])
def test_another_identity_is_refused_by_name(finished, key):
    tree, folder = finished
    path = folder / "step-00000024" / "state.json"
    state = json.loads(path.read_text())
    state["identity"][key] = "0" * 64
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"another {key}"):
        run(tree)


def test_another_format_is_refused(finished):
    tree, folder = finished
    path = folder / "step-00000024" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        run(tree)


def test_never_refuses_to_overwrite_a_run(finished):
    tree, folder = finished
    with pytest.raises(UserError, match="holds a run already"):
        run(tree, resume="never")
    assert names(folder) == ["step-00000020", "step-00000024"]


def test_resume_from_nowhere(tree):
    with pytest.raises(UserError, match="no checkpoint there"):
        run(tree, resume="nowhere/step-00000003")


def test_the_run_directory_of_another_config(finished):
    tree, _ = finished
    other = copy.deepcopy(tree)
    other["optimizer"]["lr"] = 0.5
    with pytest.raises(UserError, match=r"optimizer.lr: 0.001 -> 0.5"):
        run(other)
    other = copy.deepcopy(tree)
    other["log"]["every_steps"] = 7  # changes nothing that is computed
    run(other)


def test_an_edited_plan_is_refused(finished):
    tree, folder = finished
    path = folder.parent / "prune_plan.json"
    plan = json.loads(path.read_text())
    plan["pairs"][0]["kept"][0] += 1
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"prune_plan.json"):
        run(tree)
