"""Count what live and stored targets cost, and choose the cheaper one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from indistill import config
from indistill.config import Config
from indistill.curriculum import Phase, Timetable
from indistill.losses.gather import Rows
from indistill.losses.objective import Objective, teaches
from indistill.models.heads import Heads
from indistill.models.network import DTYPES, Network
from indistill.models.outputs import Targets
from indistill.targets import records
from indistill.targets.live import LiveTargets
from indistill.targets.records import Field

SEEN = (2, 4)  # images of two batches: their difference tells an image's part from the batch's


@dataclass(frozen=True)
class Work:
    """What an image takes in a phase. A multiply-add counts as two operations."""

    teacher_flops: int
    student_flops: int  # forward, losses and backward
    activation_bytes: int  # that the student keeps for the backward pass
    batch_bytes: int  # kept once for a batch: weights in half precision above all
    targets: dict[str, tuple[int, ...]]  # shape of each target that the phase reads
    compared: list[Rows]  # what losses that compare samples gather from all ranks


@dataclass(frozen=True)
class Choice:
    """Recomputing a phase's targets against reading them, in seconds of one device after the other."""

    source: str  # the cheaper: live or cached
    live_seconds: float
    cached_seconds: float  # with the making of all views
    uncached: str | None  # why they cannot be cached


# --- what is counted -------------------------------------------------------------------------------------------------
def measure(
    settings: Config, student: Network | Heads, targets_of: LiveTargets, objective: Objective, phase: Phase
) -> Work:
    """The work of a phase, from its loss and gradient on fake images: nothing is computed, and nothing changed."""
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    runs = [_run(settings, student, targets_of, objective, phase, batch) for batch in SEEN]
    for buffer, before in buffers:
        buffer.copy_(before)  # batch norm has counted the batches
    (*_, fewer, _, _), (teacher_flops, student_flops, more, targets, compared) = runs
    activation_bytes = (more - fewer) // (SEEN[1] - SEEN[0])
    batch_bytes = fewer - SEEN[0] * activation_bytes
    fields = _fields(settings, targets_of, phase, targets)
    shapes = {name: tuple(target.shape[1:]) for name, target in fields.items()}
    flops = teacher_flops // SEEN[1], student_flops // SEEN[1]
    return Work(*flops, activation_bytes, batch_bytes, shapes, compared)


def _run(
    settings: Config,
    student: Network | Heads,
    targets_of: LiveTargets,
    objective: Objective,
    phase: Phase,
    batch: int,
) -> tuple[int, int, int, Targets, list[Rows]]:
    """Operations of teacher and student, bytes kept for the backward pass, targets, and what losses compare."""
    parameter = next(student.parameters())
    dtype = DTYPES[settings.mixed_precision]
    autocast = torch.autocast(parameter.device.type, dtype, enabled=settings.mixed_precision != "no")
    kept: dict[int, int] = {}  # bytes by storage

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    student.train()
    with torch.compiler.set_stance("force_eager"), FakeTensorMode(allow_non_fake_inputs=True):
        images = torch.zeros(batch, *config.input_size(settings), dtype=torch.uint8, device=parameter.device)
        labels = torch.zeros(batch, dtype=torch.int64, device=parameter.device)
        if settings.kd.mix and not phase.pairs:
            labels = torch.zeros(batch, settings.data.num_classes, device=parameter.device)
        with FlopCounterMode(display=False) as teaching, autocast:
            targets = targets_of(images, phase)
        backward = {torch.ops.aten.convolution_backward: _convolution_backward}
        with FlopCounterMode(display=False, custom_mapping=backward) as learning:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                run = convert_outputs_to_fp32(autocast(student.forward))
                output = run(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
                loss, _ = objective(output, targets, labels=labels, phase=phase, step=phase.start)
            trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, trained, allow_unused=True)
    return (
        teaching.get_total_flops(),
        learning.get_total_flops(),
        sum(kept.values()),
        targets,
        [] if phase.pairs else objective.compared(output, targets, labels),
    )


def _convolution_backward(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Operations of `aten::convolution_backward`, from shapes: as many as forward for either gradient that is wanted.

    torch's own formula counts the weight's of a grouped convolution as if each channel saw all others.
    """
    *_, transposed, _, _, wanted = rest
    pixels = math.prod((images if transposed else gradient)[2:])
    return sum(wanted[:2]) * 2 * images[0] * pixels * math.prod(weight)


def _fields(settings: Config, targets_of: LiveTargets, phase: Phase, targets: Targets) -> dict[str, Tensor]:
    """The targets that the phase's losses read, by name."""
    if phase.pairs:
        return {f"pair{pair + 1}": target for pair, target in zip(phase.pairs, targets.features)}
    losses = settings.kd.losses
    fields = {f"stage{stage}": target for stage, target in zip(targets_of.kd_stages, targets.features)}
    if teaches(losses, "embedding"):
        fields["embedding"] = targets.embedding
    if teaches(losses, "logits"):
        fields["logits"] = targets.logits
    return fields | {f"head{i + 1}": logits for i, logits in enumerate(targets.cohort)}


# --- cached targets --------------------------------------------------------------------------------------------------
def record_bytes(name: str, shape: Sequence[int], section: config.Targets) -> int:
    """Of one view of an image in a store: the target `name` of `shape`, checksum included."""
    kind, top_k = records.wanted_format(name, len(shape) == 3, section)
    field = Field(format=kind, shape=tuple(shape), dtype="float32", channels_last=False, top_k=top_k)
    return field.record.itemsize


def uncached(settings: Config, phase: Phase) -> str | None:
    """Why a phase's targets have to be computed on every batch; None if they can be cached."""
    if settings.data.access == "stream":
        return "data.access: stream"
    if settings.data.augment.views is None:
        return "no data.augment.views"
    if settings.warmup and settings.warmup.curriculum == "auto":
        return "warmup.curriculum: auto"
    if phase.pairs:
        return "prune.mode: paper_bn" if settings.warmup.prune.mode == "paper_bn" else None
    if settings.kd.mix and (settings.kd.mix.mixup or settings.kd.mix.cutmix):
        return "kd.mix"
    names = " and ".join(loss.name for loss in settings.kd.losses)
    return None if any(loss.teaches for loss in settings.kd.losses) else f"{names} alone"


def decide(settings: Config, works: Mapping[Phase, Work], timetable: Timetable) -> dict[str, Choice]:
    """For each phase, by name, what `targets.source: auto` follows: a function of its arguments alone.

    Either way decoding goes on beside the device, and reading does so too. A store is made once, all views of all
    images; its making takes the teacher's part of the phase, with decoding beside it.
    """
    machine, data = settings.machine, settings.data
    choices = {}
    for phase, work in works.items():
        reason = uncached(settings, phase)
        images = phase_steps(phase, timetable) * timetable.global_batch
        made = timetable.steps_per_epoch * timetable.global_batch * (data.augment.views or 0)
        size = sum(record_bytes(*target, settings.targets) for target in work.targets.items())
        teacher, student = (
            flops / machine.flops_per_second for flops in (work.teacher_flops, work.student_flops)
        )
        decoding, reading = (
            decode_seconds(settings),
            size * machine.devices_per_node / machine.read_bytes_per_second,
        )
        live = images * max(student + teacher, decoding)
        cached = images * max(student, decoding, reading) + made * max(teacher, decoding)
        source = "cached" if reason is None and cached < live else "live"
        choices[phase.name] = Choice(source, live, cached, reason)
    return choices


def decode_seconds(settings: Config) -> float:
    """Of an image, by all workers of a rank."""
    rate = settings.machine.decode_images_per_second * max(settings.data.workers, 1)
    return 0.0 if settings.data.in_memory else 1 / rate


def phase_steps(phase: Phase, timetable: Timetable) -> int:
    return (timetable.total_steps if phase.end is None else phase.end) - phase.start
