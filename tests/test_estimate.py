"""What a run will take, against counts by hand, and the arithmetic on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from indistill import config
from indistill.commands.cli import main
from indistill.commands.plan import estimate
from indistill.commands.plan.memory import state_bytes
from indistill.commands.plan.network import all_gather_bytes, all_reduce_bytes, communication_seconds, step_seconds
from indistill.commands.plan.text import text
from indistill.config import UserError, runs
from indistill.curriculum import Timetable
from indistill.targets.cost import Work, _convolution_backward, decide, measure, record_bytes
from indistill.training import optim, parts

# Multiply-adds of an image in the small networks: 3x3 convolutions without padding, a 2x2 pool after each.
STUDENT = [8 * 27 * 30**2, 16 * 72 * 13**2, 32 * 144 * 4**2, 128 * 64 + 64 * 10]
TEACHER = [16 * 27 * 30**2, 32 * 144 * 13**2, 64 * 288 * 4**2, 256 * 128 + 128 * 10]
WEIGHTS = 8 * 27 + 16 * 72 + 32 * 144 + 128 * 64 + 64 * 10 + 3 * (8 + 16 + 32) + 64 + 10  # with biases and norms
IMAGENET = Path(__file__).parents[1] / "configs" / "imagenet_r34_r18.yaml"


@pytest.fixture
def found(settings):
    return estimate.of_run(settings, world=2)


def test_operations_are_those_counted_by_hand(found):
    phases = {phase.name: phase.work for phase in found.phases}
    assert list(phases) == ["warmup 1/3", "warmup 2/3", "warmup 3/3", "kd"]
    for depth, work in enumerate(phases.values(), start=1):
        # Backward takes each product twice, but for the gradient of the images; nothing is deeper than the pair.
        assert work.teacher_flops == 2 * sum(TEACHER[:depth])
        assert work.student_flops == 2 * (3 * sum(STUDENT[:depth]) - STUDENT[0])


def test_bytes_kept_for_backward_are_those_counted_by_hand(found):
    images, convolved, pooled = 3 * 32 * 32, 8 * 30 * 30, 8 * 15 * 15
    # The convolution's input, the norm's and the pool's; where the maxima lay (int64); the ReLU's output; the target.
    expected = 4 * images + 2 * 4 * convolved + 8 * pooled + 4 * pooled + 4 * pooled
    assert found.phases[0].work.activation_bytes == expected
    assert found.phases[0].work.batch_bytes < 1000  # means and deviations of a batch norm, and scalars
    assert sorted(p.work.activation_bytes for p in found.phases[:3]) == [
        p.work.activation_bytes for p in found.phases[:3]
    ]


def test_half_precision_halves_activations_and_holds_weights_once_more(tree, settings, found):
    half = estimate.of_run(config.parse(tree | {"mixed_precision": "bf16"}, "test"), world=2)
    work, whole = half.phases[-1].work, found.phases[-1].work
    assert whole.activation_bytes / 2 < work.activation_bytes < 0.8 * whole.activation_bytes  # images and places stay
    multiplied = WEIGHTS - 3 * (8 + 16 + 32) - 64 - 10  # without norms and biases
    assert work.batch_bytes - whole.batch_bytes == pytest.approx(2 * multiplied, abs=500)
    assert (work.teacher_flops, work.student_flops) == (whole.teacher_flops, whole.student_flops)


def test_pairs_are_those_of_training(settings, found, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    _, _, plan = parts.networks(Accelerator(cpu=True), settings, tmp_path, None)
    assert [pair.kept for pair in found.pairs] == [pair.kept for pair in plan.pairs]
    assert [pair.teacher_map for pair in found.pairs] == [(16, 15, 15), (32, 6, 6), (64, 2, 2)]
    assert [pair.student_map for pair in found.pairs] == [(8, 15, 15), (16, 6, 6), (32, 2, 2)]
    assert [phase.steps for phase in found.phases] == [4, 4, 5, 11]
    assert (found.steps_per_epoch, found.samples, found.micro_batch) == (6, 192, 16)


def test_measuring_changes_nothing(settings, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    student, targets_of, plan = parts.networks(Accelerator(cpu=True), settings, tmp_path, None)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    timetable = Timetable.of(settings, 6, len(plan.pairs))
    for phase in timetable.curriculum.phases():
        measure(settings, student, targets_of, build_objective(settings), phase)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(parameter.grad is None for parameter in student.parameters())


def build_objective(settings):
    from indistill.losses.objective import Objective

    return Objective(settings.kd.losses, 6)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_grouped_convolution_backward_is_twice_forward(groups):
    x = torch.zeros(2, 8, 9, 9, requires_grad=True)
    layer = torch.nn.Conv2d(8, 16, 3, groups=groups)
    forward = 2 * 2 * 16 * 7 * 7 * 9 * 8 // groups
    mapping = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize(("name", "copies"), [("adamw", 2), ("momentum", 1), ("sgd", 1)])
def test_optimizer_state(name, copies):
    network = torch.nn.Linear(30, 20)
    section = config.Optimizer(name=name, lr=0.1)
    assert state_bytes(optim.create(network, section)) == copies * 4 * (30 * 20 + 20)


def test_memory(settings, found):
    ddp, *zero = found.memory.values()
    assert ddp["weights"] == ddp["gradients"] == ddp["optimizer state"] / 2 == 4 * WEIGHTS
    kept = max(16 * phase.work.activation_bytes + phase.work.batch_bytes for phase in found.phases)
    assert ddp["activations"] == kept
    assert ddp["images"] == 16 * 3 * 32 * 32 * 9  # as bytes, and normalised for each network
    shared = [[of[key] == ddp[key] / 2 for key in ("optimizer state", "gradients", "weights")] for of in zero]
    assert shared == [[True, False, False], [True, True, False], [True, True, True]]
    assert "moving average" not in ddp
    with_ema = estimate.of_run(settings.model_copy(update={"ema": config.Ema()}), world=2)
    assert with_ema.memory["ddp"]["moving average"] == 4 * WEIGHTS


def test_a_ring():
    # Of four ranks each sends three quarters twice: a part at a time while summing, then while gathering.
    assert all_reduce_bytes(100, 4) == 150
    assert all_gather_bytes(100, 4) == 75
    assert all_reduce_bytes(100, 1) == 0
    machine = config.Machine(
        devices_per_node=4, intra_node_bytes_per_second=100, inter_node_bytes_per_second=10, latency_seconds=0.5
    )
    assert communication_seconds(machine, 150, 2, devices=1) == 0
    assert communication_seconds(machine, 150, 2, devices=4) == 1.5 + 2 * 6 * 0.5
    assert communication_seconds(machine, 150, 2, devices=8) == 15 + 2 * 14 * 0.5


def test_bytes_on_the_network(tree, found):
    sent = found.phases[0].network_bytes
    assert sent["gradients"] == 4 * WEIGHTS  # of two ranks, each sends half of it twice
    assert sent["batch norm statistics"] == (4 * 2 * (8 + 16 + 32) + 3 * 8 + 2 * 3 * 4) / 2
    assert sent["which parameters are used"] == 4 * 16
    assert found.network_bytes["ZeRO 3"] == pytest.approx(1.5 * 4 * WEIGHTS)
    tree["kd"] = {"losses": [{"name": "pkt"}]}
    kd = estimate.of_run(config.parse(tree, "test"), world=2).phases[-1].network_bytes
    # 32 rows of 64 and of 128 numbers gathered, the gradients of the former summed.
    assert kd["samples of all ranks"] == (32 * (64 + 128) / 2 + 32 * 64) * 4
    tree["kd"]["relational_scope"] = "local"
    assert "samples of all ranks" not in estimate.of_run(config.parse(tree, "test"), world=2).phases[-1].network_bytes


def test_a_step():
    machine = config.Machine(flops_per_second=100, overlap=0.5, decode_images_per_second=10)
    settings = small(machine=machine, workers=2)
    work = Work(teacher_flops=100, student_flops=300, activation_bytes=0, batch_bytes=0, targets={}, student_maps=[])
    # Two images: 8 s on the device, 4 s of them backward, 0.1 s decoding. Half of what is sent can be hidden, ...
    assert step_seconds(settings, work, "live", 2, 6.0) == (8 + 3, "device")
    assert step_seconds(settings, work, "live", 2, 20.0) == (8 + 16, "device")  # ... in 4 s at most
    assert step_seconds(settings, work, "cached", 2, 0.0) == (6, "device")
    slow = small(machine=machine.model_copy(update={"decode_images_per_second": 0.1}), workers=2)
    assert step_seconds(slow, work, "live", 2, 0.0) == (10, "decoding")


def small(views=None, workers=0, in_memory=False, **sections):
    tree = {
        "run_dir": "run",
        "duration": "100 epochs",
        "data": {"train": "x.tar", "num_classes": 10, "global_batch": 8, "workers": workers, "in_memory": in_memory},
        "student": {"name": "cnn32_student"},
        "teacher": {"name": "cnn32_auxiliary", "random": True},
        "warmup": {"durations": ["20 epochs"]},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"lr": 0.1},
    }
    tree["data"]["augment"] = {"views": views}
    return config.parse(tree, "test").model_copy(update=sections)


def choices(settings, teacher_flops=300, student_flops=100):
    timetable = Timetable.of(settings, 10, pairs=1)  # 80 images an epoch; 20 epochs of warm-up, 80 of KD
    shapes = {"pair1": (10, 5, 5)}, {"logits": (10,)}
    works = {
        phase: Work(teacher_flops, student_flops, 0, 0, targets, [])
        for phase, targets in zip(timetable.curriculum.phases(), shapes)
    }
    return decide(settings, works, timetable)


MACHINE = config.Machine(
    flops_per_second=100, decode_images_per_second=1e9, devices_per_node=1, read_bytes_per_second=1e9
)


def test_few_views_are_worth_caching_and_new_ones_are_not():
    found = choices(small(views=4, machine=MACHINE))
    warmup, kd = found["warmup 1/1"], found["kd"]
    assert (warmup.source, kd.source) == ("cached", "cached")
    assert (warmup.live_seconds, kd.live_seconds) == (1600 * 4, 6400 * 4)
    # The teacher on 4 views of 80 images, then the student alone.
    assert (warmup.cached_seconds, kd.cached_seconds) == (4 * 80 * 3 + 1600, 4 * 80 * 3 + 6400)

    found = choices(small(views=30, machine=MACHINE))  # more than the warm-up's epochs
    assert (found["warmup 1/1"].source, found["kd"].source) == ("live", "cached")
    assert {choice.source for choice in choices(small(machine=MACHINE)).values()} == {"live"}
    assert choices(small(machine=MACHINE))["kd"].uncached == "no data.augment.views"


def test_a_slow_disk_or_a_small_teacher_is_better_recomputed():
    slow = MACHINE.model_copy(update={"read_bytes_per_second": 100})
    found = choices(small(views=4, machine=slow))
    # A map of 250 numbers takes 10 s to read, the logits 0.4 s, hidden behind the student's 1 s.
    assert (found["warmup 1/1"].source, found["kd"].source) == ("live", "cached")
    assert found["warmup 1/1"].cached_seconds == pytest.approx(1600 * 10.04 + 4 * 80 * 3)
    assert choices(small(views=79, machine=MACHINE), teacher_flops=1)["kd"].source == "cached"
    decoding = MACHINE.model_copy(update={"decode_images_per_second": 0.1})  # then the teacher costs nothing
    assert {choice.source for choice in choices(small(views=4, machine=decoding)).values()} == {"live"}


def test_what_cannot_be_cached_is_not():
    mixed = config.KD(losses=[config.KDLoss(name="kd")], mix=config.Mix(mixup=0.2))
    found = choices(small(views=4, machine=MACHINE, kd=mixed))
    assert (found["warmup 1/1"].source, found["kd"].source, found["kd"].uncached) == ("cached", "live", "kd.mix")
    paper = config.Warmup(durations=["20 epochs"], prune=config.Prune(mode="paper_bn"))
    found = choices(small(views=4, machine=MACHINE, warmup=paper))
    assert (found["warmup 1/1"].source, found["kd"].source) == ("live", "cached")


def test_bytes_of_a_record():
    section = config.Targets
    shape = (8, 7, 5)
    assert record_bytes("pair1", shape, section(features="float32")) == 4 * 280 + 4
    assert record_bytes("pair1", shape, section(features="bf16")) == 2 * 280 + 4
    assert record_bytes("pair1", shape, section(features="int8")) == 280 + 4 * 8 + 4
    assert record_bytes("logits", (1000,), section()) == 4004
    assert record_bytes("logits", (1000,), section(top_k=50)) == 50 * 6 + 4 + 4  # and what is left over
    assert record_bytes("head1", (40_000,), section(top_k=50)) == 50 * 8 + 4 + 4
    assert record_bytes("embedding", (512,), section(top_k=50)) == 4 * 512 + 4


def test_the_imagenet_config_has_the_cost_that_it_states():
    settings = config.load(IMAGENET, ["teacher.pretrained=false", "teacher.random=true"])
    found = estimate.of_run(settings, world=8, samples=1_281_167)
    stated = re.search(r"Cost: .*\n.*\n", IMAGENET.read_text())[0]
    *warmup, kd = found.phases
    per_image = [phase.work.teacher_flops + phase.work.student_flops for phase in found.phases]
    assert f"{per_image[-1] / 1e9:.1f} GFLOP an image in KD" in stated
    assert f"({kd.work.teacher_flops / 1e9:.1f} the teacher, {kd.work.student_flops / 1e9:.1f} the student)" in stated
    mean = sum(f * p.steps for f, p in zip(per_image, warmup)) / sum(p.steps for p in warmup)
    assert f"{mean / 1e9:.1f} on average in the warm-up" in stated
    total = sum(flops * phase.steps * 512 for flops, phase in zip(per_image, found.phases))
    assert f"{total:.2e}".replace("+", "") in stated
    page = text(found)
    assert all(phase.name in page for phase in found.phases)
    assert re.search(r"kd +82 +205,164 +7.33 +10.6", page)
    assert all(name in page for name in ("machine.flops_per_second", "read_bytes_per_second", "latency_seconds"))
    one, *_, most = found.scaling
    assert (one.devices, most.devices, most.batch) == (8, 512, 1)
    assert most.efficiency["kd"] < one.efficiency["kd"] <= 1


@pytest.fixture
def config_file(tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_the_command_prints_a_page_or_json_and_leaves_nothing(config_file, tree, capsys):
    main(["plan", config_file, "--world", "4"])
    page = capsys.readouterr().out
    assert page.startswith("4 processes, 6 steps an epoch of 192 images")
    assert "4 of" not in page.splitlines()[0]
    assert "--world" not in page
    main(["plan", config_file, "--json", "duration=2 epochs", "warmup=null"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["notes"] == ["for a node of machine.devices_per_node (8): --world 1 for one process"]
    assert [phase["name"] for phase in numbers["phases"]] == ["kd"]
    assert numbers["machine"]["devices_per_node"] == numbers["world"] == 8
    assert not Path(tree["run_dir"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["teacher.name=resnet_34"], "teacher.name: timm has no model 'resnet_34'"),
        (["data.train=gone-*.tar"], "no such shard"),
        (["--world", "3"], "must be divisible by the world size"),
        (["optimizer.name=sgdd"], "timm refuses sgdd"),
        (["duration=5 steps"], "the warm-up takes 13 steps"),
        (["machine.overlap=2"], "machine.overlap: "),
        (["--samples", "20"], "larger than the data set"),
    ],
)
def test_a_mistake_is_one_line(config_file, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", config_file, *arguments])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_without_the_hub_it_says_what_is_missing(tree, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **arguments):
        if pretrained:
            raise OSError("no network")
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    tree["teacher"] |= {"pretrained": True, "random": False}
    found = estimate.of_run(config.parse(tree, "test"), world=1)
    assert [pair.kept for pair in found.pairs] == [None] * 3
    assert [pair.channels for pair in found.pairs] == [8, 16, 32]
    assert "no network" in found.notes[0]
    assert "not known yet" in text(found)
    with pytest.raises(UserError, match="no network"):  # which training does not go on without
        parts.create_teacher(config.parse(tree, "test"))


def test_a_run_without_a_teacher_says_so(tree):
    alone = tree | {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
    assert "\nno teacher, student 0.0" in text(estimate.of_run(config.parse(alone, "test"), world=1))


def test_channels_that_data_decide_on_are_left_to_training(tree):
    tree["warmup"]["prune"] = {"criterion": "taylor"}
    found = estimate.of_run(config.parse(tree, "test"), world=1)
    assert [pair.kept for pair in found.pairs] == [None] * 3


def test_a_chain_is_planned_before_its_first_stage_has_run(monkeypatch):
    path = Path(__file__).parents[1] / "configs" / "digits_pipeline.yaml"
    stages = runs.load(path, ["run_dir=gone"])
    found = estimate.of_chain(stages, world=1, samples=1437)
    assert list(found) == ["teacher", "auxiliary", "heads", "student"]
    assert found["student"].phases[-1].work.targets == {"logits": (10,)} | {f"head{i}": (10,) for i in (1, 2, 3, 4)}
    assert all(pair.kept is None for pair in found["student"].pairs)
