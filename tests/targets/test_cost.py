"""What live and stored targets cost: operations, bytes and time, counted by hand."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from costs import WEIGHTS, small
from torch.utils.flop_counter import FlopCounterMode

from indistill import config
from indistill.commands.plan import estimate
from indistill.config.run_dir import RunDir
from indistill.curriculum import Timetable
from indistill.targets.cost import Work, _convolution_backward, decide, measure, record_bytes
from indistill.training import lessons

# Multiply-adds of an image in the small networks: 3x3 convolutions without padding, a 2x2 pool after each.
STUDENT = [8 * 27 * 30**2, 16 * 72 * 13**2, 32 * 144 * 4**2, 128 * 64 + 64 * 10]
TEACHER = [16 * 27 * 30**2, 32 * 144 * 13**2, 64 * 288 * 4**2, 256 * 128 + 128 * 10]


def test_operations_are_those_counted_by_hand(found):
    phases = {phase.name: phase.work for phase in found.phases}
    assert list(phases) == ["warmup 1/3", "warmup 2/3", "warmup 3/3", "kd"]
    for depth, work in enumerate(phases.values(), start=1):
        # Backward takes each product twice, but for the gradient of the images; nothing is deeper than the
        # pair.
        assert work.teacher_flops == 2 * sum(TEACHER[:depth])
        assert work.student_flops == 2 * (3 * sum(STUDENT[:depth]) - STUDENT[0])


def test_bytes_kept_for_backward_are_those_counted_by_hand(found):
    images, convolved, pooled = 3 * 32 * 32, 8 * 30 * 30, 8 * 15 * 15
    # The convolution's input, the norm's and the pool's; where the maxima lay (int64); the ReLU's output; the
    # target.
    expected = 4 * images + 2 * 4 * convolved + 8 * pooled + 4 * pooled + 4 * pooled
    assert found.phases[0].work.activation_bytes == expected
    assert found.phases[0].work.batch_bytes < 1000  # means and deviations of a batch norm, and scalars
    assert sorted(p.work.activation_bytes for p in found.phases[:3]) == [
        p.work.activation_bytes for p in found.phases[:3]
    ]


def test_half_precision_halves_activations_and_holds_weights_once_more(tree, settings, found):
    half = estimate.of_run(config.parse(tree | {"mixed_precision": "bf16"}, "test"), world=2)
    work, whole = half.phases[-1].work, found.phases[-1].work
    assert (
        whole.activation_bytes / 2 < work.activation_bytes < 0.8 * whole.activation_bytes
    )  # images and places stay
    multiplied = WEIGHTS - 3 * (8 + 16 + 32) - 64 - 10  # without norms and biases
    assert work.batch_bytes - whole.batch_bytes == pytest.approx(2 * multiplied, abs=500)
    assert (work.teacher_flops, work.student_flops) == (whole.teacher_flops, whole.student_flops)


def test_pairs_are_those_of_training(settings, found, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    _, _, plan, _ = lessons.networks(Accelerator(cpu=True), settings, files=RunDir(tmp_path))
    assert [pair.kept for pair in found.pairs] == [pair.kept for pair in plan.pairs]
    assert [pair.teacher_map for pair in found.pairs] == [(16, 15, 15), (32, 6, 6), (64, 2, 2)]
    assert [pair.student_map for pair in found.pairs] == [(8, 15, 15), (16, 6, 6), (32, 2, 2)]
    assert [phase.steps for phase in found.phases] == [4, 4, 5, 11]
    assert (found.steps_per_epoch, found.samples, found.micro_batch) == (6, 192, 16)


def test_measuring_changes_nothing(settings, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    student, targets_of, plan, _ = lessons.networks(Accelerator(cpu=True), settings, files=RunDir(tmp_path))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    timetable = Timetable.of(settings, 6, len(plan.pairs))
    for phase in timetable.curriculum.phases():
        measure(settings, student, targets_of=targets_of, objective=build_objective(settings), phase=phase)
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


def test_partners_of_mixed_images_are_decoded_too():
    mixed = config.KD(losses=[{"name": "kd"}], mix=config.Mix(mixup=0.2))
    slow = MACHINE.model_copy(update={"decode_images_per_second": 0.1})
    plain = choices(small(views=4, machine=slow))["kd"]
    found = choices(small(views=4, machine=slow, kd=mixed))["kd"]
    assert (found.uncached, found.live_seconds) == (None, plain.live_seconds)
    assert found.cached_seconds == pytest.approx(plain.cached_seconds + 4 * 80 * 10)


def test_what_cannot_be_cached_is_not():
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
