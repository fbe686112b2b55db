"""Estimate the bytes and seconds of a step: communication, computation and decoding."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from indistill import config
from indistill.commands.plan.memory import FLOAT
from indistill.config import Config
from indistill.curriculum import Phase
from indistill.losses.gather import gathers
from indistill.models.network import Network
from indistill.models.trainable import Trainable
from indistill.targets.cost import Work, decode_seconds, record_bytes

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once
_BACKWARD = 2 / 3  # share of the student's operations


# --- bytes --------------------------------------------------------------------------------------------------
def all_reduce_bytes(size: float, world: int) -> float:
    """Return the bytes each rank sends in a ring all-reduce of `size` bytes (reduce-scatter, all-gather)."""
    return 2 * (world - 1) / world * size


def all_gather_bytes(size: float, world: int) -> float:
    """Return the bytes each rank sends in a ring all-gather, or reduce-scatter, of `size` bytes in total."""
    return (world - 1) / world * size


def traffic(
    settings: Config,
    student: Trainable,
    *,
    teachers: Mapping[str, Network],
    phase: Phase,
    work: Work,
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, float]:
    """Return the bytes a rank sends per step, by purpose; in a broadcast each rank sends the data once."""
    micro_batches = settings.grad_accumulation
    sent = _engine_bytes(settings, student, work=work, engine=engine, world=world)
    if not phase.pairs:
        sent["samples of all ranks"] = micro_batches * _gathered(
            settings.kd.relational_scope, work, world, world * micro_batch
        )
    if settings.sync_batchnorm:
        sent["batch norm over all ranks"] = micro_batches * _sync_batchnorm_bytes(student, world)
    for name, teacher in teachers.items():
        section = settings.by_teacher[name].teacher
        if section is not None and section.shard:
            weights = sum(parameter.nbytes for parameter in teacher.parameters())
            sent[f"teacher {name}".rstrip()] = micro_batches * all_gather_bytes(weights, world)
    return {purpose: size for purpose, size in sent.items() if size}


def _engine_bytes(
    settings: Config, student: Trainable, *, work: Work, engine: str, world: int
) -> dict[str, float]:
    """Return the bytes a rank sends for weights and gradients, by purpose."""
    if engine == "ddp":
        buffers = sum(buffer.nbytes for buffer in student.buffers())
        return {
            "gradients": all_reduce_bytes(FLOAT * work.trained_parameters, world),
            "batch norm statistics": all_gather_bytes(buffers, world),
        }
    # ZeRO sends all gradients in every phase, those of zero, too.
    weights = FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    if engine == "ZeRO 3":  # weights are gathered for forward and backward, gradients scattered
        return {"weights and gradients": 3 * settings.grad_accumulation * all_gather_bytes(weights, world)}
    # DeepSpeed all-reduces whole buckets and keeps its part; stage 2 after every micro-batch.
    reductions = settings.grad_accumulation if engine == "ZeRO 2" else 1
    return {
        "gradients": reductions * all_reduce_bytes(weights, world),
        "weights": all_gather_bytes(weights, world),
    }


def _sync_batchnorm_bytes(student: nn.Module, world: int) -> float:
    """Return the bytes a rank sends for synchronised batch norm, forward and backward of a micro-batch."""
    channels = sum(
        module.num_features
        for module in student.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    forward = all_gather_bytes(world * (2 * channels + 1) * FLOAT, world)
    return forward + all_reduce_bytes(2 * channels * FLOAT, world)


def _gathered(scope: str, work: Work, world: int, batch: int) -> float:
    """Bytes a rank sends for losses that compare samples (losses/gather.py), per micro-batch of all ranks."""
    sent = 0.0
    for rows in work.compared:
        if gathers(scope, batch, rows.widest, rows.related):
            sent += all_gather_bytes(batch * rows.row_bytes, world)
            sent += all_reduce_bytes(batch * rows.gradient_bytes, world)
    return sent


# --- seconds ------------------------------------------------------------------------------------------------
def communication_seconds(machine: config.Machine, sent: float, buckets: int, devices: int) -> float:
    """Return the seconds of ring all-reduces over all devices, in which each device sends `sent` bytes.

    The slowest link sets the bandwidth, and every hop of each of the `buckets` adds the latency.
    """
    if devices == 1:
        return 0.0
    bandwidth = machine.intra_node_bytes_per_second
    if devices > machine.devices_per_node:
        bandwidth = min(bandwidth, machine.inter_node_bytes_per_second)
    hops = 2 * (devices - 1) * buckets
    return sent / bandwidth + hops * machine.latency_seconds


def step_seconds(
    settings: Config, work: Work, *, source: str, batch: float, communication: float
) -> tuple[float, str]:
    """Return the seconds of one step on `batch` images per rank, and what bounds it.

    `source` of the targets is live or cached; `communication` is given in seconds, part of which the backward
    pass hides.
    """
    machine = settings.machine
    student = work.student_flops / machine.flops_per_second
    teacher = 0.0 if source == "cached" else work.teacher_flops / machine.flops_per_second
    # Communication begins in the backward pass of the last micro-batch.
    backward = _BACKWARD * student * batch / settings.grad_accumulation
    exposed = communication - min(machine.overlap * communication, backward)
    size = sum(record_bytes(name, shape, settings.targets) for name, shape in work.targets.items())
    reading = size * machine.devices_per_node / machine.read_bytes_per_second if source == "cached" else 0.0
    seconds = {
        "device": batch * (student + teacher) + exposed,
        "decoding": batch * decode_seconds(settings),
        "reading targets": batch * reading,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return seconds[bound], bound
