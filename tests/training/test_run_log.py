"""The record of a run, on a clock that only the test moves."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator

from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.config.run_dir import RunDir
from indistill.curriculum import Curriculum, Timetable
from indistill.data.batch import Batch
from indistill.training import run_log
from indistill.training.run_log import RunLog

NOT_SKIPPED = torch.tensor(False)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_log.time, "perf_counter", clock)
    return clock


@pytest.fixture
def log(tmp_path, clock):
    """Lines every 3 steps; a warm-up of 4 steps, then kd to step 10; 5 steps of 32 images an epoch."""
    timetable = Timetable(5, 32, 10, None, Curriculum(1, durations=(4,)))
    log = RunLog(Accelerator(), RunDir(tmp_path), every_steps=3, timetable=timetable)
    log.open(0)
    return log


def batches(clock, seconds):
    while True:
        clock.now += seconds
        yield Batch(torch.zeros(1), torch.zeros(1), torch.zeros(1), [])


def steps(log, clock, first, last, loss=lambda step: float(step)):
    """Each step waits 3 seconds for its batch and computes for 1."""
    waiting = log.waiting(batches(clock, 3.0))
    for step in range(first, last + 1):
        next(waiting)
        clock.now += 1.0
        log.add({"loss": torch.tensor(loss(step))}, weight=1.0)
        log.end_step(step, log.timetable.curriculum.at(step - 1), lr=0.5, skipped=NOT_SKIPPED)


def lines(log):
    return read_lines(log.files.metrics)


def test_a_line_is_the_mean_of_its_window_which_ends_with_the_phase(log, clock):
    steps(log, clock, 1, 10)
    assert [(line["step"], line["phase"], line["loss"]) for line in lines(log)] == [
        (3, "warmup 1/1", 2.0),  # of 1, 2, 3
        (4, "warmup 1/1", 4.0),
        (6, "kd", 5.5),
        (9, "kd", 8.0),
        (10, "kd", 10.0),
    ]
    assert [line["epoch"] for line in lines(log)] == [0.6, 0.8, 1.2, 1.8, 2.0]


def test_wait_and_throughput_are_those_of_the_steps(log, clock):
    steps(log, clock, 1, 2)
    with log.off_the_clock("evaluating"):
        clock.now += 1000.0  # an evaluation
    steps(log, clock, 3, 4)
    for line in lines(log):
        assert line["data_wait_fraction"] == pytest.approx(0.75)
        assert line["images_per_second"] == pytest.approx(8.0)  # 32 in 4 seconds
    assert log.phase_seconds == {"warmup 1/1": pytest.approx(16.0)}


def test_micro_batches_add_up_to_a_step(log, clock):
    for step in (1, 2, 3):
        for loss in (2.0, 4.0):
            log.add({"loss": torch.tensor(loss), "ce": torch.tensor(2 * loss)}, weight=0.5)
        clock.now += 1.0
        log.end_step(step, log.timetable.curriculum.at(step - 1), lr=0.5, skipped=NOT_SKIPPED)
    assert (lines(log)[0]["loss"], lines(log)[0]["ce"]) == (3.0, 6.0)


def test_skipped_steps_are_counted_and_left_out(log, clock, tmp_path):
    log.max_bad_steps = 3

    def run(log, bad, first, last):
        for step in range(first, last + 1):
            loss = torch.tensor(torch.nan if step in bad else float(step))
            log.add({"loss": loss, "ce": loss}, weight=1.0)
            clock.now += 1.0
            log.end_step(
                step, log.timetable.curriculum.at(step - 1), lr=0.5, skipped=torch.tensor(step in bad)
            )

    run(log, {2, 4, 8}, 1, 8)
    assert [(line["loss"], line["skipped_steps"]) for line in lines(log)] == [(2.0, 1), (None, 2), (5.5, 2)]
    again = RunLog(log.accelerator, RunDir(tmp_path), every_steps=3, timetable=log.timetable, max_bad_steps=1)
    again.restore(json.loads(json.dumps(log.state())))
    again.open(8)
    assert (again.skipped_steps, again.in_a_row) == (2, 1)  # as of the last line, of the last step
    with pytest.raises(
        UserError, match=r"step 9: loss, ce not finite: 2 steps in a row were skipped, .*none yet"
    ):
        run(again, {9}, 9, 9)


def test_a_window_survives_a_checkpoint(log, clock, tmp_path):
    steps(log, clock, 1, 5)
    state = json.loads(json.dumps(log.state()))
    again = RunLog(log.accelerator, RunDir(tmp_path), every_steps=3, timetable=log.timetable)
    again.restore(state)
    assert again.run_id == log.run_id
    again.open(5)
    steps(again, clock, 6, 6)
    assert lines(again)[-1]["loss"] == 5.5  # of 5, before, and 6, after


def test_lines_behind_the_checkpoint_are_dropped(log, clock, tmp_path):
    steps(log, clock, 1, 9)
    with log.files.metrics.open("a") as file:
        file.write('{"step": 10, "lo')  # a kill in the middle of a line
    again = RunLog(log.accelerator, RunDir(tmp_path), every_steps=3, timetable=log.timetable)
    again.open(5)
    assert [line["step"] for line in lines(again)] == [3, 4]


def test_nothing_is_read_from_the_device_between_lines(log, clock, monkeypatch):
    """Only a step that logs may wait for the device: Tensor.item and tolist are the ways to."""
    calls = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda *a, _original=original, _name=name: (calls.append(_name), _original(*a))[1],
        )
    steps(log, clock, 1, 2)
    assert calls == []
    steps(log, clock, 3, 3)
    assert calls == ["tolist"]
