"""Which channels stay: against float64 sums over filters named by hand."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from indistill import prune, taps
from indistill.config import UserError
from indistill.models import CNN32

SIZE = (3, 32, 32)


def model(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small_resnet(name="resnet18"):
    return model(name, channels=[64, 16, 24, 32])  # 64 as its stem


def l1_norms(net, *names):
    """Sum over the named layers of the L1 norms of their filters, float64 [C]."""
    modules = dict(net.named_modules())
    weights = [modules[name].weight.detach().double().numpy() for name in names]
    return sum(np.abs(weight).reshape(len(weight), -1).sum(axis=1) for weight in weights)


def assert_importance(net, stage, *names, input_size=SIZE):
    found = prune.l1_importance(net, stage, input_size)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert len(found) == taps.stages(net)[stage].channels
    assert np.allclose(found.double().numpy(), l1_norms(net, *names), rtol=1e-5)


# --- top_channels ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_top_channels_against_numpy(importance, data):
    width = data.draw(st.integers(1, len(importance)))
    kept = prune.top_channels(torch.tensor(importance, dtype=torch.float32), width)
    expected = np.sort(np.argsort(-np.array(importance), kind="stable")[:width])
    assert kept.dtype == torch.int64
    assert kept.tolist() == expected.tolist()


def test_of_equals_the_first_stay():
    assert prune.top_channels(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert prune.top_channels(torch.ones(2000), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("width", [0, -1, 6])
def test_impossible_widths(width):
    with pytest.raises(ValueError, match=f"cannot keep {width} of 5"):
        prune.top_channels(torch.ones(5), width)


# --- importance ------------------------------------------------------------------------------------------------------


def test_plain_convolutions():
    torch.manual_seed(0)
    net = CNN32((16, 32, 64), 128)
    for stage in range(3):
        assert_importance(net, stage, f"conv{stage + 1}")
    assert_importance(net, 1, "conv2", input_size=None)  # timm's default for the model


def test_residual_stages():
    net = small_resnet()
    assert_importance(net, 0, "conv1")
    # The identity shortcut carries the stem's channels through layer1.
    assert_importance(net, 1, "conv1", "layer1.0.conv2", "layer1.1.conv2")
    assert_importance(net, 2, "layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2")
    assert_importance(net, 4, "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv2")


def test_bottlenecks():
    net = small_resnet("resnet26")
    assert_importance(net, 1, "layer1.0.downsample.0", "layer1.0.conv3", "layer1.1.conv3")
    assert_importance(net, 3, "layer3.0.downsample.0", "layer3.0.conv3", "layer3.1.conv3")


@pytest.mark.parametrize("side", [32, 64])
def test_squeeze_excite_gates_scale_but_do_not_write(side):
    net = small_resnet("seresnet18")
    assert isinstance(net.layer4[0].se, nn.Module)
    assert_importance(net, 1, "conv1", "layer1.0.conv2", "layer1.1.conv2", input_size=(3, side, side))
    # At 32 pixels layer4's map is as small as the gates'.
    names = "layer4.0.downsample.0", "layer4.0.conv2", "layer4.1.conv2"
    assert_importance(net, 4, *names, input_size=(3, side, side))


def test_transformers():
    net = model("vit_tiny_patch16_224", img_size=32, depth=3)
    for stage in range(3):
        blocks = [f"blocks.{i}.{layer}" for i in range(stage + 1) for layer in ("attn.proj", "mlp.fc2")]
        assert_importance(net, stage, "patch_embed.proj", *blocks)


def test_hierarchical_transformers():
    net = model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, embed_dim=8, depths=(1, 2, 1, 1))
    block = "layers.1.blocks.{}.{}".format
    names = [block(i, layer) for i in (0, 1) for layer in ("attn.proj", "mlp.fc2")]
    assert_importance(net, 1, "layers.1.downsample.reduction", *names)


def test_convnext():
    net = model("test_convnext")
    depths = [len(stage.blocks) for stage in net.stages]
    assert_importance(net, 0, "stem.0", *[f"stages.0.blocks.{i}.mlp.fc2" for i in range(depths[0])])
    written = [f"stages.2.blocks.{i}.mlp.fc2" for i in range(depths[2])]
    assert_importance(net, 2, "stages.2.downsample.1", *written)


def test_inverted_residuals():
    net = model("mobilenetv2_050")
    assert_importance(net, 1, "blocks.1.0.conv_pwl", "blocks.1.1.conv_pwl")
    assert_importance(model("mobilenetv1_100"), 2, "blocks.2.1.conv_pw")


class GroupedLast(nn.Module):
    """A stage whose last convolution may be depthwise."""

    def __init__(self, groups):
        super().__init__()
        self.feature_info = [{"module": "depthwise", "num_chs": 6, "reduction": 1}]
        self.pointwise, self.depthwise = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=groups)

    def forward_intermediates(self, x, indices, **_):
        return [self.depthwise(self.pointwise(x).relu())]


def test_a_depthwise_convolution_counts_with_what_it_reads():
    torch.manual_seed(0)
    assert_importance(GroupedLast(groups=6), 0, "depthwise", "pointwise")
    assert_importance(GroupedLast(groups=2), 0, "depthwise")


def test_concatenated_channels_are_refused():
    net = model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2))
    with pytest.raises(UserError, match=r"stage 1 \(.*\) of DenseNet: its .* are not written by whole filters"):
        prune.l1_importance(net, 1, SIZE)


def test_frozen_networks_and_no_grad():
    net = small_resnet().requires_grad_(False)
    with torch.no_grad():
        assert_importance(net, 2, "layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2")


def test_looking_leaves_no_trace():
    net = small_resnet()
    net.train()
    net.layer1.eval()  # as users freeze batch norms
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    for stage in (1, 99):
        with contextlib.suppress(AssertionError):
            prune.writers(net, stage, SIZE)
        assert [module.training for module in net.modules()] == modes
        assert not any(module._forward_hooks for module in net.modules())
        assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
        assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in net.named_parameters())
    with pytest.raises(AssertionError):
        prune.writers(net, 99, SIZE)


def test_writers_know_their_batch_norm():
    torch.manual_seed(0)
    net = CNN32((16, 32, 64), 128)
    assert prune.writers(net, 1, SIZE) == [(net.conv2, net.conv2_bn)]
    residual = small_resnet()
    found = {writer.layer: writer.norm for writer in prune.writers(residual, 2, SIZE)}
    assert found == {
        residual.layer2[0].downsample[0]: residual.layer2[0].downsample[1],
        residual.layer2[0].conv2: residual.layer2[0].bn2,
        residual.layer2[1].conv2: residual.layer2[1].bn2,
    }


# --- plan ------------------------------------------------------------------------------------------------------------


def networks():
    torch.manual_seed(0)
    return CNN32((16, 32, 64), 128), CNN32((8, 32, 32), 64)


def test_a_plan_keeps_the_largest_filters():
    teacher, student = networks()
    found = prune.plan(teacher, student, [(0, 0), (1, 1), (2, 2)], SIZE)
    assert (found.criterion, found.mode) == ("l1", "slice")
    assert [pair[:4] for pair in found.pairs] == [(0, 0, 16, 8), (1, 1, 32, 32), (2, 2, 64, 32)]
    for pair, layer in ((found.pairs[0], "conv1"), (found.pairs[2], "conv3")):
        ranked = np.argsort(-l1_norms(teacher, layer))
        assert pair.kept == sorted(ranked[: pair.student_width].tolist())
    assert found.pairs[1].kept is None  # equal widths keep all


def test_a_wider_student_needs_an_adapter():
    teacher, student = networks()
    with pytest.raises(UserError, match=r"student stage 0 has 16 channels, more than the 8 .* warmup.adapter: conv1x1"):
        prune.plan(student, teacher, [(0, 0)], SIZE)
    (pair,) = prune.plan(student, teacher, [(0, 0)], SIZE, adapter="conv1x1").pairs
    assert pair == (0, 0, 8, 16, None)


@pytest.mark.parametrize(
    ("pairs", "role"),
    [
        ([(0, 0), (3, 1)], "teacher"),
        ([(-1, 0)], "teacher"),
        ([(0, 0), (1, 3)], "student"),
        ([(1, 0), (0, 1)], "teacher"),
        ([(0, 1), (1, 1)], "student"),
    ],
)
def test_pairs_that_are_no_stages_or_out_of_order(pairs, role):
    with pytest.raises(UserError, match=f"warmup.pairs: {role} stages .* need increasing indices from 0 to 2"):
        prune.plan(*networks(), pairs, SIZE)


def test_paper_bn_needs_plain_stages():
    teacher, student = networks()
    assert prune.plan(teacher, student, [(0, 0)], SIZE, mode="paper_bn").mode == "paper_bn"
    assert prune.published_norm(teacher, 2, SIZE) is teacher.conv3_bn
    residual = small_resnet()
    with pytest.raises(
        UserError, match="paper_bn needs plain conv-bn stages, stage 2 of the teacher is not: use slice"
    ):
        prune.plan(residual, residual, [(2, 2)], SIZE, mode="paper_bn")


PLAN = prune.Plan("l1", "slice", [prune.PairPlan(0, 1, 4, 2, [1, 3]), prune.PairPlan(2, 2, 8, 8, None)])


def test_a_plan_is_read_back_as_written(tmp_path):
    path = tmp_path / "prune_plan.json"
    path.write_text(PLAN.to_json())
    again = prune.Plan.read(path)
    assert again == PLAN
    assert again.hash == PLAN.hash
    assert again.to_json() == PLAN.to_json()


def test_the_hash_is_of_all_that_the_targets_depend_on():
    body = {
        "criterion": "l1",
        "mode": "slice",
        "pairs": [
            {"teacher_stage": 0, "student_stage": 1, "teacher_width": 4, "student_width": 2, "kept": [1, 3]},
            {"teacher_stage": 2, "student_stage": 2, "teacher_width": 8, "student_width": 8, "kept": None},
        ],
    }
    assert PLAN.hash == hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    others = [
        PLAN._replace(mode="paper_bn"),
        PLAN._replace(pairs=PLAN.pairs[:1]),
        PLAN._replace(pairs=[PLAN.pairs[0]._replace(kept=[1, 2]), PLAN.pairs[1]]),
        PLAN._replace(pairs=[PLAN.pairs[0]._replace(student_stage=0), PLAN.pairs[1]]),
    ]
    assert len({PLAN.hash, *(other.hash for other in others)}) == 5


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace("[1, 3]", "[1, 2]"),
        lambda text: text.replace("slice", "paper_bn"),
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("kept", "left"),
        lambda text: text.replace('"hash"', '"hush"'),
    ],
)
def test_an_edited_plan_is_refused(tmp_path, edit):
    path = tmp_path / "prune_plan.json"
    path.write_text(edit(PLAN.to_json()))
    assert path.read_text() != PLAN.to_json()
    with pytest.raises(UserError, match=f"^{path}: damaged or edited by hand"):
        prune.Plan.read(path)
