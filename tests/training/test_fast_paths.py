"""Every fast path against the plain one: the same results."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import (
    BF16,
    EPS,
    LOGGED,
    SMOOTH,
    assert_rounding_explains,
    in_float64,
    losses,
    run_moved,
    run_ranks,
    strayed,
)
from torch import nn

from indistill import config, prune
from indistill.curriculum import Phase
from indistill.models import frozen
from indistill.models.network import Network
from indistill.targets import live
from indistill.targets.live import LiveTargets
from indistill.training import loop, start

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
KD = Phase("kd", 1, (), (), 4, None)
WARMUP = Phase("warmup 1/1", 0, (0,), (1.0,), 0, 4)


def run(tree: dict[str, Any]) -> dict[str, Any]:
    return loop.train(config.parse(tree, "test"))


# --- the teacher --------------------------------------------------------------------------------------------

TEACHERS = {
    "resnet18": {},
    "test_vit": {"img_size": 64, "patch_size": 16},
    "test_nfnet": {},  # standardises its weights before it multiplies with them
    "test_convnext": {},
    "test_efficientnet": {},
}


def live_targets(name: str, precision: str) -> LiveTargets:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **TEACHERS[name])
    student = timm.create_model(name, num_classes=10, **TEACHERS[name])
    plan = prune.plan(net, student, [(1, 1)], (3, 64, 64))
    targets_of = LiveTargets(
        Network(net, (MEAN, STD), stages=[1]),
        plan,
        input_size=(3, 64, 64),
        kd_stages=[1],
        precision=precision,
    )
    targets_of.hold_weights()
    return targets_of


@pytest.mark.portable
@pytest.mark.parametrize("name", TEACHERS)
def test_weights_held_in_half_precision_give_what_autocast_gives(name):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))
    plain = live_targets(name, "no").teacher
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, (map_1,) = Network.forward(plain, images), Network.maps(plain, images, [1])
    targets_of = live_targets(name, "bf16")
    held = {parameter.dtype for parameter in targets_of.teacher.parameters()}
    # Batch norms are folded; other norms, and what is no plain layer, stay.
    folded = name in ("resnet18", "test_efficientnet")
    assert held == ({torch.bfloat16} if folded else {torch.bfloat16, torch.float32})
    kd, warmup = targets_of(images, KD), targets_of(images, WARMUP)
    assert torch.equal(kd.logits, expected.logits)
    assert torch.equal(kd.embedding, expected.embedding)
    assert torch.equal(kd.features[0], map_1)
    assert torch.equal(warmup.features[0], map_1)


def test_a_teacher_in_float32_beside_a_student_in_half_precision():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(1))
    expected = live_targets("resnet18", "no")(images, KD).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(live_targets("resnet18", "no")(images, KD).logits, expected)


def test_a_loss_can_go_back_from_targets_made_in_inference_mode():
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    targets_of = live_targets("resnet18", "no")
    for phase in (KD, WARMUP):
        for target in (
            t
            for t in (*targets_of(images, phase).features, targets_of(images, phase).logits)
            if t is not None
        ):
            student = torch.zeros_like(target, requires_grad=True)
            nn.functional.mse_loss(student, target).backward()
            assert torch.allclose(student.grad, -2 * target / target.numel(), rtol=4 * EPS, atol=0)


def test_the_fingerprint_is_that_of_the_weights_as_they_were_loaded():
    assert live_targets("resnet18", "bf16").fingerprint == live_targets("resnet18", "no").fingerprint


# --- the step -----------------------------------------------------------------------------------------------


@pytest.mark.portable
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_fused_optimizer_follows_the_plain_one(tree, tmp_path, float64, name):
    tree["optimizer"]["name"] = name
    plain = {**tree, "run_dir": str(tmp_path / "plain")}
    plain["optimizer"] = {**tree["optimizer"], "kwargs": {"fused": False}}
    kinds = []
    create = timm.optim.create_optimizer_v2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            timm.optim, "create_optimizer_v2", lambda *a, **k: kinds.append(o := create(*a, **k)) or o
        )
        run(tree)
        run(plain)
    assert [bool(optimizer.defaults["fused"]) for optimizer in kinds] == [True, False]
    assert losses(tree["run_dir"]) == pytest.approx(losses(plain["run_dir"]), rel=LOGGED)


# --- torch.compile ------------------------------------------------------------------------------------------


def compiled(tree: dict[str, Any], backend: str) -> None:
    """Train, with a backend that may be quicker to start than the real one, and note what dynamo did."""
    from torch._dynamo.utils import counters

    plugin, compile = start.TorchDynamoPlugin, torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "TorchDynamoPlugin", lambda **keys: plugin(**{**keys, "backend": backend}))
        patch.setattr(live.torch, "compile", partial(compile, backend=backend))
        run(tree)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    stats = {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    (Path(tree["run_dir"]) / "dynamo.json").write_text(json.dumps(stats))


@pytest.mark.parametrize("world", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_each_network_is_compiled_once_for_each_phase(tree, tmp_path, world):
    """A graph serves all steps of its phase, also after evaluations, which are not compiled."""
    tree |= {"evaluate": {"every": "3 steps"}, "ema": {"decay": 0.9}}
    plain = {**tree, "run_dir": str(tmp_path / "plain")}
    run_ranks(in_float64, world, run, plain)
    run_ranks(in_float64, world, compiled, tree | {"compile": True}, "aot_eager")
    stats = json.loads((Path(tree["run_dir"]) / "dynamo.json").read_text())
    assert stats["graphs"] == 8
    assert stats["breaks"] == 0 or world  # DDP's own, around the network
    assert losses(tree["run_dir"]) == pytest.approx(losses(plain["run_dir"]), rel=LOGGED)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("warmup", "graphs"),
    [
        (None, 2),
        # Twice as many C++ programs to compile.
        pytest.param(
            {"curriculum": "sequential", "pairs": [[1, 1]], "durations": ["6 steps"]},
            4,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_compiled_run_follows_the_plain_one(tree, tmp_path, warmup, graphs):
    """As close as runs whose weights are off by one rounding to bf16: a fused kernel rounds less often."""
    tree["student"] = {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 24]}}
    tree["teacher"] |= {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 24, 32]}}
    tree |= {
        "warmup": warmup,
        "duration": "12 steps",
        "mixed_precision": "bf16",
    }
    plain = {**tree, "run_dir": str(tmp_path / "plain")}
    run_ranks(run, None, plain)
    run_ranks(compiled, None, tree | {"compile": True}, "inductor")
    assert json.loads((Path(tree["run_dir"]) / "dynamo.json").read_text()) == {"graphs": graphs, "breaks": 0}
    run_ranks(run_moved, None, run, plain, BF16 / 2)
    ours, expected = losses(tree["run_dir"]), losses(plain["run_dir"])
    assert_rounding_explains(ours, expected, strayed(losses, plain["run_dir"]))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"engine": {"name": "deepspeed"}}, "compile: true does not work with engine: deepspeed"),
        (
            {"teacher": {"name": "resnet18", "random": True, "shard": True}},
            "compile: true needs the whole teacher",
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(tree, keys, message):
    with pytest.raises(config.UserError, match=message):
        config.parse(tree | {"compile": True} | keys, "test")


@pytest.mark.portable
def test_half_precision_for_the_teacher_alone(tree, tmp_path, monkeypatch):
    """Exactly the run whose teacher alone is under autocast."""
    plain = {**tree, "run_dir": str(tmp_path / "plain")}
    run(plain)
    tree["teacher"]["precision"] = "bf16"
    run(tree)

    def under_autocast(teacher: Network, precision: str) -> None:
        assert precision == "no"
        autocast = torch.autocast("cpu", torch.bfloat16)
        teacher.forward, teacher.maps = autocast(teacher.forward), autocast(teacher.maps)

    monkeypatch.setattr(frozen, "run_in", under_autocast)
    by_autocast = {
        **plain,
        "run_dir": str(tmp_path / "autocast"),
        "teacher": {**plain["teacher"], "precision": None},
    }
    run(by_autocast)
    assert losses(tree["run_dir"]) == losses(by_autocast["run_dir"]) != losses(plain["run_dir"])
