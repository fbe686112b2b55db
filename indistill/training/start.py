"""Start a run: the accelerator, the checks of its devices, and its directory."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin

from indistill import config
from indistill.config import Config, UserError
from indistill.config.run_dir import RunDir, has_begun
from indistill.data import class_names
from indistill.distributed import deepspeed_config, engine, environment
from indistill.distributed.agree import agree, setup
from indistill.losses.objective import reads


def start_accelerator(settings: Config, training: bool = True) -> Accelerator:
    """Accelerate, on what the launcher gave us. Raises UserError if that is not what runs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    environment.check(settings)
    check_devices(settings, world)
    torch.backends.cudnn.benchmark = (
        True  # a run has few shapes, and steps without end to use what is found for them
    )
    if settings.compile:
        # Each network has a graph for each phase; with more than the usual 8 in all, the others would not be compiled.
        torch._dynamo.config.recompile_limit = 64
    zero = deepspeed_config.zero_config(settings, world) if training else None
    # The warm-up leaves deep layers without gradient, changing from phase to phase; a loss on the embedding, the head.
    partly_unused = settings.warmup is not None or not reads(settings.kd.losses, "logits")
    with environment.without_accumulation():
        accelerator = engine.start(
            zero,
            settings.mixed_precision,
            world,
            settings.collective_timeout_minutes,
            [
                DistributedDataParallelKwargs(
                    find_unused_parameters=partly_unused, gradient_as_bucket_view=True
                )
            ],
            gradient_accumulation_steps=settings.grad_accumulation,
            dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=False) if settings.compile else None,
        )
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes, Accelerate sees {accelerator.num_processes}: unset ACCELERATE_* "
            "variables of another job, or check the accelerate config"
        )
    agree(setup(settings))
    zero_stage = f", ZeRO stage {engine.stage(accelerator)}" * (zero is not None)
    if accelerator.is_main_process:  # accelerator.print would say it on every node
        where = f", run directory {settings.run_dir}" * training
        print(
            f"indistill: {world} process{'es' * (world > 1)} on {accelerator.device.type}{zero_stage}, precision "
            f"{settings.mixed_precision}{where}",
            flush=True,
        )
    return accelerator


def check_devices(settings: Config, world: int) -> None:
    """Raise UserError for what would need a GPU that is not here."""
    if torch.cuda.is_available():
        return
    for key, section in (("mixed_precision", settings), ("teacher.precision", settings.teacher)):
        if section and getattr(section, key.removeprefix("teacher.")) == "fp16":
            raise UserError(f"{key}: fp16 needs a GPU: use bf16 or no")
    if settings.sync_batchnorm and world > 1:
        raise UserError("sync_batchnorm needs GPUs: set it to false")


def open_run_dir(settings: Config) -> RunDir:
    """Create the run directory or find it holding this very run. Raises UserError if it cannot be used."""
    files = RunDir.of(settings)
    try:
        if not has_begun(settings):  # what is there is of a config that was mended since
            files.pruning_plan.unlink(missing_ok=True)
            if files.config.exists():  # else the names are of something else, and not ours to delete
                files.classes.unlink(missing_ok=True)
        names = class_names.check(settings.data)
        files.checkpoints.mkdir(parents=True, exist_ok=True)
        files.config.write_text(config.dump(settings))
        class_names.keep(names, files.path)
    except OSError as error:
        raise UserError(
            f"run_dir {files.path}: cannot be written ({error.strerror}): choose another"
        ) from None
    return files
