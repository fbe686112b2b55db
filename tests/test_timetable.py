"""A run in steps: every duration of a config is converted once, and durations that do not fit are refused."""

import pytest

from indistill import config
from indistill.config import UserError
from indistill.curriculum import Timetable


def timetable(tree, steps_per_epoch=100, pairs=3, **changes):
    return Timetable.of(config.parse(tree | changes, "test"), steps_per_epoch, pairs)


def spans(table):
    return [(phase.name, phase.start, phase.end) for phase in table.curriculum.phases()]


def test_the_papers_timetable_in_steps(tree):
    found = timetable(
        tree, steps_per_epoch=390, duration="70 epochs", warmup={"curriculum": "sequential", "alpha": 2}
    )
    assert found.total_steps == 70 * 390
    assert spans(found) == [
        ("warmup 1/3", 0, 3 * 390),
        ("warmup 2/3", 3 * 390, 7 * 390),
        ("warmup 3/3", 7 * 390, 12 * 390),
        ("kd", 12 * 390, None),
    ]


def test_every_unit_in_one_run(tree):
    found = timetable(
        tree,
        duration="2000 steps",
        warmup={"curriculum": "sequential", "durations": ["1.5 epochs", "3200 samples", "10%"]},
        evaluate={"every": "5 percent"},
    )
    assert spans(found) == [
        ("warmup 1/3", 0, 150),
        ("warmup 2/3", 150, 250),  # of 32 samples
        ("warmup 3/3", 250, 450),
        ("kd", 450, None),
    ]
    assert found.evaluate_every == 100
    assert found.steps("5 epochs") == 500
    assert found.steps("1%") == 20
    assert found.steps("64 samples") == 2


def test_a_pair_of_no_duration_is_skipped(tree):
    found = timetable(tree, duration=10, warmup={"curriculum": "sequential", "durations": [1, 0, 1]})
    assert spans(found) == [("warmup 1/3", 0, 100), ("warmup 3/3", 100, 200), ("kd", 200, None)]


@pytest.mark.parametrize("nothing", [0, 0.0, "0 epochs", "0.00 samples", "0e3 steps", "0%", ".0 percent"])
def test_nothing_in_any_unit_skips_its_pair(tree, nothing):
    assert (
        spans(
            timetable(tree, duration=10, warmup={"curriculum": "sequential", "durations": [1, nothing, 1]})
        )[1][0]
        == "warmup 3/3"
    )


@pytest.mark.parametrize(
    "little", [0.001, "1 sample", "15 samples", "0.4 steps", "0.04%", "1e-3 epochs", 1e-7]
)
def test_a_pair_of_less_than_a_step_is_refused(tree, little):
    message = rf"^warmup.durations: {little} for pair 2 is less than one step \(an epoch has 100\)"
    with pytest.raises(UserError, match=message):
        timetable(tree, duration=10, warmup={"curriculum": "sequential", "durations": [1, little, 1]})


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("sequential", [("warmup 1/3", 0, 100), ("warmup 2/3", 100, 150), ("warmup 3/3", 150, 350)]),
        ("cumulative", [("warmup 1/3", 0, 100), ("warmup 2/3", 100, 150), ("warmup 3/3", 150, 350)]),
        ("reversed", [("warmup 3/3", 0, 200), ("warmup 2/3", 200, 250), ("warmup 1/3", 250, 350)]),
        ("all_at_once", [("warmup 1/1", 0, 350)]),
        ("auto", [("warmup 1/3", 0, 100), ("warmup 2/3", 100, 150), ("warmup 3/3", 150, 350)]),
    ],
)
def test_the_order_of_the_curriculum(tree, order, expected):
    found = timetable(tree, duration=10, warmup={"durations": [1, "50 steps", 2], "curriculum": order})
    assert spans(found) == [*expected, ("kd", 350, None)]
    assert found.curriculum.order == order


def test_all_at_once_has_one_learning_rate(tree):
    warmup = {"curriculum": "all_at_once", "durations": [1, 1, 1]}
    with pytest.raises(
        UserError, match=r"^warmup.lr: curriculum all_at_once has one phase.*: give one value"
    ):
        timetable(tree, duration=10, warmup=warmup | {"lr": [0.1, 0.2, 0.3]})
    assert spans(timetable(tree, duration=10, warmup=warmup | {"lr": 0.1}))[-1] == ("kd", 300, None)


def test_the_window_of_auto_is_at_least_a_step(tree):
    for window in ("0 steps", 0.001, "1 sample"):
        warmup = {"curriculum": "auto", "auto": {"window": window}}
        with pytest.raises(
            UserError, match=rf"^warmup.auto.window: {window} is less than one step \(an epoch has 100"
        ):
            timetable(tree, duration=20, warmup=warmup)
    assert timetable(tree, duration=20, warmup=warmup | {"curriculum": "sequential"}).total_steps == 2000


def test_without_warmup_kd_begins_at_once(tree):
    del tree["warmup"]
    assert spans(timetable(tree, pairs=0)) == [("kd", 0, None)]


def test_without_teacher_the_phase_is_called_supervised(tree):
    for key in ("warmup", "teacher", "kd"):
        del tree[key]
    assert spans(timetable(tree, pairs=0)) == [("supervised", 0, None)]


def test_a_warmup_may_fill_the_run_but_not_exceed_it(tree):
    unlimited = {"at_most": None}
    assert spans(timetable(tree, duration="12 epochs", warmup=unlimited))[-1] == ("kd", 1200, None)
    with pytest.raises(
        UserError, match=r"warm-up takes 1200 steps, the whole run \(duration\) 1199: raise duration"
    ):
        timetable(tree, duration="1199 steps", warmup=unlimited)


def test_a_warmup_by_alpha_takes_at_most_a_share_of_the_run(tree):
    """12 epochs are a fifth of 60; in shorter runs the pairs share a fifth as 3 : 4 : 5."""
    assert spans(timetable(tree, duration="60 epochs", warmup={"curriculum": "sequential"}))[-1] == (
        "kd",
        1200,
        None,
    )
    assert spans(timetable(tree, duration="24 epochs", warmup={"curriculum": "sequential"})) == [
        ("warmup 1/3", 0, 120),
        ("warmup 2/3", 120, 280),
        ("warmup 3/3", 280, 480),
        ("kd", 480, None),
    ]
    short = timetable(tree, duration="100 steps", warmup={"curriculum": "sequential", "at_most": "13 steps"})
    assert short.curriculum.durations == (3, 4, 5)  # whole steps, rounded down
    listed = timetable(
        tree, duration="24 epochs", warmup={"curriculum": "sequential", "durations": [3, 4, 5]}
    )
    assert spans(listed)[-1] == ("kd", 1200, None)
    with pytest.raises(
        UserError, match=r"^warmup.at_most: 20 percent are 2 of 10 steps, too few for 3 pairs"
    ):
        timetable(tree, duration="10 steps", warmup={"curriculum": "sequential"})


@pytest.mark.parametrize("count", [0, 2, 4])
def test_one_duration_per_pair(tree, count):
    with pytest.raises(UserError, match=f"warmup.durations: {count} given for 3 pairs: give one per pair"):
        timetable(tree, duration=50, warmup={"curriculum": "sequential", "durations": [1] * count})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (
            {"duration": "0 epochs", "warmup": {"curriculum": "sequential", "durations": [0, 0, 0]}},
            "duration",
        ),
        ({"duration": "0.004 epochs"}, "duration"),
        ({"evaluate": {"every": "0.001 epochs"}}, "evaluate.every"),
        ({"evaluate": {"every": 0}}, "evaluate.every"),
        ({"evaluate": {"every": "1%"}}, "evaluate.every"),  # of 24 steps
    ],
)
def test_durations_of_less_than_a_step_are_refused(tree, changes, key):
    with pytest.raises(UserError, match=rf"^{key} is less than one step \(an epoch has 100\)"):
        timetable(tree, **changes)


def test_when_to_evaluate(tree):
    every_ten = timetable(tree, evaluate={"every": "10 steps"})
    assert [step for step in range(1, 25) if every_ten.evaluate_at(step)] == [10, 20, 24]
    never = timetable(tree)
    assert [step for step in range(1, 25) if never.evaluate_at(step)] == [24]
