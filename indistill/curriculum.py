"""Which feature pairs are trained when: a warm-up, one pair at a time from shallow to deep, then KD (2205.10003).

Pure Python: the phase is a function of the position in the run alone, so a resumed run needs no curriculum state.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Phase:
    """A stretch of the run, start <= position < end.

    name is "warmup 1/3", "warmup 2/3", ... or "kd". index is the pair's own number, from 0, whether or not earlier
    pairs are skipped; the kd phase's is the number of pairs. pairs holds the active pairs, shallow to deep, with one
    weight each, and is empty in kd. end is None where the phase lasts to the end of the run.
    """

    name: str
    index: int
    pairs: tuple[int, ...]
    weights: tuple[float, ...]
    start: int | float
    end: int | float | None


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
        return (*phases, Phase("kd", self.pairs, (), (), start, None))


_DURATION = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*(epochs?|steps?|samples?|percent|%)?", re.IGNORECASE)


def to_steps(
    duration: str | int | float, steps_per_epoch: int, global_batch: int, total_steps: int | None = None
) -> int:
    """A duration in optimizer steps, rounded to the nearest, halves up.

    Accepts "3 epochs", "1000 steps", "1e6 samples", "10 percent" or "10%" (of `total_steps`), each also with a fraction
    or in the singular; a bare number means epochs. Raises ValueError, naming the text, for anything else.
    """
    match = _DURATION.fullmatch(str(duration).strip())
    if match is None:
        raise ValueError(
            f"duration {duration!r} is not understood; write a number of epochs, or a number and a unit: "
            "'3 epochs', '1000 steps', '1e6 samples', '10 percent', '10%'"
        )
    amount = Fraction(match[1])  # exact: 0.29 of 100 steps are 29, not 28.999...
    unit = (match[2] or "epoch").lower().removesuffix("s")
    if unit in ("percent", "%"):
        if total_steps is None:
            raise ValueError(
                f"duration {duration!r} is a share of the run, whose length is not known here; use another unit"
            )
        steps = amount * total_steps / 100
    else:
        steps = amount * {"epoch": steps_per_epoch, "step": 1, "sample": Fraction(1, global_batch)}[unit]
    return math.floor(steps + Fraction(1, 2))
