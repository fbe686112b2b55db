"""Show a run's progress: one live line in a terminal, plain lines at most every 10 seconds in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm

from indistill.config import metric_names
from indistill.curriculum import Phase, Timetable

_PLAIN_SECONDS = 10.0  # between plain lines


class Progress:
    """Shows the logged lines of a run, on rank 0. `name` distinguishes the runs that share a terminal.

    `position` is the terminal's line, counted from 0, for runs in processes that do not know of each other.
    """

    def __init__(self, timetable: Timetable, name: str = "", position: int | None = None) -> None:
        self.timetable, self.name, self.position = timetable, name, position
        self.bar: tqdm | None = None
        self.printed = -float("inf")

    def open(self, step: int) -> None:
        """Start at `step` completed steps, with a live line if there is a terminal."""
        # A terminal without a size, as in some containers, would show nothing.
        if sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno())):
            self.bar = tqdm(
                total=self.timetable.total_steps,
                initial=step,
                position=self.position,
                dynamic_ncols=True,
                bar_format=_row(self.name, "step {n_fmt}/{total_fmt}"),
            )

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def show(self, line: dict[str, Any], terms: Sequence[str], phase: Phase) -> None:
        """Show a line of `metrics.jsonl`; `terms` are the names of the loss's terms in it.

        Without a terminal, print the first line, those that end a phase, and others if 10 seconds have
        passed.
        """
        if self.bar is not None:
            width = self.bar.format_dict["ncols"] or 100
            self.bar.bar_format = live(
                line, terms, phase=phase, timetable=self.timetable, name=self.name, width=width
            )
            self.bar.refresh()
        elif (
            line["step"] in (phase.end, self.timetable.total_steps)
            or time.perf_counter() - self.printed > _PLAIN_SECONDS
        ):
            text = plain(line, terms, phase=phase, timetable=self.timetable, name=self.name)
            self._print(text, sys.stdout)
            self.printed = time.perf_counter()

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Print the accuracies among the scores, which are those of one evaluation set."""
        accuracies = {name: score for name, score in scores.items() if metric_names.is_accuracy(name)}
        texts = [f"{metric_names.split(name)[1]} {100 * one:.2f} %" for name, one in accuracies.items()]
        if texts:
            name, _ = metric_names.split(next(iter(accuracies)))
            title = f"evaluation{f' on {name}' if name else ''} at step {step}/{self.timetable.total_steps}"
            self._print(_row(self.name, title, *texts), sys.stdout)

    def say(self, message: str) -> None:
        """Print a warning above the live line."""
        name = f"{self.name}: " if self.name else ""
        self._print(f"indistill: {name}{message}", sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _print(self, text: str, file: TextIO) -> None:
        # The log may be on the disk that is full.
        with contextlib.suppress(OSError), tqdm.external_write_mode(file):
            print(text, file=file, flush=True)


def plain(
    line: dict[str, Any], terms: Sequence[str], *, phase: Phase, timetable: Timetable, name: str = ""
) -> str:
    """Format a line for a log, with all its parts."""
    number, of = _phase_number(phase, timetable)
    epochs = timetable.total_steps / timetable.steps_per_epoch
    parts = [
        f"{phase.name} (phase {number} of {of})",
        f"epoch {line['epoch']:.2f}/{epochs:.6g}",
        f"step {line['step']}/{timetable.total_steps}",
    ]
    if line["loss"] is None:
        parts.append("every step skipped")
    else:
        values = ", ".join(f"{term} {line[term]:.4g}" for term in _several(terms))
        parts.append(f"loss {line['loss']:.4g}" + (f" ({values})" if values else ""))
    parts += [
        f"{line['images_per_second']:.0f} images/s",
        f"data wait {100 * line['data_wait_fraction']:.0f} %",
    ]
    in_phase, in_run = time_left(line, phase, timetable)
    parts.append(f"left: {in_run}" if phase.end is None else f"left: phase {in_phase}, run {in_run}")
    return _row(name, *parts)


def live(
    line: dict[str, Any], terms: Sequence[str], *, phase: Phase, timetable: Timetable, name: str, width: int
) -> str:
    """Format a line for `width` columns, as a `bar_format` of tqdm, which counts the steps in it.

    A longer line loses its least important parts, but no part is cut: a number would become another number.
    """
    number, of = _phase_number(phase, timetable)
    in_phase, in_run = time_left(line, phase, timetable)
    steps = str(timetable.total_steps)
    all_skipped = line["loss"] is None
    # Each with its rank: the higher, the sooner it is dropped.
    parts = [
        (name, 1),
        (f"[{number}/{of}] {phase.name}", 0),
        (f"epoch {line['epoch']:.1f}", 5),
        (f"step {steps}/{steps}", 0),
        ("skipped" if all_skipped else f"loss {line['loss']:.3g}", 2),
    ]
    if not all_skipped:
        parts += [(f"{term} {line[term]:.3g}", 7 + i) for i, term in enumerate(_several(terms))]
    parts += [
        (f"{line['images_per_second']:.0f} img/s", 4),
        (f"wait {100 * line['data_wait_fraction']:.0f}%", 6),
        (f"left {in_run}" if phase.end is None else f"left {in_phase}, run {in_run}", 3),
    ]
    while len(_row(*(text for text, _ in parts))) > width and len(parts) > 1:
        parts.remove(max(parts, key=lambda part: part[1]))
    return _row(*(text for text, _ in parts)).replace(f"step {steps}/{steps}", "step {n_fmt}/{total_fmt}")


def time_left(line: dict[str, Any], phase: Phase, timetable: Timetable) -> tuple[str, str]:
    """Training time left in the phase and in the run at the line's rate, evaluations excluded.

    `~` marks a time that includes other phases, whose rates differ; `<` marks the most that a phase takes
    which ends when its loss has flattened.
    """
    rate = line["images_per_second"] / timetable.global_batch  # steps a second
    end = timetable.total_steps if phase.end is None else phase.end
    in_phase, in_run = (
        tqdm.format_interval((last - line["step"]) / rate) for last in (end, timetable.total_steps)
    )
    is_last = end >= timetable.total_steps
    if timetable.curriculum.order == "auto" and line["step"] < end and not is_last:
        in_phase = f"<{in_phase}"
    return in_phase, in_run if is_last else f"~{in_run}"


def _phase_number(phase: Phase, timetable: Timetable) -> tuple[int, int]:
    """The phase's number, from 1, and the number of phases."""
    names = [one.name for one in timetable.curriculum.phases()]
    return names.index(phase.name) + 1, len(names)


def _row(*parts: str) -> str:
    return "  ".join(filter(None, parts))


def _several(terms: Sequence[str]) -> Sequence[str]:
    return terms if len(terms) > 1 else ()  # a single one equals the loss
