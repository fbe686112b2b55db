"""One training run, from its first step or from any checkpoint, in one process or many.

Read `Run.step` first; it calls everything else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed as seed_everything
from torch import Tensor

from indistill import config, evaluate
from indistill.config import Config
from indistill.config.run_dir import append_end, append_start
from indistill.curriculum import Pace, Phase, Timetable
from indistill.data.dataset import ImageDataset
from indistill.distributed import engine, watchdog
from indistill.distributed.agree import agree, software_versions
from indistill.distributed.preemption import Agreement, Preempted
from indistill.losses.objective import Objective
from indistill.models.heads import Heads
from indistill.models.network import Network, save_network
from indistill.targets.live import LiveTargets
from indistill.targets.stored import CachedTargets
from indistill.training import guard, optim, parts
from indistill.training.callbacks import Callback
from indistill.training.checkpoint import Checkpoints
from indistill.training.choose import choose
from indistill.training.guard import Buffers
from indistill.training.mix import make_mix
from indistill.training.parts import Sources
from indistill.training.progress import Progress
from indistill.training.run_log import RunLog
from indistill.training.start import open_run_dir, start_accelerator


def train(
    settings: Config, resume: str = "auto", sources: Sources | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run to the end and return the content of `summary.json`.

    `resume` is auto, never, or a checkpoint's path; `sources` gives the data and teacher, by default the run's own;
    `callbacks` are told of each step, evaluation, checkpoint and of the end. Raises UserError, before any step, for
    whatever in the config cannot work with this data and world size, and Preempted where the run was asked to stop,
    with a checkpoint of that step.
    """
    run = Run(settings, resume, sources, callbacks)
    run.begin()
    while not run.finished:
        run.step()
    return run.end()


class Run:
    """One training run: `begin`, then `step` until `finished`, then `end`.

    `done` is the number of completed steps. Several students of one teacher are several runs that take turns.
    """

    def __init__(
        self,
        settings: Config,
        resume: str = "auto",
        sources: Sources | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.settings, self.resume, self.callbacks = settings, resume, callbacks
        self.sources = sources or Sources()
        self.done = 0

    @property
    def finished(self) -> bool:
        return self.done >= self.timetable.total_steps

    def begin(self) -> None:
        """Build all that the run needs, load its newest checkpoint, and score the student before the first step."""
        self._open_data()
        self._build_networks()
        self._prepare()
        self._resume()
        self.wrapped.train()
        self.stop.open(self.settings.max_hours)
        watchdog.open(self.run_dir, self.settings.collective_timeout_minutes)
        if self.scores is None:
            self.scores = self._evaluate()
            self._save()

    # --- what the run is made of -------------------------------------------------------------------------------------

    def _open_data(self) -> None:
        self.accelerator = start_accelerator(self.settings)
        self.run_dir = engine.on_main(self.accelerator, lambda: open_run_dir(self.settings))
        self.training, self.eval_set = self.sources.data(self.accelerator, self.settings)

    def _build_networks(self) -> None:
        accelerator, settings, training = self.accelerator, self.settings, self.training
        calibration = partial(training.loader, 0, device=accelerator.device)
        self.student, targets_of, self.plan = parts.networks(
            accelerator, settings, self.run_dir, calibration, self.sources.teacher, self.sources.forward
        )
        self.timetable = Timetable.of(settings, training.steps_per_epoch, pairs=len(self.plan.pairs))
        self.pace = Pace(self.timetable, settings.warmup, partial(mean_over_ranks, accelerator))
        self.objective = Objective(settings.kd.losses, training.steps_per_epoch, settings.kd.relational_scope)
        if settings.targets.source == "auto":
            targets_of = choose(
                accelerator, settings, self.student, targets_of, self.objective, self.timetable, self.plan
            )
        self.targets_of = self.sources.targets(targets_of, self.plan, self.timetable, settings)
        self.targets_of.bring_along(training, self.timetable)

    def _prepare(self) -> None:
        """Create the optimizer, and wrap the student for training on all ranks."""
        accelerator, settings, student = self.accelerator, self.settings, self.student
        self.mix = make_mix(settings, accelerator)
        self.ema = settings.ema and guard.Ema(student, settings.ema.decay, use_warmup=settings.ema.warmup)
        self.whole = engine.whole(accelerator, student)
        optimizer = optim.create(student, settings.optimizer, fused=not engine.stage(accelerator))
        blank = partial(blank_loss, accelerator, settings, student, self.targets_of, self.objective)
        unused = engine.unused(accelerator, student, self.timetable.curriculum.phases(), blank)
        self.phase_optim = optim.PhaseOptim(optimizer, settings, self.timetable, unused)
        self.wrapped, self.optimizer, self.was_skipped = engine.prepare(
            accelerator, settings.mixed_precision, student, optimizer
        )
        self.phase_optim.stale_gradients = engine.stale_gradients(self.optimizer)
        self.buffers = Buffers(self.wrapped)
        self.stop = Agreement(accelerator.num_processes, partial(mean_over_ranks, accelerator))

    def _resume(self) -> None:
        """Go on from a checkpoint, if there is one; all ranks have to agree on what they run."""
        accelerator, settings, timetable = self.accelerator, self.settings, self.timetable
        limits = settings.data.max_bad_fraction, settings.max_bad_steps
        progress = Progress(timetable, self.sources.name, self.sources.position)
        self.log = RunLog(accelerator, self.run_dir, settings.log.every_steps, timetable, *limits, progress)
        identity = {
            "config": config.fingerprint(settings),
            "plan": self.plan.hash,
            "data": self.training.fingerprint,
            "teacher": self.targets_of.fingerprint,
            "engine": engine.describe(accelerator),
        }
        agree(identity)
        state = {"log": self.log, "pace": self.pace}
        self.checkpoints = Checkpoints(
            accelerator, self.run_dir, settings.checkpoint, identity, state, self.whole
        )
        self.first_step, self.scores = self.checkpoints.resume(self.resume, self.ema)
        self.done = self.first_step
        self.log.open(self.first_step, settings)
        record_start(accelerator, self.run_dir, self.first_step)
        batches = self.sources.batches(
            self.training, self.first_step, timetable.total_steps, accelerator.device
        )
        self.batches = self.log.waiting(batches)

    # --- the run -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Make one optimizer step; then log, evaluate, save, and stop where that is due."""
        step, phase = self.done, self.pace.curriculum.at(self.done)
        if step == self.first_step:
            self.targets_of.hold_weights()  # no student's plan is made from them any more
        watchdog.begin_step(step + 1, phase.name)
        lr = self.phase_optim.begin_step(step, phase)
        self.buffers.keep()
        # Dropout and mixing, too, depend on the step alone.
        seed_everything(step_seed(self.settings.seed, step, self.accelerator.process_index))

        self.loss = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.settings.grad_accumulation):
            with self.accelerator.accumulate(self.wrapped):
                self.loss += self._micro_batch(phase, step) / self.settings.grad_accumulation
        self.done = step + 1
        skipped = self.was_skipped()  # on all ranks: a loss or gradient was not finite on one
        self.buffers.put_back(skipped)
        if self.ema:
            self.ema.update(self.whole(), self.done, skipped)
        # The phase, with its end if its loss has flattened.
        phase = self.pace.end_step(self.done, phase, self.loss.masked_fill(skipped, 0.0), ~skipped)
        self._end_step(phase, self.log.end_step(self.done, phase, lr, skipped))

    def _micro_batch(self, phase: Phase, step: int) -> Tensor:
        """Compute the gradients of one micro-batch, and after a step's last update the weights; return its loss."""
        batch = next(self.batches)
        images, labels = self.mix(batch, phase)  # [B, 3, S, S]; [B], or [B, K] where mixed
        targets = self.targets_of(images, phase, batch.records)
        output = self.wrapped(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
        loss, terms = self.objective(output, targets, labels=labels, phase=phase, step=step)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.settings.clip_grad_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.add({"loss": loss.detach(), **terms}, weight=1 / self.settings.grad_accumulation)
        return loss.detach()

    def _end_step(self, phase: Phase, line: dict[str, Any] | None) -> None:
        """After a step: evaluate, save and stop where that is due. `line` is the step's logged line, if it has one."""
        for callback in self.callbacks:
            callback.on_step(self, phase, line)
        leaving = self.stop.reached(self.done, self.log.told)
        self.scores = {}
        if self.eval_set and self.timetable.evaluate_at(self.done):
            self.scores = None if leaving else self._evaluate()
        if leaving or self.checkpoints.due(self.done, line is not None, self.scores) or self.finished:
            self._save()
        if leaving:
            self._leave()
            raise Preempted(f"stopped at step {self.done} of {self.timetable.total_steps}")

    def _scored(self) -> Network | Heads:
        """Return what is scored: the student's moving average, if the run keeps one. Call on all ranks."""
        return self.ema.module if self.ema else self.whole()

    def _evaluate(self) -> dict[str, float]:
        """The scores after this step. If a preemption stops it, a resumed run begins with it."""
        try:
            with self.log.off_the_clock("evaluating"):
                teacher = self.targets_of.teacher
                scores = evaluation(self.accelerator, self.settings, self._scored(), teacher, self.eval_set)
        except Preempted:
            self.scores = None
            self._save()
            self._leave()
            raise
        self.log.write(self.done, scores)
        for callback in self.callbacks:
            callback.on_evaluation(self, scores)
        return scores

    def _save(self) -> None:
        with self.log.off_the_clock("saving a checkpoint") as stall:
            self.checkpoints.save(self.done, self.ema, self.scores)
        self.log.write(self.done, {"checkpoint_stall_seconds": stall.seconds})
        for callback in self.callbacks:
            callback.on_checkpoint(self)

    def _leave(self) -> None:
        self.checkpoints.wait()
        self.log.close()

    # --- the result --------------------------------------------------------------------------------------------------

    def end(self) -> dict[str, Any]:
        """Write the student's weights and `summary.json`, close what is open, and return the summary."""
        self.stop.close()
        self.checkpoints.close()
        network, scores = self._scored(), self.scores
        if self.settings.evaluate.retrieval:
            batch = self.settings.evaluate.batch
            scores |= evaluate.retrieval(
                self.accelerator, network, self.training.dataset, self.eval_set, batch
            )
        summary = self._summary(scores)
        if self.accelerator.is_main_process:
            self._write_result(network, summary)
        for callback in self.callbacks:
            callback.on_end(self, summary)
        self.log.close()
        self.accelerator.wait_for_everyone()
        watchdog.close()
        return summary

    def _summary(self, scores: dict[str, float]) -> dict[str, Any]:
        log, steps = self.log, self.timetable.total_steps
        seconds = sum(log.phase_seconds.values())
        return {
            "step": steps,
            "world_size": self.accelerator.num_processes,
            "seconds": seconds,
            "phase_seconds": log.phase_seconds,
            "images_per_second": steps * self.timetable.global_batch / max(seconds, 1e-9),
            "metrics": scores,
        }

    def _write_result(self, network: Network | Heads, summary: dict[str, Any]) -> None:
        if self.settings.stage == "heads":
            network.save(self.run_dir / "heads.safetensors")
        else:
            save_network(network, self.settings.student, self.run_dir / "student.safetensors")
        partial_file = self.run_dir / "summary.json.partial"
        partial_file.write_text(json.dumps(summary, indent=2) + "\n")
        partial_file.replace(self.run_dir / "summary.json")
        append_end(self.run_dir, "done")


def record_start(accelerator: Accelerator, run_dir: Path, step: int) -> None:
    if accelerator.is_main_process:
        device, software = engine.device_name(accelerator.device), software_versions()
        append_start(run_dir, step, world_size=accelerator.num_processes, device=device, software=software)


def blank_loss(
    accelerator: Accelerator,
    settings: Config,
    student: Network | Heads,
    targets_of: LiveTargets | CachedTargets,
    objective: Objective,
    phase: Phase,
) -> Tensor:
    """The loss of a phase on two black images: its graph names the parameters that the phase trains."""
    images = torch.zeros(2, *config.input_size(settings), dtype=torch.uint8, device=accelerator.device)
    labels = torch.zeros(2, dtype=torch.int64, device=accelerator.device)
    targets = targets_of(images, phase)
    output = student(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
    return objective(output, targets, labels=labels, phase=phase, step=phase.start)[0]


def evaluation(
    accelerator: Accelerator,
    settings: Config,
    student: Network | Heads,
    teacher: Network | None,
    eval_set: ImageDataset,
) -> dict[str, float]:
    """Accuracy and, beside a teacher, how alike their stages are, whether or not they are trained to be."""
    section = settings.evaluate
    scores = evaluate.accuracy(accelerator, student, eval_set, section.batch)
    if teacher is None or not section.similarity_samples:
        return scores
    pairs = parts.comparable_pairs(settings, teacher.net, student.net)
    samples = section.similarity_samples
    return scores | evaluate.similarity(
        accelerator, student, teacher, pairs, eval_set, section.batch, samples
    )


def mean_over_ranks(accelerator: Accelerator, value: Tensor | float) -> float:
    return accelerator.reduce(torch.as_tensor(value, device=accelerator.device), reduction="mean").item()


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
