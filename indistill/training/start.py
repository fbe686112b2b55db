"""Start a run: its engine, the checks of its devices, and its directory."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin

from indistill import config
from indistill.config import Config, UserError, redacted
from indistill.config.files import read_bytes, replace_text
from indistill.config.limits import MAX_CONFIG_BYTES
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir, damaged_config, has_begun, refuse_foreign
from indistill.data import class_names
from indistill.distributed import deepspeed_config, environment, preemption
from indistill.distributed.accelerator import create_engine
from indistill.distributed.agree import agree, setup
from indistill.distributed.engine import Engine
from indistill.distributed.zero import ZeRO


def start_engine(settings: Config) -> Engine:
    """Start the engine that trains on all processes of the launcher.

    Raises UserError for an environment, devices or ranks that contradict the config.
    """
    return _start(settings, training=True)


def start_accelerator(settings: Config) -> Accelerator:
    """Start Accelerate for a command that does not train, never under DeepSpeed; raises as `start_engine`."""
    return _start(settings, training=False).accelerator


def _start(settings: Config, training: bool) -> Engine:
    ranks = Ranks.from_environment()
    environment.check(settings)
    check_devices(settings, ranks.world_size)
    # A run has few shapes, and enough steps to benefit from the fastest algorithm for each.
    torch.backends.cudnn.benchmark = True
    if settings.compile:
        # Each network has a graph for each phase; with more than the usual 8 in all, the others would not be
        # compiled.
        torch._dynamo.config.recompile_limit = 64
    zero = deepspeed_config.zero_config(settings, ranks) if training else None
    started = _engine(settings, zero, ranks)
    accelerator = started.accelerator
    if accelerator.num_processes != ranks.world_size:
        raise UserError(
            f"the launcher started {ranks.world_size} processes, Accelerate sees "
            f"{accelerator.num_processes}: unset ACCELERATE_* variables of another job, or check the "
            "accelerate config"
        )
    agree(setup(settings))
    if accelerator.is_main_process:  # accelerator.print would print on every node
        _print_start(settings, started, training)
    return started


def _engine(settings: Config, zero: dict[str, Any] | None, ranks: Ranks) -> Engine:
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    dynamo = TorchDynamoPlugin(backend="inductor", dynamic=False) if settings.compile else None
    with environment.without_accumulation():
        return create_engine(
            zero,
            settings.mixed_precision,
            ranks=ranks,
            timeout_minutes=settings.collective_timeout_minutes,
            handlers=[ddp],
            gradient_accumulation_steps=settings.grad_accumulation,
            dynamo_plugin=dynamo,
        )


def _print_start(settings: Config, started: Engine, training: bool) -> None:
    device, world = started.accelerator.device.type, started.accelerator.num_processes
    processes = "1 process" if world == 1 else f"{world} processes"
    zero_stage = f", {started.describe()}" if isinstance(started, ZeRO) else ""
    run_dir = f", run directory {settings.run_dir}" if training else ""
    precision = settings.mixed_precision
    print(f"indistill: {processes} on {device}{zero_stage}, precision {precision}{run_dir}", flush=True)


def check_devices(settings: Config, world: int) -> None:
    """Raise UserError for a setting that needs a GPU if this node has none."""
    if torch.cuda.is_available():
        return
    precisions = {f"{role}.precision": one.precision for role, one in settings.teacher_sections.items()}
    for key, precision in {"mixed_precision": settings.mixed_precision, **precisions}.items():
        if precision == "fp16":
            raise UserError(f"{key}: fp16 needs a GPU: use bf16 or no")
    if settings.sync_batchnorm and world > 1:
        raise UserError("sync_batchnorm needs GPUs: set it to false")


def open_run_dir(settings: Config) -> RunDir:
    """Create the run directory, or reuse it if it holds this run. Raises UserError if it cannot be used."""
    files = RunDir.of(settings)
    refuse_foreign(files.path)
    names = class_names.check(settings.data)  # before the folder is created
    try:
        preemption.lock(files.path)
        if not has_begun(settings):  # files that are there are from a config that was corrected since
            files.pruning_plan.unlink(missing_ok=True)
            if files.config.exists():  # else the class names belong to something else: keep them
                files.classes.unlink(missing_ok=True)
        files.checkpoints.mkdir(parents=True, exist_ok=True)
        text = redacted(config.dump(settings))
        if not _says(files.config, text):
            if damage := damaged_config(files):
                print(f"indistill: {damage}: it is written again", file=sys.stderr, flush=True)
            replace_text(files.config, text)
        class_names.keep(names, files.path)
    except OSError as error:
        raise UserError(
            f"run_dir {files.path}: cannot be written ({error.strerror}): choose another"
        ) from None
    return files


def _says(path: Path, text: str) -> bool:
    """Whether a file has this text; a FIFO or a device, which may have no end, does not."""
    with contextlib.suppress(OSError):
        return read_bytes(path, MAX_CONFIG_BYTES) == text.encode()
    return False
