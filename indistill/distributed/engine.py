"""How the processes share the training: DDP, or DeepSpeed's ZeRO, both through Accelerate.

Under ZeRO the student computes what it computes under DDP: parameters, gradients and the optimizer's state are float32,
mixed precision is the same autocast, and a parameter that a phase does not use stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import math
import os
import platform
import re
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    convert_outputs_to_fp32,
)
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim import Optimizer

from indistill.config import UserError
from indistill.curriculum import Phase

Student = TypeVar("Student", bound=nn.Module)
_PERSISTENCE = "stage3_param_persistence_threshold"  # elements


# --- how it runs -----------------------------------------------------------------------------------------------------
def start(
    zero: dict[str, Any] | None,
    precision: str,
    world: int,
    timeout_minutes: float,
    handlers: list[KwargsHandler],
    **arguments: Any,
) -> Accelerator:
    """Accelerate under DDP or, with a configuration, under ZeRO; `arguments` are those of Accelerator.

    A collective fails after `timeout_minutes`; it is the first call's in a process, whose process group stays.
    """
    # Of an earlier run of this process, which may have had another engine or precision. The process group stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    on_cpu = not torch.cuda.is_available()
    # The microsecond, because Accelerate drops what equals its default, and gloo's default is another.
    timeout = timedelta(minutes=timeout_minutes, microseconds=1)
    find_interface(world)
    if zero is None:
        if on_cpu and world > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else torchrun on CPUs is taken for single processes
        handlers = [*handlers, InitProcessGroupKwargs(timeout=timeout)]
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=handlers, **arguments)
        if accelerator.scaler is None:
            # In any precision, as in fp16, it is what skips a step whose gradients are not finite; ZeRO does so itself.
            # The scale stays 1: both factors, which may not be 1 themselves, leave it so in float32.
            growth, backoff = math.nextafter(1.0, 2.0), math.nextafter(1.0, 0.0)
            accelerator.scaler = torch.amp.GradScaler(accelerator.device.type, 1.0, growth, backoff)
        return accelerator
    os.environ["ACCELERATE_USE_CPU"] = "false"  # Accelerate takes it for a word against DeepSpeed
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm  # noqa: F401

        # For gloo alone; else DeepSpeed compiles collectives of its own for minutes. (As an attribute of the package,
        # the name deepspeed.comm.torch is torch itself.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # checked by zero_config; Accelerate would refuse any
    handlers = [*handlers, InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)]
    plugin = DeepSpeedPlugin(hf_ds_config=zero, zero3_init_flag=False)
    accelerator = Accelerator(
        mixed_precision="no", kwargs_handlers=handlers, deepspeed_plugin=plugin, **arguments
    )
    # A later run of this process asks anew: it may be another engine's.
    if asked is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = asked
    if precision != "no":  # where DeepSpeed runs, Accelerate leaves autocast to it
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, dtype)
    return accelerator


def find_interface(world: int) -> None:
    """Have gloo use the network between the nodes, where there are several."""
    if world > int(os.environ.get("LOCAL_WORLD_SIZE", world)) and (interface := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface() -> str | None:
    """The network interface that leads to the first node; gloo takes that of the host's name, often the loopback."""
    try:
        family, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # chooses a way, and sends nothing
            ours = probe.getsockname()[0]
    except OSError:
        return None  # for the rendezvous to tell
    names = [name for name, own in psutil.net_if_addrs().items() if any(a.address == ours for a in own)]
    return names[0] if names and not ipaddress.ip_address(ours).is_loopback else None


def device_name(device: torch.device) -> str:
    """What a person calls it: the GPU's product name, or that of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text()):
            return f"CPU: {found[1]}"
    return f"CPU: {platform.processor() or platform.machine()}"


def stage(accelerator: Accelerator) -> int:
    """Of ZeRO; 0 under DDP."""
    plugin = accelerator.deepspeed_plugin
    return plugin.deepspeed_config["zero_optimization"]["stage"] if plugin else 0


def describe(accelerator: Accelerator) -> str:
    """What a checkpoint's optimizer state is bound to."""
    return f"ZeRO stage {stage(accelerator)}" if stage(accelerator) else "ddp"


def prepare(
    accelerator: Accelerator, precision: str, student: nn.Module, optimizer: Optimizer
) -> tuple[nn.Module, Optimizer, Callable[[], Tensor]]:
    """The student wrapped for training, its optimizer, and what tells on the device if the last step was skipped."""
    if not stage(accelerator):
        return *accelerator.prepare(student, optimizer), _skipped(accelerator, optimizer)
    student.to(
        memory_format=torch.contiguous_format
    )  # DeepSpeed flattens parameters, and refuses channels_last
    if precision != "no":
        student.forward = convert_outputs_to_fp32(
            accelerator.autocast()(student.forward)
        )  # as Accelerate does for DDP
    if stage(accelerator) == 3:
        # A parameter is gathered for the forward pass of the module that holds it. The outermost modules are run by
        # parts, never as such: what they hold themselves (positions, class tokens) has to stay whole.
        outermost = [
            p.numel() for m in student.modules() if any(m.children()) for p in m.parameters(recurse=False)
        ]
        section, key = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"], _PERSISTENCE
        section[key] = max([section.get(key, 100_000), *outermost])
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    if precision == "fp16":
        _scale_losses(optimizer.optimizer)
    return wrapped, optimizer, lambda: torch.tensor(optimizer.step_was_skipped, device=accelerator.device)


def stale_gradients(optimizer: Optimizer) -> Tensor | None:
    """The gradients that ZeRO-3 keeps of parameters that a phase no longer uses, or None.

    It would count them when it clips: they have to be cleared when the phase changes.
    """
    return getattr(getattr(optimizer, "optimizer", None), "grad_partitions_flat_buffer", None)


def _skipped(accelerator: Accelerator, optimizer: Optimizer) -> Callable[[], Tensor]:
    """A bool [] on the device: whether the optimizer left out its last step.

    A fused optimizer is told by the scaler what it found, and skips by itself, so that nobody waits for the device. For
    the others the scaler waits, and Accelerate knows.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return lambda: torch.tensor(accelerator._optimizers[-1].step_was_skipped, device=accelerator.device)
    found = torch.zeros((), dtype=torch.bool, device=accelerator.device)

    def keep(optimizer: Optimizer, *_: Any) -> None:
        found.copy_(optimizer.found_inf)  # the scaler gives it for the time of the step

    optimizer.register_step_pre_hook(keep)
    return lambda: found


def unused(
    accelerator: Accelerator, student: nn.Module, phases: Sequence[Phase], loss_of: Callable[[Phase], Tensor]
) -> dict[tuple[int, ...], set[Tensor]]:
    """What PhaseOptim must leave alone under ZeRO: for the pairs of each phase, parameters without a gradient.

    These are missing from the graph of the phase's loss, which `loss_of` gives on any images.
    """
    if not stage(accelerator):
        return {}
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    missing = {}
    for phase in phases:
        nodes, seen = [loss_of(phase).grad_fn], set()
        used = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            used.add(getattr(node, "variable", None))  # a leaf's
            nodes += [following for following, _ in node.next_functions]
        missing[phase.pairs] = set(student.parameters()) - used
    for buffer, before in buffers:
        buffer.copy_(before)  # batch norm has seen the images
    return missing


def _scale_losses(optimizer: Any) -> None:
    """Give a ZeRO optimizer the dynamic loss scale that DeepSpeed has for parameters in fp16 only.

    It then scales the loss, unscales before clipping, skips steps that overflow on any rank, and is in checkpoints.
    Numbers of torch.amp.GradScaler.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    optimizer.loss_scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=2000,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,  # max_bad_steps says when to stop
    )
    optimizer.dynamic_loss_scale = True


def whole(accelerator: Accelerator, student: Student) -> Callable[[], Student]:
    """What gives the student with all its weights, to be called on all ranks. Call this before `prepare`.

    Under ZeRO that is a copy, with the weights as of the latest call: in training they lie in pieces (stage 3), or in
    larger buffers, which cannot be saved.
    """
    if not stage(accelerator):
        return lambda: student
    spare = copy.deepcopy(student)

    def gathered() -> nn.Module:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(student.parameters())):
            spare.load_state_dict(student.state_dict())
        return spare

    return gathered


# --- what a checkpoint holds of it ------------------------------------------------------------------------------------
def optimizer_part(accelerator: Accelerator) -> dict[str, Any]:
    """This rank's part of the optimizer's state, not copied: tensors and plain values, none where rank 0 has it all.

    Under ZeRO the parts of all ranks lie end to end as `repartition` says, for each of its groups of parameters.
    """
    optimizer = accelerator._optimizers[0]
    if not stage(accelerator):
        if not accelerator.is_main_process:
            return {}
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
        return {"optimizer": optimizer.state_dict(), "scaler": scaler}
    zero = optimizer.optimizer
    scaler = {name: value for name, value in vars(zero.loss_scaler).items() if isinstance(value, int | float)}
    states = [dict(zero.optimizer.state.get(flat, {})) for _, flat in _partitions(accelerator)]
    return {"optimizer": states, "scaler": scaler, "sizes": [sizes for sizes, _ in _partitions(accelerator)]}


def restore(accelerator: Accelerator, weights: dict[str, Tensor], parts: Sequence[dict[str, Any]]) -> None:
    """Load the student's weights and the parts of its optimizer's state, in place, whatever the number of ranks was."""
    optimizer = accelerator._optimizers[0]
    student = unwrap_model(
        accelerator._models[0]
    )  # timm's: Accelerate's imports DeepSpeed, which warns of no GPU
    if not stage(accelerator):
        student.load_state_dict(weights)
        optimizer.load_state_dict(parts[0]["optimizer"])
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(parts[0]["scaler"])
        return
    from deepspeed.runtime.zero import GatheredParameters

    zero, partitions = optimizer.optimizer, _partitions(accelerator)
    if parts[0]["sizes"] != [sizes for sizes, _ in partitions]:
        raise UserError(
            "ZeRO groups the parameters otherwise than in the checkpoint: keep DeepSpeed's sub_group_size"
        )
    with GatheredParameters(list(student.parameters()), modifier_rank=0):
        student.load_state_dict(weights)
    zero.refresh_fp32_params()  # where they are copies, of what was loaded
    vars(zero.loss_scaler).update(parts[0]["scaler"])
    each, rank, world = stage(accelerator) == 3, accelerator.process_index, accelerator.num_processes
    for i, (sizes, flat) in enumerate(partitions):
        for name, value in parts[0]["optimizer"][i].items():
            if torch.is_tensor(value) and value.dim():
                value = repartition([part["optimizer"][i][name] for part in parts], sizes, each, rank, world)
                value = value.to(flat.device)
            zero.optimizer.state[flat][name] = value


def _partitions(accelerator: Accelerator) -> list[tuple[list[int], Tensor]]:
    """For each group of parameters that ZeRO lays end to end: their sizes, and this rank's part of them."""
    zero = accelerator._optimizers[0].optimizer
    if stage(accelerator) == 3:
        sizes = [[parameter.ds_numel for parameter in group] for group in zero.fp16_groups]
        return list(zip(sizes, zero.fp32_partitioned_groups_flat))
    sizes = [[parameter.numel() for parameter in group] for group in zero.bit16_groups]
    return list(zip(sizes, zero.single_partition_of_fp32_groups))


def repartition(parts: Sequence[Tensor], sizes: Sequence[int], each: bool, rank: int, world: int) -> Tensor:
    """A rank's part [n] of what lies in `parts` for another number of ranks, in the order of the ranks.

    ZeRO lays parameters of these `sizes` end to end. In stages 1 and 2 it pads the whole to a multiple of 2 * world and
    cuts it into `world` parts; in stage 3 it does so with `each` parameter, padded to a multiple of world.
    """
    if not each:
        total = sum(sizes)
        flat = torch.cat(list(parts))[:total]
        return torch.nn.functional.pad(flat, (0, -total % (2 * world))).chunk(world)[rank]
    cut = [part.split([math.ceil(size / len(parts)) for size in sizes]) for part in parts]
    wholes = [torch.cat(pieces)[:size] for pieces, size in zip(zip(*cut), sizes)]
    padded = [torch.nn.functional.pad(whole, (0, -size % world)) for whole, size in zip(wholes, sizes)]
    return torch.cat([whole.chunk(world)[rank] for whole in padded])


# --- agreeing --------------------------------------------------------------------------------------------------------
def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Run on rank 0 alone and give every rank its result, or its UserError: none is left waiting for the others."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message is not None:
        raise UserError(message)
    return result
