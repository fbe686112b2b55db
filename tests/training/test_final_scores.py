"""Scores of a run: what cannot be computed is refused at the start, and never spoils a finished training."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, run_ranks, train_until
from PIL import Image
from safetensors.torch import load_file

from indistill import config
from indistill.config import UserError
from indistill.data import packing
from indistill.training import loop, runs


def run(tree: dict[str, Any]) -> dict[str, Any]:
    return loop.train(config.parse(tree, "test"))


def supervised(tree: dict, steps: int = 3) -> dict:
    tree |= {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
    return tree | {"duration": f"{steps} steps"}


def test_a_student_that_diverged_is_told_in_one_line(tree, capfd):
    """Training has finished, so that the run is done, without this score."""
    tree = supervised(tree) | {"optimizer": {"name": "sgd", "lr": 1e30}, "evaluate": {"retrieval": True}}
    summary = runs.run([("", config.parse(tree, "test"))])[""]
    assert set(summary["metrics"]) == {"top1", "top5"}
    run_dir = Path(tree["run_dir"])
    assert (run_dir / "checkpoints" / "step-00000003").exists()
    assert (run_dir / "student.safetensors").exists()
    assert (run_dir / "status").read_text() == "done\n"
    (told,) = [line for line in capfd.readouterr().err.splitlines() if "retrieval" in line]
    assert re.match(r"indistill: evaluate.retrieval: .*not finite: training has finished", told)
    assert told.endswith(f"`indistill eval CONFIG {run_dir}` tries it again")


@pytest.mark.parametrize("error", [UserError("a bad image"), RuntimeError("out of memory")])
def test_a_last_evaluation_that_fails_leaves_the_trained_student(tree, error, monkeypatch, capfd):
    tree = supervised(tree) | {"evaluate": {"every": "2 steps"}}
    accuracy = loop.evaluate.accuracy
    calls = []

    def fails_at_the_end(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise error
        return accuracy(*arguments)

    monkeypatch.setattr(loop.evaluate, "accuracy", fails_at_the_end)
    assert run(tree)["metrics"] == {}
    assert len(calls) == 2
    assert (Path(tree["run_dir"]) / "student.safetensors").exists()
    assert (Path(tree["run_dir"]) / "checkpoints" / "step-00000003").exists()
    told = capfd.readouterr().err
    assert f"{error}: training has finished" in told
    assert ("Traceback" in told) == isinstance(error, RuntimeError)  # a mistake needs none, a fault does


def run_quietly(tree: dict[str, Any], errors: str) -> None:
    """Train, with standard error appended to a file."""
    with open(errors, "a") as file, contextlib.redirect_stderr(file):
        run(tree)


def test_a_bad_evaluation_image_on_one_rank_is_heard_of_by_both(tree, tmp_path):
    tree = supervised(tree)
    good = tmp_path / "good.png"
    Image.new("RGB", (32, 32)).save(good)
    samples = [(f"{i}", good.read_bytes() if i else b"no image", "png", i) for i in range(4)]
    packing.pack(samples, tmp_path, "bad", samples_per_shard=4)
    tree["data"] |= {"eval": str(tmp_path / "bad-*.tar"), "in_memory": False, "workers": 1}
    run_ranks(run_quietly, 2, tree, str(tmp_path / "errors"))
    summary = json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert summary["metrics"] == {}
    told = (tmp_path / "errors").read_text()
    assert re.search(r"sample 0.*: training has finished, and the result is saved", told)


def test_an_earlier_evaluation_that_fails_ends_the_run(tree, monkeypatch):
    def fails(*arguments):
        raise UserError("a bad image")

    monkeypatch.setattr(loop.evaluate, "accuracy", fails)
    with pytest.raises(UserError, match="a bad image"):
        run(supervised(tree) | {"evaluate": {"every": "2 steps"}})


def classes_only(folder: Path, prefix: str, labels: range) -> str:
    """Shards of as many images of each of these classes."""
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "PNG")
    samples = [(f"{i:04d}", image.getvalue(), "png", label) for i, label in enumerate([*labels] * 16)]
    packing.pack(samples, folder, prefix, samples_per_shard=1000)
    return str(folder / f"{prefix}-*.tar")


def test_a_query_class_that_the_database_lacks_is_refused_before_the_first_step(tree, tmp_path):
    tree = supervised(tree) | {"evaluate": {"retrieval": True}}
    tree["data"] |= {"train": classes_only(tmp_path, "few", range(8)), "streams": 4}
    with pytest.raises(
        UserError, match=r"no image of 2 of data.eval's classes .label 8, 9.: set evaluate.ret"
    ):
        run(tree)
    assert not losses(tree["run_dir"])
    tree["evaluate"]["retrieval"] = False  # in the same directory
    assert run(tree)["step"] == 3


def test_an_evaluation_set_of_one_class(tree, tmp_path):
    tree = tree | {"duration": "13 steps", "evaluate": {"retrieval": True}}
    tree["data"] |= {"eval": classes_only(tmp_path, "one", range(3, 4))}
    metrics = run(tree)["metrics"]
    assert 0 <= metrics["map_cosine"] <= 1
    assert metrics["information_student_embedding"] == 0


def test_what_only_reads_may_change_at_a_restart(tree, tmp_path):
    run(tree | {"run_dir": str(tmp_path / "reference")})
    begun = tree | {"evaluate": {"every": "5 steps", "similarity_samples": 8}}
    train_until(begun, 10)
    changed = tree | {"evaluate": {"every": "12 steps", "retrieval": True}, "log": {"every_steps": 2}}
    changed["trackers"] = ["tensorboard"]
    assert "map_cosine" in run(changed)["metrics"]
    ours, theirs = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "reference"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    changed["evaluate"]["retrieval"] = False  # even of a finished run
    assert "map_cosine" not in run(changed)["metrics"]


def test_a_checkpoint_of_an_earlier_version_is_resumed(tree, monkeypatch):
    """It has a fingerprint to which `evaluate` belonged, but for `evaluate.batch` and keys that are newer."""
    tree["evaluate"] = {"every": "5 steps"}
    others = [f"evaluate.{key}" for key in ("batch", "knn", "linear_probe", "bank")]
    earlier = [key for key in config.OPERATIONAL_KEYS if key != "evaluate"] + others
    with monkeypatch.context() as patch:
        patch.setattr(config.tree, "OPERATIONAL_KEYS", tuple(earlier))
        settings = config.parse(tree, "test")
        before = config.fingerprint(settings)
        train_until(tree, 7)
    assert before != config.fingerprint(settings)
    state = json.loads((Path(tree["run_dir"]) / "checkpoints/step-00000007/state.json").read_text())
    assert state["identity"]["config"] == before
    (Path(tree["run_dir"]) / "config.yaml").write_text("damaged: [")  # the checkpoint says whose it is
    assert run(tree)["step"] == 24
