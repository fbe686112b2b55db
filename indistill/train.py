"""One training run, from its first step or from any checkpoint, in one process or many.

`train` is the table of contents; what it calls is named for what it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from accelerate.utils import set_seed as seed_everything
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from indistill import config, data, evaluate, models, optim, prune, taps
from indistill.checkpoint import Checkpoints
from indistill.config import Config, UserError
from indistill.curriculum import Phase, Timetable
from indistill.data import IndexedTraining
from indistill.metrics import RunLog
from indistill.models import Network
from indistill.objective import needs_logits, objective
from indistill.stream import StreamedTraining
from indistill.targets import LiveTargets


def train(settings: Config, resume: str = "auto") -> dict[str, Any]:
    """Run to the end and return the content of `summary.json`. `resume`: auto, never, or a checkpoint's path.

    Raises UserError, before any step, for whatever in the config cannot work with this data and world size.
    """
    # --- what the run is made of -------------------------------------------------------------------------------------
    accelerator = start_accelerator(settings)
    rank, accumulation = accelerator.process_index, settings.grad_accumulation
    run_dir = on_main(accelerator, lambda: open_run_dir(settings))
    training, eval_set = open_data(accelerator, settings)
    student, teacher, plan = build_networks(accelerator, settings, run_dir)
    targets_of = LiveTargets(teacher, plan, input_size(settings))
    timetable = Timetable.of(settings, training.steps_per_epoch, pairs=len(plan.pairs))
    mix = make_mix(settings, accelerator)
    ema = settings.ema and ModelEmaV3(student, settings.ema.decay, use_warmup=settings.ema.warmup)
    optimizer = optim.create(student, settings.optimizer)
    phase_optim = optim.PhaseOptim(optimizer, settings, timetable)
    wrapped, optimizer = accelerator.prepare(student, optimizer)

    # --- where it stands ---------------------------------------------------------------------------------------------
    log = RunLog(accelerator, run_dir, settings.log.every_steps, timetable, settings.data.max_bad_fraction)
    identity = {"config": config.fingerprint(settings), "plan": plan.hash, "data": training.fingerprint}
    checkpoints = Checkpoints(accelerator, run_dir, settings.checkpoint, identity)
    first_step, scores = checkpoints.resume(resume, ema, log)
    log.open(first_step)
    start_trackers(accelerator, settings)
    batches = log.waiting(training.loader(first_step, timetable.total_steps, accelerator.device))
    evaluated = ema.module if ema else student

    # --- the run -----------------------------------------------------------------------------------------------------
    wrapped.train()
    for step in range(first_step, timetable.total_steps):
        phase = timetable.curriculum.at(step)
        lr = phase_optim.begin_step(step, phase)
        seed_everything(step_seed(settings.seed, step, rank))  # dropout and mixing, too, depend on the step alone

        for _ in range(accumulation):
            with accelerator.accumulate(wrapped):
                images, labels = mix(next(batches), phase)  # [B, 3, S, S]; [B], or [B, K] where mixed
                with accelerator.autocast():
                    targets = targets_of(images, phase)
                output = wrapped(images, upto=phase.upto, pairs=phase.pairs)
                loss, terms = objective(output, targets, labels, phase, settings.kd.losses)
                accelerator.backward(loss)
                if accelerator.sync_gradients and settings.clip_grad_norm:
                    accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            log.add({"loss": loss.detach(), **terms}, weight=1 / accumulation)
        if ema:
            ema.update(student, step + 1)

        done = step + 1
        logged, scores = log.end_step(done, phase, lr), {}
        if eval_set and timetable.evaluate_at(done):
            with log.off_the_clock():
                scores = evaluate.accuracy(accelerator, evaluated, eval_set, settings.evaluate.batch)
            log.write_scores(done, scores)
        if checkpoints.due(done, logged, scores) or done == timetable.total_steps:
            with log.off_the_clock():
                checkpoints.save(done, ema, scores, log)

    # --- the result --------------------------------------------------------------------------------------------------
    if settings.evaluate.retrieval:
        scores |= evaluate.retrieval(accelerator, evaluated, training.dataset, eval_set, settings.evaluate.batch)
    return finish(accelerator, settings, run_dir, evaluated, scores, log)


def start_accelerator(settings: Config) -> Accelerator:
    """Accelerate, on what the launcher gave us. Raises UserError if that is not what runs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():
        if settings.mixed_precision == "fp16":
            raise UserError("mixed_precision: fp16 needs a GPU: use bf16 or no")
        if world > 1:
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else torchrun on CPUs is taken for single processes
    # The warm-up leaves deep layers without gradient, changing from phase to phase; a loss on the embedding, the head.
    partly_unused = settings.warmup is not None or not needs_logits(settings.kd.losses)
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.grad_accumulation,
        log_with="tensorboard" if settings.log.tensorboard else None,
        project_dir=settings.run_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=partly_unused, gradient_as_bucket_view=True)
        ],
    )
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes, Accelerate sees {accelerator.num_processes}: unset ACCELERATE_* "
            "variables of another job, or check the accelerate config"
        )
    accelerator.print(
        f"indistill: {world} process{'es' * (world > 1)} on {accelerator.device.type}, precision "
        f"{settings.mixed_precision}, run directory {settings.run_dir}"
    )
    return accelerator


def start_trackers(accelerator: Accelerator, settings: Config) -> None:
    """TensorBoard, in run_dir/tensorboard, with the configuration as hyperparameters."""
    if settings.log.tensorboard:
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.flatten(settings).items()}
        accelerator.init_trackers("tensorboard", config=plain)


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


def open_run_dir(settings: Config) -> Path:
    """Create the run directory or find it holding this very run. Raises UserError if it cannot be used."""
    run_dir = Path(settings.run_dir)
    saved = run_dir / "config.yaml"
    try:
        difference = config.difference(config.load(saved), settings) if saved.exists() else None
        if difference:
            raise UserError(f"{run_dir} holds a run of another config ({difference}): choose another run_dir")
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        saved.write_text(config.dump(settings))
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}): choose another") from None
    return run_dir


def open_data(
    accelerator: Accelerator, settings: Config
) -> tuple[IndexedTraining | StreamedTraining, data.ImageDataset | None]:
    """Training and evaluation images. Raises UserError for shards and batch sizes that cannot work."""
    kind = IndexedTraining if settings.data.access == "index" else StreamedTraining
    rank, world = accelerator.process_index, accelerator.num_processes
    training = kind(settings.data, settings.seed, rank, world, settings.grad_accumulation)
    return training, open_eval_set(settings) if settings.data.eval is not None else None


def open_eval_set(settings: Config) -> data.ImageDataset:
    return data.ImageDataset(data.open_shards(settings.data, settings.data.eval), settings.data, settings.seed)


def input_size(settings: Config) -> tuple[int, int, int]:
    return (3, settings.data.image_size, settings.data.image_size)


def build_networks(
    accelerator: Accelerator, settings: Config, run_dir: Path
) -> tuple[Network, Network | None, prune.Plan]:
    """Student, teacher if there is one, and the pruning plan that binds their stages, on the device."""
    seed_everything(settings.seed)
    size, classes = settings.data.image_size, settings.data.num_classes
    net = models.create(settings.student, classes, size, "student")
    normalisation = models.normalisation(net, settings.student, "student")
    if settings.teacher is None:
        student = Network(net, *normalisation)
        return student.to(accelerator.device), None, prune.Plan("none", "none", [])

    teacher_net = models.create(settings.teacher, classes, size, "teacher")
    plan = prune.Plan("none", "none", [])
    if settings.warmup:
        plan = agree_on_plan(accelerator, run_dir, lambda: make_plan(settings, teacher_net, net))
    adapters = {
        i: nn.Conv2d(pair.student_width, pair.teacher_width, kernel_size=1)
        for i, pair in enumerate(plan.pairs)
        if pair.student_width > pair.teacher_width
    }
    student_stages = [pair.student_stage for pair in plan.pairs]
    student = Network(net, *normalisation, student_stages, adapters, with_logits=needs_logits(settings.kd.losses))
    teacher_stages = [pair.teacher_stage for pair in plan.pairs]
    teacher = Network(teacher_net, *models.normalisation(teacher_net, settings.teacher, "teacher"), teacher_stages)
    return student.to(accelerator.device), teacher.to(accelerator.device), plan


def make_plan(settings: Config, teacher: nn.Module, student: nn.Module) -> prune.Plan:
    warmup = settings.warmup
    pairs = taps.match(teacher, student) if warmup.pairs == "auto" else warmup.pairs
    criterion, mode = warmup.prune.criterion, warmup.prune.mode
    return prune.plan(teacher, student, pairs, input_size(settings), criterion, mode, warmup.adapter)


def agree_on_plan(accelerator: Accelerator, run_dir: Path, make: Callable[[], prune.Plan]) -> prune.Plan:
    """Rank 0 computes the plan, or reads that of the run it continues; every rank gets and confirms it."""
    path = run_dir / "prune_plan.json"

    def read_or_make() -> prune.Plan:
        if path.exists():
            return prune.Plan.read(path)
        plan = make()
        path.write_text(plan.to_json())
        return plan

    plan = on_main(accelerator, read_or_make)
    hashes = set(gather_object([plan.hash]))
    if len(hashes) != 1:
        raise RuntimeError(f"the ranks disagree on the pruning plan: hashes {sorted(hashes)}")
    return plan


def evaluate_checkpoint(settings: Config, checkpoint: str) -> dict[str, float]:
    """Scores of the config's student with the weights of a file or a checkpoint (its moving average, if any)."""
    if settings.data.eval is None:
        raise UserError("eval needs shards to evaluate on: set data.eval")
    accelerator = start_accelerator(settings)
    path = Path(checkpoint)
    if path.is_dir():
        path = next((path / name for name in ("ema.safetensors", "model.safetensors") if (path / name).is_file()), path)
    student = settings.student.model_copy(update={"checkpoint": str(path), "pretrained": False})
    net = models.create(student, settings.data.num_classes, settings.data.image_size, "student")
    network = Network(net, *models.normalisation(net, student, "student")).to(accelerator.device)
    eval_set = open_eval_set(settings)
    scores = evaluate.accuracy(accelerator, network, eval_set, settings.evaluate.batch)
    if settings.evaluate.retrieval:
        database = data.ImageDataset(data.open_shards(settings.data, settings.data.train), settings.data, settings.seed)
        scores |= evaluate.retrieval(accelerator, network, database, eval_set, settings.evaluate.batch)
    accelerator.end_training()
    return scores


def make_mix(settings: Config, accelerator: Accelerator) -> Callable[[data.Batch, Phase], tuple[Tensor, Tensor]]:
    """The step that brings a batch to the device and, in KD, mixes it: before any normalisation, for both networks."""
    section, micro_batch = settings.kd.mix, settings.data.global_batch // accelerator.num_processes
    micro_batch //= settings.grad_accumulation
    mixup = None
    if section and (section.mixup or section.cutmix):
        if micro_batch % 2:
            raise UserError(f"kd.mix needs an even batch per rank and accumulation step, this is {micro_batch}")
        mixup = Mixup(
            mixup_alpha=section.mixup,
            cutmix_alpha=section.cutmix,
            prob=section.prob,
            switch_prob=section.switch_prob,
            label_smoothing=0.0,  # left to the loss
            num_classes=settings.data.num_classes,
        )

    def mix(batch: data.Batch, phase: Phase) -> tuple[Tensor, Tensor]:
        images = batch.images.to(accelerator.device, non_blocking=True)  # uint8 [B, 3, S, S]
        labels = batch.labels.to(accelerator.device, non_blocking=True)
        return (images, labels) if mixup is None or phase.pairs else mixup(images.float(), labels)

    return mix


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def finish(
    accelerator: Accelerator, settings: Config, run_dir: Path, network: Network, scores: dict[str, float], log: RunLog
) -> dict[str, Any]:
    """Write the student's weights and `summary.json`, and close what is open."""
    seconds = sum(log.phase_seconds.values())
    summary = {
        "step": log.timetable.total_steps,
        "world_size": accelerator.num_processes,
        "seconds": seconds,
        "phase_seconds": log.phase_seconds,
        "images_per_second": log.timetable.total_steps * log.timetable.global_batch / max(seconds, 1e-9),
        "metrics": scores,
    }
    if accelerator.is_main_process:
        models.save(network, settings.student, run_dir / "student.safetensors")
        partial = run_dir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(run_dir / "summary.json")
    log.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return summary
