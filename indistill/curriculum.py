"""Which feature pairs are trained when: a warm-up, one pair at a time from shallow to deep, then KD (2205.10003).

Pure Python: the phase is a function of the position in the run alone, so a resumed run needs no curriculum state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from indistill.config import Config, Duration, UserError, to_steps


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, start <= position < end.

    name is "warmup 1/3", "warmup 2/3", ... or "kd" ("supervised" in a run without a teacher). index is the pair's own
    number, from 0, whether or not earlier pairs are skipped; the last phase's is the number of pairs. pairs holds the
    active pairs, shallow to deep, with one weight each, and is empty in the last phase, whose end is None: it lasts to
    the end of the run.
    """

    name: str
    index: int
    pairs: tuple[int, ...]
    weights: tuple[float, ...]
    start: int | float
    end: int | float | None

    @property
    def upto(self) -> int | None:
        """The deepest active pair, where both forward passes stop; None in kd."""
        return max(self.pairs, default=None)


@dataclass(frozen=True)
class Curriculum:
    """The timetable. Pair i is trained for `alpha + 1 + i` (the paper: alpha = 2, so 3, 4, 5), or for `durations[i]`.

    Positions and durations share the caller's unit: epochs, as the defaults have it, or optimizer steps. Whole steps
    make every boundary exact; fractions of epochs are subject to rounding. A duration of 0 skips its pair.
    Raises ValueError for negative or non-finite values and for a number of durations other than `pairs`.
    """

    pairs: int
    alpha: int = 2
    durations: tuple[int | float, ...] | None = None
    last: str = "kd"  # name of the phase after the warm-up

    def __post_init__(self):
        if self.pairs < 0 or self.alpha < 0:
            raise ValueError(f"curriculum: pairs={self.pairs} and alpha={self.alpha} must not be negative")
        if self.durations is None:
            return
        if len(self.durations) != self.pairs:
            raise ValueError(f"curriculum: {len(self.durations)} durations for {self.pairs} pairs; give one per pair")
        if not all(math.isfinite(duration) and duration >= 0 for duration in self.durations):
            raise ValueError(f"curriculum: durations {self.durations} must be finite and not negative")

    def at(self, position: int | float) -> Phase:
        """The phase at a position >= 0; a boundary belongs to the later phase. ValueError below 0."""
        if not position >= 0:
            raise ValueError(f"curriculum: position {position} is not a number from 0 on")
        return next(phase for phase in self.phases() if phase.end is None or position < phase.end)

    def phases(self) -> tuple[Phase, ...]:
        """The timetable in order, without skipped pairs; kd comes last and has no end."""
        durations = self.durations
        if durations is None:
            durations = tuple(self.alpha + 1 + pair for pair in range(self.pairs))
        phases, start = [], 0
        for pair, duration in enumerate(durations):
            if duration > 0:
                end = start + duration
                phases.append(Phase(f"warmup {pair + 1}/{self.pairs}", pair, (pair,), (1.0,), start, end))
                start = end
        return (*phases, Phase(self.last, self.pairs, (), (), start, None))


@dataclass(frozen=True)
class Timetable:
    """A run in optimizer steps: every duration of its config converted, once."""

    steps_per_epoch: int
    global_batch: int
    total_steps: int
    evaluate_every: int | None
    curriculum: Curriculum

    @classmethod
    def of(cls, settings: Config, steps_per_epoch: int, pairs: int) -> Timetable:
        """Raises UserError if the warm-up does not fit the run, or a duration rounds to no step."""
        batch, warmup = settings.data.global_batch, settings.warmup
        total = to_steps(settings.duration, steps_per_epoch, batch)
        every = settings.evaluate.every and to_steps(settings.evaluate.every, steps_per_epoch, batch, total)
        if total < 1 or every == 0:
            key = "duration" if total < 1 else "evaluate.every"
            raise UserError(f"{key} is less than one step (an epoch has {steps_per_epoch}): raise it")
        durations = [warmup.alpha + 1 + pair for pair in range(pairs)] if warmup else []
        if warmup and warmup.durations is not None:
            durations = warmup.durations
            if len(durations) != pairs:
                raise UserError(f"warmup.durations: {len(durations)} given for {pairs} pairs: give one per pair")
        steps = tuple(to_steps(duration, steps_per_epoch, batch, total) for duration in durations)
        if sum(steps) > total:
            raise UserError(
                f"the warm-up takes {sum(steps)} steps, the whole run (duration) {total}: raise duration, lower "
                "warmup.alpha or set warmup.durations"
            )
        last = "kd" if settings.teacher else "supervised"
        return cls(steps_per_epoch, batch, total, every, Curriculum(pairs, durations=steps, last=last))

    def evaluate_at(self, step: int) -> bool:
        """Whether to evaluate after `step` completed steps: always after the last."""
        return step == self.total_steps or (bool(self.evaluate_every) and step % self.evaluate_every == 0)

    def steps(self, duration: Duration) -> int:
        return to_steps(duration, self.steps_per_epoch, self.global_batch, self.total_steps)
