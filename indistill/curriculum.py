"""Which feature pairs are trained when: a warm-up, one pair at a time from shallow to deep, then KD (2205.10003).

Pure Python: the phase is a function of the position in the run alone, so a resumed run needs no curriculum state. Only
where the losses set the pace (`warmup.curriculum: auto`) are the boundaries found on the way: `Pace` holds those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from indistill import config
from indistill.config import Config, Duration, UserError, to_steps

Order = Literal["sequential", "cumulative", "reversed", "all_at_once", "auto"]


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, start <= position < end.

    name is "warmup 1/3", "warmup 2/3", ... or "kd" ("supervised" in a run without a teacher). index is the own number,
    from 0, of the pair that the phase adds, whether or not other pairs are skipped, and the name counts it from 1. The
    one phase of all_at_once is "warmup 1/1" with index 0; the last phase's index is the number of pairs. pairs holds
    the active pairs, shallow to deep, with one weight each, and is empty in the last phase, whose end is None: it lasts
    to the end of the run.
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
    make every boundary exact; fractions of epochs are subject to rounding. A duration of 0 leaves its pair out, in
    every order. The warm-up is equally long in every order:

    - sequential: one pair at a time, shallow to deep, as in the paper.
    - cumulative: for the duration of pair i, pairs 0 to i together, each with weight 1.
    - reversed: one pair at a time, deep to shallow, each for its own duration.
    - all_at_once: one phase with every pair, each with weight 1, for the sum of the durations.
    - auto: sequential. The durations are upper bounds, which `Pace` replaces by those in force.

    Raises ValueError for negative or non-finite values, a number of durations other than `pairs`, an unknown order.
    """

    pairs: int
    alpha: int = 2
    durations: tuple[int | float, ...] | None = None
    last: str = "kd"  # name of the phase after the warm-up
    order: Order = "sequential"

    def __post_init__(self):
        if self.order not in get_args(Order):
            raise ValueError(f"curriculum: order {self.order!r} is none of {', '.join(get_args(Order))}")
        if self.pairs < 0 or self.alpha < 0:
            raise ValueError(f"curriculum: pairs={self.pairs} and alpha={self.alpha} must not be negative")
        if self.durations is None:
            return
        if len(self.durations) != self.pairs:
            raise ValueError(
                f"curriculum: {len(self.durations)} durations for {self.pairs} pairs; give one per pair"
            )
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
        trained = [pair for pair, duration in enumerate(durations) if duration > 0]
        match self.order:
            case "sequential" | "auto":
                plan = [((pair,), durations[pair]) for pair in trained]
            case "reversed":
                plan = [((pair,), durations[pair]) for pair in reversed(trained)]
            case "cumulative":
                plan = [(tuple(trained[: i + 1]), durations[pair]) for i, pair in enumerate(trained)]
            case "all_at_once":
                plan = [(tuple(trained), sum(durations))] if trained else []

        phases, start = [], 0
        for pairs, duration in plan:
            index, of = (0, 1) if self.order == "all_at_once" else (pairs[-1], self.pairs)
            end = start + duration
            phases.append(Phase(f"warmup {index + 1}/{of}", index, pairs, (1.0,) * len(pairs), start, end))
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
        """Raises UserError if the warm-up does not fit the run or its order, or a duration rounds to no step."""
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
                raise UserError(
                    f"warmup.durations: {len(durations)} given for {pairs} pairs: give one per pair"
                )
        steps = tuple(to_steps(duration, steps_per_epoch, batch, total) for duration in durations)
        for pair, duration in enumerate(durations):
            if steps[pair] == 0 and not _is_zero(duration):
                raise UserError(
                    f"warmup.durations: {duration} for pair {pair + 1} is less than one step (an epoch has "
                    f"{steps_per_epoch}): raise it, or give 0 to leave the pair out"
                )
        if sum(steps) > total:
            raise UserError(
                f"the warm-up takes {sum(steps)} steps, the whole run (duration) {total}: raise duration, lower "
                "warmup.alpha or set warmup.durations"
            )
        order = warmup.curriculum if warmup else "sequential"
        if order == "auto" and to_steps(warmup.auto.window, steps_per_epoch, batch, total) < 1:
            raise UserError(
                f"warmup.auto.window: {warmup.auto.window} is less than one step (an epoch has {steps_per_epoch}): "
                "raise it"
            )
        if order == "all_at_once" and isinstance(warmup.lr, list):
            raise UserError(
                "warmup.lr: curriculum all_at_once has one phase for all pairs: give one value, not a list"
            )
        last = "kd" if settings.teacher else "supervised"
        return cls(
            steps_per_epoch, batch, total, every, Curriculum(pairs, durations=steps, last=last, order=order)
        )

    def evaluate_at(self, step: int) -> bool:
        """Whether to evaluate after `step` completed steps: always after the last."""
        return step == self.total_steps or (bool(self.evaluate_every) and step % self.evaluate_every == 0)

    def steps(self, duration: Duration) -> int:
        return to_steps(duration, self.steps_per_epoch, self.global_batch, self.total_steps)


def _is_zero(duration: Duration) -> bool:
    """Whether a valid duration says none at all, in any unit: its number has no digit but 0 before an exponent."""
    return re.search("[1-9]", str(duration).lower().partition("e")[0]) is None


# --- pace: phases that end when their loss has flattened -------------------------------------------------------------


def flattened(means: Sequence[float], patience: int, tolerance: float) -> bool:
    """Whether a loss has stopped falling, by its means over consecutive windows, oldest first.

    True when the lowest of the last `patience` means is not below the lowest of those before them by more than the
    fraction `tolerance` of it; False while there are none before them. So a loss that falls by the factor f per
    window goes on falling while f^patience < 1 - tolerance. Noise makes it flatten early rather than late: windows are
    to average it out. A mean that is not finite counts as infinitely high: a loss that stays there has flattened.
    Losses are taken to be >= 0.
    """
    if len(means) <= patience:
        return False
    heights = [mean if math.isfinite(mean) else math.inf for mean in means]
    before, recent = min(heights[:-patience]), min(heights[-patience:])
    return not recent < before * (1 - tolerance)


class Pace:
    """The curriculum of a run; with `warmup.curriculum: auto`, phases end when their loss has flattened.

    Losses are summed over windows of `warmup.auto.window`, counted from the start of the phase, and read at a window's
    end only, as a mean over the ranks, so that every rank decides alike. When the means have `flattened`, the next
    phase starts with the next step, what follows moves up, and KD gets the steps that are left over. A pair's duration
    is the most it gets; a window that it cuts short is dropped. In any other order nothing here does anything.

    mean_over_ranks takes what the losses of a rank add up to (of the losses' type, or a float) and returns the mean
    over all ranks, the same number on each: a collective.
    """

    def __init__(
        self, timetable: Timetable, section: config.Warmup | None, mean_over_ranks: Callable[[Any], float]
    ) -> None:
        self.curriculum, self.mean_over_ranks = timetable.curriculum, mean_over_ranks
        self.auto = section.auto if section and self.curriculum.order == "auto" else None
        self.window_steps = timetable.steps(self.auto.window) if self.auto else 0
        self.means: list[float] = []  # one per whole window of the phase
        self.sum: Any = 0.0  # over the steps since the last window's end
        self.steps: Any = 0  # how many those are

    def end_step(self, done: int, phase: Phase, loss: Any, taken: Any = 1) -> Phase:
        """Count a step of `phase`, after which `done` steps are completed; returns the phase, with its end if now.

        loss is the step's, detached; of micro-batches, their mean. If the step was skipped, on all ranks, it is 0, and
        so is `taken`; both are numbers, or scalars on the device. Call on all ranks, before the checkpoint is saved.
        """
        if self.auto is None or not phase.pairs:
            return phase
        self.sum, self.steps = self.sum + loss, self.steps + taken
        if done < phase.end and (done - phase.start) % self.window_steps == 0:
            steps = int(self.steps)
            self.means.append(self.mean_over_ranks(self.sum) / steps if steps else math.inf)
            self.sum, self.steps = 0.0, 0
            if flattened(self.means, self.auto.patience, self.auto.tolerance):
                phase = replace(phase, end=done)
                durations = list(self.curriculum.durations)
                durations[phase.index] = done - phase.start
                self.curriculum = replace(self.curriculum, durations=tuple(durations))
        if done == phase.end:
            self.means, self.sum, self.steps = [], 0.0, 0
        return phase

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold for a resumed run to decide alike. Call on all ranks."""
        if self.auto is None:
            return {}
        # Every rank goes on with the mean, as it would after a restore: the two do not differ even by a rounding.
        self.sum, self.steps = self.mean_over_ranks(self.sum), int(self.steps)
        durations, means = list(self.curriculum.durations), list(self.means)
        return {"durations": durations, "means": means, "sum": self.sum, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        if self.auto is None:
            return
        self.curriculum = replace(self.curriculum, durations=tuple(state["durations"]))
        self.means, self.sum, self.steps = list(state["means"]), state["sum"], state["steps"]
