"""What a step computes before its backward pass, on CUDA tensors that have no content and need no GPU.

Fake tensors refuse to add up tensors of two devices, to be read, and to take a shape from values. So a tensor
that is left on the CPU fails here, and so does a step that waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import SMOOTH, run_ranks
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

from indistill import config
from indistill.config import plugins
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Batch
from indistill.data.training import open_data
from indistill.losses import ce_loss, objective
from indistill.losses.objective import Objective
from indistill.models import heads as heads_module
from indistill.models import timm_model
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.targets import standards
from indistill.training import features, guard, lessons, parts
from indistill.training.mix import make_mix

CUDA = torch.device("cuda", 0)
BATCH = 4
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
VITS = {
    "student": {"name": "deit_tiny_distilled_patch16_224", "kwargs": VIT},
    "teacher": {"name": "deit_tiny_patch16_224", "kwargs": {**VIT, "embed_dim": 48}, "random": True},
}
RESNETS = {
    "student": {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 16], "drop_path_rate": 0.2}},
    "teacher": {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [16, 16, 32, 32]}, "random": True},
}
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"kd": {"losses": [{"name": name}]}} for name in plugins.built_in()},
    "token": {**VITS, "warmup": None, "kd": {"losses": [{"name": "ce"}, {"name": "token"}]}},
    "tokens": {**VITS, "warmup": None, "kd": {"losses": [{"name": "feature", "on": "tokens"}]}},
    "maps": {"kd": {"losses": [{"name": "feature", "on": "maps", "projector": "mlp"}]}},
    "channel": {"kd": {"losses": [{"name": "feature", "standardise": "channel", "batches": 1}]}},
    "phi_s": {"kd": {"losses": [{"name": "feature", "standardise": "phi_s", "batches": 5}]}},
    "vit": {
        **VITS,
        "warmup": {
            "curriculum": "sequential",
            "pairs": [[0, 0], [2, 2]],
            "durations": ["4 steps", "4 steps"],
        },
    },
    "resnet": {
        **RESNETS,
        "warmup": {
            "curriculum": "sequential",
            "pairs": [[0, 0], [3, 3]],
            "durations": ["4 steps", "4 steps"],
        },
    },
    "mixed": {"kd": {"losses": [{"name": "bce"}, {"name": "kd"}], "mix": {"mixup": 0.8, "cutmix": 1.0}}},
    "paper_bn": {
        "warmup": {"curriculum": "sequential", "durations": ["4 steps"] * 3, "prune": {"mode": "paper_bn"}}
    },
    "adapters": {"warmup": {"curriculum": "sequential", "durations": ["4 steps"] * 3, "adapter": "conv1x1"}},
    "all at once": {"warmup": {"durations": ["4 steps"] * 3, "curriculum": "all_at_once"}},
    "pooled": {"kd": {"losses": [{"name": "at"}]}, "targets": {"pool": 4}},
    "teachers": {
        "teacher": None,
        "teachers": [
            {"name": "cnn32_auxiliary", "random": True},
            {"name": "cnn32_auxiliary", "random": True, "id": "second", "weight": 2.0},
            {**VITS["teacher"], "image_size": 32, "losses": [{"name": "feature"}]},
            {"name": "test_vit2", "random": True, "image_size": 48, "losses": [{"name": "feature"}]},
        ],
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}], "teacher_dropping": 0.5},
    },
    "alone": {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}},
}


def converted(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, with new parameters, since fake ones cannot be changed in place."""
    for child in module.children():
        child._apply(convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = convert(parameter.detach())
            module._parameters[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module


def really(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function outside the mode, for what reads values before anything is on the device."""

    def called(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return function(*arguments)

    return called


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Run on fake tensors and on a device that is not there; timm creates networks with content, as ever."""
    generator = torch.Generator
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(Accelerator, "device", CUDA)
        for module, name in ((timm_model, "create"), (standards, "read"), (heads_module, "load_file")):
            patch.setattr(module, name, really(getattr(module, name)))
        patch.setattr(nn.Module, "_apply", converted)
        patch.setattr(features, "FakeTensorMode", lambda **_: contextlib.nullcontext())  # it is there already
        for network in (Network, Heads):
            patch.setattr(network, "fingerprint", "not read")
        patch.setattr(heads_module, "diverged", lambda _: None)
        patch.setattr(torch, "Generator", lambda device="cpu": generator("cpu"))  # of timm's moving average
        yield


class Step:
    """A run's parts on the device, and what a micro-batch of a phase makes of them."""

    def __init__(self, settings: config.Config) -> None:
        accelerator, files = Accelerator(cpu=True), RunDir.of(settings)
        files.path.mkdir(exist_ok=True)  # where both find the plan
        training, _ = open_data(accelerator, settings)
        self.settings = settings
        self.student, self.targets_of, plan, places = lessons.networks(accelerator, settings, files=files)
        standardised = features.agree_on_standards(
            accelerator,
            settings,
            files=files,
            targets_of=self.targets_of,
            calibration=lambda batches: training.loader(0, batches, torch.device("cpu")),
        )
        section, losses = settings.kd, settings.losses
        self.objective = Objective(
            losses, 6, section.relational_scope, standardised.of_loss, places, section.teacher_dropping
        )
        self.phases = Timetable.of(settings, 6, len(plan.pairs)).curriculum.phases()
        self.mix = make_mix(settings, accelerator)
        self.ema = guard.Ema(self.student, 0.9, use_warmup=True)
        self.buffers = guard.Buffers(self.student)

    def __call__(self, phase: Phase) -> dict[str, Tensor]:
        """Compute the loss and its terms; then do what follows a step."""
        self.buffers.keep()
        how = torch.zeros(BATCH, 6) if self.settings.kd.mixing else None
        pictures = torch.zeros(BATCH, 3, 32, 32, dtype=torch.uint8)
        labels = torch.zeros(BATCH, dtype=torch.int64)
        images, labels = self.mix(Batch(pictures, labels, labels, [], mix=how), phase)
        targets = self.targets_of(images, phase)
        output = self.student(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
        loss, terms = self.objective(output, targets, labels=labels, phase=phase, step=int(phase.start))
        skipped = ~torch.isfinite(loss.detach())
        self.buffers.put_back(skipped)
        self.ema.update(self.student, 1, skipped)
        return {"loss": loss, **terms}


def settings_of(tree: dict[str, Any], tmp_path: Path, name: str) -> config.Config:
    """A run's config; a teacher of `dih` gets its classifiers."""
    if name == "dih":
        with_heads = config.parse(tree, "test").model_copy(update={"heads": config.Heads(stages=[0, 2])})
        tree["teacher"]["heads"] = str(tmp_path / "heads.safetensors")
        parts.heads(Accelerator(cpu=True), with_heads).save(Path(tree["teacher"]["heads"]))
    return config.parse(tree | RUNS[name], "test")


def make_steps(tree: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Make a step of each phase on the device that is not there, in a process of its own."""
    settings = settings_of(tree, tmp_path, name)
    Step(settings)  # chooses channels and computes standards, which the other one reads from their files
    with fake_cuda():
        step = Step(settings)
        assert {x.device for x in step.student.state_dict().values()} == {CUDA}
        for phase in step.phases:
            for what, value in step(phase).items():
                assert (what, value.device, value.shape) == (what, CUDA, torch.Size())


# Of the built-in losses, at least one of each kind stays: logits, embeddings, maps, tokens, a memory bank.
QUICK = {"ce", "kd", "rkd", "pkt", "crd", "at", "feature", "token"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in {*plugins.built_in()} - QUICK else ())
        for name in RUNS
    ],
)
def test_a_step_stays_on_the_device_and_reads_nothing(tree, tmp_path, name):
    run_ranks(make_steps, None, tree, tmp_path, name)


def make_planted_steps(tree: dict[str, Any], tmp_path: Path) -> None:
    """Make steps with a fault in the loss of the last phase, then in that of the first: each is found."""
    entropy, hint = ce_loss.cross_entropy, objective.hint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ce_loss, "cross_entropy", lambda *a: entropy(*a) * entropy(*a).item())
        with pytest.raises(DataDependentOutputException):
            make_steps(tree, tmp_path, "ce")
        patch.setattr(objective, "hint", lambda *a: (hint(*a) + torch.ones(2)).sum())
        with pytest.raises(RuntimeError, match="devices"):
            make_steps(tree, tmp_path, "ce")


def test_what_is_read_or_left_on_the_cpu_is_found(tree, tmp_path):
    run_ranks(make_planted_steps, None, tree, tmp_path)
