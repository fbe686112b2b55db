"""Record steps of a run with torch.profiler, on each rank: the section `profile` of the config.

A step that is recorded is a range with the name of its phase, in the trace and, on GPUs, in NVTX.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from indistill import config
from indistill.config import in_one_line
from indistill.config.files import replace_text
from indistill.config.run_dir import RunDir
from indistill.curriculum import Phase
from indistill.training.callbacks import Callback, TrainingRun

_MOST_ROWS = 10  # of the table


class Profile(Callback):
    """Writes a trace of the recorded steps, and a table of the operations that took longest.

    A run that is asked to stop within these steps writes what it has; the resumed one records the others.
    """

    # torch records once at a time in a process. Students that take turns are all in the profile of the first.
    recording: ClassVar[Profile | None] = None

    def __init__(
        self,
        section: config.Profile,
        files: RunDir,
        rank: int,
        off_the_clock: Callable[[str], contextlib.AbstractContextManager[Any]],
    ) -> None:
        self.steps = section.recorded
        self.files = files
        self.rank = rank
        self.off_the_clock = off_the_clock
        self.on_gpu = torch.cuda.is_available()
        self.first_step = 0  # that is in the profile
        self.step_range = contextlib.ExitStack()

    def on_step_begin(self, run: TrainingRun, phase: Phase) -> None:
        if run.done in self.steps and not self._is_recording():
            self._start(run.done)
        if self._is_recording():
            self.step_range.enter_context(record_function(phase.name))
            if self.on_gpu:
                self.step_range.enter_context(torch.cuda.nvtx.range(phase.name))

    def on_step(self, run: TrainingRun, phase: Phase, line: dict[str, Any] | None) -> None:
        self.step_range.close()
        if run.done == self.steps.stop and self._is_recording():
            self._write(run.done)

    def on_stop(self, run: TrainingRun) -> None:
        if self._is_recording():
            self._write(run.done)

    def _is_recording(self) -> bool:
        return Profile.recording is self

    def _start(self, step: int) -> None:
        other = Profile.recording
        if other is not None and other.files != self.files:
            self.steps = range(0)
            _say(f"{self.files.profile}: the steps are in {other.files.profile}, which is being recorded")
            return
        if other is not None:  # of a start of this run that failed
            other._stop()
        self.first_step = step
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
        )
        self.profiler.start()
        Profile.recording = self
        atexit.register(self._stop)  # a process that ends while torch records ends with a segmentation fault

    def _stop(self) -> None:
        atexit.unregister(self._stop)
        Profile.recording = None
        self.profiler.stop()

    def _write(self, done: int) -> None:
        with self.off_the_clock("writing the profile"):
            self._stop()
            name = f"steps-{self.first_step + 1}-{done}-rank-{self.rank:05d}"
            folder = self.files.profile
            key = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
            table = self.profiler.key_averages().table(sort_by=key, row_limit=_MOST_ROWS)
            try:
                folder.mkdir(exist_ok=True)
                self.profiler.export_chrome_trace(str(folder / f"{name}.json.gz"))
                replace_text(folder / f"{name}.txt", table)
            except (OSError, RuntimeError) as error:
                reason = in_one_line(error, 300)
                _say(f"{folder}: the profile cannot be written ({reason}): the run goes on without it")


def _say(line: str) -> None:
    print(f"indistill: {line}", file=sys.stderr, flush=True)
