"""Report a run: `metrics.jsonl`, trackers such as TensorBoard, and one live line.

Losses are summed on the device and read only when a line is logged, so that no other step waits for the
device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from indistill.config import Config, UserError, records
from indistill.config.files import replacing
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Batch
from indistill.distributed import preemption, watchdog
from indistill.training.progress import Progress
from indistill.training.trackers import Trackers

_ON_DEVICE = ("sums", "skipped_sums", "in_a_row", "most_in_a_row")  # of RunLog


@dataclass
class Pause:
    """How long an `off_the_clock` block took, once it has ended."""

    seconds: float = 0.0


class RunLog:
    """Collects the terms of each step; writes a line every `every_steps` steps and at each phase's end."""

    def __init__(
        self,
        accelerator: Accelerator,
        files: RunDir,
        *,
        timetable: Timetable,
        every_steps: int,
        max_bad_fraction: float = 0.0,
        max_bad_steps: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.files = files
        self.timetable = timetable
        self.every_steps = every_steps
        self.max_bad_fraction = max_bad_fraction
        self.max_bad_steps = max_bad_steps
        self.terms: dict[str, Tensor] = {}  # of the step under way
        self.names: list[str] = []  # of the terms in the sums: a window lies within a phase
        self.zero = torch.zeros((), device=accelerator.device)
        # Sums over the steps since the last line, [T + 1]: of each term and, last, the number of steps.
        self.sums = self.zero  # of the steps that were taken
        self.skipped_sums = self.zero
        self.in_a_row = self.zero  # skipped steps in a row, up to the last step
        self.most_in_a_row = self.zero  # the most since the last line
        self.timed_steps = 0  # steps that this process ran since the last line, the skipped ones included
        self.skipped_steps = 0  # up to the last line
        self.wait_seconds = 0.0
        self.phase_seconds: dict[str, float] = {}
        # Names of undecodable samples: of this rank, and of all ranks as of the last line.
        self.bad: set[str] = set()
        self.bad_agreed = 0  # sum over the ranks of len(bad) when they last exchanged the names
        # If the last step was logged, means over the ranks: asked to stop, and seconds per step
        # (preemption.py).
        self.agreed: tuple[float, float] | None = None
        self.progress = progress or Progress(timetable)
        self.trackers = Trackers(self.progress.say)
        self.run_id = secrets.token_hex(16)  # kept in checkpoints: for trackers that go on with a run
        self.unwritten: list[str] = []  # lines for metrics.jsonl, while the disk is full
        self.clock = self.phase_clock = time.perf_counter()

    def open(self, step: int, settings: Config | None = None) -> None:
        """Begin at `step` completed steps, without the lines of later steps that a killed run has left.

        With a config, its trackers begin too.
        """
        self.clock = self.phase_clock = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        kept = records.lines(self.files.metrics, records.MetricsLine) if step else []
        with replacing(self.files.metrics) as file:
            for line in kept:
                if line["step"] <= step:
                    file.write(f"{json.dumps(line)}\n".encode())
        if settings is not None:
            self.trackers.start(settings, self.run_id, step)
        self.progress.open(step)

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; count how long the loop waits for each, and note samples that were replaced."""
        iterator = iter(batches)
        while True:
            begin = time.perf_counter()
            watchdog.at("waiting for data")
            try:
                batch = next(iterator, None)
            except UserError as error:
                error.found_by_one_rank = True
                raise
            self.wait_seconds += time.perf_counter() - begin
            watchdog.at("training")
            if batch is None:
                return
            for name in batch.replaced:
                if name not in self.bad:
                    self.bad.add(name)
                    self.progress.say(f"replaced by the next of its stream: {name}")
            yield batch

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Add the detached scalars of one micro-batch; `weight` is its share of the step."""
        for name, value in terms.items():
            value = weight * value.float()
            self.terms[name] = self.terms[name] + value if name in self.terms else value

    def end_step(self, step: int, phase: Phase, lr: float, skipped: Tensor) -> dict[str, Any] | None:
        """Record a step, after which `step` are completed; return its line if one is logged, else None.

        `skipped` is a bool [] on the device, the same on all ranks: the terms of a skipped step are left out.
        Raises UserError on all ranks, at a logged step, if too many steps in a row were skipped.
        """
        self.timed_steps += 1
        self.names = list(self.terms)
        values = torch.stack([*self.terms.values(), torch.ones_like(self.zero)])  # [T + 1]
        self.sums = self.sums + values.masked_fill(skipped, 0.0)
        self.skipped_sums = self.skipped_sums + values.masked_fill(~skipped, 0.0)
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        self.terms = {}
        self.progress.step()
        self.agreed = None
        if step % self.every_steps and step != phase.end and step != self.timetable.total_steps:
            return None
        pace = (time.perf_counter() - self.clock) / self.timed_steps
        losses, (bad, asked, step_seconds) = self._agree(step, [len(self.bad), preemption.asked(), pace])
        self._agree_on_bad_samples(round(bad * self.accelerator.num_processes))
        self.agreed = asked, step_seconds
        line = self._line(step, phase, lr, losses)
        self._close_window(phase)
        self._write(line)
        if self.accelerator.is_main_process:
            self.progress.show(line, [name for name in self.names if name in line and name != "loss"], phase)
        return line

    def _line(self, step: int, phase: Phase, lr: float, losses: dict[str, float]) -> dict[str, Any]:
        seconds = time.perf_counter() - self.clock
        return {
            "step": step,
            "epoch": step / self.timetable.steps_per_epoch,
            "phase": phase.name,
            "loss": None,  # stays if every step was skipped
            **losses,
            "lr": lr,
            "images_per_second": self.timed_steps * self.timetable.global_batch / seconds,
            "data_wait_fraction": self.wait_seconds / seconds,
            "bad_samples": len(self.bad),
            "skipped_steps": self.skipped_steps,
        }

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Write a line beside those of the steps: scores, or how long a checkpoint took."""
        if numbers:
            self._write({"step": step, **numbers})
            if self.accelerator.is_main_process:
                self.progress.scores(step, numbers)

    @contextlib.contextmanager
    def off_the_clock(self, doing: str) -> Iterator[Pause]:
        """Leave the time of the block (evaluation, checkpoints) out of that of the training steps."""
        pause = Pause()
        begin = time.perf_counter()
        watchdog.at(doing)
        yield pause
        watchdog.at("training")
        pause.seconds = time.perf_counter() - begin
        self.clock += pause.seconds
        self.phase_clock += pause.seconds

    def state(self) -> dict[str, Any]:
        """Return what the next line depends on, so that a resumed run logs the same. Call on all ranks."""
        means = {
            name: self.accelerator.reduce(getattr(self, name), reduction="mean").tolist()
            for name in _ON_DEVICE
        }
        return {
            **means,
            "names": self.names,
            "phase_seconds": self.phase_seconds,
            "bad": sorted(self.bad),
            "skipped_steps": self.skipped_steps,
            "run_id": self.run_id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned, on any number of ranks."""
        # Every rank takes the mean over the ranks, whose mean over any number of ranks is itself.
        for name in _ON_DEVICE:
            value = torch.tensor(state[name], device=self.accelerator.device)
            if value.dim() and value.shape != (len(state["names"]) + 1,):
                raise ValueError(f"{name} has not one number for each of {state['names']}")
            setattr(self, name, value)
        self.names = state["names"]
        self.phase_seconds = dict(state["phase_seconds"])
        self.bad = set(state["bad"])
        self.bad_agreed = len(self.bad) * self.accelerator.num_processes
        self.skipped_steps = state["skipped_steps"]
        self.run_id = state.get("run_id") or self.run_id

    def close(self) -> None:
        self.progress.close()
        self.trackers.finish()

    def _write(self, line: dict[str, Any]) -> None:
        """Write a line to metrics.jsonl and to the trackers. A full disk is reported, and the run goes on."""
        if not self.accelerator.is_main_process:
            return
        numbers = {
            name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"
        }
        self.trackers.log(numbers, line["step"])
        self.unwritten.append(json.dumps(line) + "\n")
        size = self.files.metrics.stat().st_size
        try:
            with self.files.metrics.open("a") as file:
                file.writelines(self.unwritten)
        except OSError as error:
            os.truncate(self.files.metrics, size)  # without a half line, to which the next would be appended
            if len(self.unwritten) == 1:
                self.progress.say(f"METRICS NOT WRITTEN, kept for later: {error}")
            return
        self.unwritten.clear()

    def _agree(self, step: int, numbers: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        """Return each term's mean over the steps that were taken, {} if none was, and the ranks' means of
        `numbers`.

        All of it takes one collective. Raises UserError if too many steps in a row were skipped.
        """
        extra = torch.tensor([float(number) for number in numbers], device=self.zero.device)
        parts = [self.sums, self.skipped_sums, self.most_in_a_row[None], extra]
        means = iter(self.accelerator.reduce(torch.cat(parts), reduction="mean").tolist())
        *of_taken, taken = islice(means, len(self.sums))
        *of_skipped, skipped = islice(means, len(self.skipped_sums))
        in_a_row = next(means)
        self.skipped_steps += round(skipped)
        if in_a_row > self.max_bad_steps:
            terms = [name for name, value in zip(self.names, of_skipped) if not math.isfinite(value)]
            good = max(self.files.saved_checkpoints(), default="none yet")
            raise UserError(
                f"step {step}: {', '.join(terms) or 'gradient'} not finite: {in_a_row:.0f} steps in a row "
                f"were skipped, more than max_bad_steps ({self.max_bad_steps}); last good checkpoint: "
                f"{good}: start from its weights in another run_dir, with a lower optimizer.lr or with "
                "clip_grad_norm"
            )
        losses = {name: value / taken for name, value in zip(self.names, of_taken)} if taken else {}
        return losses, list(means)

    def _agree_on_bad_samples(self, count: int) -> None:
        """Share the names of bad samples if any rank found one since the last line; `count` sums the ranks'
        counts.

        Raises UserError if there are too many.
        """
        if count == self.bad_agreed:
            return
        self.bad = set(gather_object(sorted(self.bad)))
        self.bad_agreed = len(self.bad) * self.accelerator.num_processes
        samples = self.timetable.steps_per_epoch * self.timetable.global_batch
        if len(self.bad) > self.max_bad_fraction * samples:
            raise UserError(
                f"{len(self.bad)} of {samples} samples cannot be decoded, more than data.max_bad_fraction "
                f"({self.max_bad_fraction}): {'; '.join(sorted(self.bad))}"
            )

    def _close_window(self, phase: Phase) -> None:
        """Begin a new window, after a logged step."""
        now = time.perf_counter()
        self.phase_seconds[phase.name] = self.phase_seconds.get(phase.name, 0.0) + now - self.phase_clock
        self.sums = self.skipped_sums = self.zero
        self.most_in_a_row = self.in_a_row
        self.timed_steps = 0
        self.wait_seconds = 0.0
        self.clock = self.phase_clock = now
