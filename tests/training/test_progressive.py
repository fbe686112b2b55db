"""Progressive resolution: one size per step, in the loader, in stored targets, in a run and in `plan`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LOGGED, in_float64, losses, run_ranks, train_until

from indistill import config
from indistill.commands.plan import estimate
from indistill.commands.targets import verify, write
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.curriculum import ImageSizes, Timetable
from indistill.models import timm_model
from indistill.training import loop, mix


@pytest.fixture
def growing(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """24 steps of 6 an epoch: 32 px for 5 steps, 64 px for 5, then 96 px."""
    tree["data"]["image_size"] = {"from": 32, "to": 96, "until": "10 steps"}
    tree["student"] = {"name": "resnet10t", "kwargs": {"channels": [8, 8, 16, 16], "stem_width": 8}}
    wider = {"channels": [16, 16, 32, 32], "stem_width": 8}
    tree["teacher"] = {"name": "resnet10t", "kwargs": wider, "pretrained": False, "random": True}
    tree["warmup"]["pairs"] = [[1, 1], [2, 2], [3, 3]]
    tree["data"]["augment"] = {"recipe": "random_resized_crop", "views": 2}
    tree["warmup"]["durations"] = ["2 steps", "2 steps", "4 steps"]
    tree["kd"]["losses"] = [{"name": "kd"}, {"name": "at"}]
    tree["targets"] = {"dir": str(tmp_path / "targets")}
    tree["evaluate"] = {"similarity_samples": 0}
    tree["duration"] = "15 steps"
    return tree


SIZES = [32] * 5 + [64] * 5 + [96] * 5


def terms(run_dir: str | Path) -> list[dict[str, Any]]:
    lines = read_lines(Path(run_dir) / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if k not in ("images_per_second", "data_wait_fraction")}
        for line in lines
        if "loss" in line
    ]


def with_(tree: dict[str, Any], run_dir: Path, source: str = "live") -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    tree["run_dir"] = str(run_dir)
    tree["targets"]["source"] = source
    return tree


@pytest.mark.parametrize(("until", "rises"), [(10, 2), (11, 3), (7, 7), (100, 6)])
def test_sizes_take_equal_times(until, rises):
    sizes = ImageSizes(64, 64 + 32 * rises, until)
    found = [sizes.at(step) for step in range(until + 20)]
    assert found == sorted(found)
    assert set(found) == set(range(64, 65 + 32 * rises, 32))
    assert found[until - 1] < found[until] == sizes.full
    counts = [found[:until].count(size) for size in range(64, sizes.full, 32)]
    assert max(counts) - min(counts) <= 1


def test_phases_are_cut_where_the_size_changes():
    timetable = Timetable(6, 32, 24, None, None)
    sizes = ImageSizes(32, 128, 11)
    phase = config_phase()
    parts = sizes.parts(phase, timetable.steps_of(phase))
    steps = [(step, size) for part, size in parts for step in timetable.steps_of(part)]
    assert steps == [(step, sizes.at(step)) for step in timetable.steps_of(phase)]
    assert [part.name for part, _ in parts] == [f"kd at {size} px" for size in (32, 64, 96, 128)]
    assert ImageSizes(64, 64).parts(phase, range(24)) == [(phase, 64)]


def config_phase():
    from indistill.curriculum import Phase

    return Phase("kd", 0, (), (), 2, None)


@pytest.mark.parametrize("access", ["index", "stream"])
def test_a_step_has_one_size_and_a_resumed_run_the_same(growing, tmp_path, monkeypatch, access):
    growing["data"] |= {"in_memory": False, "workers": 0, "access": access, "epoch_samples": 192}
    seen: list[int] = []
    make_mix = mix.make_mix

    def telling(*arguments):
        inner = make_mix(*arguments)
        return lambda batch, phase: (seen.append(batch.images.shape[-1]), inner(batch, phase))[1]

    monkeypatch.setattr(loop, "make_mix", telling)
    growing["grad_accumulation"] = 2
    evaluated: list[int] = []
    accuracy = loop.evaluate.accuracy

    def telling_accuracy(accelerator, student, eval_set, batch):
        evaluated.append(eval_set[loop_request()].images.shape[-1])
        return accuracy(accelerator, student, eval_set, batch)

    monkeypatch.setattr(loop.evaluate, "accuracy", telling_accuracy)
    train_until(with_(growing, tmp_path / "run"), 7)
    assert seen == [size for size in SIZES[:7] for _ in range(2)]
    train_until(with_(growing, tmp_path / "run"))
    assert seen[14:] == [size for size in SIZES[7:] for _ in range(2)]
    assert set(evaluated) == {96}


def loop_request():
    import numpy as np

    from indistill.data.batch import Request

    return Request(0, 0, 0, np.arange(2))


@pytest.mark.parametrize("mixing", [False, True])
def test_stored_targets_of_each_size_give_the_live_run(growing, tmp_path, monkeypatch, mixing):
    if mixing:
        growing["kd"]["mix"] = {"mixup": 0.8, "cutmix": 1.0}
    loop.train(config.parse(with_(growing, tmp_path / "live"), "test"))
    live = terms(tmp_path / "live")
    manifest = write.write(config.parse(growing, "test"))
    assert {name: field.views for name, field in manifest.fields.items()} == {
        "pair1-32px": [0],
        "pair2-32px": [0],
        "pair3-32px": [0],
        "pair3-64px": [0, 1],
        **{f"{name}-64px": [1] for name in ("stage1", "stage2", "stage3", "logits")},
        **{f"{name}-96px": [0, 1] for name in ("stage1", "stage2", "stage3", "logits")},
    }
    assert manifest.fields["pair3-64px"].shape[1] == 2 * manifest.fields["pair3-32px"].shape[1]
    assert verify.verify(config.parse(growing, "test"), 1000)
    create = timm_model.create

    def student_only(section, classes, size, role):
        assert role == "student"
        return create(section, classes, size, role)

    monkeypatch.setattr(timm_model, "create", student_only)
    loop.train(config.parse(with_(growing, tmp_path / "cached", "cached"), "test"))
    assert terms(tmp_path / "cached") == live
    shorter = with_(growing, tmp_path / "shorter", "cached")
    shorter["data"]["image_size"]["until"] = "9 steps"
    with pytest.raises(UserError, match=r"made with data.image_size.until: 10 steps, this run has 9 steps"):
        loop.train(config.parse(shorter, "test"))


@pytest.mark.portable
def test_sizes_do_not_depend_on_the_ranks(growing, tmp_path):
    growing["student"] = {"name": "test_vit", "kwargs": {"img_size": 96, "dynamic_img_size": True}}
    growing["warmup"] = None
    growing["kd"]["losses"] = [{"name": "ce"}, {"name": "kd"}]
    run_ranks(in_float64, 1, train_until, with_(growing, tmp_path / "one"))
    run_ranks(in_float64, 2, train_until, with_(growing, tmp_path / "two"), 7)
    run_ranks(in_float64, 1, train_until, with_(growing, tmp_path / "two"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=LOGGED)


def test_plan_counts_each_size(growing):
    growing["warmup"] = None
    growing["kd"]["pairs"] = [[1, 1]]
    found = estimate.of_run(config.parse(growing, "test"), world=2)
    assert [(phase.name, phase.steps) for phase in found.phases] == [
        ("kd at 32 px", 5), ("kd at 64 px", 5), ("kd at 96 px", 5)
    ]  # fmt: skip
    flops = [phase.work.teacher_flops for phase in found.phases]
    assert flops[1] / flops[0] == pytest.approx(4, rel=0.1)
    assert flops[2] / flops[0] == pytest.approx(9, rel=0.1)
    assert {"logits-32px", "stage1-96px"} <= {name for phase in found.phases for name in phase.record_bytes}
    assert "kd at 64 px" in str(found)


def test_plan_compares_the_hours_with_those_at_the_last_size(growing):
    """Of each phase: those of the warm-up end before images have their full size."""
    growing["data"]["in_memory"] = True  # else decoding bounds networks as small as these
    full = copy.deepcopy(growing)
    full["data"]["image_size"] = 96
    found, at_full_size = (estimate.of_run(config.parse(one, "test"), world=1) for one in (growing, full))
    hours = {phase.name: phase.hours / phase.steps for phase in at_full_size.phases}
    for phase in found.phases:
        expected = hours[phase.name.partition(" at ")[0]] * phase.steps
        assert phase.full_size_hours == pytest.approx(expected, rel=1e-9)
    assert sum(phase.full_size_hours for phase in found.phases) == pytest.approx(
        sum(phase.hours for phase in at_full_size.phases)
    )
    share = sum(phase.hours for phase in found.phases) / sum(phase.hours for phase in at_full_size.phases)
    assert 0.1 < share < 0.9
    title, *lines = str(found).partition("Timetable")[2].splitlines()[1:]
    assert title.endswith("hours  of those at 96 px")
    (whole,) = (line for line in lines if line.startswith("  run "))
    assert whole.endswith(f" {share:.0%}")
    assert "of those at" not in str(at_full_size)


# --- a teacher without a classifier, with an input size of its own ------------------------------------------


FEATURES = [
    {"name": "feature", "standardise": "phi_s", "distance": "mse"},
    {"name": "feature", "on": "maps", "standardise": "channel", "distance": "smooth_l1"},
    {"name": "feature", "on": "tokens", "standardise": "channel", "batches": 6},
]


@pytest.fixture(params=[48, 96], ids=["own size", "own size is the last"])
def headless(growing: dict[str, Any], request: pytest.FixtureRequest) -> dict[str, Any]:
    vit = {"patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 3, "dynamic_img_size": True}
    growing["student"] = {"name": "test_vit", "num_classes": 0, "kwargs": vit | {"img_size": 96}}
    growing["teacher"] = {"name": "test_vit2", "random": True, "num_classes": 0, "image_size": request.param}
    growing["kd"] = {"losses": FEATURES, "pairs": [[0, 0], [1, 2]]}
    growing["warmup"] = None
    return growing


def test_a_teacher_with_its_own_size_sees_no_other(headless, tmp_path, monkeypatch):
    side = headless["teacher"]["image_size"]
    seen: set[int] = set()
    create = timm_model.create

    def telling(section, classes, size, role):
        net = create(section, classes, size, role)
        if role == "teacher":
            net.patch_embed.register_forward_pre_hook(lambda _, x: seen.add(x[0].shape[-1]))
        return net

    with monkeypatch.context() as patched:
        patched.setattr(timm_model, "create", telling)
        loop.train(config.parse(with_(headless, tmp_path / "live"), "test"))
    assert seen == {side}
    live = terms(tmp_path / "live")
    assert len(live) == 15

    train_until(with_(headless, tmp_path / "resumed"), 7)
    train_until(with_(headless, tmp_path / "resumed"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "live")

    manifest = write.write(config.parse(headless, "test"))
    assert set(manifest.fields) == {
        f"{name}-{size}px" for name in ("stage0", "stage1", "tokens", "embedding") for size in (32, 64, 96)
    }
    assert len({field.shape for name, field in manifest.fields.items() if name.startswith("tokens")}) == 1
    assert verify.verify(config.parse(headless, "test"), 1000)
    loop.train(config.parse(with_(headless, tmp_path / "cached", "cached"), "test"))
    assert terms(tmp_path / "cached") == live


def test_plan_counts_such_a_teacher_alike_at_each_size(headless):
    side = headless["teacher"]["image_size"]
    found = estimate.of_run(config.parse(headless, "test"), world=1)
    assert len({phase.work.teacher_flops for phase in found.phases}) == 1
    assert f" M at {side} px, student" in str(found)
    # uint8 images, and two normalised copies in float32: of the student's last size, of the teacher's
    assert found.memory["ddp"]["images"] == 32 * 3 * (96**2 * 5 + side**2 * 4)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (
            {"from": 128, "to": 220, "until": "70 percent"},
            "from 128 to 220 is not a rise in steps of 32 pixels",
        ),
        (
            {"from": 224, "to": 224, "until": "70 percent"},
            "from 224 to 224 is not a rise in steps of 32 pixels",
        ),
        ({"from": 128, "to": 224}, "data.image_size.until: Field required"),
        ({"form": 128, "to": 224, "until": 1}, "unknown key 'form'; the nearest valid key is 'from'"),
        (9999, "data.image_size: Input should be less than or equal to 8192"),
        ({"from": 32, "to": 64, "until": 1, "x": 2}, "data.image_size: unknown key 'x'"),
        ({"from": True, "to": 224, "until": 1}, "data.image_size.from: Input should be a valid number"),
        (
            {"from": 128, "to": 224, "until": "some time"},
            "data.image_size.until: duration 'some time' is not",
        ),
    ],
)
def test_what_is_no_rise_is_refused_with_the_config(tree, image_size, message):
    tree["data"]["image_size"] = image_size
    with pytest.raises(UserError) as caught:
        config.parse(tree, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"until": "1 step"},
            "data.image_size.until: 1 step are 1 of 15 steps: images of 3 sizes need from 2 to 14",
        ),
        ({"until": "100 percent"}, "data.image_size.until: 100 percent are 15 of 15 steps"),
    ],
)
def test_sizes_that_do_not_fit_the_run_are_refused(growing, changes, message):
    growing["data"]["image_size"] |= changes
    for command in (lambda settings: loop.train(settings), lambda settings: estimate.of_run(settings, 1)):
        with pytest.raises(UserError) as caught:
            command(config.parse(growing, "test"))
        assert message in str(caught.value)


def test_a_network_of_one_size_is_refused(growing):
    growing["student"] = {"name": "test_vit", "kwargs": {"img_size": 96, "dynamic_img_size": False}}
    growing["warmup"] = None
    growing["kd"]["losses"] = [{"name": "kd"}]
    with pytest.raises(UserError, match=r"^student: cannot take 32 px images .*dynamic_img_size: true"):
        loop.train(config.parse(growing, "test"))


def test_the_recorded_config_reads_back(growing):
    settings = config.parse(growing, "test")
    import yaml

    assert config.parse(yaml.safe_load(config.dump(settings)), "dump") == settings
    flat = config.flatten(settings)
    assert (flat["data.image_size.from"], flat["data.image_size.to"]) == (32, 96)
    assert settings.data.full_size == 96
    assert torch.zeros(config.input_size(settings)).shape == (3, 96, 96)
