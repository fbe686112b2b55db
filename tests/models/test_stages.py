"""Stages of timm models: which pair up, and that a truncated forward pass gives the full one's maps."""

import pytest
import timm
import torch
from conftest import newer_timm
from torch import nn

import indistill.models  # noqa: F401  # registers cnn32_student
from indistill.config import UserError
from indistill.models.stages import find_stages, match_stages, stage_maps


def model(name, **options):
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def vit(depth, name="vit_tiny_patch16_224", img_size=32):
    return model(name, img_size=img_size, depth=depth)


def blocks(reductions):
    """A model that only has its stages' descriptions."""
    net = nn.Identity()
    net.forward_intermediates = None
    net.feature_info = [
        {"module": f"stage{i}", "num_chs": 8, "reduction": r} for i, r in enumerate(reductions)
    ]
    return net


# --- pairs --------------------------------------------------------------------------------------------------


def test_stages_of_equal_reduction_pair_up():
    resnets = model("resnet34"), model("resnet18")
    assert match_stages(*resnets) == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [(s.name, s.channels, s.reduction) for s in find_stages(resnets[0])] == [
        ("act1", 64, 2), ("layer1", 64, 4), ("layer2", 128, 8), ("layer3", 256, 16), ("layer4", 512, 32),
    ]  # fmt: skip


@newer_timm
def test_numbering_may_differ():
    # ConvNeXt has no stage of reduction 2, VGG one of reduction 1.
    with torch.device("meta"):
        vgg = model("vgg11")
    assert match_stages(model("test_resnet"), model("test_convnext")) == [(1, 0), (2, 1), (3, 2), (4, 3)]
    assert match_stages(vgg, model("test_resnet")) == [(2, 1), (3, 2), (4, 3), (5, 4)]
    assert match_stages(model("test_efficientnet"), vgg) == [(1, 2), (2, 3), (3, 4), (4, 5)]


def test_the_deepest_of_several_stages_of_one_reduction():
    assert match_stages(blocks([4, 8, 8, 16, 16, 16]), blocks([4, 8, 16])) == [(0, 0), (2, 1), (5, 2)]
    assert match_stages(blocks([4, 8]), blocks([2, 4, 4, 16])) == [(0, 2)]


def test_at_most_four_pairs_the_deepest():
    assert match_stages(blocks([1, 2, 4, 8, 16, 32]), blocks([1, 2, 4, 8, 16, 32])) == [
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 5),
    ]


def test_nothing_in_common():
    with pytest.raises(
        UserError, match=r"reductions \[2, 4\]\) and student \(\[8, 16\]\) .* give warmup.pairs"
    ):
        match_stages(blocks([2, 4]), blocks([8, 16]))


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        (12, 12, [(2, 2), (5, 5), (8, 8), (11, 11)]),
        (24, 12, [(5, 2), (11, 5), (17, 8), (23, 11)]),
        (12, 8, [(2, 1), (5, 3), (8, 5), (11, 7)]),
        (12, 6, [(2, 1), (5, 2), (8, 4), (11, 5)]),
        (6, 3, [(1, 0), (3, 1), (5, 2)]),
        (12, 1, [(11, 0)]),
    ],
)
def test_blocks_of_transformers_pair_by_depth(teacher, student, pairs):
    assert match_stages(blocks([16] * teacher), blocks([16] * student)) == pairs


def test_transformers_of_other_patch_sizes_pair_by_depth():
    assert match_stages(vit(4), vit(2, "vit_small_patch32_224", img_size=64)) == [(1, 0), (3, 1)]


def test_a_hierarchy_and_a_transformer_pair_by_depth():
    resnet, transformer = model("test_resnet"), vit(12)
    assert match_stages(resnet, transformer) == [(1, 2), (2, 5), (3, 8), (4, 11)]
    assert match_stages(transformer, resnet) == [(2, 1), (5, 2), (8, 3), (11, 4)]
    assert match_stages(model("test_convnext"), transformer) == [(0, 2), (1, 5), (2, 8), (3, 11)]


# --- maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("test_resnet", [16, 8, 4, 2, 1]),
        ("test_convnext", [8, 4, 2, 1]),
        ("test_efficientnet", [16, 8, 4, 2, 1]),
        ("test_vit", [2] * 6),
        ("cnn32_student", [15, 6, 2]),
    ],
)
def test_maps_are_the_full_passes_intermediates(name, sides):
    net = model(name)
    images = torch.randn(2, 3, 32, 32)
    stages = find_stages(net)
    _, full = net.forward_intermediates(images)
    assert len(full) == len(stages)
    for stage, expected, side in zip(stages, full, sides):
        (alone,) = stage_maps(net, images, [stage.index])
        assert torch.equal(alone, expected)
        assert alone.shape == (2, stage.channels, side, side)
    some = [stage.index for stage in stages][::2]
    for ours, index in zip(stage_maps(net, images, some), some):
        assert torch.equal(ours, full[index])


def test_maps_of_a_resnet_are_its_modules_outputs():
    net, images = model("resnet18"), torch.randn(1, 3, 32, 32)
    x = net.maxpool(net.act1(net.bn1(net.conv1(images))))
    for index, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4), start=1):
        x = layer(x)
        assert torch.equal(stage_maps(net, images, [index])[0], x)


@pytest.mark.portable
def test_maps_of_a_transformer_are_its_patch_tokens(float64):
    net, images = vit(2), torch.randn(3, 3, 32, 32)
    tokens = torch.cat([net.cls_token.expand(3, -1, -1), net.patch_embed(images)], dim=1) + net.pos_embed
    for index, block in enumerate(net.blocks):
        tokens = block(tokens)  # [B, 1 + 2 * 2, C]
        expected = tokens[:, 1:].reshape(3, 2, 2, 192).permute(0, 3, 1, 2)
        assert torch.allclose(stage_maps(net, images, [index])[0], expected, rtol=0, atol=1e-10)


def test_a_model_without_stages_is_refused():
    class Plain(nn.Module):
        def forward_intermediates(self):
            """timm's method, without the description of the stages."""

    for net in (nn.Linear(2, 2), Plain()):
        with pytest.raises(
            UserError, match=f"^{type(net).__name__} has no forward_intermediates and feature_info"
        ):
            find_stages(net)
