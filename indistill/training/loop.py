"""One training run, from its first step or from any checkpoint, in one process or many.

Read `Run.step` first; it calls everything else.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed as seed_everything
from safetensors import SafetensorError
from torch import Tensor, nn

from indistill import config, evaluate
from indistill.config import Config, UserError, in_one_line, metric_names, plugins, run_lock
from indistill.config.files import replace_text
from indistill.config.run_dir import RunDir, append_end, append_start, weights_file
from indistill.curriculum import Pace, Phase, Timetable
from indistill.data.dataset import ImageDataset
from indistill.data.training import open_bank
from indistill.distributed import engine, watchdog
from indistill.distributed.agree import agree, software_versions
from indistill.distributed.preemption import Agreement, Preempted
from indistill.losses.objective import Objective
from indistill.models.network import Network
from indistill.models.outputs import Output
from indistill.models.trainable import Trainable
from indistill.training import guard, lessons, optim, parts
from indistill.training.callbacks import Callback, check_callbacks
from indistill.training.checkpoint import Checkpoints
from indistill.training.choose import choose
from indistill.training.features import agree_on_standards
from indistill.training.guard import Buffers
from indistill.training.mirror.fetch import fetch_run
from indistill.training.mirror.uploads import Mirror
from indistill.training.mix import make_mix
from indistill.training.parts import Sources
from indistill.training.profile import Profile
from indistill.training.progress import Progress
from indistill.training.run_log import RunLog
from indistill.training.start import open_run_dir, start_engine


def train(
    settings: Config, resume: str = "auto", sources: Sources | None = None, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run to the end and return the content of `summary.json`.

    `resume` is auto, never, or a checkpoint's path. `sources` gives the data and the teacher, by default the
    run's own. `callbacks` are called after each step, evaluation and checkpoint, and at the end. Raises
    UserError, before any step, for a config that cannot work with this data and world size; raises Preempted
    if the run was asked to stop, after a checkpoint of that step.
    """
    run = Run(settings, resume, sources, callbacks)
    with run_lock.released_after():
        run.build()
        run.begin()
        while not run.finished:
            run.step()
        return run.end()


class Run:
    """One training run: `build`, `begin`, then `step` until `finished`, then `end`.

    `done` is the number of completed steps. Several students of one teacher are several runs that take turns,
    once all of them are built.
    """

    def __init__(
        self,
        settings: Config,
        resume: str = "auto",
        sources: Sources | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.settings = settings
        self.resume = resume
        self.sources = sources or Sources()
        self.callbacks = check_callbacks(callbacks)
        self.begun = False
        self.done = 0
        # Of the last step: {} if no evaluation was due, None if the one that was due has not been made.
        self.scores: dict[str, float] | None = {}

    @property
    def finished(self) -> bool:
        if not self.begun:
            raise RuntimeError("the run has not begun: call build() and begin() first")
        return self.done >= self.timetable.total_steps

    def build(self) -> None:
        """Build all parts of the run and load its newest checkpoint."""
        self._open_data()
        self._build_networks()
        self._prepare()
        self._resume()
        self.wrapped.train()
        self.stop.open(self.settings.max_hours)
        watchdog.open(self.run_dir, self.settings.collective_timeout_minutes)

    def begin(self) -> None:
        """Convert the teacher's weights, and make the evaluation that a preemption stopped.

        Every student that shares the teacher must be built: their plans are made from the teacher's weights.
        """
        self.targets_of.hold_weights()
        self.begun = True
        if self.scores is None:
            self.scores = self._evaluate()
            self._save()

    # --- what the run is made of ----------------------------------------------------------------------------

    def _open_data(self) -> None:
        self.engine = start_engine(self.settings)
        self.accelerator = self.engine.accelerator
        fetch_run(self.settings)
        self.files: RunDir = engine.on_main(self.accelerator, lambda: open_run_dir(self.settings))
        self.run_dir: Path = self.files.path
        self.mirror = Mirror(self.engine, self.settings, self.files)
        self.training, self.eval_sets = self.sources.data(self.accelerator, self.settings)
        self.bank = open_bank(self.settings, self.training.dataset)
        if self.bank is not None:
            sets = {name: dataset.shards for name, dataset in self.eval_sets.items()}
            evaluate.check_bank(self.settings, self.bank.shards, sets)

    def _build_networks(self) -> None:
        accelerator, settings, training = self.accelerator, self.settings, self.training
        self.student, targets_of, self.plan, places = lessons.networks(
            accelerator,
            settings,
            files=self.files,
            calibration=partial(training.loader, 0, device=accelerator.device),
            make_teacher=self.sources.teacher,
            run_teacher=self.sources.forward,
        )
        self._set_timetable()
        self.standards = agree_on_standards(
            accelerator,
            settings,
            files=self.files,
            targets_of=targets_of,
            calibration=partial(training.loader, 0, device=accelerator.device),
        )
        self.objective = Objective(
            settings.losses,
            training.steps_per_epoch,
            settings.kd.relational_scope,
            self.standards.of_loss,
            places,
            settings.kd.teacher_dropping,
        )
        if settings.targets.source == "auto":
            targets_of = choose(
                accelerator,
                settings,
                student=self.student,
                live=targets_of,
                objective=self.objective,
                timetable=self.timetable,
                plan=self.plan,
            )
        self.own_targets = targets_of  # before other ranks have a part in them
        self.targets_of = self.sources.targets(targets_of, self.plan, self.timetable, settings)
        self.targets_of.bring_along(training, self.timetable)

    def _set_timetable(self) -> None:
        accelerator, settings = self.accelerator, self.settings
        self.timetable = Timetable.of(settings, self.training.steps_per_epoch, pairs=len(self.plan.pairs))
        if accelerator.is_main_process:
            for note in self.timetable.notes:
                print(f"indistill: WARNING: {note}", file=sys.stderr, flush=True)
        self.pace = Pace(self.timetable, settings.warmup, partial(mean_over_ranks, accelerator))

    def _prepare(self) -> None:
        """Create the optimizer, and wrap the student for training on all ranks."""
        accelerator, settings, student = self.accelerator, self.settings, self.student
        self.mix = make_mix(settings, accelerator)
        self.ema: guard.Ema | None = None
        if settings.ema is not None:
            self.ema = guard.Ema(student, settings.ema.decay, use_warmup=settings.ema.warmup)
        self.whole = self.engine.whole(student)
        optimizer = optim.create(student, settings.optimizer, fused=self.engine.fused)
        self._check_single_images()
        unused = self.engine.unused(student, self.timetable.curriculum.phases(), self._blank_output)
        self.phase_optim = optim.PhaseOptim(optimizer, settings, self.timetable, unused)
        self.wrapped, self.optimizer, self.was_skipped = self.engine.prepare(student, optimizer)
        self.phase_optim.stale_gradients = self.engine.stale_gradients()
        self.buffers = Buffers(self.wrapped)
        self.stop = Agreement(accelerator.num_processes, partial(mean_over_ranks, accelerator))

    def _check_single_images(self) -> None:
        """Raise UserError if a batch norm of a loss or of the targets cannot take a micro-batch of one.

        `parts.create_student` checks the student.
        """
        projectors = self.student.projectors.modules() if isinstance(self.student, Network) else ()
        normalises = self.plan.mode == "paper_bn" or any(isinstance(x, nn.BatchNorm2d) for x in projectors)
        if not (normalises and parts.has_single_images(self.settings)):
            return
        buffers = Buffers(self.student)
        with parts.refusing_single_values(self.settings):
            for phase in self.timetable.curriculum.phases():
                self._blank_output(self.student, phase, 1)
        buffers.put_back(torch.tensor(True, device=self.accelerator.device))

    def _blank_output(self, student: nn.Module, phase: Phase, samples: int = 2) -> Output:
        """Compute a phase's output for black images; its graph has the parameters that the phase trains."""
        device = self.accelerator.device
        size = self.training.sizes.at(int(phase.start))
        # No batch has this type, so that several students do not take the teacher's output for one.
        images = torch.zeros(samples, 3, size, size, dtype=torch.int32, device=device)
        with torch.compiler.set_stance("force_eager"):  # a batch of this size does not come again
            targets = self.own_targets(images, phase)
            return student(images, upto=phase.upto, pairs=phase.pairs, targets=targets)

    def _resume(self) -> None:
        """Load the newest checkpoint, if there is one, once all ranks agree on what they run."""
        accelerator, settings, timetable = self.accelerator, self.settings, self.timetable
        self.log = RunLog(
            accelerator,
            self.files,
            timetable=timetable,
            every_steps=settings.log.every_steps,
            max_bad_fraction=settings.data.max_bad_fraction,
            max_bad_steps=settings.max_bad_steps,
            progress=Progress(timetable, self.sources.name, self.sources.position),
        )
        if settings.profile is not None:
            rank, off_the_clock = accelerator.process_index, self.log.off_the_clock
            self.callbacks = [Profile(settings.profile, self.files, rank, off_the_clock), *self.callbacks]
        identity = self._identity()
        agree(identity)
        self.checkpoints = Checkpoints(
            self.engine,
            self.files,
            section=settings.checkpoint,
            identity=identity,
            earlier={"config": config.earlier_fingerprint(settings)},
            parts={"log": self.log, "pace": self.pace},
            whole=self.whole,
            published=self.mirror.wake,
        )
        self.first_step, self.scores = self.checkpoints.resume(self.resume, self.ema)
        self.done = self.first_step
        self.log.open(self.first_step, settings)
        record_start(accelerator, self.run_dir, self.first_step)
        batches = self.sources.batches(
            self.training, self.first_step, timetable.total_steps, accelerator.device
        )
        self.batches = self.log.waiting(batches)

    def _identity(self) -> dict[str, str]:
        """Return what a checkpoint belongs to, by names that a message may show."""
        settings = self.settings
        identity = {
            "config": config.fingerprint(settings),
            "plan": self.plan.hash,
            "data": self.training.fingerprint,
            "teacher": self.targets_of.fingerprint,
            "engine": self.engine.describe(),
            **({"standards": self.standards.fingerprint} if self.standards.fingerprint else {}),
            **plugins.source_hashes([loss.name for loss in settings.losses]),
        }
        if settings.kd.mixing:
            # Of the way partners and coefficients are drawn: checkpoints without it drew them by rank.
            identity["version of kd.mix"] = "1"
        return identity

    # --- the run --------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Make one optimizer step; then log, evaluate, save and stop where that is due."""
        if self.finished:
            raise RuntimeError(f"the run has finished its {self.done} steps: call end()")
        step = self.done
        phase = self.pace.curriculum.at(step)
        self._before_step(phase)
        lr = self.phase_optim.begin_step(step, phase)
        self.wrapped = self.engine.in_phase(phase)
        self.buffers.keep()
        # Dropout depends on the step alone, so a resumed run repeats it.
        seed_everything(step_seed(self.settings.seed, step, self.accelerator.process_index))

        self.loss = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.settings.grad_accumulation):
            with self.accelerator.accumulate(self.wrapped):
                self.loss += self._micro_batch(phase, step) / self.settings.grad_accumulation
        self.done = step + 1

        # A bool [] on the device, the same on all ranks: was a loss or gradient not finite on any of them?
        skipped = self.was_skipped()
        self.buffers.put_back(skipped)
        if self.ema:
            self.ema.update(self.whole(), self.done, skipped)
        # With `curriculum: auto`, a phase whose loss has flattened gets its end here.
        phase = self.pace.end_step(self.done, phase, self.loss.masked_fill(skipped, 0.0), ~skipped)
        line = self.log.end_step(self.done, phase, lr, skipped)
        self._after_step(phase, line)

    def _before_step(self, phase: Phase) -> None:
        watchdog.begin_step(self.done + 1, phase.name)
        for callback in self.callbacks:
            callback.on_step_begin(self, phase)

    def _micro_batch(self, phase: Phase, step: int) -> Tensor:
        """Train on one micro-batch and return its loss; the last of a step updates the weights."""
        batch = next(self.batches)
        images, labels = self.mix(batch, phase)  # [B, 3, S, S]; [B], or [B, K] where mixed
        targets = self.targets_of(images, phase, batch.records)
        output = self.wrapped(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
        loss, terms = self.objective(output, targets, labels=labels, phase=phase, step=step)
        self._backward(loss)
        if self.accelerator.sync_gradients and self.settings.clip_grad_norm:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip_grad_norm)
        # Accelerate lets only the last micro-batch of a step through to the optimizer.
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.log.add({"loss": loss.detach(), **terms}, weight=1 / self.settings.grad_accumulation)
        return loss.detach()

    def _backward(self, loss: Tensor) -> None:
        with self.buffers.unchanged() if self.settings.grad_checkpointing else contextlib.nullcontext():
            self.accelerator.backward(loss)

    def _after_step(self, phase: Phase, line: dict[str, Any] | None) -> None:
        """Evaluate, save and stop where that is due. `line` is the step's logged line, if it has one."""
        for callback in self.callbacks:
            callback.on_step(self, phase, line)
        leaving = self.stop.reached(self.done, self.log.agreed)
        self.scores = {}
        if self.eval_sets and self.timetable.evaluate_at(self.done):
            self.scores = None if leaving else self._evaluate()
        if leaving or self.finished or self.checkpoints.due(self.done, line is not None, self.scores or {}):
            self._save()
        if leaving:
            self._leave()
            raise Preempted(f"stopped at step {self.done} of {self.timetable.total_steps}")

    def _evaluate(self) -> dict[str, float]:
        """Score the student after this step. If a preemption stops it, the resumed run begins with it."""
        try:
            with self.log.off_the_clock("evaluating"):
                by_set = evaluation(
                    self.accelerator,
                    self.settings,
                    student=self._scored_network(),
                    teacher=self.targets_of.teacher,
                    eval_sets=self.eval_sets,
                    bank=self.bank,
                )
        except Preempted:
            self.scores = None
            self._save()
            self._leave()
            raise
        except Exception as error:
            if not self._does_without(error):
                raise
            return {}
        scores: dict[str, float] = {}
        for of_set in by_set:
            self.log.write(self.done, of_set)
            scores |= of_set
        for callback in self.callbacks:
            callback.on_evaluation(self, scores)
        return scores

    def _scored_network(self) -> Trainable:
        """Return the network that is scored: the moving average, if the run keeps one. Call on all ranks."""
        return self.ema.module if self.ema else self.whole()

    def _save(self) -> None:
        with self.log.off_the_clock("saving a checkpoint") as stall:
            self.checkpoints.save(self.done, self.ema, self.scores)
        self.log.write(self.done, {"checkpoint_stall_seconds": stall.seconds})
        for callback in self.callbacks:
            callback.on_checkpoint(self)

    def _leave(self) -> None:
        self.checkpoints.wait()
        for callback in self.callbacks:
            callback.on_stop(self)
        self.log.close()
        self.mirror.leave()

    # --- the result -----------------------------------------------------------------------------------------

    def end(self) -> dict[str, Any]:
        """Write the trained weights and `summary.json`, close what is open, and return the summary."""
        if not self.finished:
            total = self.timetable.total_steps
            raise RuntimeError(f"the run has made {self.done} of {total} steps: call step() until `finished`")
        self.stop.close()
        self.checkpoints.close()
        if self.log.skipped_steps >= self.done:  # the same on all ranks
            raise UserError.of_all_ranks(
                f"each of the {self.done} steps was skipped, as a loss or gradient was not finite, so that "
                "nothing was trained: start in another run_dir, with a lower optimizer.lr or with "
                "clip_grad_norm"
            )
        network = self._scored_network()
        scores = self.scores or {}
        scores |= self._final_scores(network)
        summary = self._summary(scores)
        if self.accelerator.is_main_process:
            self._write_result(network, summary)
        for callback in self.callbacks:
            callback.on_end(self, summary)
        if self.accelerator.is_main_process:
            append_end(self.run_dir, "done")  # last, or else the history would contradict a failed status
        self.log.close()
        self.accelerator.wait_for_everyone()
        watchdog.close()
        self.mirror.close(self.settings.collective_timeout_minutes)
        return summary

    def _final_scores(self, network: Trainable) -> dict[str, float]:
        """Score what is measured at the end alone: a linear probe, and retrieval."""
        section = self.settings.evaluate
        keys = [key for key in section.on_bank if key != "knn"]
        if self.bank is None or not keys:
            return {}
        try:
            by_set = evaluate.bank_scores(
                self.accelerator, network, section=section, keys=keys, bank=self.bank, sets=self.eval_sets
            )
        except Exception as error:
            if not self._does_without(error):
                raise
            return {}
        scores: dict[str, float] = {}
        for name, of_set in by_set.items():
            named = metric_names.of_set(name, of_set)
            of_probe = [key for key in of_set if key.startswith("probe_")]
            self.log.write(self.done, metric_names.of_set(name, {key: of_set[key] for key in of_probe}))
            scores |= named
        return scores

    def _does_without(self, error: Exception) -> bool:
        """Whether the run ends without a score that failed, and say so: what was trained is good without it.

        All ranks raise a UserError together; with another error, the others would wait for this rank.
        """
        alone = self.accelerator.num_processes == 1
        if not self.finished or not (isinstance(error, UserError) or alone):
            return False
        if not isinstance(error, UserError):  # a fault of ours, or a full device
            traceback.print_exception(error)
        if self.accelerator.is_main_process or getattr(error, "found_by_one_rank", False):
            reason = in_one_line(error, 500, with_type=not isinstance(error, UserError))
            print(
                f"indistill: {reason}: training has finished, and the result is saved without this score: "
                f"`indistill eval CONFIG {self.run_dir}` tries it again",
                file=sys.stderr,
                flush=True,
            )
        return True

    def _write_result(self, network: Trainable, summary: dict[str, Any]) -> None:
        """Raises UserError, from rank 0 alone, if the disk is full or the files cannot be replaced."""
        try:
            network.save(Path(weights_file(self.settings)), self.settings.student)
            replace_text(self.files.summary, json.dumps(summary, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            mistake = UserError(
                f"run_dir {self.run_dir}: the result cannot be written ({in_one_line(error, 300)}): mend "
                "that, and start again: the run ends from its last checkpoint"
            )
            mistake.found_by_one_rank = True
            raise mistake from None

    def _summary(self, scores: dict[str, float]) -> dict[str, Any]:
        phase_seconds, steps = self.log.phase_seconds, self.timetable.total_steps
        seconds = sum(phase_seconds.values())
        return {
            "step": steps,
            "world_size": self.accelerator.num_processes,
            "seconds": seconds,
            "phase_seconds": phase_seconds,
            "images_per_second": steps * self.timetable.global_batch / max(seconds, 1e-9),
            "metrics": scores,
        }


def record_start(accelerator: Accelerator, run_dir: Path, step: int) -> None:
    """Append this start to the run's history, with the world size, the device and the software."""
    if accelerator.is_main_process:
        device, software = engine.device_name(accelerator.device), software_versions()
        append_start(run_dir, step, world_size=accelerator.num_processes, device=device, software=software)


def evaluation(
    accelerator: Accelerator,
    settings: Config,
    *,
    student: Trainable,
    teacher: Network | None,
    eval_sets: Mapping[str, ImageDataset],
    bank: ImageDataset | None,
) -> list[dict[str, float]]:
    """Measure each set's accuracy, by the classifier and by k-NN, under the names of the log.

    On the first set also measure, beside a teacher, how similar the stages of both networks are, whether
    trained to be or not.
    """
    section = settings.evaluate
    by_set = {
        name: evaluate.accuracy(accelerator, student, one, section.batch) for name, one in eval_sets.items()
    }
    if section.knn is not None and bank is not None:
        neighbours = evaluate.bank_scores(
            accelerator, student, section=section, keys=["knn"], bank=bank, sets=eval_sets
        )
        by_set = {name: scores | neighbours[name] for name, scores in by_set.items()}
    lines = [metric_names.of_set(name, scores) for name, scores in by_set.items()]
    if teacher is not None and section.similarity_samples:
        assert isinstance(student, Network)  # heads hold their teacher themselves and have no other
        pairs = parts.comparable_pairs(settings, teacher.net, student.net)
        first, samples = next(iter(eval_sets.values())), section.similarity_samples
        lines[0] |= evaluate.similarity(accelerator, student, teacher, pairs, first, section.batch, samples)
    return lines


def mean_over_ranks(accelerator: Accelerator, value: Tensor | float) -> float:
    return accelerator.reduce(torch.as_tensor(value, device=accelerator.device), reduction="mean").item()


def step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])
