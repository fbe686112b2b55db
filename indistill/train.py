"""One training run, from its first step or from any checkpoint, in one process or many.

`train` is the table of contents; what it calls is named for what it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, TorchDynamoPlugin
from accelerate.utils import set_seed as seed_everything
from timm.data.mixup import Mixup
from torch import Tensor

from indistill import (
    build,
    config,
    data,
    deepspeed_config,
    engine,
    estimate,
    evaluate,
    health,
    history,
    models,
    optim,
    report,
    watchdog,
)
from indistill.checkpoint import Checkpoints
from indistill.config import Config, UserError
from indistill.curriculum import Pace, Phase, Timetable
from indistill.export import Program, load_for_eval
from indistill.metrics import RunLog
from indistill.models import Heads, Network
from indistill.objective import Objective, reads
from indistill.preemption import Agreement, Preempted
from indistill.progress import Progress
from indistill.sources import Sources, open_eval_set
from indistill.targets import CachedTargets, LiveTargets


def train(settings: Config, resume: str = "auto") -> dict[str, Any]:
    """Run to the end and return the content of `summary.json`. `resume`: auto, never, or a checkpoint's path.

    Raises UserError, before any step, for whatever in the config cannot work with this data and world size, and
    Preempted where the run was asked to stop, with a checkpoint of that step.
    """
    run = steps(settings, resume, Sources())
    while True:
        try:
            next(run)
        except StopIteration as end:
            return end.value


def steps(settings: Config, resume: str, sources: Sources) -> Generator[int, None, dict[str, Any]]:
    """`train`, which pauses before its first step and after each, with the number of completed steps."""
    # --- what the run is made of -------------------------------------------------------------------------------------
    accelerator = start_accelerator(settings)
    rank, accumulation = accelerator.process_index, settings.grad_accumulation
    run_dir = engine.on_main(accelerator, lambda: open_run_dir(settings))
    training, eval_set = sources.data(accelerator, settings)
    calibration = partial(training.loader, 0, device=accelerator.device)
    student, targets_of, plan = build.networks(accelerator, settings, run_dir, calibration, sources)
    timetable = Timetable.of(settings, training.steps_per_epoch, pairs=len(plan.pairs))
    pace = Pace(timetable, settings.warmup, partial(mean_over_ranks, accelerator))
    objective = Objective(settings.kd.losses, training.steps_per_epoch, settings.kd.relational_scope)
    if settings.targets.source == "auto":
        targets_of = estimate.choose(accelerator, settings, student, targets_of, objective, timetable, plan)
    targets_of = sources.targets(targets_of, plan, timetable, settings)
    targets_of.bring_along(training, timetable)
    mix = make_mix(settings, accelerator)
    ema = settings.ema and health.Ema(student, settings.ema.decay, use_warmup=settings.ema.warmup)
    whole = engine.whole(accelerator, student)
    optimizer = optim.create(student, settings.optimizer, fused=not engine.stage(accelerator))
    blank = partial(blank_loss, accelerator, settings, student, targets_of, objective)
    unused = engine.unused(accelerator, student, timetable.curriculum.phases(), blank)
    phase_optim = optim.PhaseOptim(optimizer, settings, timetable, unused)
    wrapped, optimizer, was_skipped = engine.prepare(
        accelerator, settings.mixed_precision, student, optimizer, phase_optim
    )
    buffers = health.Buffers(wrapped)

    # --- where it stands ---------------------------------------------------------------------------------------------
    limits = settings.data.max_bad_fraction, settings.max_bad_steps
    progress = Progress(timetable, sources.name, sources.position)
    log = RunLog(accelerator, run_dir, settings.log.every_steps, timetable, *limits, progress)
    identity = {"config": config.fingerprint(settings), "plan": plan.hash, "data": training.fingerprint}
    identity |= {"teacher": targets_of.fingerprint, "engine": engine.describe(accelerator)}
    health.agree(identity)
    checkpoints = Checkpoints(accelerator, run_dir, settings.checkpoint, identity, {"log": log, "pace": pace}, whole)
    first_step, scores = checkpoints.resume(resume, ema)
    log.open(first_step, settings)
    record_start(accelerator, run_dir, first_step)
    batches = log.waiting(sources.batches(training, first_step, timetable.total_steps, accelerator.device))
    evaluated = (lambda: ema.module) if ema else whole
    stop = Agreement(accelerator.num_processes, partial(mean_over_ranks, accelerator))

    def evaluate_step(done: int) -> dict[str, float]:
        """The scores after `done` steps. If a preemption stops it, a resumed run begins with it."""
        try:
            with log.off_the_clock("evaluating"):
                scores = evaluation(accelerator, settings, evaluated(), targets_of.teacher, eval_set)
        except Preempted:
            save(done, None)
            checkpoints.wait()
            log.close()
            raise
        log.write(done, scores)
        return scores

    def save(done: int, scores: dict[str, float] | None) -> None:
        with log.off_the_clock("saving a checkpoint") as stall:
            checkpoints.save(done, ema, scores)
        log.write(done, {"checkpoint_stall_seconds": stall.seconds})

    # --- the run -----------------------------------------------------------------------------------------------------
    wrapped.train()
    stop.open(settings.max_hours)
    watchdog.open(run_dir, settings.collective_timeout_minutes)
    if scores is None:
        scores = evaluate_step(first_step)
        save(first_step, scores)
    yield first_step
    targets_of.hold_weights()
    for step in range(first_step, timetable.total_steps):
        phase = pace.curriculum.at(step)
        watchdog.begin_step(step + 1, phase.name)
        lr = phase_optim.begin_step(step, phase)
        buffers.keep()
        seed_everything(step_seed(settings.seed, step, rank))  # dropout and mixing, too, depend on the step alone

        step_loss = torch.zeros((), device=accelerator.device)
        for _ in range(accumulation):
            with accelerator.accumulate(wrapped):
                batch = next(batches)
                images, labels = mix(batch, phase)  # [B, 3, S, S]; [B], or [B, K] where mixed
                targets = targets_of(images, phase, batch.records)
                output = wrapped(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
                loss, terms = objective(output, targets, labels, phase, step)
                accelerator.backward(loss)
                if accelerator.sync_gradients and settings.clip_grad_norm:
                    accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            step_loss += loss.detach() / accumulation
            log.add({"loss": loss.detach(), **terms}, weight=1 / accumulation)
        done = step + 1
        skipped = was_skipped()  # on all ranks: a loss or gradient was not finite on one
        buffers.put_back(skipped)
        if ema:
            ema.update(whole(), done, skipped)
        # With its end, where its loss has flattened.
        phase = pace.end_step(done, phase, step_loss.masked_fill(skipped, 0.0), ~skipped)
        logged, scores = log.end_step(done, phase, lr, skipped), {}
        leaving = stop.reached(done, log.told)
        if eval_set and timetable.evaluate_at(done):
            scores = None if leaving else evaluate_step(done)
        if leaving or checkpoints.due(done, logged, scores) or done == timetable.total_steps:
            save(done, scores)
        if leaving:
            checkpoints.wait()
            log.close()
            raise Preempted(f"stopped at step {done} of {timetable.total_steps}")
        yield done
    stop.close()
    checkpoints.close()

    # --- the result --------------------------------------------------------------------------------------------------
    if settings.evaluate.retrieval:
        scores |= evaluate.retrieval(accelerator, evaluated(), training.dataset, eval_set, settings.evaluate.batch)
    return finish(accelerator, settings, run_dir, evaluated(), scores, log)


def start_accelerator(settings: Config, training: bool = True) -> Accelerator:
    """Accelerate, on what the launcher gave us. Raises UserError if that is not what runs."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_devices(settings, world)
    torch.backends.cudnn.benchmark = True  # a run has few shapes, and steps without end to use what is found for them
    if settings.compile:
        # Each network has a graph for each phase; with more than the usual 8 in all, the others would not be compiled.
        torch._dynamo.config.recompile_limit = 64
    zero = deepspeed_config.zero_config(settings, world) if training else None
    # The warm-up leaves deep layers without gradient, changing from phase to phase; a loss on the embedding, the head.
    partly_unused = settings.warmup is not None or not reads(settings.kd.losses, "logits")
    accelerator = engine.start(
        zero,
        settings.mixed_precision,
        world,
        settings.collective_timeout_minutes,
        [DistributedDataParallelKwargs(find_unused_parameters=partly_unused, gradient_as_bucket_view=True)],
        gradient_accumulation_steps=settings.grad_accumulation,
        dynamo_plugin=TorchDynamoPlugin(backend="inductor", dynamic=False) if settings.compile else None,
    )
    if accelerator.num_processes != world:
        raise UserError(
            f"the launcher started {world} processes, Accelerate sees {accelerator.num_processes}: unset ACCELERATE_* "
            "variables of another job, or check the accelerate config"
        )
    if accelerator.gradient_accumulation_steps != settings.grad_accumulation:
        raise UserError("ACCELERATE_GRADIENT_ACCUMULATION_STEPS would replace grad_accumulation: unset it")
    health.agree(health.setup(settings))
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


def record_start(accelerator: Accelerator, run_dir: Path, step: int) -> None:
    if accelerator.is_main_process:
        device, software = engine.device_name(accelerator.device), health.software()
        history.start(run_dir, step, world_size=accelerator.num_processes, device=device, software=software)


def open_run_dir(settings: Config) -> Path:
    """Create the run directory or find it holding this very run. Raises UserError if it cannot be used."""
    run_dir = Path(settings.run_dir)
    saved = run_dir / "config.yaml"
    try:
        if not history.has_begun(settings):
            (run_dir / "prune_plan.json").unlink(missing_ok=True)  # that of a config that was mended since
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        saved.write_text(config.dump(settings))
    except OSError as error:
        raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}): choose another") from None
    return run_dir


def evaluate_checkpoint(settings: Config, checkpoint: str) -> dict[str, float]:
    """Scores of a checkpoint (its moving average, if any), an export or a timm model, as `load_for_eval` takes them."""
    if settings.data.eval is None:
        raise UserError("eval needs shards to evaluate on: set data.eval")
    accelerator = start_accelerator(settings, training=False)
    network, view = load_for_eval(settings, checkpoint)
    network = network.to(accelerator.device)
    if settings.evaluate.retrieval and isinstance(network, Program):
        raise UserError(f"{checkpoint}: gives no embeddings to retrieve by: evaluate.retrieval=false, or a timm export")
    eval_set = open_eval_set(settings, view)
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


def blank_loss(
    accelerator: Accelerator,
    settings: Config,
    student: Network | Heads,
    targets_of: LiveTargets | CachedTargets,
    objective: Objective,
    phase: Phase,
) -> Tensor:
    """The loss of a phase on two black images: its graph names the parameters that the phase trains."""
    images = torch.zeros(2, *build.input_size(settings), dtype=torch.uint8, device=accelerator.device)
    labels = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    targets = targets_of(images, phase)
    output = student(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
    return objective(output, targets, labels, phase, phase.start)[0]


def evaluation(
    accelerator: Accelerator,
    settings: Config,
    student: Network | Heads,
    teacher: Network | None,
    eval_set: data.ImageDataset,
) -> dict[str, float]:
    """Accuracy and, beside a teacher, how alike their stages are, whether or not they are trained to be."""
    section = settings.evaluate
    scores = evaluate.accuracy(accelerator, student, eval_set, section.batch)
    if teacher is None or not section.similarity_samples:
        return scores
    pairs = build.comparable_pairs(settings, teacher.net, student.net)
    samples = section.similarity_samples
    return scores | evaluate.similarity(accelerator, student, teacher, pairs, eval_set, section.batch, samples)


def mean_over_ranks(accelerator: Accelerator, value: Tensor | float) -> float:
    return accelerator.reduce(torch.as_tensor(value, device=accelerator.device), reduction="mean").item()


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def finish(
    accelerator: Accelerator,
    settings: Config,
    run_dir: Path,
    network: Network | Heads,
    scores: dict[str, float],
    log: RunLog,
) -> dict[str, Any]:
    """Write the student's weights, `summary.json` and the report, and close what is open."""
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
        if settings.stage == "heads":
            network.save(run_dir / "heads.safetensors")
        else:
            models.save(network, settings.student, run_dir / "student.safetensors")
        partial = run_dir / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(run_dir / "summary.json")
        history.end(run_dir, "done")
        report.at_end(run_dir)
    log.close()
    accelerator.wait_for_everyone()
    watchdog.close()
    return summary
