"""Runs with a teacher without a classifier: its own input size, its features, stored targets, bad configs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import losses, refused, run_each_alone, train_until
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

from indistill import config
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.commands.plan import estimate
from indistill.commands.targets import write
from indistill.config import UserError, runs
from indistill.models import timm_model
from indistill.models.network import Network
from indistill.training import parts
from indistill.training.loop import train
from indistill.training.runs import run

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
TERMS = [
    {"name": "feature", "standardise": "phi_s", "distance": "mse"},
    {"name": "feature", "on": "maps", "standardise": "channel", "distance": "smooth_l1", "projector": "mlp"},
    {"name": "feature", "on": "tokens", "weight": 0.5, "standardise": "channel", "batches": 2},
]


@pytest.fixture
def headless(tree: dict[str, Any]) -> dict[str, Any]:
    """A small ViT at 32 px taught by a larger one at 48 px, neither with a classifier."""
    del tree["warmup"]
    tree["duration"] = "8 steps"
    tree["student"] = {"name": "test_vit", "num_classes": 0, "kwargs": VIT}
    tree["teacher"] = {"name": "test_vit2", "random": True, "num_classes": 0, "image_size": 48}
    tree["kd"] = {"losses": TERMS, "pairs": [[0, 0], [1, 2]]}
    tree["evaluate"] = {"similarity_samples": 0}
    return tree


def settings_of(tree: dict[str, Any]) -> config.Config:
    return config.parse(tree, "test")


def teacher_of(tree: dict[str, Any]) -> Network:
    torch.manual_seed(0)
    return parts.create_teacher(settings_of(tree)).eval()


# --- the teacher's input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "side"),
    [
        ({"name": "test_vit", "num_classes": 0}, 160),
        ({"name": "test_vit3", "num_classes": 0, "image_size": 64}, 64),
        ({"name": "test_resnet", "num_classes": 0}, 160),
        ({"name": "test_resnet"}, 32),  # with a classifier, the student's size, as ever
        ({"name": "test_resnet", "image_size": 72}, 72),
        ({"name": "test_vit3", "num_classes": 0, "kwargs": {"img_size": 48}}, 48),
        # 150 pixels are not whole patches of 16.
        ({"name": "test_vit", "num_classes": 0, "kwargs": {"img_size": 150, "dynamic_img_size": True}}, 144),
    ],
)
def test_the_size_of_the_teachers_input(headless, section, side):
    headless["teacher"] = {"random": True, **section}
    network = teacher_of(headless)
    seen = []
    network.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    network.net(network.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)))
    assert seen == [(1, 3, side, side)]
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).embedding.shape[0] == 2


def test_the_teacher_sees_the_view_resized_and_normalised_as_its_own(headless):
    headless["teacher"] |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    network = teacher_of(headless)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    larger = resize(images.float(), [48, 48], interpolation=3, antialias=True).clamp(0, 255)  # 3: bicubic
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    with torch.no_grad():
        expected = network.net((larger / 255 - mean) / std)
        assert torch.allclose(network(images).embedding, expected, rtol=1e-4, atol=1e-5)


def test_plan_counts_the_teacher_at_its_own_size(headless):
    found = estimate.of_run(settings_of(headless), world=1)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = timm.create_model("test_vit2", num_classes=0, img_size=48).eval()
        net(torch.empty(1, 3, 48, 48))
    assert found.phases[-1].work.teacher_flops == counter.get_total_flops()
    assert " M at 48 px, student" in str(found)
    # uint8 images of 32 px, and two normalised copies in float32, of 32 px and of 48 px
    assert found.memory["ddp"]["images"] == 32 * 3 * (32**2 * 5 + 48**2 * 4)


# --- features -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "vit_small_patch16_dinov3", "deit_tiny_distilled_patch16_224"]
)
def test_class_and_register_tokens_are_in_no_map(name):
    """Patch tokens are the last block's map after the final norm, one for each patch."""
    net = timm.create_model(name, num_classes=0, img_size=64, depth=2).eval()
    assert net.num_prefix_tokens > 0
    network = Network(
        timm_model.timm_model(net), ((0.5,) * 3, (0.5,) * 3), reads=("tokens",), kd_stages=[0, 1]
    )
    with torch.no_grad():
        output = network.eval()(torch.randint(0, 256, (2, 3, 64, 64)))
        assert [x.shape[2:] for x in (*output.features, output.tokens)] == [(4, 4)] * 3
        normed = net.norm(output.features[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(output.tokens, normed, atol=1e-5)


@pytest.mark.parametrize("mlp", [False, True])
@pytest.mark.parametrize("on", ["embedding", "maps", "tokens"])
def test_each_feature_alone_is_learned(headless, on, mlp):
    headless["kd"]["losses"] = [{"name": "feature", "on": on, "projector": "mlp" if mlp else "linear"}]
    headless["duration"] = "24 steps"
    headless["optimizer"] = {"name": "adamw", "lr": 3e-3}
    summary = train(settings_of(headless))
    told = losses(headless["run_dir"])
    assert sum(told[-4:]) < 0.7 * sum(told[:4])
    assert "top1" not in summary["metrics"]


def test_a_run_resumes_with_the_same_statistics(headless, tmp_path):
    headless["checkpoint"] = {"every_steps": 4, "keep_last": 9}
    whole = settings_of(headless | {"run_dir": str(tmp_path / "whole")})
    train(whole)
    expected = losses(whole.run_dir)
    train_until(headless, 4)
    kept = Path(headless["run_dir"], "standards.safetensors")
    with safe_open(kept, "pt") as file:
        assert {name.rpartition(".")[0] for name in file.keys()} == {  # noqa: SIM118
            "embedding.phi_s.8", "stage0.channel.8", "stage1.channel.8", "tokens.channel.2",
        }  # fmt: skip
    before = kept.read_bytes()
    train_until(headless)
    assert losses(headless["run_dir"]) == expected
    assert kept.read_bytes() == before

    student = load_file(Path(headless["run_dir"], "student.safetensors"))
    assert set(student) == set(timm.create_model("test_vit", num_classes=0, **VIT).state_dict())
    state = load_file(Path(headless["run_dir"], "checkpoints", "step-00000008", "model.safetensors"))
    assert any(name.startswith("projectors.2.") for name in state)


def test_statistics_that_were_edited_are_refused(headless):
    headless["checkpoint"] = {"every_steps": 4}
    train_until(headless, 4)
    path = Path(headless["run_dir"], "standards.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata)
    with pytest.raises(
        UserError, match=r"standards\.safetensors: cannot be read \(its hash is of other values"
    ):
        train_until(headless)
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"standards\.safetensors: cannot be read .*restore it, or start"):
        train_until(headless)


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        ({"name": "test_vit2"}, {"name": "test_vit", "kwargs": VIT}, [[0, 0], [1, 2]]),
        ({"name": "test_vit2"}, {"name": "cnn32_student"}, "auto"),
        ({"name": "test_resnet"}, {"name": "cnn32_student"}, [[0, 0], [1, 1]]),
    ],
    ids=["ViT to ViT", "ViT to CNN", "CNN to CNN"],
)
def test_the_warm_up_before_it(headless, teacher, student, pairs):
    size = {"image_size": 48, "num_classes": 0, "random": True}
    headless |= {"teacher": teacher | size, "student": student | {"num_classes": 0}}
    headless["warmup"] = {
        "curriculum": "sequential",
        "pairs": pairs,
        "durations": ["2 steps", "2 steps"] + ["0 steps"] * (pairs == "auto"),
    }
    headless["kd"] = {"losses": [{"name": "feature"}]}
    train(settings_of(headless))
    lines = [json.loads(line) for line in Path(headless["run_dir"], "metrics.jsonl").read_text().splitlines()]
    phases = [line["phase"] for line in lines if "loss" in line]
    assert [phase.partition(" ")[0] for phase in phases] == ["warmup"] * 4 + ["kd"] * 4
    assert Path(headless["run_dir"], "prune_plan.json").exists()


def test_students_of_one_teacher_read_other_features(headless, tmp_path):
    cnn = {"name": "cnn32_student", "num_classes": 0}
    headless |= {"run_dir": str(tmp_path / "together"), "duration": "4 steps"}
    headless["students"] = [
        {"name": "cnn", "student": cnn, "kd": {"losses": TERMS[:1]}},
        {"name": "vit", "student": headless.pop("student"), "kd": headless.pop("kd")},
    ]
    path = tmp_path / "students.yaml"
    path.write_text(yaml.safe_dump(headless))
    run(runs.load(path))
    run_each_alone(path, tmp_path / "alone")
    for name in ("cnn", "vit"):
        assert losses(tmp_path / "together" / name) == losses(tmp_path / "alone" / name)


# --- stored -------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(headless: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    headless["data"]["augment"]["views"] = 2
    headless["targets"] = {"dir": str(tmp_path / "targets")}
    return headless


def cached(tree: dict[str, Any], **section: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["run_dir"] += "-cached"
    tree["targets"] |= {"source": "cached", **section}
    return tree


def test_stored_features_teach_as_the_teacher_does(stored, monkeypatch):
    train(settings_of(stored))
    manifest = write.write(settings_of(stored))
    assert set(manifest.fields) == {"stage0", "stage1", "tokens", "embedding"}
    assert manifest.fields["tokens"].shape == (64, 3, 3)
    monkeypatch.setattr(parts, "create_teacher", None)
    tree = cached(stored)
    train(settings_of(tree))
    assert losses(tree["run_dir"]) == losses(stored["run_dir"])
    ours, theirs = (Path(one["run_dir"], "standards.safetensors").read_bytes() for one in (tree, stored))
    assert ours == theirs


def test_a_store_without_the_statistics_is_refused_and_completed(stored):
    plain = copy.deepcopy(stored)
    plain["kd"]["losses"] = [
        {key: value for key, value in term.items() if key != "standardise"} for term in TERMS
    ]
    write.write(settings_of(plain))
    with pytest.raises(UserError, match=r"has nothing, but not embedding\.phi_s\.8, which kd.losses reads"):
        train(settings_of(cached(stored)))
    write.write(settings_of(stored))
    tree = cached(stored)
    tree["run_dir"] += "-again"
    train(settings_of(tree))
    assert len(losses(tree["run_dir"])) == 8


# --- what is refused ----------------------------------------------------------------------------------------


VIT_TEACHER = {"name": "test_vit", "random": True, "num_classes": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": VIT_TEACHER | {"name": "test_resnet"}},
            "ResNet has no patch tokens, as vision",
        ),
        ({"student": {"name": "cnn32_student", "num_classes": 0}}, "CNN32 has no patch tokens, as vision"),
        (
            {"teacher": VIT_TEACHER | {"image_size": 50}},
            "50 is no multiple of 16, the patch size",
        ),
        (
            {"teacher": VIT_TEACHER | {"image_size": 64, "kwargs": {"patch_size": [16, 32]}}},
            "the 8 patch tokens of VisionTransformer are no square grid, and cannot be aligned",
        ),
        (
            {
                "teacher": VIT_TEACHER | {"image_size": 64, "kwargs": {"patch_size": [8, 32]}},
                "kd": {"losses": [{"name": "feature", "on": "maps"}], "pairs": [[0, 0]]},
            },
            "the grids 4 x 4 of the student and 8 x 2 of the teacher cannot be aligned",
        ),
        (
            {"teacher": VIT_TEACHER | {"image_size": 48, "kwargs": {"embed_dim": 92, "num_heads": 2}}},
            "standardise: phi_s needs a Hadamard matrix of 92 rows",
        ),
        ({"kd": {"losses": [{"name": "kd"}]}}, "kd.losses: kd reads the student's logits"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_mistake_is_one_line_before_any_step(headless, tmp_path, capsys, command, changes, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(headless | changes))
    assert message in refused(capsys, command, str(path))
    assert not Path(headless["run_dir"], "metrics.jsonl").exists()


def test_phi_s_needs_more_samples_than_channels(headless):
    """A rotation of channels with no extent would be another on other processes."""
    headless["kd"]["losses"] = [{"name": "feature", "standardise": "phi_s", "batches": 2}]
    with pytest.raises(UserError, match=r"phi_s of 64 channels \(embedding\) .* have 64: raise batches"):
        train(settings_of(headless))


def test_an_evaluation_without_a_score_says_what_to_set(headless, tmp_path):
    headless["duration"] = "1 steps"
    train(settings_of(headless))
    with pytest.raises(UserError, match=r"has no classifier to evaluate: set evaluate\.knn"):
        evaluate_checkpoint(settings_of(headless), headless["run_dir"])
