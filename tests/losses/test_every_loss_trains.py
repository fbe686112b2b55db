"""Every method through the training loop, on small networks."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from indistill import config
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.models import heads, timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.training import parts
from indistill.training.loop import train

ALL = ["kd", "dist", "dkd", "pkt", "information_flow", "rkd", "crd", "sp", "at", "hint", "vid", "reviewkd"]


def run(tree):
    return train(config.parse(tree, "test"))


def lines(tree):
    return [line for line in read_lines(Path(tree["run_dir"]) / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", ALL)
def test_a_loss_alone_goes_down_and_resumes(tree, name):
    del tree["warmup"]
    tree["kd"] = {"losses": [{"name": name}]}
    tree["optimizer"] = {"name": "adamw", "lr": 3e-3}
    tree["duration"] = "30 steps"
    tree["checkpoint"] = {"every_steps": 15, "keep_last": 9}
    summary = run(tree)
    told = [line[name] for line in lines(tree)]
    assert len(told) == 30
    assert sum(told[-5:]) < 0.985 * sum(told[:5])  # vid is slow: its variances begin far from their best
    assert ("top1" in summary["metrics"]) == (
        name in ("kd", "dist", "dkd")
    )  # else no loss trains the classifier

    state = load_file(Path(tree["run_dir"]) / "checkpoints" / "step-00000030" / "model.safetensors")
    trained = {key.split(".")[0] for key in state}
    assert trained == ({"net", "projectors"} if name in ("hint", "vid", "reviewkd", "crd") else {"net"})
    student = load_file(Path(tree["run_dir"]) / "student.safetensors")
    assert set(student) == set(
        timm_model.create(config.Model(name="cnn32_student"), 10, 32, "student").state_dict()
    )

    again = copy.deepcopy(tree)
    train(config.parse(again, "test"), str(Path(tree["run_dir"]) / "checkpoints" / "step-00000015"))
    assert [line[name] for line in lines(again)] == told


def test_losses_on_maps_of_a_later_pair_leave_the_rest(tree):
    """kd.pairs is its own: the warm-up has three pairs, KD reads one."""
    tree["kd"] = {"losses": [{"name": "ce"}, {"name": "at"}], "pairs": [[1, 1]]}
    run(tree)
    assert lines(tree)[-1].keys() >= {"ce", "at"}
    tree["kd"]["pairs"] = [[3, 1]]
    tree["run_dir"] += "-other"
    with pytest.raises(UserError, match=r"kd\.pairs: teacher stages \[3\]"):
        run(tree)


# --- the distillation token ---------------------------------------------------------------------------------


DEIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def test_a_distillation_token_learns_from_the_teacher(tree):
    del tree["warmup"]
    tree["student"] = {"name": "deit_tiny_distilled_patch16_224", "kwargs": DEIT}
    tree["kd"] = {"losses": [{"name": "ce", "weight": 0.5}, {"name": "token", "weight": 0.5}]}
    summary = run(tree)
    assert {"ce", "token"} <= lines(tree)[-1].keys()
    assert 0 <= summary["metrics"]["top1"] <= 1


@pytest.mark.portable
def test_the_tokens_are_apart_in_training_and_averaged_in_evaluation(float64):
    torch.manual_seed(0)
    section = config.Model(name="deit_tiny_distilled_patch16_224", kwargs=DEIT)
    net = timm_model.create(section, 10, 32, "student")
    network = Network(net, ((0.5,) * 3, (0.5,) * 3), reads=("logits", "token"))
    images = torch.randint(0, 256, (2, 3, 32, 32))
    output = network.train()(images)
    tokens = net.forward_features(network.normalise(images))
    assert torch.allclose(output.logits, net.head(tokens[:, 0]), rtol=0, atol=1e-10)
    assert torch.allclose(output.token_logits, net.head_dist(tokens[:, 1]), rtol=0, atol=1e-10)
    mean = network.eval()(images)
    assert mean.token_logits is None
    assert torch.allclose(mean.logits, (output.logits + output.token_logits) / 2, rtol=0, atol=1e-10)


def test_a_student_without_the_token_is_refused(tree):
    tree["kd"] = {"losses": [{"name": "token"}]}
    with pytest.raises(UserError, match="distillation token, cnn32_student has none"):
        run(tree)


# --- intermediate classifier heads --------------------------------------------------------------------------


@pytest.fixture
def heads_tree(tree):
    for key in ("student", "warmup", "kd"):
        del tree[key]
    tree |= {"stage": "heads", "optimizer": {"name": "adamw", "lr": 3e-3}}
    return tree


def test_heads_learn_on_a_teacher_that_does_not(heads_tree):
    heads_tree["duration"] = "48 steps"
    summary = run(heads_tree)
    told = [line["ce"] for line in lines(heads_tree)]
    assert sum(told[-5:]) < 0.7 * sum(told[:5])
    metrics = summary["metrics"]
    assert metrics["top1"] == metrics["top1_head3"]
    assert all(metrics[f"top1_head{i}"] > 0.2 for i in (1, 2, 3))  # ten classes
    run_dir = Path(heads_tree["run_dir"])
    state = load_file(run_dir / "checkpoints" / "step-00000048" / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "classifiers.0.weight": (10, 16 * 15 * 15), "classifiers.0.bias": (10,),
        "classifiers.1.weight": (10, 32 * 6 * 6), "classifiers.1.bias": (10,),
        "classifiers.2.weight": (10, 64 * 2 * 2), "classifiers.2.bias": (10,),
    }  # fmt: skip


def test_a_student_learns_from_the_cohort(heads_tree, tmp_path):
    heads_tree["heads"] = {"stages": [0, 2], "pool": 4}
    run(heads_tree)
    path = f"{heads_tree['run_dir']}/heads.safetensors"
    tree = copy.deepcopy(heads_tree) | {"stage": "distill", "run_dir": str(tmp_path / "student")}
    tree |= {"student": {"name": "cnn32_student"}, "kd": {"losses": [{"name": "dih"}]}}
    tree["teacher"] = {"name": "cnn32_auxiliary", "random": True, "heads": path}
    run(tree)
    assert lines(tree)[-1]["dih"] == lines(tree)[-1]["loss"]

    weighted = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "weighted")}
    weighted["kd"]["losses"][0]["weights"] = [1.0, 1.0]
    with pytest.raises(UserError, match=r"dih\.weights: 2 for the teacher and 2 heads"):
        run(weighted)
    other = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "other")}
    other["teacher"] |= {"name": "cnn32_student"}
    with pytest.raises(UserError, match="holds no heads of this teacher"):
        run(other)
    other = copy.deepcopy(tree) | {"run_dir": str(tmp_path / "none")}
    other["teacher"]["heads"] = str(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no file"):
        run(other)


@pytest.mark.portable
def test_saved_heads_classify_the_teachers_own_maps(float64, tmp_path):
    torch.manual_seed(0)
    net = timm_model.create(config.Model(name="cnn32_auxiliary"), 10, 32, "teacher")
    teacher = Network(net, ((0.5,) * 3, (0.25,) * 3))
    heads = Heads(teacher, [0, 1], pool=5, image_size=32)
    heads.save(tmp_path / "heads.safetensors")
    loaded = Heads.load(str(tmp_path / "heads.safetensors"), teacher, 32)
    images = torch.randint(0, 256, (3, 3, 32, 32))
    output = loaded(images)
    _, maps = net.forward_intermediates(teacher.normalise(images), [0, 1])
    for i, (feature, logits) in enumerate(zip(maps, output.cohort)):
        pooled = torch.nn.functional.adaptive_avg_pool2d(feature, 5).flatten(1)
        expected = pooled @ heads.classifiers[i].weight.T + heads.classifiers[i].bias
        assert torch.allclose(logits, expected, rtol=0, atol=1e-10)
    assert output.logits is output.cohort[-1]
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_heads_do_not_run_the_teacher_beyond_their_stage():
    net = timm_model.create(config.Model(name="cnn32_auxiliary"), 10, 32, "teacher")
    calls = []
    for name, module in net.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    heads = Heads(Network(net, ((0.5,) * 3, (0.25,) * 3)), [0, 1], None, 32)
    calls.clear()
    heads(torch.zeros(1, 3, 32, 32))
    assert set(calls) == {"conv1", "conv1_bn", "conv2", "conv2_bn"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {"name": "cnn32_student"}}, "remove student"),
        ({"warmup": {}}, "remove warmup"),
        ({"kd": {"losses": [{"name": "kd"}]}}, "remove kd.losses other than ce"),
        ({"teacher": None}, "needs one teacher"),
        ({"heads": {"stages": [2, 1]}}, "need increasing indices from 0 to 2"),
        ({"heads": {"stages": [3]}}, "need increasing indices from 0 to 2"),
    ],
)
def test_what_heads_refuse(heads_tree, change, message):
    with pytest.raises(UserError, match=message):
        run(heads_tree | change)


def test_a_head_too_large_to_be_meant_is_refused(monkeypatch):
    monkeypatch.setattr(heads, "_MAX_HEAD_WEIGHTS", 16 * 15 * 15 * 10 - 1)
    net = timm_model.create(config.Model(name="cnn32_auxiliary"), 10, 32, "teacher")
    with pytest.raises(UserError, match=r"3600 inputs for 10 classes.*heads\.pool"):
        Heads(Network(net, ((0.5,) * 3, (0.25,) * 3)), [0], None, 32)


# --- what a run is made of ----------------------------------------------------------------------------------


def test_a_changed_teacher_is_refused_by_name(tree, tmp_path):
    torch.manual_seed(1)
    weights = timm_model.create(config.Model(name="cnn32_auxiliary"), 10, 32, "teacher").state_dict()
    torch.save(weights, tmp_path / "teacher.pt")
    tree["teacher"] |= {"checkpoint": str(tmp_path / "teacher.pt"), "random": False}
    tree["warmup"]["prune"] = {"criterion": "random"}
    run(tree)
    weights["fc2.bias"] += 1
    torch.save(weights, tmp_path / "teacher.pt")
    with pytest.raises(UserError, match="saved with another teacher"):
        run(tree)


@pytest.mark.parametrize("criterion", ["l2", "bn_scale", "activation", "taylor", "random"])
def test_a_criterion_makes_the_plan(tree, criterion):
    tree["warmup"]["prune"] = {"criterion": criterion, "batches": 2}
    run(tree)
    plan = json.loads((Path(tree["run_dir"]) / "prune_plan.json").read_text())
    assert plan["criterion"] == criterion
    assert [len(pair["kept"]) for pair in plan["pairs"]] == [8, 16, 32]


@pytest.mark.parametrize(
    ("curriculum", "phases"),
    [
        ("cumulative", [{"mse_pair1"}, {"mse_pair1", "mse_pair2"}, {"mse_pair1", "mse_pair2", "mse_pair3"}]),
        ("reversed", [{"mse_pair3"}, {"mse_pair2"}, {"mse_pair1"}]),
        ("all_at_once", [{"mse_pair1", "mse_pair2", "mse_pair3"}]),
    ],
)
def test_a_curriculum_trains_its_pairs(tree, curriculum, phases):
    tree["warmup"]["curriculum"] = curriculum
    run(tree)
    terms = [frozenset(key for key in line if key.startswith("mse_pair")) for line in lines(tree)]
    assert list(dict.fromkeys(terms)) == [*map(frozenset, phases), frozenset()]
    assert sum(map(bool, terms)) == 13  # steps of warm-up


def test_a_pace_of_its_own_is_kept_by_a_resumed_run(tree):
    """Each pair gets at most 8 steps; a tolerance that nothing meets ends it after two windows of 2 steps."""
    tree["warmup"] = {"curriculum": "auto", "durations": ["8 steps"] * 3}
    tree["warmup"]["auto"] = {"window": "2 steps", "patience": 1, "tolerance": 0.5}
    tree["duration"] = "30 steps"
    tree["checkpoint"] = {"every_steps": 1, "keep_last": 99}
    run(tree)
    expected = [(line["phase"], line["loss"]) for line in lines(tree)]
    phases = [phase for phase, _ in expected]
    assert phases == ["warmup 1/3"] * 4 + ["warmup 2/3"] * 4 + ["warmup 3/3"] * 4 + ["kd"] * 18
    for step in (10, 8, 3):  # in a window, at a boundary, before any decision
        train(config.parse(tree, "test"), str(Path(tree["run_dir"]) / "checkpoints" / f"step-{step:08d}"))
        assert [(line["phase"], line["loss"]) for line in lines(tree)] == expected


def test_sync_batchnorm_converts_the_student_alone(tree):
    settings = config.parse(tree | {"sync_batchnorm": True}, "test")
    net = timm_model.create(settings.student, 10, 32, "student")
    student = parts.trainable(settings, Network(net, ((0.5,) * 3, (0.25,) * 3)))
    kinds = {type(module).__name__ for module in student.modules()}
    assert "SyncBatchNorm" in kinds
    assert "BatchNorm2d" not in kinds
    assert set(student.state_dict()) == {f"net.{key}" for key in net.state_dict()}
