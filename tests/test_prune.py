"""The kept channels, against float64 sums over hand-named filters and finite differences of the loss."""

import contextlib
import hashlib
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import EPS, newer_timm
from hypothesis import given
from hypothesis import strategies as st
from timm.models import hiera, mvitv2
from torch import nn

from indistill import prune
from indistill.config import UserError
from indistill.models.cnn32 import CNN32
from indistill.models.stages import find_stages

SIZE = (3, 32, 32)


def model(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def small_resnet(name="resnet18"):
    return model(name, channels=[64, 16, 24, 32])  # 64 as its stem


def rounded(net, *names):
    """Relative error of a float32 sum of terms >= 0: one rounding per weight of the named layers' filters."""
    modules = dict(net.named_modules())
    return EPS * sum(modules[name].weight[0].numel() for name in names)


def l1_norms(net, *names):
    """Sum the L1 norms of the filters over the named layers, float64 [C]."""
    modules = dict(net.named_modules())
    weights = [modules[name].weight.detach().double().numpy() for name in names]
    return sum(np.abs(weight).reshape(len(weight), -1).sum(axis=1) for weight in weights)


def assert_importance(net, stage, *names, input_size=SIZE):
    found = prune.l1_importance(net, stage, input_size)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert len(found) == find_stages(net)[stage].channels
    assert np.allclose(found.double().numpy(), l1_norms(net, *names), rtol=rounded(net, *names), atol=0)


# --- top_channels -------------------------------------------------------------------------------------------


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


# --- importance ---------------------------------------------------------------------------------------------


@pytest.mark.portable
def test_plain_convolutions():
    torch.manual_seed(0)
    net = CNN32((16, 32, 64), 128)
    for stage in range(3):
        assert_importance(net, stage, f"conv{stage + 1}")
    assert_importance(net, 1, "conv2", input_size=None)  # timm's default for the model


@pytest.mark.portable
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


@newer_timm
def test_concatenated_channels_are_refused():
    net = model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2))
    with pytest.raises(
        UserError, match=r"stage 1 \(.*\) of DenseNet: its .* are not written by whole filters"
    ):
        prune.l1_importance(net, 1, SIZE)


def test_frozen_networks_and_no_grad():
    net = small_resnet().requires_grad_(False)
    with torch.no_grad():
        assert_importance(net, 2, "layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2")


def test_looking_leaves_no_trace():
    net = small_resnet()
    net.train()
    net.layer1.eval()  # as users do to freeze batch norms
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


class PreActivated(nn.Module):
    """A residual stage whose batch norm reads the layer that writes the output, but on the other branch."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"module": "conv", "num_chs": 6, "reduction": 1}]
        self.stem, self.bn, self.conv = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward_intermediates(self, x, indices, **_):
        x = self.stem(x)
        return [x + self.conv(self.bn(x).relu())]


def test_a_batch_norm_of_another_branch_is_not_the_writers():
    net = PreActivated()
    assert {writer.layer: writer.norm for writer in prune.writers(net, 0, SIZE)} == {
        net.stem: None,
        net.conv: None,
    }


# --- other criteria of the weights --------------------------------------------------------------------------


def loops(net, names, score):
    """Sum over the named layers of `score` of each row of their weights, float64 [C]."""
    modules = dict(net.named_modules())
    weights = [modules[name].weight.detach().double().numpy() for name in names]
    return [sum(score(weight[c].flatten()) for weight in weights) for c in range(len(weights[0]))]


def drawn_norms(net):
    """Randomise batch norms, as after training; new ones all have a scale of one, or zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
    return net


@pytest.mark.portable
def test_l2_norms_of_coupled_filters():
    net = small_resnet()
    names = "layer2.0.downsample.0", "layer2.0.conv2", "layer2.1.conv2"
    found = prune.filter_importance(net, 2, SIZE, "l2")
    assert found.dtype == torch.float32
    assert not found.requires_grad
    expected = loops(net, names, lambda row: sum(w * w for w in row) ** 0.5)
    assert np.allclose(found.numpy(), expected, rtol=rounded(net, *names), atol=0)
    torch.manual_seed(0)
    net = CNN32((16, 32, 64), 128)
    expected = loops(net, ["conv2"], lambda row: sum(w * w for w in row) ** 0.5)
    found = prune.filter_importance(net, 1, SIZE, "l2")
    assert np.allclose(found.numpy(), expected, rtol=rounded(net, "conv2"), atol=0)


def assert_scales(net, found, *names):
    expected = loops(net, names, lambda row: abs(row[0]))
    assert np.allclose(found.numpy(), expected, rtol=rounded(net, *names), atol=0)


@pytest.mark.portable
def test_scales_of_coupled_batch_norms():
    net = drawn_norms(small_resnet())
    names = "layer2.0.downsample.1", "layer2.0.bn2", "layer2.1.bn2"
    found = prune.filter_importance(net, 2, SIZE, "bn_scale")
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert_scales(net, found, *names)
    found = prune.filter_importance(
        net, 1, SIZE, "bn_scale"
    )  # the identity shortcut carries the stem's channels
    assert_scales(net, found, "bn1", "layer1.0.bn2", "layer1.1.bn2")


def test_scales_of_batch_norms_that_hold_their_activation():
    net = drawn_norms(model("mobilenetv1_100"))
    assert type(net.blocks[2][1].bn2) is timm.layers.BatchNormAct2d
    found = prune.filter_importance(net, 2, SIZE, "bn_scale")
    assert_scales(net, found, "blocks.2.1.bn2")
    net = drawn_norms(model("mobilenetv2_050"))
    found = prune.filter_importance(net, 1, SIZE, "bn_scale")
    assert_scales(net, found, "blocks.1.0.bn3", "blocks.1.1.bn3")


def test_scales_need_batch_norms():
    without_scale = CNN32((16, 32, 64), 128)
    without_scale.conv2_bn = nn.BatchNorm2d(32, affine=False)
    partly = small_resnet()
    partly.layer2[0].downsample[1] = nn.Identity()
    vit = model("vit_tiny_patch16_224", img_size=32, depth=2)
    for net, stage, name in ((vit, 1, "blocks.1"), (without_scale, 1, "conv2_bn"), (partly, 2, "layer2")):
        where = rf"bn_scale needs a batch norm .* stage {stage} \({name}\) of {type(net).__name__}: use l1"
        with pytest.raises(UserError, match=f"^warmup.prune.criterion: {where}"):
            prune.filter_importance(net, stage, SIZE, "bn_scale")
    assert len(prune.filter_importance(without_scale, 2, SIZE, "bn_scale")) == 64


def test_weights_know_no_other_criterion():
    with pytest.raises(ValueError, match="taylor"):
        prune.filter_importance(small_resnet(), 1, SIZE, "taylor")


# --- criteria of the data -----------------------------------------------------------------------------------

CLASSES = 5


def normalise(images):
    return (images.double() - 120) / 60


def calibration_batches(sizes=(3, 2), side=32):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randint(256, (size, 3, side, side), generator=generator),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def loss_without(net, images, labels, module, axis, channel, change):
    """Return each sample's cross-entropy [B] with one channel of a module's output scaled by 1 + change."""

    def scale(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        gate = torch.ones(x.shape[axis], dtype=x.dtype)
        gate[channel] += change
        x = x * gate.view([-1 if dim == axis % x.dim() else 1 for dim in range(x.dim())])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    hook = net.get_submodule(module).register_forward_hook(scale)
    try:
        with torch.no_grad():
            return F.cross_entropy(net(normalise(images)), labels, reduction="none")
    finally:
        hook.remove()


def assert_taylor(net, stage, module, axis, positions, side=32):
    """Scaling a channel by 1 + e changes the loss by e * sum over positions of activation * gradient."""
    net = net.double().eval()
    batches = calibration_batches(side=side)
    found = prune.calibrate(net, normalise, [stage], batches, "taylor")[stage]
    assert found.dtype == torch.float64
    assert len(found) == find_stages(net)[stage].channels
    step, expected = 1e-5, np.zeros(len(found))
    for images, labels in batches:
        for channel in range(len(found)):
            above, below = (
                loss_without(net, images, labels, module, axis, channel, change) for change in (step, -step)
            )
            slopes = ((above - below) / (2 * step)).numpy()
            expected[channel] += np.abs(slopes / positions).sum()
    expected /= 5  # samples
    assert expected.max() > 1e-6
    assert np.allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_taylor_of_the_papers_network():
    torch.manual_seed(0)
    net = drawn_norms(CNN32((4, 6, 8), 12, CLASSES))
    # The published modules end before ReLU and pooling, which commute with a positive factor.
    for stage, side in enumerate((15, 6, 2)):
        assert_taylor(net, stage, f"conv{stage + 1}_bn", 1, side**2)


@pytest.mark.portable
def test_taylor_of_residual_stages():
    net = drawn_norms(model("resnet18", channels=[64, 8, 8, 12], num_classes=CLASSES))
    assert_taylor(net, 2, "layer2", 1, 16)
    assert_taylor(net, 4, "layer4", 1, 1)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_taylor_of_transformers(pool):
    tiny = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 12,
        "num_heads": 2,
        "depth": 2,
        "num_classes": CLASSES,
    }
    net = model("vit_tiny_patch16_224", global_pool=pool, class_token=pool == "token", **tiny)
    nn.init.normal_(net.head.weight)
    # Only the class token of the last block reaches the loss.
    for stage in (0, 1):
        assert_taylor(net, stage, f"blocks.{stage}", -1, 17 if pool == "token" else 16)


def test_taylor_of_hierarchical_transformers():
    tiny = {
        "img_size": 32,
        "window_size": 2,
        "embed_dim": 8,
        "depths": (1, 2, 1, 1),
        "num_heads": (1, 2, 2, 2),
    }
    net = model("swin_tiny_patch4_window7_224", num_classes=CLASSES, **tiny)
    nn.init.normal_(net.head.fc.weight)
    assert_taylor(net, 0, "layers.0", -1, 64)  # 8 x 8 positions of 8 channels: the axes have equal sizes
    assert_taylor(net, 1, "layers.1", -1, 16)
    assert_taylor(net, 3, "layers.3", -1, 1)


def test_taylor_of_stages_that_return_more_than_a_map():
    torch.manual_seed(0)
    tiny = mvitv2.MultiScaleVitCfg(embed_dim=(8, 12, 16, 20), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
    net = mvitv2.MultiScaleVit(tiny, img_size=64, num_classes=CLASSES)
    nn.init.normal_(net.head.fc.weight)
    assert_taylor(net, 1, "stages.1", -1, 64, side=64)


def test_taylor_of_maps_put_back_in_order():
    torch.manual_seed(0)
    net = hiera.Hiera(img_size=(64, 64), embed_dim=8, stages=(1, 1, 1, 1), num_classes=CLASSES)
    nn.init.normal_(net.head.fc.weight)
    assert_taylor(net, 1, "blocks.1", -1, 64, side=64)  # its tokens are sorted by mask unit


class Copies(nn.Module):
    """A map that the classifier does not read, directly or through plain copies."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"module": "conv", "num_chs": 4, "reduction": 1}]
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, CLASSES)

    def forward_intermediates(self, x, indices, **_):
        x = self.conv(x)
        return x, [x.relu().permute(0, 2, 3, 1).permute(0, 3, 1, 2)]

    def forward_head(self, x):
        return self.fc(x.mean((2, 3)))


def test_taylor_refuses_a_map_that_does_not_reach_the_loss():
    net = Copies().double()
    with pytest.raises(UserError, match=r"taylor cannot follow stage 0 \(conv\) of Copies .* use activation"):
        prune.calibrate(net, normalise, [0], calibration_batches(), "taylor")
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_channel_that_nothing_reads_matters_nothing():
    torch.manual_seed(0)
    net = CNN32((6, 8, 8), 12, CLASSES).double()
    with torch.no_grad():
        net.conv2.weight[:, 3] = 0
        net.conv1.weight[3] *= 10
    batches = calibration_batches()
    found = prune.calibrate(net, normalise, [0], batches, "taylor")[0].tolist()
    assert found[3] == 0
    assert all(value > 0 for channel, value in enumerate(found) if channel != 3)
    # Other criteria cannot detect it.
    assert prune.filter_importance(net.float(), 0, SIZE).argmax() == 3


def test_mean_absolute_activations():
    net = model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=12, num_heads=2, depth=3
    ).double()
    batches, seen, reached = calibration_batches(), [], []
    found = prune.calibrate(net, normalise, [0, 1], batches, "activation")
    hooks = [
        net.blocks[i].register_forward_hook(lambda m, x, y, i=i: seen.append((i, y.detach()))) for i in (0, 1)
    ]
    net.eval()
    for images, _ in batches:
        net(normalise(images))
    for hook in hooks:
        hook.remove()
    for stage in (0, 1):
        rows = [
            row for i, tokens in seen if i == stage for row in tokens[:, 1:].numpy()
        ]  # [16, 12] without the class token
        expected = [sum(np.abs(row[:, c]).sum() / 16 for row in rows) / 5 for c in range(12)]
        assert found[stage].dtype == torch.float64
        assert np.allclose(found[stage].numpy(), expected, rtol=1e-10)
    net.blocks[2].register_forward_hook(lambda m, x, y: reached.append(1))
    prune.calibrate(net, normalise, [0, 1], batches, "activation")
    assert reached == []  # nothing beyond the deepest stage is computed


@pytest.mark.portable
@pytest.mark.parametrize("criterion", prune.NEEDS_DATA)
@pytest.mark.parametrize("ranks", [[[0], [1, 2, 3]], [[2, 3], [], [0, 1]]])
def test_calibration_does_not_depend_on_the_number_of_ranks(criterion, ranks):
    torch.manual_seed(0)
    net = CNN32((6, 8, 8), 12, CLASSES).double()
    batches = calibration_batches((4, 2, 3, 1))
    alone = prune.calibrate(net, normalise, [0, 2], batches, criterion)
    sent = []

    def keep(sums):
        sent.append(sums.clone())
        return torch.ones_like(sums)

    for mine in ranks:
        prune.calibrate(net, normalise, [0, 2], [batches[i] for i in mine], criterion, keep)
    assert len(sent) == len(ranks)  # one reduction per rank
    assert all(sums.dtype == torch.float64 for sums in sent)
    for mine in ranks:
        found = prune.calibrate(
            net, normalise, [0, 2], [batches[i] for i in mine], criterion, lambda _: sum(sent)
        )
        assert list(found) == [0, 2]
        for stage in (0, 2):
            assert np.allclose(found[stage].numpy(), alone[stage].numpy(), rtol=1e-12, atol=0)


def test_calibration_needs_an_image():
    net = CNN32((6, 8, 8), 12, CLASSES)
    with pytest.raises(ValueError, match="no batches"):
        prune.calibrate(net, normalise, [0], [], "activation")


def test_a_teacher_whose_loss_is_constant_has_no_taylor_importance():
    net = CNN32((6, 8, 8), 12, CLASSES).double()
    nn.init.zeros_(net.fc2.weight)
    with pytest.raises(
        UserError, match=r"taylor is zero or not a number .* of teacher stage 1: .*trained weights"
    ):
        prune.calibrate(net, normalise, [1], calibration_batches(), "taylor")
    assert prune.calibrate(net, normalise, [1], calibration_batches(), "activation")[1].max() > 0
    nn.init.constant_(net.conv2.weight, np.nan)
    with pytest.raises(UserError, match="activation is zero or not a number for every channel"):
        prune.calibrate(net, normalise, [1], calibration_batches(), "activation")


@pytest.mark.parametrize("criterion", prune.NEEDS_DATA)
def test_calibration_leaves_no_trace(criterion):
    net = model("resnet18", channels=[64, 8, 8, 12], num_classes=CLASSES).double()
    net.train()
    net.layer1.eval()
    net.conv1.requires_grad_(False)
    modes = [module.training for module in net.modules()]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        found = prune.calibrate(net, normalise, [1, 3], calibration_batches(), criterion)
        again = prune.calibrate(
            net.requires_grad_(False), normalise, [1, 3], calibration_batches(), criterion
        )
    for stage in (1, 3):
        assert not found[stage].requires_grad
        assert torch.equal(found[stage], again[stage])  # frozen or not
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(net.state_dict()[name], value) for name, value in state.items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.parameters())


def test_calibration_keeps_what_is_trainable():
    net = CNN32((4, 6, 8), 12, CLASSES).double()
    net.conv1.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in net.parameters()]
    prune.calibrate(net, normalise, [1], calibration_batches(), "taylor")
    assert [parameter.requires_grad for parameter in net.parameters()] == trainable
    assert all(parameter.grad is None for parameter in net.parameters())


def test_chance_is_the_same_everywhere():
    scores = prune.random_importance(3, 1, 1000)
    assert torch.equal(scores, prune.random_importance(3, 1, 1000))
    assert scores.dtype == torch.float64
    assert 0 <= scores.min() < 0.02
    assert 0.98 < scores.max() < 1
    assert abs(scores.mean() - 0.5) < 5 * (1 / 12 / 1000) ** 0.5  # standard deviations of the mean
    for other in (prune.random_importance(4, 1, 1000), prune.random_importance(3, 2, 1000)):
        assert (scores != other).all()


# --- plan ---------------------------------------------------------------------------------------------------


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


def test_a_plan_by_each_criterion_of_the_weights():
    teacher, student = networks()
    drawn_norms(teacher)
    with torch.no_grad():
        teacher.conv1.weight[:8] = 0
        teacher.conv1.weight[:8, 0, 0, 0] = 9.0  # L1 norm 9, L2 norm 9
        teacher.conv1.weight[8:] = 1.0  # L1 norm 27, L2 norm 5.2
    expected = {
        "l1": list(range(8, 16)),
        "l2": list(range(8)),
        "bn_scale": sorted(np.argsort(-teacher.conv1_bn.weight.detach().abs().numpy())[:8].tolist()),
    }
    plans = {name: prune.plan(teacher, student, [(0, 0)], SIZE, name) for name in expected}
    assert {name: found.pairs[0].kept for name, found in plans.items()} == expected
    assert {name: found.criterion for name, found in plans.items()} == {name: name for name in expected}
    paper = prune.plan(teacher, student, [(0, 0)], SIZE, "bn_scale", "paper_bn")
    assert (paper.mode, paper.pairs) == ("paper_bn", plans["bn_scale"].pairs)


@pytest.mark.parametrize("criterion", prune.NEEDS_DATA)
def test_a_plan_by_calibrated_importance(criterion):
    teacher, student = networks()
    importance = {0: torch.arange(16.0).double() % 5, 2: torch.arange(64.0).double()}
    found = prune.plan(teacher, student, [(0, 0), (1, 1), (2, 2)], SIZE, criterion, importance=importance)
    assert found.criterion == criterion
    # 0 1 2 3 4 0 1 2 3 4 0 1 2 3 4 0: three fours, three threes, the first two twos
    assert found.pairs[0].kept == [2, 3, 4, 7, 8, 9, 13, 14]
    assert found.pairs[1].kept is None
    assert found.pairs[2].kept == list(range(32, 64))
    for lacking in (None, {0: importance[0]}):
        with pytest.raises(ValueError, match=f"{criterion} needs the importance of teacher stage"):
            prune.plan(teacher, student, [(0, 0), (2, 2)], SIZE, criterion, importance=lacking)


@newer_timm
def test_concatenated_channels_have_activations():
    net = model("densenet121", growth_rate=4, block_config=(2, 2, 2, 2), num_classes=CLASSES).double()
    student = model("densenet121", growth_rate=2, block_config=(2, 2, 2, 2), num_classes=CLASSES)
    importance = prune.calibrate(net, normalise, [1, 2], calibration_batches(), "activation")
    found = prune.plan(net, student, [(1, 1), (2, 2)], SIZE, "activation", importance=importance)
    for pair in found.pairs:
        ranked = np.argsort(-importance[pair.teacher_stage].numpy())
        assert pair.kept == sorted(ranked[: pair.student_width].tolist())


def test_a_plan_by_chance_follows_the_seed():
    teacher, student = networks()
    plans = [prune.plan(teacher, student, [(0, 0), (2, 2)], SIZE, "random", seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].hash != plans[2].hash
    scores = np.random.default_rng((1, 2)).random(64)
    assert plans[2].pairs[1].kept == sorted(np.argsort(-scores)[:32].tolist())


def test_a_wider_student_needs_an_adapter():
    teacher, student = networks()
    with pytest.raises(
        UserError, match=r"student stage 0 has 16 channels, more than the 8 .* warmup.adapter: conv1x1"
    ):
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
    with pytest.raises(
        UserError, match=f"warmup.pairs: {role} stages .* need increasing indices from 0 to 2"
    ):
        prune.plan(*networks(), pairs, SIZE)


def test_no_pairs():
    with pytest.raises(UserError, match=r"warmup\.pairs: is empty"):
        prune.plan(*networks(), [], SIZE)


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
