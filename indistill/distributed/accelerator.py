"""Starts Accelerate, with DDP or DeepSpeed, on the network that leads to the other nodes."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, KwargsHandler

from indistill.config.ranks import Ranks
from indistill.distributed.ddp import DDP
from indistill.distributed.engine import Engine
from indistill.distributed.zero import ZeRO


def create_engine(
    zero: dict[str, Any] | None,
    precision: str,
    *,
    ranks: Ranks,
    timeout_minutes: float,
    handlers: Sequence[KwargsHandler] = (),
    **arguments: Any,
) -> Engine:
    """Start Accelerate under DDP, or under ZeRO with the DeepSpeed configuration `zero`.

    `handlers` and `arguments` are passed to Accelerator. A collective fails after `timeout_minutes`; those of
    the first call in a process count, because its process group stays.
    """
    # Forget an earlier run of this process, which may have had another engine or precision. The process group
    # stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    use_deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # The microsecond, because Accelerate drops what equals its default, and gloo's default is another.
    timeout = timedelta(minutes=timeout_minutes, microseconds=1)
    find_interface(ranks)
    if zero is None:
        if not torch.cuda.is_available() and ranks.world_size > 1:
            # Else Accelerate takes torchrun on CPUs for single processes.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        groups = InitProcessGroupKwargs(timeout=timeout)
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[*handlers, groups], **arguments)
        if accelerator.scaler is None:
            accelerator.scaler = _constant_scaler(accelerator.device)
        return DDP(accelerator, precision)
    accelerator = _deepspeed_accelerator(zero, timeout, handlers, arguments)
    if use_deepspeed is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = use_deepspeed
    if precision != "no":  # where DeepSpeed runs, Accelerate leaves autocast to it
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, dtype)
    return ZeRO(accelerator, precision)


def _constant_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler that skips steps whose gradients are not finite, as in fp16, at a scale of 1.

    Its factors must not be 1: these leave the scale at 1 in float32. ZeRO skips such steps itself.
    """
    growth = math.nextafter(1.0, 2.0)
    backoff = math.nextafter(1.0, 0.0)
    return torch.amp.GradScaler(device.type, 1.0, growth, backoff)


def _deepspeed_accelerator(
    zero: dict[str, Any], timeout: timedelta, handlers: Sequence[KwargsHandler], arguments: dict[str, Any]
) -> Accelerator:
    """Start Accelerate under ZeRO, and remove its variable again: a later run may have another engine."""
    on_cpu = not torch.cuda.is_available()
    os.environ["ACCELERATE_USE_CPU"] = "false"  # if true, Accelerate would not use DeepSpeed
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm  # noqa: F401

        # With gloo alone; else DeepSpeed compiles its own collectives for minutes. (As an attribute of the
        # package, the name deepspeed.comm.torch is torch itself.)
        backend: Any = sys.modules["deepspeed.comm.torch"]
        backend.build_shm_op = lambda: None
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # checked by zero_config; Accelerate would refuse any
    groups = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[*handlers, groups],
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero, zero3_init_flag=False),
        **arguments,
    )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return accelerator


def find_interface(ranks: Ranks) -> None:
    """Make gloo use the network between the nodes, if there are several."""
    if ranks.world_size > ranks.local_world_size and (interface := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface() -> str | None:
    """Return the network interface that leads to the first node.

    By default gloo uses the one of the host name, often the loopback.
    """
    try:
        family, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # chooses a route, and sends nothing
            own_address = probe.getsockname()[0]
    except OSError:
        return None  # the rendezvous reports it
    if ipaddress.ip_address(own_address).is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own_address for entry in addresses):
            return name
    return None
