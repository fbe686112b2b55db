"""Estimate the cost of live and stored targets, and choose the cheaper ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from indistill import config
from indistill.config import Config
from indistill.curriculum import Phase, Timetable
from indistill.losses.gather import Rows
from indistill.losses.objective import Objective, teaches
from indistill.models.network import DTYPES
from indistill.models.outputs import Targets
from indistill.models.trainable import Trainable
from indistill.targets import records
from indistill.targets.records import Field
from indistill.targets.several import SeveralTargets
from indistill.targets.source import TargetSource

SEEN = (2, 4)  # images in two batches: their difference separates bytes per image from bytes per batch


@dataclass(frozen=True)
class Work:
    """The cost of an image in a phase. A multiply-add counts as two operations."""

    teacher_flops: int
    student_flops: int  # forward, losses and backward
    activation_bytes: int  # that the student keeps for the backward pass
    batch_bytes: int  # kept once per batch: mostly weights in half precision
    targets: dict[str, tuple[int, ...]]  # shape of each target that the phase reads
    compared: list[Rows]  # what losses that compare samples gather from all ranks
    # Results within the largest block that the backward pass computes again (grad_checkpointing).
    recomputed_bytes: int = 0
    trained_parameters: int = 0  # those with a gradient


@dataclass(frozen=True)
class Choice:
    """The time of a phase with live and with stored targets, in seconds of all devices added up."""

    source: str  # the cheaper one: live or cached
    live_seconds: float
    cached_seconds: float  # the time to store all views included
    uncached: str | None  # why the targets cannot be stored; None if they can


# --- work of a phase ----------------------------------------------------------------------------------------
def measure(
    settings: Config,
    student: Trainable,
    *,
    targets_of: TargetSource,
    objective: Objective,
    phase: Phase,
) -> Work:
    """The work of a phase, from its loss and gradient on fake tensors: nothing is computed, nor changed."""
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    fewer, more = (
        _run(settings, student, targets_of=targets_of, objective=objective, phase=phase, batch=batch)
        for batch in SEEN
    )
    for buffer, before in buffers:
        buffer.copy_(before)  # batch norm has counted the batches
    activation_bytes = (more.kept_bytes - fewer.kept_bytes) // (SEEN[1] - SEEN[0])
    fields = _fields(settings, targets_of, phase, more.targets)
    return Work(
        teacher_flops=more.teacher_flops // SEEN[1],
        student_flops=more.student_flops // SEEN[1],
        activation_bytes=activation_bytes,
        batch_bytes=fewer.kept_bytes - SEEN[0] * activation_bytes,
        targets={name: tuple(target.shape[1:]) for name, target in fields.items()},
        compared=more.compared,
        recomputed_bytes=(more.recomputed_bytes - fewer.recomputed_bytes) // (SEEN[1] - SEEN[0]),
        trained_parameters=more.trained_parameters,
    )


@dataclass(frozen=True)
class _Run:
    """One step on a fake batch."""

    teacher_flops: int
    student_flops: int  # forward, losses and backward
    kept_bytes: int  # that the student keeps for the backward pass
    targets: Targets
    compared: list[Rows]  # what losses that compare samples gather
    recomputed_bytes: int  # of the largest block that the backward pass computes again
    trained_parameters: int  # those with a gradient


class _Memory(TorchDispatchMode):
    """Adds up the bytes that a step keeps for its backward pass, and those that this computes again.

    `keep` and `use` are hooks of saved tensors. The mode is for the backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[int, int] = {}  # bytes by storage
        self.block: dict[int, int] = {}  # of the block that is being computed again
        self.largest_block = 0

    def keep(self, tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            self.kept[storage._cdata] = storage.nbytes()
        return tensor

    def use(self, tensor: Tensor) -> Tensor:
        self.block = {}  # a block begins with the use of its inputs
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if torch.is_grad_enabled():  # in a backward pass, only where it repeats a forward pass
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    storage = result.untyped_storage()
                    self.block[storage._cdata] = storage.nbytes()
            self.largest_block = max(self.largest_block, sum(self.block.values()))
        return results


def _run(
    settings: Config,
    student: Trainable,
    *,
    targets_of: TargetSource,
    objective: Objective,
    phase: Phase,
    batch: int,
) -> _Run:
    parameter = next(student.parameters())
    dtype = DTYPES[settings.mixed_precision]
    autocast = torch.autocast(parameter.device.type, dtype, enabled=settings.mixed_precision != "no")
    memory = _Memory()
    student.train()
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True):
        images, labels = _batch(settings, phase, batch, device=parameter.device)
        with operations() as teaching, autocast:
            targets = targets_of(images, phase)
        with operations() as learning:
            with torch.autograd.graph.saved_tensors_hooks(memory.keep, memory.use):
                run = convert_outputs_to_fp32(autocast(student.forward))
                output = run(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
                loss, _ = objective(output, targets, labels=labels, phase=phase, step=int(phase.start))
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            with memory:
                gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return _Run(
        teacher_flops=teaching.get_total_flops(),
        student_flops=learning.get_total_flops(),
        kept_bytes=sum(memory.kept.values()),
        targets=targets,
        compared=[] if phase.pairs else objective.compared(output, targets, labels),
        recomputed_bytes=memory.largest_block,
        trained_parameters=sum(gradient.numel() for gradient in gradients if gradient is not None),
    )


def _batch(settings: Config, phase: Phase, batch: int, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images, and labels or, where KD mixes images, class probabilities."""
    images = torch.zeros(batch, *config.input_size(settings), dtype=torch.uint8, device=device)
    if settings.kd.mixing and not phase.pairs:
        return images, torch.zeros(batch, settings.data.num_classes, device=device)
    return images, torch.zeros(batch, dtype=torch.int64, device=device)


def operations() -> FlopCounterMode:
    """Count operations: a context that has them in `get_total_flops()`."""
    aten = torch.ops.aten
    formulas = {
        aten.convolution_backward: _convolution_backward,
        # torch 2.10 counts attention on GPUs alone.
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **_kwargs: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Sequence[int],
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *_: Any,
    **_kwargs: Any,
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _convolution_backward(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **_kwargs: Any
) -> int:
    """Operations of `aten::convolution_backward`, from shapes: those of the forward pass per requested
    gradient.

    torch's own formula counts a grouped convolution's weight gradient as if each channel read all others.
    """
    *_, transposed, _output_padding, _groups, output_mask = rest
    pixels = math.prod((images if transposed else gradient)[2:])
    return sum(output_mask[:2]) * 2 * images[0] * pixels * math.prod(weight)


def _fields(settings: Config, targets_of: TargetSource, phase: Phase, targets: Targets) -> dict[str, Tensor]:
    """The targets that the phase's losses read, by name: of several teachers NAME/FIELD."""
    if isinstance(targets_of, SeveralTargets):
        several: dict[str, Tensor] = {}
        for one in [targets_of.first] if phase.pairs else targets_of.members:
            if phase.pairs or one.place is not None:
                own = targets if phase.pairs else targets.each[one.place or 0]
                of_teacher = _fields(settings.by_teacher[one.name], one.source, phase, own)
                several |= {f"{one.name}/{name}": target for name, target in of_teacher.items()}
        return several
    if phase.pairs:
        return {f"pair{pair + 1}": target for pair, target in zip(phase.pairs, targets.features)}
    losses = settings.kd.losses
    fields = {f"stage{stage}": target for stage, target in zip(targets_of.kd_stages, targets.features)}
    if targets.tokens is not None and teaches(losses, "tokens"):
        fields["tokens"] = targets.tokens
    if targets.embedding is not None and teaches(losses, "embedding"):
        fields["embedding"] = targets.embedding
    if targets.logits is not None and teaches(losses, "logits"):
        fields["logits"] = targets.logits
    return fields | {f"head{i + 1}": logits for i, logits in enumerate(targets.cohort)}


# --- live or stored -----------------------------------------------------------------------------------------
def record_bytes(name: str, shape: Sequence[int], section: config.Targets) -> int:
    """Bytes of one stored record of target `name` with `shape`, checksum included."""
    name = name.rpartition("/")[2]  # without that of one of several teachers
    kind, top_k = records.wanted_format(name, len(shape) == 3, section)
    field = Field(format=kind, shape=tuple(shape), dtype="float32", channels_last=False, top_k=top_k)
    return field.record.itemsize


def uncached(settings: Config, phase: Phase) -> str | None:
    """Why a phase's targets must be computed on every batch; None if they can be stored."""
    if settings.data.access == "stream":
        return "data.access: stream"
    if settings.data.augment.views is None:
        return "no data.augment.views"
    if settings.warmup and settings.warmup.curriculum == "auto":
        return "warmup.curriculum: auto"
    if phase.pairs:
        paper_bn = settings.warmup is not None and settings.warmup.prune.mode == "paper_bn"
        return "prune.mode: paper_bn" if paper_bn else None
    names = " and ".join(loss.name for loss in settings.losses)
    return None if any(loss.teaches for loss in settings.losses) else f"{names} alone"


def decide(settings: Config, works: Mapping[Phase, Work], timetable: Timetable) -> dict[str, Choice]:
    """The choice of `targets.source: auto` for each phase, by name: a function of its arguments alone.

    Decoding and reading run beside the device. All views of all images are stored once, which takes the
    teacher's part of a step for each, with decoding beside it: of its partner, too, where images are mixed.
    """
    machine = settings.machine
    decoding = decode_seconds(settings)
    views = settings.data.augment.views or 0
    choices = {}
    for phase, work in works.items():
        reason = uncached(settings, phase)
        trained_images = phase_steps(phase, timetable) * timetable.global_batch
        stored_images = timetable.steps_per_epoch * timetable.global_batch * views
        size = sum(record_bytes(*target, settings.targets) for target in work.targets.items())
        teacher = work.teacher_flops / machine.flops_per_second  # seconds per image, like all that follow
        student = work.student_flops / machine.flops_per_second
        reading = size * machine.devices_per_node / machine.read_bytes_per_second
        if isinstance(settings.data.image_size, config.Progressive):  # a size is read in its own epochs
            stored_images = min(stored_images, trained_images)
        to_decode = decoding * (2 if settings.kd.mixing else 1)
        live = trained_images * max(student + teacher, decoding)
        cached = trained_images * max(student, decoding, reading) + stored_images * max(teacher, to_decode)
        source = "cached" if reason is None and cached < live else "live"
        choices[phase.name] = Choice(source, live, cached, reason)
    return choices


def decode_seconds(settings: Config) -> float:
    """Seconds per image with all of a rank's loader workers."""
    rate = settings.machine.decode_images_per_second * max(settings.data.workers, 1)
    return 0.0 if settings.data.in_memory else 1 / rate


def phase_steps(phase: Phase, timetable: Timetable) -> int:
    """The number of a phase's steps."""
    return len(timetable.steps_of(phase))
