"""Measure the cost of three students of one teacher at once, compared with three separate runs.

    python benchmarks/students.py [--rounds 7]

See benchmarks/README.md for the method. Prints its table and writes it to benchmarks/results/students.md.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from report import RESULTS, heading, table

TEACHER = "resnet101"
STUDENTS = ("resnet10t", "mobilenetv3_small_100", "regnetx_002")
CLASSES, SIZE, BATCH = 1000, 160, 4
GOAL = 0.6  # of the time of three runs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    text = heading(
        "Several students at once", f"python benchmarks/students.py --rounds {rounds}", ("torch", "timm")
    )
    contestants = [*((student,) for student in STUDENTS), STUDENTS]
    for phase, warmup in (("KD", None), ("the warm-up's third pair", 2)):
        seconds = play(contestants, warmup, rounds)
        medians = [statistics.median(of_one) for of_one in seconds]
        ratio = statistics.median(together / sum(alone) for *alone, together in zip(*seconds))
        rows = [[", ".join(names), f"{1000 * median:.0f}"] for names, median in zip(contestants, medians)]
        rows.append(["sum of the three runs", f"{1000 * sum(medians[:-1]):.0f}"])
        text += f"\n## {phase}\n\n{table([f'students of {TEACHER}', 'ms per step'], rows)}\n"
        verdict = "met" if ratio < GOAL else "not met"
        text += (
            f"Together they take {ratio:.0%} of the time of three runs (goal {verdict}: under {GOAL:.0%}).\n"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "students.md").write_text(text)
    print(text)


def play(contestants: list[tuple[str, ...]], warmup: int | None, rounds: int) -> list[list[float]]:
    """Return CPU seconds per step, by contestant and round. Contestants are processes that take turns."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for names in contestants:
        pipe, other = context.Pipe()
        context.Process(target=work, args=(names, warmup, other), daemon=True).start()
        other.close()
        pipes.append(pipe)
    seconds: list[list[float]] = [[] for _ in contestants]
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        for i in random.sample(range(len(pipes)), len(pipes)):  # nosec B311  # the order of measurements is no secret
            pipes[i].send(True)
            taken = pipes[i].recv()
            if number:  # the first round is a warm-up
                seconds[i].append(taken)
    for pipe in pipes:
        pipe.send(False)
    return seconds


class Stopped(Exception):
    """Raised by the data loader when the parent asks for no more steps."""


def work(names: tuple[str, ...], warmup: int | None, pipe: Connection) -> None:
    """Train these students as a user does, with a loader that repeats one batch and waits for each turn."""
    from indistill import config
    from indistill.data.batch import Batch
    from indistill.training import loop
    from indistill.training.parts import Sources
    from indistill.training.students import Shared, train_students

    torch.set_num_threads(1)
    images = torch.randint(256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    batch = Batch(images, torch.arange(BATCH), torch.arange(BATCH), [])

    class Synthetic:
        steps_per_epoch, fingerprint, dataset = 10**6, "synthetic", None

        def loader(self, *_: Any, **__: Any) -> Iterator[Batch]:
            while pipe.recv():
                begin = time.process_time()
                yield batch
                pipe.send(time.process_time() - begin)
            raise Stopped

    class OneRun(Sources):
        def data(self, *_: Any) -> tuple[Any, None]:
            return Synthetic(), None

    class Several(Shared):
        def data(self, *_: Any) -> tuple[Any, None]:
            self.opened = self.opened or (Synthetic(), None)
            return self.opened

    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "duration": "1e9 steps",
            "data": {
                "train": "none",
                "num_classes": CLASSES,
                "image_size": SIZE,
                "global_batch": BATCH,
                "streams": BATCH,
            },
            "teacher": {"name": TEACHER, "random": True},
            "warmup": None,
            "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
            "optimizer": {"name": "momentum", "lr": 1e-3},
            "checkpoint": {"every_steps": None},
            "trackers": [],
        }
        if warmup is not None:
            shared["warmup"] = {"durations": ["1e9 steps" if pair == warmup else 0 for pair in range(4)]}
            shared["warmup"]["adapter"] = "conv1x1"
        students = [
            (
                name,
                config.parse(
                    {**shared, "run_dir": f"{folder}/{name}", "student": {"name": name}}, "students.py"
                ),
            )
            for name in names
        ]
        with contextlib.suppress(Stopped), contextlib.redirect_stdout(sys.stderr):
            if len(students) > 1:
                train_students(students, shared=Several(students[0][1], len(students)))
            else:
                loop.train(students[0][1], sources=OneRun())


if __name__ == "__main__":
    main()
