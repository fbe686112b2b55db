"""The timetable against handmade ones, the vocabulary for durations, and the pace against a plain loop."""

import json
import math

import numpy as np
import pytest
from conftest import EPS

from indistill.config import Warmup, to_steps
from indistill.curriculum import Curriculum, Pace, Phase, Timetable, flattened


def test_the_papers_timetable():
    assert Curriculum(pairs=3).phases() == (
        Phase("warmup 1/3", 0, (0,), (1.0,), 0, 3),
        Phase("warmup 2/3", 1, (1,), (1.0,), 3, 7),
        Phase("warmup 3/3", 2, (2,), (1.0,), 7, 12),
        Phase("kd", 3, (), (), 12, None),
    )


def test_at_walks_the_timetable():
    curriculum = Curriculum(pairs=3, alpha=2)
    by_epoch = [curriculum.at(epoch).index for epoch in range(15)]
    assert by_epoch == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3]
    assert curriculum.at(2.999).name == "warmup 1/3"
    assert curriculum.at(3.0).name == "warmup 2/3"
    assert curriculum.at(10**9).name == "kd"


def test_alpha_moves_every_pair():
    assert [phase.start for phase in Curriculum(pairs=2, alpha=0).phases()] == [0, 1, 3]


def test_durations_in_steps():
    curriculum = Curriculum(pairs=2, durations=(1000, 500))
    assert [curriculum.at(step).name for step in (0, 999, 1000, 1499, 1500)] == [
        *["warmup 1/2"] * 2,
        *["warmup 2/2"] * 2,
        "kd",
    ]
    assert all(isinstance(phase.start, int) for phase in curriculum.phases())


def test_a_duration_of_zero_skips_its_pair():
    curriculum = Curriculum(pairs=3, durations=(2, 0, 1.5))
    assert [(phase.name, phase.pairs, phase.start, phase.end) for phase in curriculum.phases()] == [
        ("warmup 1/3", (0,), 0, 2),
        ("warmup 3/3", (2,), 2, 3.5),
        ("kd", (), 3.5, None),
    ]
    assert curriculum.at(2).pairs == (2,)
    assert Curriculum(pairs=2, durations=(0, 0)).at(0).name == "kd"


def test_no_pairs_means_kd_alone():
    assert Curriculum(pairs=0).phases() == (Phase("kd", 0, (), (), 0, None),)
    assert Curriculum(pairs=0).at(0) == Phase("kd", 0, (), (), 0, None)


def test_cumulative_adds_a_pair_per_phase():
    assert Curriculum(pairs=3, order="cumulative").phases() == (
        Phase("warmup 1/3", 0, (0,), (1.0,), 0, 3),
        Phase("warmup 2/3", 1, (0, 1), (1.0, 1.0), 3, 7),
        Phase("warmup 3/3", 2, (0, 1, 2), (1.0, 1.0, 1.0), 7, 12),
        Phase("kd", 3, (), (), 12, None),
    )


def test_reversed_goes_up_with_each_pairs_own_duration():
    curriculum = Curriculum(pairs=3, order="reversed")
    assert curriculum.phases() == (
        Phase("warmup 3/3", 2, (2,), (1.0,), 0, 5),
        Phase("warmup 2/3", 1, (1,), (1.0,), 5, 9),
        Phase("warmup 1/3", 0, (0,), (1.0,), 9, 12),
        Phase("kd", 3, (), (), 12, None),
    )
    assert [curriculum.at(epoch).upto for epoch in (0, 5, 11, 12)] == [2, 1, 0, None]


def test_all_at_once_is_one_phase():
    assert Curriculum(pairs=3, order="all_at_once").phases() == (
        Phase("warmup 1/1", 0, (0, 1, 2), (1.0, 1.0, 1.0), 0, 12),
        Phase("kd", 3, (), (), 12, None),
    )


def test_auto_begins_as_sequential():
    assert Curriculum(pairs=3, order="auto").phases() == Curriculum(pairs=3).phases()


@pytest.mark.parametrize(
    ("order", "pairs"),
    [
        ("cumulative", [(0,), (0, 2)]),
        ("reversed", [(2,), (0,)]),
        ("all_at_once", [(0, 2)]),
        ("auto", [(0,), (2,)]),
    ],
)
def test_a_duration_of_zero_leaves_its_pair_out_of_every_order(order, pairs):
    phases = Curriculum(pairs=3, durations=(2, 0, 1.5), order=order).phases()
    assert [phase.pairs for phase in phases] == [*pairs, ()]
    assert phases[-1].start == 3.5
    assert all(len(phase.weights) == len(phase.pairs) for phase in phases)
    assert Curriculum(pairs=2, durations=(0, 0), order=order).phases() == (Phase("kd", 2, (), (), 0, None),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": -1}, "negative"),
        ({"pairs": 1, "alpha": -1}, "negative"),
        ({"pairs": 2, "durations": (1,)}, "1 durations for 2 pairs"),
        ({"pairs": 0, "durations": (1,)}, "1 durations for 0 pairs"),
        ({"pairs": 2, "durations": (1, -1)}, "not negative"),
        ({"pairs": 1, "durations": (float("nan"),)}, "finite"),
        ({"pairs": 1, "order": "shuffled"}, "order 'shuffled' is none of sequential, cumulative, reversed"),
    ],
)
def test_impossible_curricula(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**arguments)


@pytest.mark.parametrize("position", [-1, -0.001, float("nan")])
def test_impossible_positions(position):
    with pytest.raises(ValueError, match="position"):
        Curriculum(pairs=3).at(position)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("3 epochs", 300),
        ("1 epoch", 100),
        ("0.5 epochs", 50),
        (" 2.5epochs ", 250),
        (2, 200),
        (0.25, 25),
        ("4", 400),
        (0, 0),
        ("1000 steps", 1000),
        ("1 Step", 1),
        ("1e6 samples", 15625),
        ("96 samples", 2),  # 1.5
        ("95 samples", 1),
        ("1 sample", 0),
        ("10 percent", 50),
        ("10%", 50),
        ("5.8 %", 29),  # 5.8 / 100 * 500 is 28.999... in floats
        ("100 percent", 500),
        ("0.005 epochs", 1),  # halves up
        ("0.015 epochs", 2),
    ],
)
def test_to_steps(duration, steps):
    assert to_steps(duration, steps_per_epoch=100, global_batch=64, total_steps=500) == steps


@pytest.mark.parametrize(
    "duration", ["", "epochs", "3 weeks", "-1 steps", -1, "3 epochs 2", "nan", float("inf"), True]
)
def test_to_steps_names_what_it_does_not_understand(duration):
    with pytest.raises(ValueError, match="'3 epochs', '1000 steps', '1e6 samples', '10 percent'") as error:
        to_steps(duration, steps_per_epoch=100, global_batch=64)
    assert repr(duration) in str(error.value)


def test_percent_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="'10%'"):
        to_steps("10%", steps_per_epoch=100, global_batch=64)


# --- when a loss has flattened ------------------------------------------------------------------------------


def flattens_after(means, patience=3, tolerance=0.01):
    """The number of windows after which the loss counts as flat, None if it never does."""
    return next((n for n in range(1, len(means) + 1) if flattened(means[:n], patience, tolerance)), None)


@pytest.mark.parametrize("patience", [1, 3, 7])
def test_a_steady_fall_is_judged_over_the_patience(patience):
    slowest = -math.log(0.99) / patience  # falls by the tolerance in so many windows
    for rate, expected in ((1.01 * slowest, None), (0.99 * slowest, patience + 1)):
        assert flattens_after([5 * math.exp(-rate * n) for n in range(50)], patience) == expected


def test_a_decay_to_a_floor_flattens_where_the_formula_says():
    floor, height, ratio, patience, tolerance = 0.3, 2.0, 0.8, 3, 0.01
    # floor + height ratio^(m + patience) >= (1 - tolerance) (floor + height ratio^m), solved for m, the last
    # but these
    m = math.log(floor * tolerance / (height * (1 - tolerance - ratio**patience))) / math.log(ratio)
    expected = math.ceil(m) + patience + 1
    assert 20 < expected < 40
    assert flattens_after([floor + height * ratio**n for n in range(60)], patience, tolerance) == expected


@pytest.mark.parametrize("seed", range(20))
def test_noise_below_the_tolerance_hides_neither_the_fall_nor_its_end(seed):
    fall = [0.95**n for n in range(40)]
    noise = 1 + np.random.default_rng(seed).uniform(-0.004, 0.004, size=60)
    after = flattens_after(([*fall] + [fall[-1]] * 20) * noise)
    assert 40 < after <= 40 + 3


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([1.0] * 9, 4),  # flat from the start
        ([1, 2, 3, 4, 5], 4),  # rising
        ([1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5], 7),  # a plateau that the drop ends in time, and the next
        ([1, 1, 1, 1, 0.5], 4),  # one that lasts too long
        ([1, 5, 5, 0.98, 5, 5, 5], 7),  # a rise in between
        ([0.0] * 5, 4),
        ([], None),
        ([1, 1, 1], None),
    ],
)
def test_plateaus(means, expected):
    assert flattens_after(means) == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([None] * 5, 4),
        ([None, 3, 2, 1, 1, 1], None),  # a bad start is forgotten
        ([None, 1, 1, 1, 1], 5),
        ([1, None, None, 0.5, 0.5], None),
        ([1, None, None, None], 4),
        ([4, 3, 2, 1, None, None, None], 7),
    ],
)
def test_a_mean_that_is_not_a_number_is_no_improvement(bad, means, expected):
    assert flattens_after([bad if mean is None else mean for mean in means]) == expected


# --- pace ---------------------------------------------------------------------------------------------------

WINDOW, PATIENCE, TOLERANCE = 7, 2, 0.05
LONGEST = (120, 0, 60, 200)  # steps of each pair; 60 is no multiple of the window
TOTAL = 500


def new_pace(mean_over_ranks=lambda total: float(np.mean(total)), order="auto", window=WINDOW):
    timetable = Timetable(10, 32, TOTAL, None, Curriculum(4, durations=LONGEST, order=order))
    auto = {"window": f"{window} steps", "patience": PATIENCE, "tolerance": TOLERANCE}
    return Pace(timetable, Warmup(curriculum=order, auto=auto), mean_over_ranks)


def loss_curves(ranks=1):
    """float32 [steps of the pair, ranks] for each pair: to a floor, none, a fall throughout, one that is over
    soon.
    """
    t = np.arange(200.0)[:, None]
    noise = 1 + np.random.default_rng(0).uniform(-0.1, 0.1, size=(4, 200, ranks))
    shapes = (0.2 + np.exp(-t / 10), None, np.exp(-t / 30), 0.9 + np.exp(-t / 2))
    return [
        None if shape is None else (shape * noise[i]).astype(np.float32) for i, shape in enumerate(shapes)
    ]


def run(pace, curves, steps=range(TOTAL), save_at=None):
    """What is in force after each step; the state is asked for after `save_at` steps, and comes back from
    JSON.
    """
    trace, saved = [], None
    for step in steps:
        phase = pace.curriculum.at(step)
        loss = curves[phase.index][step - phase.start] if phase.pairs else np.float32(1)
        phase = pace.end_step(step + 1, phase, loss)
        trace.append((phase, list(pace.means), np.mean(pace.sum)))
        if step + 1 == save_at:
            saved = json.loads(json.dumps(pace.state()))
    return trace, saved


def durations_by_hand(curves):
    """A pair ends at the end of a window if none of the last PATIENCE means improved on all of those before
    them.
    """
    durations = []
    for curve, longest in zip(curves, LONGEST):
        duration = 0
        while duration < longest:
            duration = min(duration + WINDOW, longest)
            means = [
                np.mean(curve[i : i + WINDOW], dtype=np.float64)
                for i in range(0, duration - WINDOW + 1, WINDOW)
            ]
            before, recent = means[:-PATIENCE], means[-PATIENCE:]
            if before and not any(all(m < (1 - TOLERANCE) * b for b in before) for m in recent):
                break
        durations.append(duration)
    return durations


def test_auto_moves_on_when_the_loss_has_flattened():
    curves = loss_curves()
    first, second, third, fourth = durations_by_hand(curves)
    assert second == 0
    assert third == 60  # still falling at the most it gets
    assert 2 * WINDOW < first < 120
    assert (PATIENCE + 1) * WINDOW <= fourth < 50
    trace, _ = run(new_pace(), curves)
    ends = np.cumsum([first, third, fourth])
    spans = {phase.name: (phase.start, phase.end) for phase, _, _ in trace}  # as each was when it ended
    assert spans == {
        "warmup 1/4": (0, ends[0]),
        "warmup 3/4": (ends[0], ends[1]),
        "warmup 4/4": (ends[1], ends[2]),
        "kd": (ends[2], None),
    }
    assert [trace[end - 1][0].end for end in ends] == list(ends)  # known after the phase's last step
    assert [phase.index for phase, _, _ in trace] == [0] * first + [2] * third + [3] * fourth + [4] * (
        TOTAL - sum((first, third, fourth))
    )


def test_a_window_starts_with_its_phase():
    curves = loss_curves()
    trace, _ = run(new_pace(), curves)
    for step, (phase, means, total) in enumerate(trace):
        into = step + 1 - phase.start  # steps of the phase so far
        if not phase.pairs or step + 1 == phase.end:
            assert (means, total) == ([], 0)
            continue
        curve = curves[phase.index][:into, 0].astype(np.float64)
        whole = into // WINDOW * WINDOW
        # In float32: an addition a step, then a division.
        assert means == pytest.approx(list(curve[:whole].reshape(-1, WINDOW).mean(axis=1)), rel=WINDOW * EPS)
        assert total == pytest.approx(curve[whole:].sum(), rel=WINDOW * EPS)


class OnDevice:
    """A number that only `read` may look at."""

    def __init__(self, value):
        self.value = value

    def __add__(self, other):
        return OnDevice(self.value + (other.value if isinstance(other, OnDevice) else other))

    __radd__ = __add__

    def __bool__(self):
        raise AssertionError("read")

    __float__ = __lt__ = __gt__ = __eq__ = __bool__
    __hash__ = None


@pytest.mark.parametrize("window", [WINDOW, 6])  # the third pair's 60 steps are 10 windows of 6
def test_a_loss_is_read_at_the_ends_of_windows_only(window):
    reads = []
    curves = [
        None if curve is None else [OnDevice(float(value[0])) for value in curve] for curve in loss_curves()
    ]
    pace = new_pace(lambda total: reads.append(step + 1) or total.value, window=window)
    expected = []
    for step in range(TOTAL):
        phase = pace.curriculum.at(step)
        if phase.pairs and (step + 1 - phase.start) % window == 0 and step + 1 < phase.end:
            expected.append(step + 1)
        pace.end_step(
            step + 1, phase, curves[phase.index][step - phase.start] if phase.pairs else OnDevice(1.0)
        )
    assert reads == expected
    assert len(reads) > 10


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_resumed_run_decides_alike_to_the_bit(ranks):
    curves = loss_curves(ranks)  # a vector of losses is all ranks at once
    never_saved, _ = run(new_pace(), curves)
    for step in [*range(1, 200, 3), 300]:
        whole, saved = run(new_pace(), curves, save_at=step)
        resumed = new_pace()
        resumed.restore(saved)
        rest, _ = run(resumed, curves, range(step, TOTAL))
        assert rest == whole[step:]
        if ranks == 1:
            assert whole == never_saved  # saving changes nothing


def test_another_number_of_ranks_decides_alike():
    curves = loss_curves(ranks=2)
    doubled = [None if curve is None else np.repeat(curve, 2, axis=1) for curve in curves]
    for step in (5, 40, 75):
        whole, saved = run(new_pace(), curves, save_at=step)
        resumed = new_pace()
        resumed.restore(saved)
        rest, _ = run(resumed, doubled, range(step, TOTAL))
        assert [phase for phase, _, _ in rest] == [phase for phase, _, _ in whole[step:]]


def test_a_skipped_step_is_in_no_window():
    """Pair 0 at a constant loss, in windows of 7: one without two of its steps, and one of which nothing is
    left.
    """

    def run(pace, steps):
        for step in steps:
            skipped = step in (1, 3) or 7 <= step < 14
            pace.end_step(
                step + 1, pace.curriculum.at(step), np.float32(0 if skipped else step), taken=not skipped
            )

    pace = new_pace()
    run(pace, range(14))
    assert pace.means == [np.mean([0, 2, 4, 5, 6]), np.inf]
    first = new_pace()
    run(first, range(5))
    again = new_pace()
    again.restore(json.loads(json.dumps(first.state())))
    run(again, range(5, 14))
    assert again.means == pace.means


@pytest.mark.parametrize("order", ["sequential", "cumulative", "reversed", "all_at_once"])
def test_other_orders_keep_to_their_timetable(order):
    pace = new_pace(mean_over_ranks=None, order=order)  # which nobody may call
    before = pace.curriculum
    for step in range(TOTAL):
        phase = pace.curriculum.at(step)
        assert pace.end_step(step + 1, phase, loss=1.0) is phase
    assert pace.state() == {}
    pace.restore({})
    assert pace.curriculum == before == Curriculum(4, durations=LONGEST, order=order)


def test_no_warmup_no_pace():
    pace = Pace(Timetable(10, 32, TOTAL, None, Curriculum(0)), None, mean_over_ranks=None)
    assert pace.end_step(1, pace.curriculum.at(0), loss=1.0).name == "kd"
    assert pace.state() == {}
