"""Estimate the memory of a rank: parameters, gradients, optimizer state and activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from indistill import config
from indistill.config import Config
from indistill.models.network import Network
from indistill.targets.cost import Work

ENGINES = ("ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3")
FLOAT = 4  # bytes: parameters, gradients and optimizer state are float32 in any precision
_BUCKET_ELEMENTS = 50_000_000  # default of engine.reduce_bucket_size and the other bucket sizes


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of optimizer state after every parameter has been stepped.

    Takes such a step, with gradients of zero: the weights may change.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    values = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return sum(value.nbytes for value in values if value.dim())


def memory(
    settings: Config,
    student: nn.Module,
    *,
    teachers: Mapping[str, Network],
    state: int,
    works: Sequence[Work],
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, int]:
    """Return the bytes on a rank's device at the end of a forward pass, by purpose.

    `works` are those of all phases; the largest decides. `state` is the size of the whole optimizer state.
    """
    stage = ENGINES.index(engine)
    parameters = FLOAT * sum(parameter.numel() for parameter in student.parameters())
    trained = FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)

    def share(size: int, from_stage: int) -> int:
        return math.ceil(size / world) if stage >= from_stage else size

    pixels, side = math.prod(config.input_size(settings)), settings.data.full_size
    of_teachers = sum(math.prod(teacher.input_size(side)) for teacher in teachers.values())
    sizes = {
        "weights": share(parameters, 3),
        "gradients": share(trained, 2),
        "optimizer state": share(state, 1),
        **_activations(works, micro_batch),
        "images": micro_batch * (pixels + FLOAT * (pixels + of_teachers)),  # uint8, and normalised copies
    }
    for name, teacher in teachers.items():
        sizes[f"teacher {name}".rstrip()] = _teacher_bytes(settings.by_teacher[name], teacher, world)
    if settings.ema:
        sizes["moving average"] = parameters
    if stage:
        sizes["ZeRO's own part of the weights"] = share(trained, 1)
        sizes["ZeRO's buckets"] = _zero_buckets(settings, stage, trained)
        sizes["whole copy for checkpoints"] = parameters
    return sizes


def _teacher_bytes(settings: Config, teacher: nn.Module, world: int) -> int:
    size = sum(value.nbytes for value in [*teacher.parameters(), *teacher.buffers()])
    sharded = settings.teacher is not None and settings.teacher.shard
    return math.ceil(size / world) if sharded else size


def _activations(works: Sequence[Work], micro_batch: int) -> dict[str, int]:
    """Return the bytes kept for the backward pass and, with grad_checkpointing, what this computes again."""
    sizes = {"activations": max(micro_batch * work.activation_bytes + work.batch_bytes for work in works)}
    if again := max(work.recomputed_bytes for work in works):
        sizes["largest block, computed again"] = micro_batch * again
    return sizes


def _zero_buckets(settings: Config, stage: int, trained: int) -> int:
    """Return the bytes of DeepSpeed's buffers for reducing gradients and fetching weights."""
    section = settings.engine
    if not isinstance(section, config.DeepSpeed):
        section = config.DeepSpeed(name="deepspeed")
    fetched = section.prefetch_bucket_size if stage == 3 else section.allgather_bucket_size
    elements = [section.reduce_bucket_size or _BUCKET_ELEMENTS, fetched or _BUCKET_ELEMENTS]
    return sum(min(FLOAT * count, trained) for count in elements)
