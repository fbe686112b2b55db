"""What a run reports: `metrics.jsonl`, trackers such as TensorBoard, and one live line.

Losses are summed on the device and read only where a line is logged, so that no other step waits for the device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from indistill.config import Config, UserError
from indistill.config.files import read_lines, replace_text
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Batch
from indistill.distributed import preemption, watchdog
from indistill.training import checkpoint
from indistill.training.progress import Progress
from indistill.training.trackers import Trackers


@dataclass
class Pause:
    seconds: float = 0.0


class RunLog:
    """Collects the terms of each step and writes a line every `every_steps` completed steps and at each phase's end."""

    def __init__(
        self,
        accelerator: Accelerator,
        run_dir: Path,
        every_steps: int,
        timetable: Timetable,
        max_bad_fraction: float = 0.0,
        max_bad_steps: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self.accelerator, self.path = accelerator, run_dir / "metrics.jsonl"
        self.every_steps, self.timetable, self.max_bad_fraction = every_steps, timetable, max_bad_fraction
        self.max_bad_steps = max_bad_steps
        self.terms: dict[str, Tensor] = {}  # of the step under way
        self.names: list[str] = []  # of the terms in the sums: a window lies within a phase
        self.zero = torch.zeros((), device=accelerator.device)
        # Over the steps since the last line: the sum of each term and, last, the number of steps: [T + 1]. First of
        # those that were taken, then of the skipped ones.
        self.sums = self.skipped_sums = self.zero
        self.in_a_row = self.most_in_a_row = (
            self.zero
        )  # skipped steps: up to the last step; the most since a line
        self.timed_steps = 0  # steps that this process ran since the last line, the skipped ones included
        self.skipped_steps = 0  # up to the last line
        self.wait_seconds = 0.0
        self.phase_seconds: dict[str, float] = {}
        self.bad: set[str] = (
            set()
        )  # undecodable samples, by name: this rank's, and all ranks' as of the last line
        self.bad_agreed = 0  # sum over the ranks of len(bad) when they last told each other
        # If the last step was logged, means over the ranks: asked to stop, and seconds per step (preemption.py).
        self.told: tuple[float, float] | None = None
        self.progress = progress or Progress(timetable)
        self.trackers = Trackers(self.progress.say)
        self.run_id = secrets.token_hex(16)  # kept in checkpoints: for trackers that go on with a run
        self.unwritten: list[str] = []  # lines for metrics.jsonl, while the disk is full
        self.clock = self.phase_clock = time.perf_counter()

    def open(self, step: int, settings: Config | None = None) -> None:
        """Begin at `step` completed steps; lines of later steps, left by a run that was killed, are dropped.

        With a config, its trackers begin too.
        """
        self.clock = self.phase_clock = time.perf_counter()
        if not self.accelerator.is_main_process:
            return
        kept = [line for line in read_lines(self.path) if line["step"] <= step] if step else []
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        if settings is not None:
            self.trackers.start(settings, self.run_id, step)
        self.progress.open(step)

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with the time the loop waited for each counted."""
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
        """Detached scalars of one micro-batch, which is `weight` of a step."""
        for name, value in terms.items():
            value = weight * value.float()
            self.terms[name] = self.terms[name] + value if name in self.terms else value

    def end_step(self, step: int, phase: Phase, lr: float, skipped: Tensor) -> dict[str, Any] | None:
        """Record a completed step (`step` of them are now); return its line if one was logged, else None.

        `skipped`, a bool [] on the device and the same on all ranks, leaves its terms out. Raises UserError, on all
        ranks and where a line is logged, when too many in a row were.
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
        self.told = None
        if step % self.every_steps and step != phase.end and step != self.timetable.total_steps:
            return None
        pace = (time.perf_counter() - self.clock) / self.timed_steps
        means, taken, bad, asked, step_seconds = self._agree(step, len(self.bad), preemption.asked(), pace)
        self._agree_on_bad_samples(round(bad * self.accelerator.num_processes))
        self.told = asked, step_seconds
        seconds = time.perf_counter() - self.clock
        line = {
            "step": step,
            "epoch": step / self.timetable.steps_per_epoch,
            "phase": phase.name,
            "loss": None,  # where every step was skipped
            **({name: value / taken for name, value in means.items()} if taken else {}),
            "lr": lr,
            "images_per_second": self.timed_steps * self.timetable.global_batch / seconds,
            "data_wait_fraction": self.wait_seconds / seconds,
            "bad_samples": len(self.bad),
            "skipped_steps": self.skipped_steps,
        }
        self._close_window(phase)
        self._write(line)
        if self.accelerator.is_main_process:
            self.progress.show(line, [name for name in self.names if name in line and name != "loss"], phase)
        return line

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A line beside those of the steps: scores, or what a checkpoint cost."""
        if numbers:
            self._write({"step": step, **numbers})
            if self.accelerator.is_main_process:
                self.progress.scores(step, numbers)

    @contextlib.contextmanager
    def off_the_clock(self, doing: str) -> Iterator[Pause]:
        """Time spent here (evaluation, checkpoints) is not the training step's."""
        pause, begin = Pause(), time.perf_counter()
        watchdog.at(doing)
        yield pause
        watchdog.at("training")
        pause.seconds = time.perf_counter() - begin
        self.clock += pause.seconds
        self.phase_clock += pause.seconds

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for the next line to come out as if nothing had happened. Call on all ranks."""
        device = {name: getattr(self, name) for name in ("sums", "skipped_sums", "in_a_row", "most_in_a_row")}
        return {
            **{
                name: self.accelerator.reduce(value, reduction="mean").tolist()
                for name, value in device.items()
            },
            "names": self.names,
            "phase_seconds": self.phase_seconds,
            "bad": sorted(self.bad),
            "skipped_steps": self.skipped_steps,
            "run_id": self.run_id,
        }

    def restore(self, state: dict[str, Any]) -> None:
        # Every rank takes the mean over the ranks, whose mean over any number of ranks is itself.
        for name in ("sums", "skipped_sums", "in_a_row", "most_in_a_row"):
            setattr(self, name, torch.tensor(state[name], device=self.accelerator.device))
        self.names, self.phase_seconds = state["names"], dict(state["phase_seconds"])
        self.bad, self.bad_agreed = set(state["bad"]), len(state["bad"]) * self.accelerator.num_processes
        self.skipped_steps = state["skipped_steps"]
        self.run_id = state.get("run_id", self.run_id)

    def close(self) -> None:
        self.progress.close()
        self.trackers.finish()

    def _write(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and its numbers to the trackers. A full disk is told, and does not end the run."""
        if not self.accelerator.is_main_process:
            return
        numbers = {
            name: value for name, value in line.items() if isinstance(value, int | float) and name != "step"
        }
        self.trackers.log(numbers, line["step"])
        self.unwritten.append(json.dumps(line) + "\n")
        size = self.path.stat().st_size
        try:
            with self.path.open("a") as file:
                file.writelines(self.unwritten)
        except OSError as error:
            os.truncate(self.path, size)  # no half line, to which the next would be added
            if len(self.unwritten) == 1:
                self.progress.say(f"METRICS NOT WRITTEN, kept for later: {error}")
            return
        self.unwritten.clear()

    def _agree(self, step: int, *numbers: float) -> tuple[dict[str, float], float, ...]:
        """What the line says, in one collective: the means over the ranks of each term's sum, the number of steps that
        were taken, and the means of `numbers`. Raises UserError if too many in a row were skipped.
        """
        numbers = torch.tensor([float(number) for number in numbers], device=self.zero.device)
        parts = self.sums, self.skipped_sums, self.most_in_a_row[None], numbers
        told = iter(self.accelerator.reduce(torch.cat(parts), reduction="mean").tolist())
        (*sums, taken), (*of_skipped, skipped), (in_a_row,), numbers = (
            list(islice(told, len(part))) for part in parts
        )
        self.skipped_steps += round(skipped)
        if in_a_row > self.max_bad_steps:
            terms = [name for name, value in zip(self.names, of_skipped) if not math.isfinite(value)]
            good = max(checkpoint.saved(self.path.parent / "checkpoints"), default="none yet")
            raise UserError(
                f"step {step}: {', '.join(terms) or 'gradient'} not finite: {in_a_row:.0f} steps in a row were "
                f"skipped, more than max_bad_steps ({self.max_bad_steps}); last good checkpoint: {good}: start from "
                "its weights in another run_dir, with a lower optimizer.lr or with clip_grad_norm"
            )
        return dict(zip(self.names, sums)), taken, *numbers

    def _agree_on_bad_samples(self, told: int) -> None:
        """If any rank found a bad sample since the last line (`told` sums their counts), share the names."""
        if told == self.bad_agreed:
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
        now = time.perf_counter()
        self.phase_seconds[phase.name] = self.phase_seconds.get(phase.name, 0.0) + now - self.phase_clock
        self.sums = self.skipped_sums = self.zero
        self.most_in_a_row = self.in_a_row
        self.timed_steps, self.wait_seconds = 0, 0.0
        self.clock = self.phase_clock = now
