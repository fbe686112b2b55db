"""The timetable against ones made by hand, and the vocabulary for durations."""

import pytest

from indistill.config import to_steps
from indistill.curriculum import Curriculum, Phase


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": -1}, "negative"),
        ({"pairs": 1, "alpha": -1}, "negative"),
        ({"pairs": 2, "durations": (1,)}, "1 durations for 2 pairs"),
        ({"pairs": 0, "durations": (1,)}, "1 durations for 0 pairs"),
        ({"pairs": 2, "durations": (1, -1)}, "not negative"),
        ({"pairs": 1, "durations": (float("nan"),)}, "finite"),
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


@pytest.mark.parametrize("duration", ["", "epochs", "3 weeks", "-1 steps", -1, "3 epochs 2", "nan", float("inf"), True])
def test_to_steps_names_what_it_does_not_understand(duration):
    with pytest.raises(ValueError, match="'3 epochs', '1000 steps', '1e6 samples', '10 percent'") as error:
        to_steps(duration, steps_per_epoch=100, global_batch=64)
    assert repr(duration) in str(error.value)


def test_percent_needs_the_length_of_the_run():
    with pytest.raises(ValueError, match="'10%'"):
        to_steps("10%", steps_per_epoch=100, global_batch=64)
