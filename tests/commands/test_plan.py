"""What a run will take, against counts by hand, and the arithmetic on it."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml
from costs import WEIGHTS, small

from indistill import config
from indistill.commands.cli import main
from indistill.commands.plan import estimate
from indistill.commands.plan.memory import state_bytes
from indistill.commands.plan.network import (
    all_gather_bytes,
    all_reduce_bytes,
    communication_seconds,
    step_seconds,
)
from indistill.config import UserError, runs
from indistill.targets.cost import Work
from indistill.training import optim, parts

IMAGENET = Path(__file__).parents[2] / "configs" / "imagenet_r34_r18.yaml"


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
        devices_per_node=4,
        intra_node_bytes_per_second=100,
        inter_node_bytes_per_second=10,
        latency_seconds=0.5,
    )
    assert communication_seconds(machine, 150, 2, devices=1) == 0
    assert communication_seconds(machine, 150, 2, devices=4) == 1.5 + 2 * 6 * 0.5
    assert communication_seconds(machine, 150, 2, devices=8) == 15 + 2 * 14 * 0.5


def test_bytes_on_the_network(tree, found):
    first, second, _, last = (phase.network_bytes for phase in found.phases)
    # Of two ranks, each sends half of the gradients twice: in a phase, of the layers that it trains.
    assert first["gradients"] == 4 * (8 * 27 + 3 * 8)
    assert second["gradients"] == 4 * (8 * 27 + 3 * 8 + 16 * 72 + 3 * 16)
    assert last["gradients"] == 4 * WEIGHTS
    for sent in (first, second, last):
        assert sent["batch norm statistics"] == (4 * 2 * (8 + 16 + 32) + 3 * 8 + 2 * 3 * 4) / 2
        assert sent.keys() == {"gradients", "batch norm statistics"}
    assert found.network_bytes["ZeRO 3"] == pytest.approx(1.5 * 4 * WEIGHTS)
    tree["kd"] = {"losses": [{"name": "pkt"}]}
    kd = estimate.of_run(config.parse(tree, "test"), world=2).phases[-1].network_bytes
    # 32 rows of 64 and of 128 numbers gathered, the gradients of the former summed.
    assert kd["samples of all ranks"] == (32 * (64 + 128) / 2 + 32 * 64) * 4
    tree["kd"]["relational_scope"] = "local"
    assert (
        "samples of all ranks"
        not in estimate.of_run(config.parse(tree, "test"), world=2).phases[-1].network_bytes
    )


def test_a_step():
    machine = config.Machine(flops_per_second=100, overlap=0.5, decode_images_per_second=10)
    settings = small(machine=machine, workers=2)
    work = Work(
        teacher_flops=100, student_flops=300, activation_bytes=0, batch_bytes=0, targets={}, compared=[]
    )

    def step(settings, source, communication):
        return step_seconds(settings, work, source=source, batch=2, communication=communication)

    # Two images: 8 s on the device, 4 s of them backward, 0.1 s decoding. Half of the communication can be
    # hidden, ...
    assert step(settings, "live", 6.0) == (8 + 3, "device")
    assert step(settings, "live", 20.0) == (8 + 16, "device")  # ... in 4 s at most
    assert step(settings, "cached", 0.0) == (6, "device")
    slow = small(machine=machine.model_copy(update={"decode_images_per_second": 0.1}), workers=2)
    assert step(slow, "live", 0.0) == (10, "decoding")


def test_the_imagenet_config_has_the_cost_that_it_states():
    settings = config.load(IMAGENET, ["teacher.pretrained=false", "teacher.random=true"])
    found = estimate.of_run(settings, world=8, samples=1_281_167)
    stated = re.search(r"Cost: .*\n.*\n", IMAGENET.read_text())[0]
    *warmup, kd = found.phases
    per_image = [phase.work.teacher_flops + phase.work.student_flops for phase in found.phases]
    assert f"{per_image[-1] / 1e9:.1f} GFLOP per image in KD" in stated
    teacher, student = kd.work.teacher_flops / 1e9, kd.work.student_flops / 1e9
    assert f"(teacher {teacher:.1f}, student {student:.1f})" in stated
    mean = sum(f * p.steps for f, p in zip(per_image, warmup)) / sum(p.steps for p in warmup)
    assert f"on average {mean / 1e9:.1f} in the warm-up" in stated
    total = sum(flops * phase.steps * 512 for flops, phase in zip(per_image, found.phases))
    assert f"{total:.2e}".replace("+", "") in stated
    page = str(found)
    assert all(phase.name in page for phase in found.phases)
    assert re.search(r"kd +82 +205,164 +7.33 +10.6", page)
    assert all(
        name in page for name in ("machine.flops_per_second", "read_bytes_per_second", "latency_seconds")
    )
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
    assert page.startswith("4 processes, 6 steps per epoch of 192 images")
    assert "4 of" not in page.splitlines()[0]
    assert "--world" not in page
    main(["plan", config_file, "--json", "duration=2 epochs", "warmup=null"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["notes"] == [
        "estimated for machine.devices_per_node (8) processes; --world N sets another number"
    ]
    assert [phase["name"] for phase in numbers["phases"]] == ["kd"]
    assert numbers["machine"]["devices_per_node"] == numbers["world"] == 8
    assert not Path(tree["run_dir"]).exists()


def test_compressed_shards_that_training_would_decode_into_memory(tree, data_dir, tmp_path):
    for path in data_dir.glob("train-*.tar"):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    tree["data"] |= {"train": f"{tmp_path}/train-*.tar.gz", "in_memory": True}
    assert estimate.of_run(config.parse(tree, "test"), world=2).steps_per_epoch == 6
    tree["data"]["in_memory"] = False
    with pytest.raises(UserError, match="a compressed shard cannot be read at random"):
        estimate.of_run(config.parse(tree, "test"), world=2)


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        (["duration=24 epochs"], True),
        (["duration=25 epochs"], False),
        (["duration=24 epochs", "warmup.curriculum=all_at_once"], False),
        (["duration=24 epochs", "warmup.durations=[0, 0, 0]"], False),
        (["duration=24 epochs", "warmup=null"], False),
    ],
)
def test_a_warmup_that_was_seen_to_lose_in_short_runs_is_named(config_file, overrides, warns):
    (settings,) = [settings for _, settings in runs.load(config_file, overrides)]
    found = estimate.of_run(settings, world=1)
    assert ["warmup.curriculum: sequential" in str(found)] == [warns]


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
    assert "not known yet" in str(found)
    with pytest.raises(UserError, match="no network"):  # training needs the weights
        parts.create_teacher(config.parse(tree, "test"))
    tree["warmup"] = None
    assert estimate.of_run(config.parse(tree, "test"), world=1).pairs == []


def test_a_run_without_a_teacher_says_so(tree):
    alone = tree | {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
    assert "\nno teacher, student 0.0" in str(estimate.of_run(config.parse(alone, "test"), world=1))


def test_channels_that_data_decide_on_are_left_to_training(tree):
    tree["warmup"]["prune"] = {"criterion": "taylor"}
    found = estimate.of_run(config.parse(tree, "test"), world=1)
    assert [pair.kept for pair in found.pairs] == [None] * 3


def test_a_chain_is_planned_before_its_first_stage_has_run(monkeypatch):
    path = Path(__file__).parents[2] / "configs" / "digits_pipeline.yaml"
    stages = runs.load(path, ["run_dir=gone"])
    found = estimate.of_chain(stages, world=1, samples=1437)
    assert list(found) == ["teacher", "auxiliary", "heads", "student"]
    assert found["student"].phases[-1].work.targets == {"logits": (10,)} | {
        f"head{i}": (10,) for i in (1, 2, 3, 4)
    }
    assert all(pair.kept is None for pair in found["student"].pairs)
