"""Which feature pairs are trained when: a warm-up, one pair at a time from shallow to deep, then KD
(2205.10003).

Pure Python: the phase is a function of the position in the run alone, so a resumed run needs no curriculum
state. Only with `warmup.curriculum: auto` do the losses decide where phases end: `Pace` keeps these
boundaries.
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
    """The positions start <= position < end of a run, in which the same losses are trained.

    - name: "warmup 1/3", "warmup 2/3", ... or "kd" ("supervised" in a run without a teacher).
    - index: number of the pair that the phase adds, from 0 (from 1 in the name), counting pairs that are left
      out. The only phase of all_at_once is "warmup 1/1" with index 0; the last phase's index is the number of
      pairs.
    - pairs: the active pairs, shallow to deep; empty in the last phase.
    - weights: the weight of each active pair's loss.
    - end: None in the last phase, which lasts to the end of the run.
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
    """The order and durations of the phases.

    Pair i is trained for `alpha + 1 + i` (the paper has alpha = 2, so 3, 4, 5), or for `durations[i]`.
    Positions and durations have the caller's unit: epochs for the defaults, or optimizer steps. Whole steps
    make every boundary exact; fractions of epochs are subject to rounding. A duration of 0 leaves its pair
    out, in every order. The warm-up has the same length in every order:

    - sequential: one pair at a time, shallow to deep, as in the paper.
    - cumulative: for the duration of pair i, pairs 0 to i together, each with weight 1.
    - reversed: one pair at a time, deep to shallow, each for its own duration.
    - all_at_once: one phase with every pair, each with weight 1, for the sum of the durations.
    - auto: sequential. The durations are upper bounds, which `Pace` replaces by the actual ones.

    Raises ValueError for negative or non-finite values, a number of durations other than `pairs`, an unknown
    order.
    """

    pairs: int
    alpha: int = 2
    durations: tuple[int | float, ...] | None = None
    last: str = "kd"  # name of the phase after the warm-up
    order: Order = "sequential"

    def __post_init__(self) -> None:
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

    @property
    def pair_durations(self) -> tuple[int | float, ...]:
        """How long each pair is trained: `durations`, or those by `alpha`."""
        if self.durations is not None:
            return self.durations
        return tuple(self.alpha + 1 + pair for pair in range(self.pairs))

    def at(self, position: int | float) -> Phase:
        """The phase at a position >= 0; a boundary belongs to the later phase. Raises ValueError below 0."""
        if not position >= 0:
            raise ValueError(f"curriculum: position {position} is not a number from 0 on")
        return next(phase for phase in self.phases() if phase.end is None or position < phase.end)

    def phases(self) -> tuple[Phase, ...]:
        """All phases in order, without pairs that are left out; kd comes last and has no end."""
        durations = self.pair_durations
        trained = [pair for pair, duration in enumerate(durations) if duration > 0]
        plan: list[tuple[tuple[int, ...], int | float]]  # active pairs and duration of each phase
        match self.order:
            case "sequential" | "auto":
                plan = [((pair,), durations[pair]) for pair in trained]
            case "reversed":
                plan = [((pair,), durations[pair]) for pair in reversed(trained)]
            case "cumulative":
                plan = [(tuple(trained[: i + 1]), durations[pair]) for i, pair in enumerate(trained)]
            case "all_at_once":
                plan = [(tuple(trained), sum(durations))] if trained else []

        phases: list[Phase] = []
        start: int | float = 0
        for pairs, duration in plan:
            index, count = (0, 1) if self.order == "all_at_once" else (pairs[-1], self.pairs)
            end = start + duration
            phases.append(Phase(f"warmup {index + 1}/{count}", index, pairs, (1.0,) * len(pairs), start, end))
            start = end
        return (*phases, Phase(self.last, self.pairs, (), (), start, None))


@dataclass(frozen=True)
class Timetable:
    """A run in optimizer steps: all durations of its config, converted once."""

    steps_per_epoch: int
    global_batch: int
    total_steps: int
    evaluate_every: int | None
    curriculum: Curriculum
    notes: tuple[str, ...] = ()  # on what works, and can hardly be meant

    @classmethod
    def of(cls, settings: Config, steps_per_epoch: int, pairs: int) -> Timetable:
        """Convert a config's durations, for a warm-up of `pairs` pairs.

        Raises UserError if the warm-up does not fit the run or its order, a learning rate schedule does not
        fit its phase, a duration rounds to no step, or `profile` is for steps that the run does not have.
        """
        batch = settings.data.global_batch
        total = to_steps(settings.duration, steps_per_epoch, batch)
        every = settings.evaluate.every
        evaluate_every = None if every is None else to_steps(every, steps_per_epoch, batch, total)
        for key, steps in (("duration", total), ("evaluate.every", evaluate_every)):
            if steps is not None and steps < 1:
                raise UserError(f"{key} is less than one step (an epoch has {steps_per_epoch}): raise it")
        if settings.profile is not None and settings.profile.recorded.stop > total:
            raise UserError(
                f"profile: its last step is {settings.profile.recorded.stop}, and the run has {total}: lower "
                "profile.from or profile.steps, or remove the section"
            )
        last = "kd" if settings.has_teacher else "supervised"
        timetable = cls(steps_per_epoch, batch, total, evaluate_every, Curriculum(0, last=last))
        if settings.warmup is not None:
            durations = timetable._warmup_steps(settings.warmup, pairs)
            curriculum = Curriculum(pairs, durations=durations, last=last, order=settings.warmup.curriculum)
            timetable = replace(timetable, curriculum=curriculum)
        return replace(timetable, notes=timetable._check_schedules(settings))

    def _warmup_steps(self, warmup: config.Warmup, pairs: int) -> tuple[int, ...]:
        """Steps of each pair. Raises UserError if the warm-up does not fit the run or its order."""
        if warmup.durations is None:
            steps = self._steps_by_alpha(warmup, pairs)
        else:
            steps = self._listed_steps(warmup.durations, pairs)
        if sum(steps) > self.total_steps:
            raise UserError(
                f"the warm-up takes {sum(steps)} steps, the whole run (duration) {self.total_steps}: raise "
                "duration, lower warmup.alpha or set warmup.durations"
            )
        if warmup.curriculum == "auto" and self.steps(warmup.auto.window) < 1:
            raise UserError(
                f"warmup.auto.window: {warmup.auto.window} is less than one step (an epoch has "
                f"{self.steps_per_epoch}): raise it"
            )
        if warmup.curriculum == "all_at_once" and isinstance(warmup.lr, list):
            raise UserError(
                "warmup.lr: curriculum all_at_once has one phase for all pairs: give one value, not a list"
            )
        if isinstance(warmup.lr, list) and len(warmup.lr) != pairs:
            raise UserError(f"warmup.lr: {len(warmup.lr)} values for {pairs} pairs: give one per pair")
        return steps

    def _steps_by_alpha(self, warmup: config.Warmup, pairs: int) -> tuple[int, ...]:
        """Steps of each pair by `warmup.alpha`, shortened to at most `warmup.at_most` in total."""
        steps = tuple(self.steps(warmup.alpha + 1 + pair) for pair in range(pairs))
        if warmup.at_most is None or sum(steps) <= (most := self.steps(warmup.at_most)):
            return steps
        shortened = tuple(count * most // sum(steps) for count in steps)
        if 0 in shortened:
            raise UserError(
                f"warmup.at_most: {warmup.at_most} are {most} of {self.total_steps} steps, too few for "
                f"{pairs} pairs: raise duration or warmup.at_most, or set warmup.durations"
            )
        return shortened

    def _listed_steps(self, durations: Sequence[Duration], pairs: int) -> tuple[int, ...]:
        """Steps of each pair by `warmup.durations`."""
        if len(durations) != pairs:
            raise UserError(f"warmup.durations: {len(durations)} given for {pairs} pairs: give one per pair")
        steps = tuple(self.steps(duration) for duration in durations)
        for pair, duration in enumerate(durations):
            if steps[pair] == 0 and not _is_zero(duration):
                raise UserError(
                    f"warmup.durations: {duration} for pair {pair + 1} is less than one step (an epoch has "
                    f"{self.steps_per_epoch}): raise it, or give 0 to leave the pair out"
                )
        return steps

    def _check_schedules(self, settings: Config) -> tuple[str, ...]:
        """Describe phases of the warm-up that are too short for the schedule that they inherit, and decays
        after the end of their phase.

        Raises UserError for a phase that is too short for a schedule of its own, or KD for that of the run,
        and for a decay more often than each step.
        """
        notes = []
        for phase in self.curriculum.phases():
            key, section = schedule_of(settings, phase)
            length, rise = len(self.steps_of(phase)), self.steps(section.warmup)
            if section.name == "step" and self.steps(section.decay_every) < 1:
                raise UserError(f"{key}.decay_every: {section.decay_every} is less than one step: raise it")
            if key != "schedule" or not phase.pairs:
                notes += self._late_decays(key, section, phase)
            if not 0 < length < rise:
                continue
            problem = (
                f"{key}.warmup: {section.warmup} are {rise} steps, and the phase {phase.name} has {length}, "
                "so that it never reaches its learning rate"
            )
            if key != "schedule" or not phase.pairs:
                raise UserError(f"{problem}: lower it, or make the phase longer")
            notes.append(f"{problem}: set warmup.schedule, such as {{name: constant}}")
        return tuple(notes)

    def _late_decays(self, key: str, section: config.Schedule, phase: Phase) -> list[str]:
        """Describe the decays of `multistep` that the longest form of a phase does not reach."""
        if section.name != "multistep":
            return []
        starts_early = self.curriculum.order == "auto" and not phase.pairs  # it may, and then takes longer
        length = self.total_steps if starts_early else len(self.steps_of(phase))
        late = [str(time) for time in section.decay_at if self.steps(time) >= length]
        if not late:
            return []
        return [
            f"{key}.decay_at: {', '.join(late)}: from its start, the phase {phase.name} has {length} steps "
            f"(an epoch has {self.steps_per_epoch}), so that the rate does not decay then: lower it"
        ]

    def evaluate_at(self, step: int) -> bool:
        """Whether to evaluate after `step` completed steps: always after the last."""
        if step == self.total_steps:
            return True
        return self.evaluate_every is not None and step % self.evaluate_every == 0

    def steps(self, duration: Duration) -> int:
        """A duration in optimizer steps."""
        return to_steps(duration, self.steps_per_epoch, self.global_batch, self.total_steps)

    def steps_of(self, phase: Phase) -> range:
        """The steps of a phase of this timetable, whose positions are whole steps."""
        return range(int(phase.start), self.total_steps if phase.end is None else int(phase.end))


def schedule_of(settings: Config, phase: Phase) -> tuple[str, config.Schedule]:
    """Return the key and the section of a phase's learning rate schedule: its own, or else the run's."""
    key, section = ("warmup", settings.warmup) if phase.pairs else ("kd", settings.kd)
    if section is None or section.schedule is None:
        return "schedule", settings.schedule
    return f"{key}.schedule", section.schedule


def _is_zero(duration: Duration) -> bool:
    """Whether a valid duration is zero in any unit: its number has no digit but 0 before an exponent."""
    return re.search("[1-9]", str(duration).lower().partition("e")[0]) is None


# --- progressive resolution ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSizes:
    """The size of training images, in pixels a side, as a function of the step alone."""

    first: int
    full: int
    until: int = 0  # step from which images have their full size

    @classmethod
    def of(cls, settings: Config, steps_per_epoch: int) -> ImageSizes:
        """The sizes of a config. Raises UserError if they do not all have a step of the run."""
        section, batch = settings.data.image_size, settings.data.global_batch
        if isinstance(section, int):
            return cls(section, section)
        total = to_steps(settings.duration, steps_per_epoch, batch)
        sizes = cls(section.from_, section.to, to_steps(section.until, steps_per_epoch, batch, total))
        if not sizes.rises <= sizes.until < total:
            raise UserError(
                f"data.image_size.until: {section.until} are {sizes.until} of {total} steps: images of "
                f"{sizes.rises + 1} sizes need from {sizes.rises} to {total - 1}"
            )
        return sizes

    @property
    def rises(self) -> int:
        """How often the size grows; 0 if all images have one size."""
        return (self.full - self.first) // config.SIZE_STEP

    def at(self, step: int) -> int:
        """The size of the images of a global step, from 0."""
        if step >= self.until:
            return self.full
        return self.first + step * self.rises // self.until * config.SIZE_STEP

    def parts(self, phase: Phase, steps: range) -> list[tuple[Phase, int]]:
        """The parts of a phase, which has these steps, in which images have one size, and the sizes."""
        if not self.rises:
            return [(phase, self.full)]
        changes = [-(-rise * self.until // self.rises) for rise in range(1, self.rises + 1)]
        starts = [steps.start, *(step for step in changes if steps.start < step < steps.stop)]
        ends = [*starts[1:], phase.end]
        sizes = map(self.at, starts)
        return [
            (replace(phase, name=f"{phase.name} at {size} px", start=start, end=end), size)
            for start, end, size in zip(starts, ends, sizes)
        ]


# --- pace: phases that end when their loss has flattened ----------------------------------------------------


def flattened(means: Sequence[float], patience: int, tolerance: float) -> bool:
    """Whether a loss has stopped falling, by its means over consecutive windows, oldest first.

    True if the lowest of the last `patience` means is not below the lowest mean before them by more than the
    fraction `tolerance` of it; False while there are no means before them. A loss that falls by the factor f
    per window thus counts as falling while f^patience < 1 - tolerance. Noise makes a loss flatten early
    rather than late: choose windows long enough to average it out. A mean that is not finite counts as
    infinite, so a loss whose means stay infinite has flattened. Losses must be >= 0.
    """
    if len(means) <= patience:
        return False
    heights = [mean if math.isfinite(mean) else math.inf for mean in means]
    before, recent = min(heights[:-patience]), min(heights[-patience:])
    return not recent < before * (1 - tolerance)


class Pace:
    """The curriculum of a run; with `warmup.curriculum: auto`, phases end when their loss has flattened.

    Losses are summed over windows of `warmup.auto.window`, counted from the start of the phase, and read only
    at the end of a window, as a mean over the ranks, so that all ranks decide the same. When the means have
    `flattened`, the next phase starts with the next step, later phases move forward, and KD gets the
    remaining steps. A pair is trained at most for its duration; a window that this cuts short is dropped. In
    any other order the phases stay as they are.

    mean_over_ranks takes the sum of a rank's losses (of the losses' type, or a float) and returns the mean
    over all ranks, the same number on each; it is collective.
    """

    def __init__(
        self, timetable: Timetable, section: config.Warmup | None, mean_over_ranks: Callable[[Any], float]
    ) -> None:
        self.curriculum = timetable.curriculum
        self.mean_over_ranks = mean_over_ranks
        self.auto = section.auto if section and self.curriculum.order == "auto" else None
        self.window_steps = timetable.steps(self.auto.window) if self.auto else 0
        self.means: list[float] = []  # of each complete window of the phase
        self.sum: Any = 0.0  # of losses since the last window's end
        self.steps: Any = 0  # number of these losses

    def end_step(self, done: int, phase: Phase, loss: Any, taken: Any = 1) -> Phase:
        """Record a step of `phase`, after which `done` steps are completed; return the phase, with its end if
        now.

        loss is the step's, detached; that of micro-batches is their mean. If the step was skipped on all
        ranks, loss and `taken` are 0. Both are numbers, or scalars on the device. Call on all ranks, before
        the checkpoint is saved.
        """
        if self.auto is None or not phase.pairs or phase.end is None:
            return phase
        self.sum = self.sum + loss
        self.steps = self.steps + taken
        if done < phase.end and (done - phase.start) % self.window_steps == 0:
            steps = int(self.steps)
            self.means.append(self.mean_over_ranks(self.sum) / steps if steps else math.inf)
            self._clear()
            if flattened(self.means, self.auto.patience, self.auto.tolerance):
                phase = replace(phase, end=done)
                durations = list(self.curriculum.pair_durations)
                durations[phase.index] = done - phase.start
                self.curriculum = replace(self.curriculum, durations=tuple(durations))
        if done == phase.end:
            self.means = []
            self._clear()
        return phase

    def _clear(self) -> None:
        """Begin a window."""
        self.sum = 0.0
        self.steps = 0

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint needs for a resumed run to decide the same. Collective."""
        if self.auto is None:
            return {}
        # Every rank continues with the mean, as it would after a restore: the two do not differ even by a
        # rounding.
        self.sum = self.mean_over_ranks(self.sum)
        self.steps = int(self.steps)
        durations = list(self.curriculum.pair_durations)
        return {"durations": durations, "means": list(self.means), "sum": self.sum, "steps": self.steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the output of `state`."""
        if self.auto is None:
            return
        self.curriculum = replace(self.curriculum, durations=tuple(state["durations"]))
        self.means = list(state["means"])
        self.sum = state["sum"]
        self.steps = state["steps"]
