"""Whole runs in one process: the files they leave, and a killed run that resumes without a trace."""

from __future__ import annotations

import copy
import functools
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    BF16,
    EPS,
    LOGGED,
    SMOOTH,
    assert_rounding_explains,
    kill_at_checkpoint,
    run_moved,
    strayed,
)
from safetensors.torch import load_file
from torch.optim import Optimizer

from indistill import config
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.data import packing
from indistill.data.dataset import open_shards
from indistill.models.cnn32 import CNN32
from indistill.models.network import Network
from indistill.training import guard, optim
from indistill.training.loop import Run, train


def run(tree: dict[str, Any], resume: str = "auto") -> dict[str, Any]:
    return train(config.parse(tree, "test"), resume)


def record(run_dir: str | Path) -> list[dict[str, Any]]:
    """The training lines, without what depends on the clock."""
    lines = [line for line in read_lines(Path(run_dir) / "metrics.jsonl") if "loss" in line]
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_fraction")}
        for line in lines
    ]


def everything(tree: dict[str, Any]) -> dict[str, Any]:
    """The config with all that has state or randomness turned on."""
    tree = copy.deepcopy(tree)
    tree["student"]["name"] = "resnet10t"  # drop path and residual stages
    tree["student"]["kwargs"] = {"channels": [8, 8, 16, 16], "stem_width": 8, "drop_path_rate": 0.2}
    tree["warmup"]["pairs"] = [[0, 0], [1, 1], [2, 3]]
    tree["warmup"]["reset_optimizer"] = "start"
    tree["kd"]["mix"] = {"mixup": 0.8, "cutmix": 1.0}
    tree["schedule"] = {"name": "cosine", "warmup": "2 steps"}
    tree["grad_accumulation"], tree["clip_grad_norm"], tree["ema"] = 2, 1.0, {"decay": 0.9}
    tree["log"]["every_steps"] = 3  # lines that sum steps from before and after a checkpoint
    tree["checkpoint"] = {"every_steps": 2, "keep_last": 2}
    tree["evaluate"] = {"every": "10 steps"}
    return tree


def test_the_run_directory_tells_the_run(tree):
    tree["evaluate"] = {"every": "10 steps", "retrieval": True}
    tree["trackers"] = ["tensorboard"]
    summary = run(tree)
    run_dir = Path(tree["run_dir"])

    lines = record(run_dir)
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert [line["phase"] for line in lines] == (
        ["warmup 1/3"] * 4 + ["warmup 2/3"] * 4 + ["warmup 3/3"] * 5 + ["kd"] * 11
    )
    assert lines[5]["epoch"] == 1.0  # 192 samples in batches of 32
    assert lines[0]["loss"] == lines[0]["mse_pair1"]
    assert lines[20]["loss"] == pytest.approx(lines[20]["ce"] + lines[20]["kd"], rel=LOGGED)
    timing = read_lines(run_dir / "metrics.jsonl")[3]
    assert timing["images_per_second"] > 0
    assert 0 <= timing["data_wait_fraction"] < 1
    evaluations = [line for line in read_lines(run_dir / "metrics.jsonl") if "top1" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 24]

    assert summary == json.loads((run_dir / "summary.json").read_text())
    assert set(summary["phase_seconds"]) == {"warmup 1/3", "warmup 2/3", "warmup 3/3", "kd"}
    assert summary["metrics"]["top1"] == evaluations[-1]["top1"]
    assert 0 < summary["metrics"]["map_cosine"] <= 1
    assert config.load(run_dir / "config.yaml") == config.parse(tree, "test")
    assert list(run_dir.glob("tensorboard/events.out.tfevents.*"))
    assert {path.name for path in run_dir.iterdir()} == {
        "config.yaml", "prune_plan.json", "metrics.jsonl", "checkpoints", "summary.json",
        "student.safetensors",
        "tensorboard", "history.jsonl",
    }  # fmt: skip

    # The weights left behind score what the run says they score.
    again = evaluate_checkpoint(config.parse(tree, "test"), str(run_dir / "student.safetensors"))
    assert again.items() <= summary["metrics"].items()
    # What compares it with the teacher is told beside them.
    compared = summary["metrics"].keys() - again.keys()
    assert compared == {"information_flow_divergence"} | {
        f"{what}_{layer}"
        for what in ("cka", "information_student", "information_teacher")
        for layer in ("pair1", "pair2", "pair3", "embedding")
    }
    assert evaluations[-1].keys() >= compared
    assert (
        evaluate_checkpoint(config.parse(tree, "test"), str(run_dir / "checkpoints" / "step-00000024"))
        == again
    )


def test_it_learns(tree):
    tree |= {"teacher": None, "warmup": None, "duration": "20 epochs", "kd": {"losses": [{"name": "ce"}]}}
    tree["optimizer"]["lr"] = 1e-2
    tree["data"]["augment"] = {"recipe": "none", "flip": False}
    summary = run(tree)
    assert summary["metrics"]["top1"] > 0.9
    assert record(tree["run_dir"])[-1]["phase"] == "supervised"


def test_nothing_is_created_anew_at_a_phase(tree, monkeypatch):
    calls = {"prepare": 0, "optimizer": 0, "network": 0}

    def counting(name, function):
        def counted(*arguments, **keywords):
            calls[name] += 1
            return function(*arguments, **keywords)

        return counted

    monkeypatch.setattr(Accelerator, "prepare", counting("prepare", Accelerator.prepare))
    monkeypatch.setattr(Optimizer, "__init__", counting("optimizer", Optimizer.__init__))
    monkeypatch.setattr(Network, "__init__", counting("network", Network.__init__))
    monkeypatch.setattr(optim, "create", counting("optimizer", optim.create))
    run(tree)
    assert calls == {"prepare": 1, "optimizer": 2, "network": 2}  # optim.create and the optimizer it makes


def test_the_teacher_is_in_no_checkpoint(tree):
    run(tree)
    folder = Path(tree["run_dir"]) / "checkpoints" / "step-00000024"
    student = sum(p.numel() for p in CNN32((8, 16, 32), 64).state_dict().values())
    assert sum(v.numel() for v in load_file(folder / "model.safetensors").values()) == student
    state = torch.load(folder / "optimizer-00000.pt", weights_only=True)["optimizer"]["state"]
    assert sum(moments["exp_avg"].numel() for moments in state.values()) == sum(
        p.numel() for p in CNN32((8, 16, 32), 64).parameters()
    )


@pytest.mark.portable
def test_the_moving_average_is_timms(tree, monkeypatch):
    """The saved average equals one updated by hand; its decay is ramped up, counted in steps."""
    tree |= {"ema": {"decay": 0.9}, "duration": "6 steps"}
    tree["warmup"]["durations"] = ["1 step", "1 step", "1 step"]
    snapshots = []
    update = guard.Ema.update

    def keeping_update(ema, student, step, skipped):
        snapshots.append(copy.deepcopy(student.state_dict()))
        update(ema, student, step, skipped)

    monkeypatch.setattr(guard.Ema, "update", keeping_update)
    run(tree)
    key, *rest = "net.fc1.weight", *snapshots[1:]
    expected = snapshots[0][key].double()  # the first update copies
    for step, weights in enumerate(rest, start=1):
        decay = min(1 - (1 + step) ** (-2 / 3), 0.9)
        expected = decay * expected + (1 - decay) * weights[key].double()
    saved = load_file(Path(tree["run_dir"]) / "checkpoints" / "step-00000006" / "ema.safetensors")
    # Each update is two products and a sum of averages that are no larger than the weights.
    largest = max(weights[key].abs().max().item() for weights in snapshots)
    torch.testing.assert_close(saved[key].double(), expected, rtol=0, atol=3 * len(rest) * EPS * largest)


@pytest.fixture(scope="module")
def reference(data_dir, tmp_path_factory):
    """The losses and weights of the run that nobody kills; made by the first test that needs it."""
    made: dict[str, Any] = {}

    def of(tree: dict[str, Any]) -> tuple[list[dict[str, Any]], Path]:
        if not made:
            run_dir = tmp_path_factory.mktemp("reference")
            run({**tree, "run_dir": str(run_dir)})
            made.update(record=record(run_dir), run_dir=run_dir)
        return made["record"], made["run_dir"]

    return of


@pytest.mark.parametrize("step", [3, 8, 17], ids=["in the warm-up", "at a phase boundary", "in kd"])
def test_a_killed_run_goes_on_bit_for_bit(tree, step, reference):
    tree = everything(tree)
    expected, reference_dir = reference(tree)
    run_dir = Path(tree["run_dir"])

    kill_at_checkpoint(run, tree, step=step - step % 2)
    run(tree)
    assert record(run_dir) == expected
    starts = read_lines(run_dir / "history.jsonl")
    assert [line["event"] for line in starts] == [
        "start",
        "start",
        "end",
    ]  # the first was killed without a word
    assert starts[1]["step"] >= step - step % 2
    for name in ("student.safetensors", "checkpoints/step-00000024/ema.safetensors"):
        ours, theirs = load_file(run_dir / name), load_file(reference_dir / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_left_alone(tree):
    first = run(tree)
    before = (Path(tree["run_dir"]) / "metrics.jsonl").read_text()
    assert run(tree)["metrics"] == first["metrics"]
    assert (Path(tree["run_dir"]) / "metrics.jsonl").read_text() == before


def test_a_run_ends_after_its_last_step_and_no_earlier(tree):
    """Otherwise a summary would call an unfinished run done."""
    a_run = Run(config.parse(tree | {"warmup": None, "duration": "2 steps"}, "test"))
    a_run.build()
    a_run.begin()
    a_run.step()
    with pytest.raises(RuntimeError, match="made 1 of 2 steps"):
        a_run.end()
    assert not a_run.files.summary.exists()
    a_run.step()
    with pytest.raises(RuntimeError, match="finished its 2 steps"):
        a_run.step()
    assert a_run.end()["step"] == 2


def test_going_back_to_an_earlier_checkpoint(tree):
    tree["checkpoint"] = {"every_steps": 8, "keep_last": 3, "keep_best": 0}
    run(tree)
    run_dir = Path(tree["run_dir"])
    expected = record(run_dir)
    run(tree, resume=str(run_dir / "checkpoints" / "step-00000008"))
    assert record(run_dir) == expected
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == [
        "step-00000008", "step-00000016", "step-00000024",
    ]  # fmt: skip
    assert len(list((run_dir / "checkpoints").glob("superseded-*"))) == 2


def test_shards_over_http_give_the_same_run(tree, tmp_path):
    tree["data"] |= {"in_memory": False, "workers": 2}
    run(tree)
    expected = record(tree["run_dir"])
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tree["data"]["root"])
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        names = sorted(path.name for path in Path(tree["data"]["root"]).glob("train-*.tar"))
        tree["data"] |= {"train": [f"{url}/{name}" for name in names], "cache_dir": str(tmp_path / "cache")}
        tree["run_dir"] += "-remote"
        run(tree)
        server.shutdown()
    assert record(tree["run_dir"]) == expected
    assert len(list((tmp_path / "cache").rglob("*.tar"))) == 3


def damage(tree: dict[str, Any], folder: Path, count: int) -> None:
    """Point the config at a copy of its training set in which the first `count` images are none."""
    source = open_shards(config.parse(tree, "test").data, tree["data"]["train"])
    packed = [
        (sample.key, b"no image" if i < count else sample.image, "png", sample.label)
        for i, sample in enumerate(source.iterate())
    ]
    packing.pack(packed, folder, "bad", samples_per_shard=64)
    tree["data"] = {**tree["data"], "train": f"{folder}/bad-*.tar"}


def test_bad_images_are_counted_and_named_once(tree, tmp_path, capfd):
    damage(tree, tmp_path, count=2)
    tree["data"]["max_bad_fraction"] = 0.011  # 2.1 of 192
    run(tree)
    counts = [line["bad_samples"] for line in record(tree["run_dir"])]
    assert counts[-1] == 2
    assert counts == sorted(counts)
    told = [line for line in capfd.readouterr().err.splitlines() if "not a readable image" in line]
    assert len(told) == 2


def test_too_many_bad_images_end_the_run_with_their_names(tree, tmp_path):
    damage(tree, tmp_path, count=2)
    tree["data"]["max_bad_fraction"] = 0.009
    with pytest.raises(UserError, match=r"2 of 192 samples .*train0000.*; .*train0001"):
        run(tree)


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_streaming(tree, workers):
    tree["data"] |= {
        "access": "stream",
        "epoch_samples": 192,
        "in_memory": False,
        "workers": workers,
        "shuffle_buffer": 50,
    }
    summary = run(tree)
    assert summary["step"] == 24
    assert [line["step"] for line in record(tree["run_dir"])] == list(range(1, 25))
    assert record(tree["run_dir"])[5]["epoch"] == 1.0


@pytest.mark.portable
def test_bf16_trains_close_to_float32(tree):
    """As close as runs in float32 from weights that are off by as much as bf16 rounds."""
    tree["student"] = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 24]}}
    tree["teacher"] |= {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 24, 32]}}
    tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    run(tree)
    run_moved(run, tree, BF16 / 2)
    run({**tree, "run_dir": tree["run_dir"] + "-bf16", "mixed_precision": "bf16"})

    def losses(run_dir: str) -> list[float]:
        return [line["loss"] for line in record(run_dir)]

    full, half = losses(tree["run_dir"]), losses(tree["run_dir"] + "-bf16")
    assert_rounding_explains(half, full, strayed(losses, tree["run_dir"]))
    assert half != full


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is allowed on a GPU")
def test_fp16_is_refused_on_a_cpu(tree):
    with pytest.raises(UserError, match="fp16"):
        run({**tree, "mixed_precision": "fp16"})


def test_a_run_that_has_not_begun_says_so(settings):
    run = Run(settings)
    for use in (run.step, run.end, lambda: run.finished):
        with pytest.raises(RuntimeError, match=r"the run has not begun: call build\(\) and begin\(\) first"):
            use()
