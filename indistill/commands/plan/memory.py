"""Estimate the bytes of parameters, gradients and optimizer states per GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from indistill import config
from indistill.config import Config
from indistill.targets.cost import Work

ENGINES = ("ddp", "ZeRO 1", "ZeRO 2", "ZeRO 3")
FLOAT = 4  # bytes: parameters, gradients and the optimizer's state are float32 in any precision


# --- what is counted -------------------------------------------------------------------------------------------------
def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer keeps once every parameter has been stepped, found by such a step: weights may change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    values = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    ]
    return sum(value.nbytes for value in values if value.dim())


# --- memory ----------------------------------------------------------------------------------------------------------
def memory(
    settings: Config,
    student: nn.Module,
    teacher: nn.Module | None,
    state: int,
    works: Sequence[Work],
    engine: str,
    world: int,
    micro_batch: int,
) -> dict[str, int]:
    """Bytes on a rank's device at the end of a forward pass, by purpose, in the phase that keeps most."""
    stage = ENGINES.index(engine)
    parameters = FLOAT * sum(parameter.numel() for parameter in student.parameters())
    trained = FLOAT * sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)

    def share(size: int, from_stage: int) -> int:
        return math.ceil(size / world) if stage >= from_stage else size

    held = {
        "weights": share(parameters, 3),
        "gradients": share(trained, 2),
        "optimizer state": share(state, 1),
        "activations": max(micro_batch * work.activation_bytes + work.batch_bytes for work in works),
        # uint8, and normalised for each network
        "images": micro_batch
        * math.prod(config.input_size(settings))
        * (1 + FLOAT * (1 + (teacher is not None))),
    }
    if teacher is not None:
        whole = sum(value.nbytes for value in [*teacher.parameters(), *teacher.buffers()])
        held["teacher"] = math.ceil(whole / world) if settings.teacher and settings.teacher.shard else whole
    if settings.ema:
        held["moving average"] = parameters
    if stage:
        section = (
            settings.engine
            if isinstance(settings.engine, config.DeepSpeed)
            else config.DeepSpeed(name="deepspeed")
        )
        fetched = section.prefetch_bucket_size if stage == 3 else section.allgather_bucket_size
        buckets = [
            min(FLOAT * (size or 50_000_000), trained) for size in (section.reduce_bucket_size, fetched)
        ]
        held["ZeRO's own part of the weights"] = share(trained, 1)
        held["ZeRO's buckets"] = sum(buckets)
        held["whole copy for checkpoints"] = parameters
    return held
