"""Every config in configs/ is built: networks, plan, timetable and optimizer, with random weights."""

import re
from pathlib import Path

import pytest
import torch

from indistill import config, models, optim, prune, taps
from indistill.curriculum import Timetable

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
IMAGENET, CIFAR10, DIGITS = 1_281_167, 50_000, 1_437  # training samples
SAMPLES = {"imagenet": IMAGENET, "cifar10": CIFAR10, "digits": DIGITS}


def opening_comment(path):
    return path.read_text().partition("\nrun_dir:")[0]


def test_there_are_configs():
    assert len(CONFIGS) >= 5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_opening_comment_tells_command_cost_and_result(path):
    opening = opening_comment(path)
    assert all(line.startswith("#") for line in opening.splitlines())
    commands = re.findall(r"indistill train (\S+)", opening)
    assert commands == [f"configs/{path.name}"]
    assert "Expected: " in opening
    assert re.search(r"\d %", opening)
    assert re.search(r"Cost: \d|minute", opening)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_commands_overrides_are_keys(path):
    command = re.search(r"indistill train \S+(.*)", opening_comment(path).replace("\\\n#", " "))[1]
    config.load(path, re.findall(r"[\w.]+=\S+", command))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_builds(path):
    torch.manual_seed(0)
    settings = config.load(path)
    random_weights = {"pretrained": False, "checkpoint": None}
    size, classes = settings.data.image_size, settings.data.num_classes
    student_section = settings.student.model_copy(update=random_weights)
    teacher_section = settings.teacher.model_copy(update=random_weights)
    student = models.create(student_section, classes, size, "student")
    teacher = models.create(teacher_section, classes, size, "teacher")

    warmup = settings.warmup
    pairs = taps.match(teacher, student) if warmup.pairs == "auto" else warmup.pairs
    plan = prune.plan(teacher, student, pairs, (3, size, size), warmup.prune.criterion, warmup.prune.mode)
    assert len(plan.pairs) >= 3
    assert any(pair.kept for pair in plan.pairs) or path.stem == "imagenet_r34_r18"  # whose widths are equal

    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    for net, section, stages in (
        (student, student_section, [pair.student_stage for pair in plan.pairs]),
        (teacher, teacher_section, [pair.teacher_stage for pair in plan.pairs]),
    ):
        network = models.Network(net, *models.normalisation(net, section, "either"), stages).eval()
        with torch.no_grad():
            maps = network(images, upto=len(stages) - 1).features
            assert network(images).logits.shape == (1, classes)
        assert [m.shape[1] for m in maps] == [taps.stages(net)[stage].channels for stage in stages]

    samples = next(count for name, count in SAMPLES.items() if path.stem.startswith(name))
    timetable = Timetable.of(settings, samples // settings.data.global_batch, len(pairs))
    phases = timetable.curriculum.phases()
    assert [phase.name for phase in phases][-1] == "kd"
    assert len(phases) == len(pairs) + 1
    assert phases[-1].start < timetable.total_steps / 2
    phase_optim = optim.PhaseOptim(optim.create(student, settings.optimizer), settings, timetable)
    for phase in phases:
        rate = phase_optim.begin_step((phase.start + (phase.end or timetable.total_steps)) // 2, phase)
        assert 0 < rate <= settings.optimizer.lr
    assert settings.data.global_batch % settings.data.streams == 0
