"""grad_checkpointing: the same run, bit for bit, with less memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from conftest import losses
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn

from indistill import config
from indistill.commands.plan import estimate
from indistill.config import UserError
from indistill.models import timm_model
from indistill.models.network import Network
from indistill.training import parts
from indistill.training.guard import Buffers
from indistill.training.loop import train

NORMALISATION = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
# A CNN with batch norm, one with drop path besides, and a ViT with dropout.
STUDENTS = {
    "test_resnet": {},
    "test_efficientnet": {"drop_path_rate": 0.3, "drop_rate": 0.2},
    "test_vit": {"img_size": 32, "patch_size": 8, "proj_drop_rate": 0.2, "drop_path_rate": 0.2},
}


def student(name, *, checkpointing, **options):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10, **STUDENTS.get(name, {}))
    if checkpointing:
        timm_model.checkpoint_gradients(net, name)
    return Network(net, NORMALISATION, **options).train()


def saved_bytes(network, **arguments):
    """Bytes that a forward pass keeps for the backward pass, weights apart; and its output."""
    kept = {}

    def keep(tensor):
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))
    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images, **arguments)
    return sum(kept.values()), output


def step(network, **arguments):
    """The output of a forward pass, then gradients and buffers after the backward pass."""
    buffers = Buffers(network)
    _, output = saved_bytes(network, **arguments)
    results = [result for result in (*output.features, output.logits) if result is not None]
    with buffers.unchanged():
        sum(result.square().sum() for result in results).backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return results, gradients, dict(network.named_buffers())


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (value is None) == (found[name] is None), name
        assert value is None or torch.equal(found[name], value), name


# --- a step -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["statistics", "frozen statistics"])
@pytest.mark.parametrize("arguments", [{}, {"upto": 0}, {"upto": 1}], ids=["kd", "one stage", "two stages"])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_step_is_the_same_bit_for_bit(name, arguments, frozen):
    found = []
    for checkpointing in (False, True):
        network = student(name, checkpointing=checkpointing, stages=[0, 1])
        if frozen:
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        found.append(step(network, **arguments))
    (plain, plain_gradients, plain_buffers), (output, gradients, buffers) = found
    assert all(torch.equal(a, b) for a, b in zip(output, plain))
    assert_equal(gradients, plain_gradients)
    assert_equal(buffers, plain_buffers)
    counts = [value.item() for key, value in buffers.items() if key.endswith("num_batches_tracked")]
    if counts and not (frozen or arguments):
        assert set(counts) == {1}


def test_without_care_batch_norm_would_count_a_batch_twice():
    """What `Buffers.unchanged` is there for; if timm or torch mends it, it can go."""
    network = student("test_resnet", checkpointing=True)
    _, output = saved_bytes(network)
    output.logits.sum().backward()
    counts = [value.item() for key, value in network.named_buffers() if key.endswith("num_batches_tracked")]
    assert 2 in counts


@pytest.mark.parametrize("arguments", [{}, {"upto": 1}], ids=["kd", "warm-up"])
@pytest.mark.parametrize("name", STUDENTS)
def test_less_is_kept_for_the_backward_pass(name, arguments):
    if arguments and name == "test_resnet" and Version(timm.__version__) < Version("1.0.31"):
        pytest.skip("timm's ResNet keeps everything up to a stage; 1.0.31 does not")
    plain, _ = saved_bytes(student(name, checkpointing=False, stages=[0, 1]), **arguments)
    less, _ = saved_bytes(student(name, checkpointing=True, stages=[0, 1]), **arguments)
    assert less < 0.9 * plain


# --- a run --------------------------------------------------------------------------------------------------


def with_student(tree, name="test_efficientnet"):
    tree["student"] = {"name": name, "kwargs": STUDENTS[name]}
    tree["teacher"] = {"name": name, "kwargs": STUDENTS[name], "random": True}
    tree["warmup"] = {
        "curriculum": "sequential",
        "durations": ["4 steps", "4 steps"],
        "pairs": [[0, 0], [1, 1]],
    }
    tree |= {"duration": "16 steps", "checkpoint": {"every_steps": 6, "keep_last": 9}}
    return tree


def run(tree, resume="auto", **keys):
    tree = copy.deepcopy(tree) | keys
    train(config.parse(tree, "test"), resume)
    return losses(tree["run_dir"])


def weights(tree):
    return load_file(Path(tree["run_dir"]) / "student.safetensors")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_the_same_with_and_without_and_resumes_with_the_other(tree, tmp_path, accumulation):
    tree = with_student(tree) | {"grad_accumulation": accumulation}
    plain = tree | {"run_dir": str(tmp_path / "plain")}
    expected = run(plain)
    assert run(tree, grad_checkpointing=True) == expected
    assert_equal(weights(tree), weights(plain))
    middle = str(Path(tree["run_dir"]) / "checkpoints" / "step-00000006")
    assert run(tree, middle, grad_checkpointing=False) == expected
    assert_equal(weights(tree), weights(plain))


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDENTS)
def test_the_plan_has_the_bytes_that_a_forward_pass_keeps(tree, name):
    tree = with_student(tree, name)
    del tree["warmup"]
    plain, less = (
        estimate.of_run(config.parse(tree | {"grad_checkpointing": value}, "test"), world=1)
        for value in (False, True)
    )
    assert less.memory["ddp"]["activations"] < 0.8 * plain.memory["ddp"]["activations"]
    again = less.memory["ddp"]["largest block, computed again"]
    assert 0 < again < plain.memory["ddp"]["activations"] - less.memory["ddp"]["activations"]
    assert "largest block, computed again" not in plain.memory["ddp"]
    # The forward pass again, but for what is outside of the blocks.
    assert 1.1 < less.phases[0].work.student_flops / plain.phases[0].work.student_flops < 4 / 3
    for found, checkpointing in ((plain, False), (less, True)):
        kept, _ = saved_bytes(student(name, checkpointing=checkpointing))
        (phase,) = found.phases
        losses_keep = 4 * 8 * 10 * 4  # a few tensors of logits
        assert (
            abs(4 * phase.work.activation_bytes + phase.work.batch_bytes - kept) < losses_keep + 0.01 * kept
        )


# --- what cannot be -----------------------------------------------------------------------------------------


def test_a_network_without_it_is_one_line(tree):
    tree["grad_checkpointing"] = True
    message = (
        r"^grad_checkpointing: timm has none for cnn32_student: remove it, or choose another student.name$"
    )
    with pytest.raises(UserError, match=message):
        parts.create_student(config.parse(tree, "test"))
    tree["student"] = {"name": "vgg11"}
    with pytest.raises(UserError, match="timm has none for vgg11"):
        parts.create_student(config.parse(tree, "test"))


def test_heads_have_no_student_for_it(tree):
    for key in ("student", "warmup"):
        del tree[key]
    tree |= {"stage": "heads", "grad_checkpointing": True, "kd": {"losses": [{"name": "ce"}]}}
    with pytest.raises(UserError, match="grad_checkpointing is for a student, and stage: heads trains none"):
        config.parse(tree, "test")
