"""Batch norms of a frozen network, folded into its convolutions: the same outputs, by fewer layers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from indistill import prune
from indistill.curriculum import Phase
from indistill.models import frozen
from indistill.models.network import Network
from indistill.models.stages import find_stages
from indistill.targets.live import LiveTargets

STATISTICS = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
SIZE = (3, 64, 64)
# How many batch norms are left: those that read a sum or a concatenation, and those of a ViT, which has none.
FAMILIES = {
    "resnet18": 0,
    "resnet50d": 0,
    "mobilenetv3_small_050": 0,
    "tf_efficientnet_lite0": 0,
    "regnety_002": 0,
    "hrnet_w18_small": 0,
    "repvgg_a0": 17,
    "densenet121": 62,
    "test_vit": 0,
    "nf_resnet26": 0,
}


def trained(net: nn.Module) -> nn.Module:
    """Give the batch norms statistics and weights that are no identity."""
    generator = torch.Generator().manual_seed(0)
    for norm in norms(net):
        for tensor, low, high in (
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.3, 0.3),
            (norm.running_mean, -0.3, 0.3),
            (norm.running_var, 0.5, 2.0),
        ):
            with torch.no_grad():
                tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return net.eval().requires_grad_(False)


def norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def pictures() -> Tensor:
    return torch.randint(0, 256, (2, *SIZE), dtype=torch.uint8, generator=torch.manual_seed(1))


def network(name: str) -> Network:
    torch.manual_seed(0)
    kwargs = {"img_size": 64} if "vit" in name else {}
    net = trained(timm.create_model(name, num_classes=10, **kwargs))
    if not hasattr(net, "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} has no stages of {name}")
    return Network(net, STATISTICS, kd_stages=[stage.index for stage in find_stages(net)])


def outputs(network: Network) -> list[Tensor]:
    with torch.no_grad():
        output = network(pictures())
        maps = network.maps(pictures(), network.kd_stages)
    return [*output.features, *maps, output.embedding, output.logits]


@pytest.mark.portable
@pytest.mark.parametrize("name", FAMILIES)
def test_the_outputs_stay(float64, name):
    teacher = network(name)
    expected = outputs(teacher)
    frozen.fold(teacher, SIZE)
    assert len(norms(teacher)) == FAMILIES[name]
    for ours, theirs in zip(outputs(teacher), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


@pytest.mark.portable
def test_a_second_fold_finds_nothing_to_do(float64):
    teacher = network("resnet18")
    frozen.fold(teacher, SIZE)
    once = copy.deepcopy(teacher.state_dict())
    frozen.fold(teacher, SIZE)
    assert teacher.state_dict().keys() == once.keys()
    assert all(torch.equal(value, once[name]) for name, value in teacher.state_dict().items())


@pytest.mark.portable
def test_a_fold_after_the_conversion_changes_nothing():
    """As where a second student shares the teacher."""
    teacher = network("resnet18")
    frozen.fold(teacher, SIZE)
    frozen.hold(teacher, "bf16")
    once = copy.deepcopy(teacher.state_dict())
    frozen.fold(teacher, SIZE)
    assert all(torch.equal(value, once[name]) for name, value in teacher.state_dict().items())


@pytest.mark.portable
def test_half_precision_is_as_near_as_it_was():
    """Folded weights are rounded to bf16 too, but the map between convolution and norm is not any more."""
    plain, folded = network("resnet18"), network("resnet18")
    frozen.fold(folded, SIZE)
    exact = outputs(copy.deepcopy(plain).double())[-1]
    errors = []
    for teacher in (plain, folded):
        with torch.autocast("cpu", torch.bfloat16):
            errors.append(float((outputs(teacher)[-1].double() - exact).norm() / exact.norm()))
    assert errors[1] < 2 * errors[0]


class Forked(nn.Module):
    """Two stages; another layer, a stage, or nothing but the norm reads the output of a convolution."""

    num_classes = 4
    head_hidden_size = 4

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.reader = reader
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.feature_info = [{"module": str(i), "num_chs": 4, "reduction": 1} for i in range(2)]

    def forward_intermediates(
        self, x: Tensor, indices: list[int], **_: object
    ) -> tuple[Tensor, list[Tensor]]:
        written = self.stem(x)
        normed = self.bn(written)
        if self.reader == "layer":
            normed = normed + written
        if self.reader == "twice":
            normed = normed + self.bn(self.stem(x.flip(1)))
        stages = [written if self.reader == "stage" else normed, normed.relu()]
        return stages[-1], [stages[i] for i in indices]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3))

    def get_classifier(self) -> None:
        return None


@pytest.mark.portable
@pytest.mark.parametrize(("reader", "left"), [("norm", 0), ("layer", 1), ("stage", 1), ("twice", 1)])
def test_a_convolution_that_something_else_reads_stays(float64, reader, left):
    torch.manual_seed(0)
    teacher = Network(trained(Forked(reader)), STATISTICS, kd_stages=[0, 1])
    with torch.no_grad():
        expected = teacher(pictures())
        frozen.fold(teacher, SIZE)
        output = teacher(pictures())
    assert len(norms(teacher)) == left
    for ours, theirs in zip((*output.features, output.logits), (*expected.features, expected.logits)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))


def test_the_norms_of_the_published_pruning_stay_for_all_students(float64):
    """The norms that one of two students runs on batch statistics are not folded for the other."""
    torch.manual_seed(0)
    net = trained(timm.create_model("cnn32_auxiliary", num_classes=10))
    student = timm.create_model("cnn32_student", num_classes=10)
    shared = Network(net, STATISTICS, stages=[0, 1, 2])
    sources = []
    for mode in ("paper_bn", "slice"):
        plan = prune.plan(net, student, [(0, 0), (1, 1), (2, 2)], (3, 32, 32), mode=mode)
        sources.append(LiveTargets(copy.copy(shared), plan, input_size=(3, 32, 32)))
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    phases = [Phase(f"warmup {i + 1}/3", 0, (i,), (1.0,), i, 4) for i in range(3)]
    expected = [[source(images, phase).features[0] for phase in phases] for source in sources]
    for source in reversed(sources):
        source.hold_weights()
    for source, maps in zip(sources, expected):
        for phase, theirs in zip(phases, maps):
            ours = source(images, phase).features[0]
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
