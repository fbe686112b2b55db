"""Estimate the bytes and seconds of a step's communication."""

from __future__ import annotations

from torch import nn

from indistill import config
from indistill.commands.plan.memory import FLOAT
from indistill.config import Config
from indistill.curriculum import Phase
from indistill.losses.gather import gathers
from indistill.losses.objective import reads
from indistill.models.heads import Heads
from indistill.models.network import Network
from indistill.targets.cost import Work, decode_seconds, record_bytes

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once
_BACKWARD = 2 / 3  # of the student's operations


# --- the network -----------------------------------------------------------------------------------------------------
def all_reduce_bytes(size: float, world: int) -> float:
    """That each rank of a ring sends to have `size` bytes summed everywhere: a scatter of sums, then a gather."""
    return 2 * (world - 1) / world * size


def all_gather_bytes(size: float, world: int) -> float:
    """That each rank of a ring sends until all have the `size` bytes that they hold parts of; or scatter sums of."""
    return (world - 1) / world * size


def traffic(
    settings: Config,
    student: Network | Heads,
    teacher: Network | None,
    phase: Phase,
    work: Work,
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, float]:
    """Bytes that a rank sends in a step, by purpose; a broadcast counts as each rank passing it on to the next."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    weights = FLOAT * sum(parameter.numel() for parameter in parameters)
    micro_batches, sent = settings.grad_accumulation, {}
    if engine == "ddp":
        # All of them in every phase: those that have none count as zero.
        sent["gradients"] = all_reduce_bytes(weights, world)
        sent["batch norm statistics"] = all_gather_bytes(
            sum(buffer.nbytes for buffer in student.buffers()), world
        )
        if settings.warmup or not reads(settings.kd.losses, "logits"):
            sent["which parameters are used"] = all_reduce_bytes(4 * len(parameters), world)
    elif engine == "ZeRO 3":  # gathered for forward and backward, gradients scattered
        sent["weights and gradients"] = 3 * micro_batches * all_gather_bytes(weights, world)
    else:  # DeepSpeed sums whole buckets and keeps its part; stage 2 after every micro-batch
        sums = micro_batches if engine == "ZeRO 2" else 1
        sent["gradients"] = sums * all_reduce_bytes(weights, world)
        sent["weights"] = all_gather_bytes(weights, world)
    if not phase.pairs:
        sent["samples of all ranks"] = micro_batches * _gathered(
            settings.kd.relational_scope, work, world, world * micro_batch
        )
    if settings.sync_batchnorm:
        channels = sum(
            m.num_features for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        )
        each = all_gather_bytes(world * (2 * channels + 1) * FLOAT, world) + all_reduce_bytes(
            2 * channels * 4, world
        )
        sent["batch norm over all ranks"] = micro_batches * each
    if teacher is not None and settings.teacher.shard:
        sent["teacher"] = micro_batches * all_gather_bytes(sum(p.nbytes for p in teacher.parameters()), world)
    return {purpose: size for purpose, size in sent.items() if size}


def _gathered(scope: str, work: Work, world: int, batch: int) -> float:
    """Bytes a rank sends for losses that compare samples (losses/gather.py), per micro-batch of all ranks."""
    sent = 0.0
    for rows in work.compared:
        if gathers(scope, batch, rows.widest, rows.related):
            sent += all_gather_bytes(batch * rows.row_bytes, world)
            sent += all_reduce_bytes(batch * rows.gradient_bytes, world)
    return sent


def communication_seconds(machine: config.Machine, sent: float, buckets: int, devices: int) -> float:
    """A ring over all devices: its slowest link, and the latency of every hop of each bucket's all-reduce."""
    if devices == 1:
        return 0.0
    within = machine.intra_node_bytes_per_second
    across = min(within, machine.inter_node_bytes_per_second)
    hops = 2 * (devices - 1) * buckets
    return sent / (within if devices <= machine.devices_per_node else across) + hops * machine.latency_seconds


def step_seconds(
    settings: Config, work: Work, source: str, batch: float, communication: float
) -> tuple[float, str]:
    """Of a rank's step on `batch` images, and what sets its pace."""
    machine, of_image = settings.machine, work.student_flops
    student = of_image / machine.flops_per_second
    teacher = 0.0 if source == "cached" else work.teacher_flops / machine.flops_per_second
    backward = (
        _BACKWARD * student * batch / settings.grad_accumulation
    )  # of the last micro-batch, where sums begin
    exposed = communication - min(machine.overlap * communication, backward)
    size = sum(record_bytes(*target, settings.targets) for target in work.targets.items())
    reading = size * machine.devices_per_node / machine.read_bytes_per_second if source == "cached" else 0.0
    paces = {
        "device": batch * (student + teacher) + exposed,
        "decoding": batch * decode_seconds(settings),
        "reading targets": batch * reading,
    }
    bound = max(paces, key=paces.get)
    return paces[bound], bound
