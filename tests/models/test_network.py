"""Networks: nothing initialised at random silently, nothing normalised wrongly, every mistake one line."""

import pickle
import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import skip_without
from safetensors import safe_open
from torch import nn

from indistill import config
from indistill.config import UserError
from indistill.data.decode import decode
from indistill.data.shards import ShardSet
from indistill.models import timm_model
from indistill.models.cnn32 import CNN32
from indistill.models.network import Network, normalisation, save_network

STATISTICS = {"mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)}


def create(name="cnn32_student", num_classes=10, image_size=32, **section):
    return timm_model.create(config.Model(name=name, **section), num_classes, image_size, "teacher").eval()


def refusal(*arguments, **section):
    with pytest.raises(UserError) as caught:
        create(*arguments, **section)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("teacher")
    return message


def pictures(count=3, size=32, seed=0):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(seed))


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_unknown_name_suggests_others():
    assert refusal("resnt18").startswith("teacher.name: timm has no model 'resnt18'; near: resnet18, ")
    assert refusal("no such thing at all") == "teacher.name: timm has no model 'no such thing at all'"
    assert "could not create resnet18.no_such_tag" in refusal("resnet18.no_such_tag", pretrained=True)


@pytest.mark.parametrize("name", ["cnn32_student", "test_resnet"])
def test_an_unknown_argument_is_refused(name):
    assert f"timm could not create {name}: " in refusal(name, kwargs={"widht": 3})


def test_the_maps_alone_are_refused():
    message = refusal("test_resnet", kwargs={"features_only": True})
    assert message.startswith(
        "teacher.kwargs: with features_only test_resnet gives maps and has no classifier"
    )


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "cnn32_student"])
def test_a_network_without_a_classifier(name, tmp_path):
    size = 32 if name == "cnn32_student" else 160
    whole = create(name, 10, size)
    network = Network(whole, (STATISTICS["mean"], STATISTICS["std"])).eval()
    save_network(network, config.Model(name=name), tmp_path / "whole.safetensors")
    section = config.Model(name=name, num_classes=0, checkpoint=str(tmp_path / "whole.safetensors"))
    bare = timm_model.create(section, 10, size, "teacher")
    assert bare.num_classes == 0
    images = pictures(size=size)
    output = Network(bare, (STATISTICS["mean"], STATISTICS["std"])).eval()(images)
    assert output.logits is None
    assert torch.equal(output.embedding, network(images).embedding)


def test_a_head_of_another_size():
    message = refusal("test_resnet", kwargs={"num_classes": 7})
    assert "the head of test_resnet has 7 classes, data.num_classes is 10" in message


@pytest.mark.parametrize(
    ("name", "size"),
    [("vit_tiny_patch16_224", 32), ("test_vit3", 64), ("cnn32_student", 64), ("cnn32_student", 8)],
)
def test_an_image_size_that_the_model_cannot_take(name, size):
    message = refusal(name, 10, size)
    assert f"teacher: {name} cannot take {size} px images (data.image_size): " in message
    assert create("vit_tiny_patch16_224", 10, 32, kwargs={"img_size": 32, "depth": 1}).num_classes == 10


class Scaled(CNN32):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_that_is_not_one_linear_map_of_the_embedding(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: Scaled((8, 16, 32), 64))
    assert refusal("cnn32_student", 10, 32) == (
        "teacher: the output of cnn32_student is not its classifier on its embedding: use another variant"
    )


class Diverged(CNN32):
    def forward(self, x):
        return torch.nan * super().forward(x)


def test_weights_that_have_diverged(monkeypatch):
    monkeypatch.setattr("timm.create_model", lambda *_, **__: Diverged((8, 16, 32), 64))
    assert "teacher: the output of cnn32_student for random pixels is not finite" in refusal(
        "cnn32_student", 10, 32
    )


@pytest.mark.parametrize(
    ("name", "size", "kwargs"),
    [
        ("shvit_s1", 64, {}),  # a batch norm
        ("efficientvit_m0", 224, {}),
        ("lcnetv2_small", 32, {"drop_rate": 0.5}),
        ("mvitv2_tiny", 64, {"drop_rate": 0.5, "img_size": 64}),
        ("test_resnet", 32, {"drop_rate": 0.5}),  # its dropout is before the embedding
    ],
)
def test_what_is_between_embedding_and_classifier_trains(name, size, kwargs):
    net = timm_model.create(config.Model(name=name, kwargs=kwargs), 10, size, "student")
    started = [buffer for key, buffer in net.named_buffers() if key.endswith("running_mean")]
    assert not any(buffer.any() for buffer in started)  # the check leaves no trace
    assert net.plain_head == (name == "test_resnet")
    network = Network(net, (*STATISTICS.values(),)).train()
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    for module in net.modules():
        if "DropPath" in type(module).__name__:
            module.eval()
    if "drop_rate" in kwargs and not net.plain_head:  # the two parts draw one after the other
        assert not torch.allclose(network(images).logits, network(images).logits)
        return
    torch.manual_seed(0)
    expected = net(network.normalise(images))
    torch.manual_seed(0)
    torch.testing.assert_close(network(images).logits, expected)


def test_the_width_of_the_embedding_is_found(monkeypatch):
    net = CNN32((8, 16, 32), 64)
    del net.head_hidden_size
    monkeypatch.setattr("timm.create_model", lambda *_, **__: net)
    assert create("cnn32_student", 10, 32).head_hidden_size == 64


@pytest.mark.portable
def test_two_classifiers_of_a_distilled_model_are_known(float64):
    net = create("deit_tiny_distilled_patch16_224", 10, 32, kwargs={"img_size": 32, "depth": 1})
    ours = Network(net, (*STATISTICS.values(),)).eval()
    expected = net(normalised(pictures(), *STATISTICS.values()))
    assert torch.allclose(ours(pictures()).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.portable
def test_a_classifier_that_is_a_convolution(float64):
    net = create("resnetv2_50x1_bit", 10, 64, kwargs={"channels": [128] * 4})
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.manual_seed(0))
    ours = Network(net, (*STATISTICS.values(),)).eval()
    expected = net(normalised(images, *STATISTICS.values()))
    assert expected.shape == (2, 10)
    assert torch.allclose(ours(images).logits, expected, rtol=0, atol=1e-10)


def test_no_hub_to_have_weights_from(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal("resnet18.a1_in1k", 1000, 64, pretrained=True)
    assert "timm could not create resnet18.a1_in1k: " in message
    assert message.endswith("(for weights in a file: teacher.pretrained: false, teacher.checkpoint: FILE)")
    assert "no hub holds its weights" in refusal(pretrained=True)


def test_a_pretrained_teacher_keeps_its_head(monkeypatch):
    def with_another_head(*_, num_classes=1000, **__):  # as timm does, without its hub
        return timm.models.create_model("resnet18", num_classes=num_classes)

    monkeypatch.setattr(timm_model.timm, "create_model", with_another_head)
    message = refusal("resnet18", 10, 64, pretrained=True, kwargs={"num_classes": 10})
    assert message.startswith(
        "teacher.kwargs.num_classes: timm would replace the head of another size by a random one"
    )
    section = config.Model(name="resnet18", pretrained=True, kwargs={"num_classes": 10})
    assert timm_model.create(section, 10, 64, "student").num_classes == 10  # a fine-tune may


@pytest.mark.parametrize(
    "key",
    ["checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict"],
)
def test_weights_come_from_the_keys_that_are_checked(key):
    message = refusal(kwargs={key: False})
    assert (
        message
        == f"teacher.kwargs.{key}: would load other weights, or only some: give teacher.checkpoint instead"
    )


def test_statistics_that_nobody_knows():
    net = create()
    for unknown in (None, {}, {"mean": None, "std": (1, 1, 1)}):
        net.pretrained_cfg = unknown
        with pytest.raises(
            UserError, match=r"^student: the normalisation of x is not known: set student.mean and"
        ):
            normalisation(net, config.Model(name="x"), "student")
    given = config.Model(name="x", **STATISTICS)
    assert normalisation(net, given, "student") == (STATISTICS["mean"], STATISTICS["std"])


def test_statistics_are_those_of_the_weights():
    for name, mean in [
        ("resnet18.a1_in1k", 0.485),
        ("vit_tiny_patch16_224", 0.5),
        ("cnn32_student", 125.3 / 255),
    ]:
        net = timm.create_model(name)
        assert normalisation(net, config.Model(name=name), "student")[0][0] == pytest.approx(mean)


# --- checkpoints --------------------------------------------------------------------------------------------


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return (open, (str(self.proof), "w"))


def test_a_checkpoint_is_no_program(tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "evil.pt"
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        save({**create().state_dict(), "extra": Payload(proof)}, path)
        proof.unlink(missing_ok=True)
        message = refusal(checkpoint=str(path))
        assert message.startswith(
            f"teacher.checkpoint: {path} is not a readable checkpoint: damaged, or it holds"
        )
        assert not proof.exists()
    with path.open("rb") as file:
        pickle.load(file)
    assert proof.exists()  # the payload works


def test_files_that_are_no_checkpoints(tmp_path):
    assert refusal(checkpoint=f"{tmp_path}/none.pt") == f"teacher.checkpoint: no file {tmp_path}/none.pt"
    whole = tmp_path / "whole.pt"
    torch.save(create().state_dict(), whole)
    contents = {
        "empty": b"",
        "garbage": b"garbage" * 99,
        "cut": whole.read_bytes()[: whole.stat().st_size // 2],
    }
    for kind, content in contents.items():
        for suffix in (".pt", ".safetensors"):
            path = tmp_path / f"{kind}{suffix}"
            path.write_bytes(content)
            message = refusal(checkpoint=str(path))
            assert message.startswith(f"teacher.checkpoint: {path} is not a readable checkpoint: ")
            assert not message.endswith(": ")


@pytest.mark.parametrize(
    "content", [[1, 2], 5, {"epoch": 3}, {1: torch.zeros(2)}, {"state_dict": [3]}, torch.zeros(3)]
)
def test_checkpoints_that_are_no_state_dicts(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert f"{tmp_path}/other.pt is not a " in refusal(checkpoint=f"{tmp_path}/other.pt")


def test_a_state_dict_with_something_else_in_it(tmp_path):
    torch.save(create().state_dict() | {"fc2.bias": 3}, tmp_path / "odd.pt")
    assert "odd.pt is not a state dict" in refusal(checkpoint=f"{tmp_path}/odd.pt")


def test_a_checkpoint_with_another_head(tmp_path):
    torch.save(create(num_classes=7).state_dict(), tmp_path / "seven.pt")
    assert refusal(checkpoint=f"{tmp_path}/seven.pt") == (
        f"teacher.checkpoint: fc2.weight is (7, 64) in {tmp_path}/seven.pt, teacher.name with "
        "data.num_classes needs (10, 64): give the name, kwargs and data.num_classes that it was saved with"
    )


def test_a_checkpoint_of_another_architecture(tmp_path):
    path = str(tmp_path / "resnet.pt")
    torch.save(create("test_resnet").state_dict(), path)
    assert f"{path} lacks conv1.weight: it belongs to another architecture" in refusal(checkpoint=path)
    deeper = create().state_dict() | {"conv4.weight": torch.zeros(3)}
    torch.save(deeper, path)
    assert f"{path} has an unexpected conv4.weight: it belongs" in refusal(checkpoint=path)


def same_as(net: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    loaded = net.state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[key], weights[key]) for key in loaded)


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Of a residual network with batch norm, whose counters have counted nothing."""
    torch.manual_seed(3)
    return timm.create_model("test_resnet", num_classes=10).state_dict()


def mmpretrain(weights):
    return {
        ("head." if key.startswith("fc.") else "backbone.") + key: value for key, value in weights.items()
    }


def under(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


COUNTED = ".num_batches_tracked"


@pytest.mark.parametrize(
    ("saved", "how"),
    [
        (
            lambda w: {k: v for k, v in w.items() if not k.endswith(COUNTED)},
            "without num_batches_tracked, which",
        ),
        (lambda w: {"state_dict": under("model.", w)}, "with model. removed from the names"),
        (lambda w: under("module.model.", w), "with model. removed from the names"),  # timm cuts module.
        (lambda w: under("ema.student.", w), "with ema.student. removed from the names"),
        (lambda w: {"state_dict": mmpretrain(w)}, "with backbone. and head. removed from the names"),
        (lambda w: under("model.", mmpretrain(w)), "with model.backbone. and model.head. removed"),
        (lambda w: {"net": w, "acc": 93.1, "epoch": 5}, "from its entry net$"),
        (lambda w: {"net": under("module.", w)}, "from its entry net; with module. removed from the names"),
        (
            lambda w: {"state_dict": under("model.", w) | {"criterion.weight": torch.ones(10)}},
            "with model. removed from the names; without 1 other tensors .criterion.weight.$",
        ),
        (lambda w: under("model.", w) | under("model.teacher.", {"fc.weight": torch.ones(1)}), "removed"),
    ],
)
def test_weights_as_other_programs_name_them(tmp_path, weights, saved, how, capsys):
    torch.save(saved(weights), tmp_path / "other.pt")
    assert same_as(create("test_resnet", checkpoint=f"{tmp_path}/other.pt"), weights)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"indistill: teacher.checkpoint: {tmp_path}/other.pt is loaded ")
    assert re.search(how, line)


def test_weights_that_fit_as_they_are_need_no_word(tmp_path, weights, capsys):
    torch.save({"state_dict": under("module.", weights)}, tmp_path / "own.pt")
    assert same_as(create("test_resnet", checkpoint=f"{tmp_path}/own.pt"), weights)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("saved", "error"),
    [
        (
            lambda w: under("student.", w) | under("teacher.", w),
            "holds several networks that fit (student. and",
        ),
        (lambda w: {"net": w, "ema": w}, "holds several state dicts (net, ema): save one alone"),
        (lambda w: under("model.", w | {"fc.bias": torch.ones(3)}), "it belongs to another architecture"),
        (
            lambda w: {k: v for k, v in w.items() if k != "bn1.running_mean"},
            "lacks bn1.running_mean: it belongs",
        ),
        (
            lambda w: under("model.", {k: w[k] for k in w if k != "fc.bias"}),
            "it belongs to another architecture",
        ),
        (
            lambda w: w | {"fc.weight": w["fc.weight"] / 0},
            "has NaN or infinity in fc.weight: its training has",
        ),
        (
            lambda w: w | {"bn1.running_var": w["bn1.running_var"] * torch.nan},
            "has NaN or infinity in bn1.runn",
        ),
    ],
)
def test_weights_that_are_not_the_networks(tmp_path, weights, saved, error):
    torch.save(saved(weights), tmp_path / "other.pt")
    message = refusal("test_resnet", checkpoint=f"{tmp_path}/other.pt")
    assert message.startswith(f"teacher.checkpoint: {tmp_path}/other.pt ")
    assert error in message


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_resnets_are_timms_key_by_key(tmp_path, name):
    """`layer1.0.downsample.0.weight`, `fc.weight`: the same names, and the same function."""
    torch.manual_seed(4)
    theirs = torchvision.models.get_model(name, num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / f"{name}.pth")
    ours = create(name, checkpoint=f"{tmp_path}/{name}.pth")
    assert same_as(ours, theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["cnn32_student", "test_resnet", "test_vit"])
def test_what_is_saved_is_created_again_bit_for_bit(tmp_path, name, suffix):
    torch.manual_seed(1)
    section = config.Model(name=name, **STATISTICS)
    net = timm_model.create(section, 7, 32, "student")
    network = Network(net, normalisation(net, section, "student"), adapters={0: nn.Conv2d(3, 4, 1)})
    network.train()(pictures())  # batch norms move away from their defaults
    path = tmp_path / f"student{suffix}"
    if suffix == ".pt":
        torch.save(network.state_dict(), path)
    else:
        save_network(network, section, path)
    torch.manual_seed(2)
    again = timm_model.create(section.model_copy(update={"checkpoint": str(path)}), 7, 32, "student")
    again = Network(again, (*STATISTICS.values(),)).eval()
    assert torch.equal(again(pictures()).logits, network.eval()(pictures()).logits)


def test_layers_that_share_their_weights_are_saved_under_each_name(tmp_path):
    """The file fits a network that shares nothing, which then computes the same."""
    section = config.Model(name="test_resnet", **STATISTICS)
    net = timm_model.create(section, 7, 32, "student")
    net.layer1[0].conv2 = net.layer1[0].conv1
    network = Network(net, (*STATISTICS.values(),))
    save_network(network, section, tmp_path / "student.safetensors")
    again = create("test_resnet", 7, checkpoint=f"{tmp_path}/student.safetensors")
    assert same_as(again, net.state_dict())
    assert again.layer1[0].conv1 is not again.layer1[0].conv2
    logits = Network(again, (*STATISTICS.values(),)).eval()(pictures()).logits
    assert torch.equal(logits, network.eval()(pictures()).logits)


def test_saved_metadata_tells_how_to_use_the_weights(tmp_path):
    section = config.Model(name="test_resnet", kwargs={"drop_rate": 0.1}, **STATISTICS)
    net = timm_model.create(section, 7, 32, "student")
    save_network(Network(net, (*STATISTICS.values(),)), section, tmp_path / "student.safetensors")
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        assert file.metadata() == {
            "name": "test_resnet",
            "kwargs": '{"drop_rate": 0.1}',
            "num_classes": "7",
            "mean": "[0.5, 0.4, 0.3]",
            "std": "[0.1, 0.2, 0.3]",
        }
        assert set(file.keys()) == set(net.state_dict())


# --- Network ------------------------------------------------------------------------------------------------


def network(name="cnn32_student", mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), **options):
    torch.manual_seed(0)
    return Network(create(name), (mean, std), **options).eval()


def normalised(images, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)):
    scaled = images.numpy().astype(np.float64) / 255
    return torch.from_numpy((scaled - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1)))


@pytest.mark.portable
def test_each_network_normalises_by_its_own_statistics(float64):
    images = pictures()
    for mean, std in [((0.5, 0.4, 0.3), (0.1, 0.2, 0.3)), ((0.1, 0.2, 0.9), (1, 0.5, 0.25))]:
        seen = []
        ours = network("cnn32_auxiliary", mean, std)
        hook = ours.net.conv1.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        output = ours(images)
        hook.remove()
        expected = normalised(images, mean, std)
        assert torch.allclose(seen[0], expected, rtol=0, atol=1e-10)
        assert torch.allclose(output.logits, ours.net(expected), rtol=0, atol=1e-10)


def test_bytes_and_floats_are_the_same():
    ours = network()
    for a, b in zip(ours(pictures())[1:3], ours(pictures().float())[1:3]):
        assert torch.equal(a, b)


@pytest.mark.portable
def test_outputs_are_the_models_own(float64):
    ours = network("test_resnet", stages=[0, 2, 4])
    images = pictures(size=64)
    x = normalised(images)
    features, embedding, logits = ours(images)[:3]
    assert features == ()
    assert torch.allclose(logits, ours.net(x), rtol=0, atol=1e-10)
    assert torch.allclose(ours.net.get_classifier()(embedding), logits, rtol=0, atol=1e-10)
    maps, embedding, logits = ours(images, upto=1)[:3]
    assert (embedding, logits) == (None, None)
    assert [tuple(m.shape) for m in maps] == [(3, 32, 32, 32), (3, 48, 8, 8)]
    (deepest,) = ours(images, upto=2, pairs=[2]).features
    assert torch.allclose(deepest, ours.net.forward_features(x), rtol=0, atol=1e-10)


def test_an_adapter_lifts_the_map_of_its_pair():
    torch.manual_seed(3)
    adapter = nn.Conv2d(16, 20, 1)
    plain, lifted = network(stages=[0, 1, 2]), network(stages=[0, 1, 2], adapters={1: adapter})
    before, after = plain(pictures(), upto=2).features, lifted(pictures(), upto=2).features
    assert torch.equal(after[1], adapter(before[1]))
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[2], before[2])
    assert {name for name, _ in lifted.named_parameters()} - {
        name for name, _ in plain.named_parameters()
    } == {
        "adapters.1.weight",
        "adapters.1.bias",
    }


def test_without_a_loss_on_them_logits_are_for_evaluation_only():
    ours = network(reads=("embedding",))
    assert ours(pictures()).logits is not None
    ours.train()
    embedding, logits = ours(pictures())[1:3]
    assert logits is None
    embedding.sum().backward()
    assert ours.net.fc1.weight.grad is not None
    assert ours.net.fc2.weight.grad is None


def test_statistics_are_no_weights():
    assert not any("mean" in name and "running" not in name for name in network().state_dict())
    assert set(network().state_dict()) == {f"net.{name}" for name in network().net.state_dict()}


# --- the papers' small networks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "widths", "fc1"),
    [("cnn32_auxiliary", (16, 32, 64), (128, 256)), ("cnn32_student", (8, 16, 32), (64, 128))],
)
def test_the_papers_networks(name, widths, fc1):
    net = timm.create_model(name)
    expected = {"fc1.weight": fc1, "fc1.bias": fc1[:1], "fc2.weight": (10, fc1[0]), "fc2.bias": (10,)}
    for i, (before, width) in enumerate(zip((3, *widths), widths), start=1):
        expected |= {f"conv{i}.weight": (width, before, 3, 3), f"conv{i}.bias": (width,)}
        expected |= {
            f"conv{i}_bn.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")
        }
        expected[f"conv{i}_bn.num_batches_tracked"] = ()
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected
    assert timm.create_model(name, num_classes=3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.portable
def test_the_papers_network_computes_what_the_paper_says(float64):
    torch.manual_seed(0)
    net = timm.create_model("cnn32_student").eval()
    x = torch.randn(2, 3, 32, 32)
    state, y = net.state_dict(), x
    for i in (1, 2, 3):
        y = nn.functional.conv2d(y, state[f"conv{i}.weight"], state[f"conv{i}.bias"])
        mean, var = state[f"conv{i}_bn.running_mean"], state[f"conv{i}_bn.running_var"]
        y = nn.functional.batch_norm(y, mean, var, state[f"conv{i}_bn.weight"], state[f"conv{i}_bn.bias"])
        y = nn.functional.max_pool2d(y.clamp(min=0), 2)
    embedding = (y.flatten(1) @ state["fc1.weight"].T + state["fc1.bias"]).clamp(min=0)
    assert torch.allclose(
        net.forward_head(net.forward_features(x), pre_logits=True), embedding, rtol=0, atol=1e-10
    )
    assert torch.allclose(net(x), embedding @ state["fc2.weight"].T + state["fc2.bias"], rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def cifar10_test_images(tmp_path_factory):
    """The first 2,000 of the real test images, uint8 [N, 3, 32, 32], and their labels."""
    shard_file = skip_without(
        "cifar10/cifar10-test-0000.tar.gz",
        "CIFAR-10's test images, packed by `indistill shards pack` and then by gzip",
    )
    index = str(tmp_path_factory.mktemp("index"))
    shard = ShardSet(shard_file.name, root=str(shard_file.parent), cache_dir=index)
    samples = list(shard.iterate(0, 2000))
    images = np.stack([decode(sample.image, sample.key) for sample in samples])
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor([sample.label for sample in samples])


@pytest.mark.parametrize(
    ("name", "file", "low", "high"),
    [
        ("cnn32_auxiliary", "auxiliary_cifar10.pt", 0.69, 0.74),  # 71.4 % on all 10,000
        ("cnn32_student", "student_baseline_cifar10.pt", 0.665, 0.715),  # 69.1 %
    ],
)
def test_published_weights_classify_as_published(cifar10_test_images, name, file, low, high):
    images, labels = cifar10_test_images
    weights = skip_without(f"published/{file}", "the weights of github.com/gsarridis/InDistill")
    section = config.Model(name=name, checkpoint=str(weights))
    net = timm_model.create(section, 10, 32, "teacher")
    with torch.no_grad():
        teacher = Network(net, normalisation(net, section, "teacher")).eval()
        predicted = teacher(images).logits.argmax(dim=1)
    assert len(labels) == 2000
    assert low < (predicted == labels).float().mean().item() < high
