"""The warm-up on every family of networks, and how far it computes."""

from collections import Counter

import pytest
import timm
import torch
from conftest import newer_timm
from timm.models.vgg import VGG

from indistill import config, prune
from indistill.curriculum import Phase
from indistill.losses.objective import Objective
from indistill.models.network import Network
from indistill.models.stages import match_stages
from indistill.targets.live import LiveTargets

MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
SIZE = 64


def warmup(pair):
    return Phase(f"warmup {pair + 1}", pair, (pair,), (1.0,), 0, 4)


def build(teacher_name, student_name):
    """Targets, student and plan of two small networks, as a run would build them."""
    torch.manual_seed(0)
    teacher, student = NETWORKS[teacher_name](), NETWORKS[student_name]()
    plan = prune.plan(teacher, student, match_stages(teacher, student), (3, SIZE, SIZE))
    teacher = Network(teacher, (MEAN, STD), stages=[pair.teacher_stage for pair in plan.pairs])
    student = Network(student, (MEAN, STD), stages=[pair.student_stage for pair in plan.pairs])
    return LiveTargets(teacher, plan, input_size=(3, SIZE, SIZE)), student.train(), plan


def timm_model(name, **options):
    return lambda: timm.create_model(name, num_classes=10, **options)


def vgg(*widths, **options):
    configuration = [layer for width in (8, *widths) for layer in (width, "M")]
    return VGG(configuration, num_classes=10, mlp_ratio=0.01, **options)


NETWORKS = {
    "resnet": timm_model("resnet18", channels=[64, 64, 96, 128]),
    "small resnet": timm_model("resnet10t", channels=[8, 16, 24, 32]),
    "bottleneck resnet": timm_model("resnet26", channels=[16, 16, 32, 32]),
    "mobilenet": timm_model("mobilenetv2_100"),
    "small mobilenet": timm_model("mobilenetv2_050"),
    "efficientnet": timm_model("efficientnet_b0"),
    "small efficientnet": timm_model("test_efficientnet"),
    "convnext": timm_model("test_convnext2"),
    "small convnext": timm_model("test_convnext"),
    "regnet": timm_model("regnety_004"),
    "small regnet": timm_model("regnetx_002"),
    "vgg": lambda: vgg(16, 32, 32, 48, norm_layer=torch.nn.BatchNorm2d),
    "small vgg": lambda: vgg(8, 12, 16, 24),
    "vit": timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=5),
    "small vit": timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=4, embed_dim=16, num_heads=2),
    "swin": timm_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2, embed_dim=16, depths=(1, 2, 1, 1)
    ),
    "small swin": timm_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=2, embed_dim=12, depths=(1, 1, 1, 1)
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("resnet", "small resnet"),
        ("bottleneck resnet", "small resnet"),
        ("mobilenet", "small mobilenet"),
        ("efficientnet", "small efficientnet"),
        ("convnext", "small convnext"),
        ("regnet", "small regnet"),
        pytest.param("vgg", "small vgg", marks=newer_timm),
        ("vit", "small vit"),
        ("swin", "small swin"),
        ("resnet", "small vit"),
        ("swin", "small resnet"),
        ("vit", "small mobilenet"),
    ],
)
def test_a_warmup_step_teaches_the_active_stage_alone(teacher, student):
    targets_of, student, plan = build(teacher, student)
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    parameters = dict(student.named_parameters())
    assert len(plan.pairs) == 4

    def loss_of(pair):
        output = student(images, upto=pair, pairs=(pair,))
        assert output.features[0].shape[1] == plan.pairs[pair].student_width
        assert (output.embedding, output.logits) == (None, None)
        return Objective(config.KD().losses, 4)(
            output, targets_of(images, warmup(pair)), labels=None, phase=warmup(pair), step=0
        )[0]

    before: set[str] = set()
    for pair, stage in enumerate(student.stages):
        # What the stage depends on, from a forward pass through the whole model.
        everything = student.net.forward_intermediates(images.float())[1]
        used = torch.autograd.grad(everything[stage].sum(), list(parameters.values()), allow_unused=True)
        expected = {name for name, gradient in zip(parameters, used) if gradient is not None}

        student.zero_grad()
        loss = loss_of(pair)
        loss.backward()
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        assert gradients.keys() == expected
        assert before <= expected < parameters.keys()
        newly_reached = expected - before or expected  # VGG's last stage is but the pool of the one before
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        assert any(gradients[name].abs().max() > 0 for name in newly_reached)
        before = expected

        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        torch.optim.SGD(student.parameters(), lr=1e-3 / norm.item()).step()
        assert loss_of(pair).item() < loss.item()


# --- how far it computes ------------------------------------------------------------------------------------


def leaves(net):
    """The modules that compute something themselves."""
    idle = (torch.nn.Identity, torch.nn.Dropout)
    return {n: m for n, m in net.named_modules() if not list(m.children()) and not isinstance(m, idle)}


def calls(net, run):
    """How often each leaf module of `net` runs during `run()`."""
    counts: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counts.update([name]))
        for name, module in leaves(net).items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def leaves_under(net, prefixes):
    return {name for name in leaves(net) if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)}


@pytest.mark.parametrize(
    ("teacher", "student", "upto"),
    [
        (
            "resnet",
            "small resnet",
            lambda stage: ["conv1", "bn1", "act1", "maxpool", *[f"layer{i}" for i in range(1, stage + 1)]],
        ),
        (
            "vit",
            "small vit",
            lambda stage: ["patch_embed", *[f"blocks.{i}" for i in range(stage + 1)]],
        ),
    ],
)
def test_nothing_beyond_the_active_stage_is_computed(teacher, student, upto):
    targets_of, student, plan = build(teacher, student)
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    previous = 0
    for pair, stages in enumerate(plan.pairs):
        teachers = calls(targets_of.teacher.net, lambda pair=pair: targets_of(images, warmup(pair)))
        students = calls(student.net, lambda pair=pair: student(images, upto=pair, pairs=(pair,)))
        assert set(teachers) == leaves_under(targets_of.teacher.net, upto(stages.teacher_stage))
        assert set(students) == leaves_under(student.net, upto(stages.student_stage))
        assert {*teachers.values(), *students.values()} == {1}
        assert len(teachers) > previous
        previous = len(teachers)
    everything = calls(student.net, lambda: student(images))
    assert set(everything) > set(students)


def test_stages_of_later_pairs_wait_even_if_earlier_ones_are_asked_for():
    _, student, _ = build("resnet", "small resnet")
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    both = calls(student.net, lambda: student(images, upto=1))
    assert set(both) == set(calls(student.net, lambda: student(images, upto=1, pairs=(1,))))
    assert len(student(images, upto=1).features) == 2
    assert not any(name.startswith(("layer3", "layer4", "fc")) for name in both)
