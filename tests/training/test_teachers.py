"""Runs with several teachers: what each teaches, stored targets, resuming, several students, bad configs."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LOGGED, in_float64, losses, run_each_alone, run_ranks, train_until
from safetensors.torch import load_file

from indistill import Trainer, config
from indistill.commands.plan import estimate
from indistill.config import UserError
from indistill.curriculum import Phase
from indistill.losses.feature_loss import FeatureLoss
from indistill.losses.objective import Objective, Place
from indistill.models.outputs import Output, Targets
from indistill.targets.several import Member, SeveralTargets
from indistill.training import parts
from indistill.training.loop import train

VIT = {"name": "test_vit2", "id": "dino", "random": True, "num_classes": 0, "image_size": 48}
FEATURE = [
    {"name": "feature", "standardise": "channel", "batches": 2},
    {"name": "feature", "on": "maps", "weight": 0.5},
]


@pytest.fixture
def several(tree: dict[str, Any]) -> dict[str, Any]:
    """A warm-up and logits of one teacher, features of a ViT without a classifier at another size."""
    tree["teachers"] = [tree.pop("teacher"), {**VIT, "weight": 0.25, "losses": FEATURE, "pairs": [[2, 2]]}]
    tree["kd"]["losses"] = [{"name": "ce"}, {"name": "kd"}, {"name": "hint"}]
    tree["evaluate"] = {"similarity_samples": 8}
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 9}
    tree["log"] = {"every_steps": 1}
    return tree


def settings_of(tree: dict[str, Any]) -> config.Config:
    return config.parse(tree, "test")


def lines(run_dir: str) -> list[dict[str, Any]]:
    parsed = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in parsed if "loss" in line]


# --- what each teacher teaches ------------------------------------------------------------------------------


def test_one_teacher_in_a_list_is_the_special_case(tree):
    alone = copy.deepcopy(tree)
    alone["run_dir"] += "-alone"
    train(settings_of(alone))
    tree["teachers"] = [tree.pop("teacher")]
    train(settings_of(tree))
    assert losses(tree["run_dir"]) == losses(alone["run_dir"])
    ours, theirs = (load_file(f"{one['run_dir']}/student.safetensors") for one in (tree, alone))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_each_loss_is_that_of_its_teacher_alone(several):
    """In the first step of KD, each term is what a run with this teacher alone would have had."""
    several["warmup"] = None
    del several["kd"]["losses"][2]
    train(settings_of({**several, "duration": "2 steps"}))
    together, compared = lines(several["run_dir"])[0], []
    for role, of_kd in (("dino", FEATURE), ("", several["kd"]["losses"])):
        one = next(iter(s for s in several["teachers"] if bool(s.get("losses")) == bool(role)))
        section = {key: value for key, value in one.items() if key not in ("id", "weight", "losses", "pairs")}
        tree = {key: value for key, value in several.items() if key != "teachers"} | {"teacher": section}
        tree |= {
            "kd": {"losses": of_kd, "pairs": one.get("pairs")},
            "run_dir": f"{several['run_dir']}-{role}",
        }
        train(settings_of({**tree, "duration": "2 steps"}))
        for key, value in lines(tree["run_dir"])[0].items():
            if key in ("ce", "kd", "feature", "feature_2"):
                assert together[f"{role}/{key}".lstrip("/")] == pytest.approx(value, rel=1e-6)
                compared.append(key)
    assert sorted(compared) == ["ce", "feature", "feature_2", "kd"]
    terms = {"ce": 1, "kd": 1, "dino/feature": 0.25, "dino/feature_2": 0.125}
    assert together["loss"] == pytest.approx(sum(w * together[key] for key, w in terms.items()), rel=1e-6)


def test_the_warm_up_is_that_of_its_teacher(several):
    train(settings_of({**several, "duration": "14 steps"}))
    alone = copy.deepcopy(several)
    alone |= {"teacher": alone.pop("teachers")[0], "run_dir": several["run_dir"] + "-alone"}
    train(settings_of({**alone, "duration": "14 steps"}))
    assert [line for line in lines(several["run_dir"]) if "mse_pair1" in line]
    ours, theirs = (
        [line["loss"] for line in lines(one["run_dir"]) if line["phase"] != "kd"] for one in (several, alone)
    )
    assert ours == theirs


class _Fixed:
    """A source of given logits."""

    fingerprint, teacher, kd_stages = "", None, ()

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, images: Any, phase: Phase, records: Any = None) -> Targets:
        return Targets(logits=self.logits)


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_an_ensemble_is_the_weighted_mean(mean):
    logits = 5 * torch.randn(3, 4, 7, generator=torch.manual_seed(0))
    weights = [1.0, 2.0, 0.5]
    members = [Member(str(i), _Fixed(x), 0, w) for i, (x, w) in enumerate(zip(logits, weights))]
    found = SeveralTargets(members, None, mean)(None, Phase("kd", 0, (), (), 0, 9)).each[0].logits
    exact = logits.double()
    share = torch.tensor(weights, dtype=torch.float64)[:, None, None] / 3.5
    if mean == "logits":
        assert torch.allclose(found.double(), (share * exact).sum(0), atol=1e-5)
    else:
        assert torch.allclose(found.double().exp(), (share * exact.softmax(2)).sum(0), atol=1e-6)


def test_an_ensemble_teaches_its_mean(several):
    several["warmup"] = None
    second = {**several["teachers"][0], "id": "second", "weight": 3.0}
    second["kwargs"] = {**second.get("kwargs", {})}
    several["teachers"] = [several["teachers"][0], second]
    several["kd"] = {"losses": [{"name": "kd", "temperature": 1.0}], "ensemble": "logits"}
    train(settings_of({**several, "duration": "2 steps"}))
    # Two teachers with the same weights are as good as one.
    alone = {key: value for key, value in several.items() if key != "teachers"}
    alone |= {"teacher": several["teachers"][0], "run_dir": several["run_dir"] + "-alone"}
    train(settings_of({**alone, "duration": "2 steps"}))
    assert losses(several["run_dir"]) == pytest.approx(losses(alone["run_dir"]), rel=1e-5)


def _objective(dropping: float | None) -> tuple[Objective, Output, Targets, list[torch.Tensor]]:
    """Two teachers of an embedding [6, 4] at weights 1 and 3, and the squared error of each sample."""
    generator = torch.Generator().manual_seed(3)
    student, *of_teachers = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    loss = FeatureLoss(name="feature", distance="mse")
    output = Output((), student, projected={"0": (student,), "1": (student,)})
    targets = Targets(each=(Targets(), *(Targets(embedding=x) for x in of_teachers)))
    places = [Place("a", 1, (), 1.0), Place("b", 2, (), 3.0)]
    exact = [w * (student - x).square().mean(1) for w, x in zip((1, 3), of_teachers)]
    return Objective([loss, loss], 1, places=places, dropping=dropping), output, targets, exact


def test_teacher_dropping_keeps_the_largest_loss_of_each_image():
    objective, output, targets, exact = _objective(1.0)
    total, _ = objective(output, targets, labels=torch.zeros(6), phase=Phase("kd", 0, (), (), 0, 9), step=0)
    assert torch.allclose(total, torch.stack(exact).amax(0).mean())


def test_teacher_dropping_is_a_mean_over_what_is_kept():
    objective, output, targets, exact = _objective(0.0)
    phase = Phase("kd", 0, (), (), 0, 9)
    total, terms = objective(output, targets, labels=torch.zeros(6), phase=phase, step=0)
    assert torch.allclose(total, torch.stack(exact).mean())
    assert torch.allclose(terms["b/feature"], exact[1].mean() / 3)
    objective, *_ = _objective(0.25)
    largest = torch.stack(exact).argmax(0)
    kept_pairs = []
    for seed in range(400):
        torch.manual_seed(seed)
        total, _ = objective(output, targets, labels=torch.zeros(6), phase=phase, step=0)
        torch.manual_seed(seed)
        kept = torch.rand(2, 6, dtype=torch.float64) >= 0.25
        kept[largest, torch.arange(6)] = True
        assert torch.allclose(total, torch.stack(exact)[kept].mean())
        kept_pairs.append(kept.sum().item() - 6)
    assert sum(kept_pairs) / 2400 == pytest.approx(0.75, abs=0.04)  # more than four standard errors


def test_teacher_dropping_in_a_run(several):
    several["teachers"].append({**VIT, "id": "clip", "name": "test_vit", "losses": FEATURE[:1]})
    several["kd"]["teacher_dropping"] = 0.5
    train(settings_of(several))
    assert {"dino/feature", "clip/feature", "ce"} <= lines(several["run_dir"])[-1].keys()


# --- stored targets, resuming, several students -------------------------------------------------------------


def test_stored_targets_give_the_same_run(several, tmp_path):
    several["data"]["augment"]["views"] = 2
    live = {**several, "run_dir": several["run_dir"] + "-live"}
    train(settings_of(live))
    stored = {**several, "targets": {"source": "cached", "dir": str(tmp_path / "t")}}
    only = {**stored, "teachers": several["teachers"][:1], "run_dir": str(tmp_path / "one")}
    Trainer(only).write_targets()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").rglob("*.bin")}
    Trainer(stored).write_targets()
    assert {path: path.stat().st_mtime_ns for path in files} == files  # none was computed again
    assert {path.name for path in (tmp_path / "t").iterdir()} == {"cnn32_auxiliary", "dino"}
    assert Trainer(stored).verify_targets(20)
    with pytest.raises(ValueError, match="would check nothing"):
        Trainer(stored).verify_targets(0)
    train(settings_of(stored))
    assert losses(stored["run_dir"]) == losses(live["run_dir"])


@pytest.mark.parametrize("step", [6, 15])  # in the warm-up, and in KD
def test_a_killed_run_repeats_itself(several, step):
    whole = {**several, "run_dir": several["run_dir"] + "-whole"}
    train(settings_of(whole))
    train_until(several, step)
    train_until(several)
    assert losses(several["run_dir"]) == losses(whole["run_dir"])


def test_a_run_resumes_on_another_number_of_processes(several):
    """In float64, and with a student without batch norms, which see how many images a process has."""
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3}
    several |= {"student": {"name": "test_vit", "kwargs": kwargs}, "warmup": None}
    several["kd"] = {"losses": [{"name": "ce"}, {"name": "kd"}]}
    whole = {**several, "run_dir": several["run_dir"] + "-whole"}
    run_ranks(in_float64, None, train_until, whole)
    run_ranks(in_float64, None, train_until, several, 10)
    run_ranks(in_float64, 2, train_until, several)
    ours, theirs = losses(several["run_dir"]), losses(whole["run_dir"])
    assert len(ours) == len(theirs) == 24
    assert ours[10:] == pytest.approx(theirs[10:], rel=LOGGED)


def test_several_students_of_several_teachers(several, tmp_path):
    several["checkpoint"] = {"every_steps": 100}
    several["students"] = [{"name": "a"}, {"name": "b", "kd": {"losses": [{"name": "kd"}, {"name": "ce"}]}}]
    path = tmp_path / "students.yaml"
    path.write_text(yaml.safe_dump(several))
    Trainer(path).train()
    run_each_alone(path, tmp_path / "alone")
    for name in "ab":
        assert losses(f"{several['run_dir']}/{name}") == losses(tmp_path / "alone" / name)


# --- plan ---------------------------------------------------------------------------------------------------


def test_plan_counts_each_teacher(several):
    settings = settings_of(several)
    found = estimate.of_run(settings, world=1)
    sizes = {}
    for name, one in settings.by_teacher.items():
        network = parts.create_teacher(one)
        sizes[name] = sum(p.numel() for p in network.parameters())
    assert {one.name: one.parameters for one in found.teachers} == sizes
    assert found.teacher_parameters == sum(sizes.values())
    assert {"teacher dino", "teacher cnn32_auxiliary"} <= found.memory["ddp"].keys()
    kd = found.phases[-1]
    assert kd.work.teacher_flops == sum(one.flops for one in found.teachers)
    assert {"dino/embedding", "dino/stage2", "cnn32_auxiliary/logits"} <= kd.work.targets.keys()
    assert found.phases[0].work.targets.keys() == {"cnn32_auxiliary/pair1"}
    assert "Teachers" in str(found)


# --- mistakes -----------------------------------------------------------------------------------------------

SECOND = {"name": "cnn32_auxiliary", "random": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": SECOND}, "teacher and teachers exclude each other"),
        (
            {"teachers": [SECOND, SECOND]},
            "teachers: two are called cnn32_auxiliary: give one of them another",
        ),
        ({"warmup": {"teacher": "clip"}}, "warmup.teacher: clip is none of teachers"),
        ({"targets": "auto"}, "targets: auto decides for one teacher"),
        (
            {"teachers": [{**SECOND, "losses": [{"name": "kd"}]}]},
            "kd.losses: kd learns from teachers without",
        ),
        ({"teachers": [SECOND, {**SECOND, "id": "b"}]}, "hint needs more than logits"),
        ({"kd": {"losses": [{"name": "ce"}]}, "warmup": None}, "cnn32_auxiliary teaches nothing"),
        ({"teachers": [SECOND, {**VIT, "losses": [{"name": "ce"}]}]}, "dino: the loss ce learns from no"),
        ({"teachers": [SECOND, {**VIT, "losses": [{"name": "kd"}]}]}, "has no classifier"),
        ({"kd": {"teacher_dropping": 0.5}}, "kd.teacher_dropping needs at least two teachers"),
        (
            {
                "kd": {"teacher_dropping": 0.5},
                "teachers": [{**SECOND, "losses": [{"name": "kd"}]}, {**VIT, "losses": FEATURE}],
                "warmup": None,
            },
            "the loss kd of cnn32_auxiliary has no value for each image",
        ),
        ({"kd": {"losses": []}, "teachers": []}, "kd.losses: is empty"),
        ({"stage": "heads", "student": None, "warmup": None}, "stage: heads needs one teacher"),
        (
            {"teachers": [{**SECOND, "id": "../x"}]},
            "teachers.0.id: '../x' cannot name a folder: begin with a letter",
        ),
        (
            {"teachers": [{**SECOND, "pairs": [[0, 0]]}, {**VIT, "losses": FEATURE}]},
            "cnn32_auxiliary: pairs are for losses of its own on feature maps",
        ),
    ],
)
def test_mistakes_in_the_config(several, change, message):
    with pytest.raises(UserError, match=r"^test: ") as error:
        settings_of({**several, **change})
    assert message in str(error.value)


@pytest.mark.parametrize("dropping", [False, True])
def test_a_run_is_read_without_its_losses(several, tmp_path, dropping):
    """As `report` and `export` read it: in a process that has loaded no loss."""
    if dropping:
        several["teachers"][0]["losses"] = FEATURE
        several["kd"] = {"losses": [], "teacher_dropping": 0.5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(several))
    program = f"from indistill import config; print(len(config.load_recorded({str(path)!r}).teachers))"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"2\n"


def test_errors_name_the_teacher(several):
    several["teachers"][1] |= {"losses": [{"name": "feature", "on": "tokens"}], "pairs": None}
    with pytest.raises(UserError, match=r"^teachers: dino: .*patch tokens"):
        train(settings_of(several))


def test_old_runs_have_the_same_identity(tree):
    flat = config.flatten(settings_of(tree))
    assert not [key for key in flat if "teachers" in key or key in ("kd.ensemble", "warmup.teacher")]


def test_the_identity_has_the_keys_of_each_teacher(several):
    flat = config.flatten(settings_of(several))
    assert flat["teachers.1.weight"] == 0.25
    assert "teachers.1.shard" not in flat  # it may change between two starts
