"""What the student is taught, against the teacher's own maps and the published code's arithmetic."""

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from indistill import prune
from indistill.curriculum import Phase
from indistill.models.cnn32 import CNN32
from indistill.models.network import Network
from indistill.models.outputs import Targets
from indistill.targets.live import LiveTargets

pytestmark = [pytest.mark.portable, pytest.mark.usefixtures("float64")]

SIZE = (3, 32, 32)
MEAN, STD = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
KD = Phase("kd", 3, (), (), 12, None)


def warmup(*pairs):
    return Phase("warmup", pairs[0], pairs, (1.0,) * len(pairs), 0, 4)


def trained(net):
    """Batch norms as after training: scales, biases and statistics that differ by channel."""
    torch.manual_seed(7)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def cnn32():
    torch.manual_seed(0)
    return trained(CNN32((16, 32, 64), 128)), CNN32((8, 32, 16), 64)


def resnets():
    torch.manual_seed(0)
    teacher = timm.create_model("resnet18", channels=[64, 16, 24, 32], num_classes=10)
    return trained(teacher), timm.create_model("resnet10t", channels=[8, 16, 12, 20], num_classes=10)


def build(teacher_net, student_net, pairs, mode="slice"):
    plan = prune.plan(teacher_net, student_net, pairs, SIZE, mode=mode)
    teacher = Network(teacher_net, (MEAN, STD), stages=[pair.teacher_stage for pair in plan.pairs])
    return LiveTargets(teacher, plan, input_size=SIZE), plan


def pictures(seed=0):
    return torch.randint(0, 256, (6, *SIZE), dtype=torch.uint8, generator=torch.manual_seed(seed))


def normalised(images):
    return (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(("networks", "pairs"), [(cnn32, [0, 1, 2]), (resnets, [1, 2, 3, 4])])
def test_a_target_is_the_kept_channels_of_the_teachers_map(networks, pairs):
    teacher, student = networks()
    targets_of, plan = build(teacher, student, [(pair, pair) for pair in pairs])
    with torch.no_grad():
        maps = teacher.eval().forward_intermediates(
            normalised(pictures()), indices=pairs, intermediates_only=True
        )
    for pair, (full, chosen) in enumerate(zip(maps, plan.pairs)):
        (feature,), embedding, logits = targets_of(pictures(), warmup(pair))[:3]
        assert (embedding, logits) == (None, None)
        expected = full.numpy() if chosen.kept is None else full.numpy()[:, chosen.kept]
        assert feature.shape[1] == chosen.student_width
        assert np.allclose(feature.numpy(), expected, rtol=0, atol=1e-10)
        exact = targets_of.teacher(pictures(), upto=pair, pairs=[pair]).features[0]
        assert torch.equal(feature, exact if chosen.kept is None else exact[:, chosen.kept])


def test_several_pairs_at_once():
    targets_of, _ = build(*cnn32(), [(0, 0), (1, 1), (2, 2)])
    together = targets_of(pictures(), warmup(0, 2)).features
    for pair, feature in zip((0, 2), together):
        assert torch.equal(feature, targets_of(pictures(), warmup(pair)).features[0])


@pytest.mark.parametrize("networks", [cnn32, resnets])
def test_kd_gets_the_bare_models_embedding_and_logits(networks):
    teacher, student = networks()
    targets_of, _ = build(teacher, student, [(1, 1)])
    features, embedding, logits = targets_of(pictures(), KD)[:3]
    with torch.no_grad():
        hidden = teacher.forward_features(normalised(pictures()))
        assert torch.allclose(embedding, teacher.forward_head(hidden, pre_logits=True), rtol=0, atol=1e-10)
        assert torch.allclose(logits, teacher(normalised(pictures())), rtol=0, atol=1e-10)
    assert features == ()


def test_without_a_teacher_there_is_nothing_to_learn_from_it():
    nothing = LiveTargets(None, prune.Plan("none", "none", []), input_size=SIZE)
    assert nothing(pictures(), KD) == Targets((), None, None)


@pytest.mark.parametrize("mode", ["slice", "paper_bn"])
def test_the_teacher_is_frozen_and_stays_as_it_is(mode):
    teacher, student = cnn32()
    teacher.train()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    targets_of, _ = build(teacher, student, [(0, 0), (1, 1), (2, 2)], mode)
    for phase in (warmup(0), warmup(1), warmup(2), KD):
        features, embedding, logits = targets_of(pictures(), phase)[:3]
        for tensor in (*features, embedding, logits):
            assert tensor is None or not tensor.requires_grad
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in before.items())
    assert not any(module.training for module in teacher.modules())
    assert not any(module._forward_hooks for module in teacher.modules())
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters()
    )


# --- paper_bn: the published code's targets -----------------------------------------------------------------


def published_target(net, images, stage, kept):
    """As in the authors' code: a pruned copy of the convolution reads the whole map before it; the copy of
    the batch
    norm has the kept scales, zero bias, and normalises by the batch."""
    state, x = net.state_dict(), normalised(images)
    for i in range(1, stage + 1):
        x = F.conv2d(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
        statistics = state[f"conv{i}_bn.running_mean"], state[f"conv{i}_bn.running_var"]
        x = F.batch_norm(x, *statistics, state[f"conv{i}_bn.weight"], state[f"conv{i}_bn.bias"])
        x = F.max_pool2d(F.relu(x), 2)
    layer = f"conv{stage + 1}"
    x = F.conv2d(x, state[f"{layer}.weight"][kept], state[f"{layer}.bias"][kept])
    scale = state[f"{layer}_bn.weight"][kept]
    fresh_statistics = torch.zeros(len(kept)), torch.ones(len(kept))
    x = F.batch_norm(x, *fresh_statistics, scale, torch.zeros(len(kept)), training=True)
    return F.max_pool2d(F.relu(x), 2)


@pytest.mark.parametrize("pair", [0, 1, 2])
def test_paper_bn_against_the_published_arithmetic(pair):
    teacher, student = cnn32()
    targets_of, plan = build(teacher, student, [(0, 0), (1, 1), (2, 2)], "paper_bn")
    (feature,) = targets_of(pictures(), warmup(pair)).features
    kept = plan.pairs[pair].kept or list(range(32))
    expected = published_target(teacher, pictures(), pair, kept)
    assert feature.shape == expected.shape
    assert torch.allclose(feature, expected, rtol=0, atol=1e-10)
    plain, _ = build(*cnn32(), [(0, 0), (1, 1), (2, 2)])
    assert not torch.allclose(feature, plain(pictures(), warmup(pair)).features[0], atol=0.1)


def test_paper_bn_leaves_kd_alone():
    published, _ = build(*cnn32(), [(0, 0)], "paper_bn")
    plain, _ = build(*cnn32(), [(0, 0)])
    published(pictures(), warmup(0))
    assert torch.equal(published(pictures(), KD).logits, plain(pictures(), KD).logits)
