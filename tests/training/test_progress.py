"""What a run shows: lines as a hand writes them, and those of real runs in a terminal and without one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import run_ranks

from indistill.config import runs
from indistill.curriculum import Curriculum, Timetable
from indistill.training import progress
from indistill.training import runs as training_runs

TIMETABLE = Timetable(5004, 256, 500_400, None, Curriculum(3, durations=(15_012, 20_016, 25_020)))
_, WARMUP, _, KD = TIMETABLE.curriculum.phases()
LINE = {
    "step": 25_000,
    "epoch": 4.99600,
    "phase": "warmup 2/3",
    "loss": 0.0123456,
    "mse_pair2": 0.0123456,
    "lr": 0.1,
}
LINE |= {"images_per_second": 2560.0, "data_wait_fraction": 0.034, "bad_samples": 0, "skipped_steps": 0}
IN_KD = LINE | {
    "step": 400_400,
    "epoch": 80.016,
    "phase": "kd",
    "loss": 3.21987,
    "ce": 1.20123,
    "kd": 2.01864,
}


def test_a_plain_line():
    assert progress.plain(LINE, ["mse_pair2"], phase=WARMUP, timetable=TIMETABLE) == (
        "warmup 2/3 (phase 2 of 4)  epoch 5.00/100  step 25000/500400  loss 0.01235  2560 images/s  data "
        "wait 3 %  "
        "left: phase 16:42, run ~13:12:20"  # 10,028 and 475,400 steps, 10 a second
    )
    assert progress.plain(IN_KD, ["ce", "kd"], phase=KD, timetable=TIMETABLE, name="small") == (
        "small  kd (phase 4 of 4)  epoch 80.02/100  step 400400/500400  loss 3.22 (ce 1.201, kd 2.019)  "
        "2560 images/s  data wait 3 %  left: 2:46:40"
    )
    skipped = {key: value for key, value in LINE.items() if key != "mse_pair2"} | {"loss": None}
    assert "  step 25000/500400  every step skipped  2560 images/s" in progress.plain(
        skipped, [], phase=WARMUP, timetable=TIMETABLE
    )


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (
            120,
            "small  [4/4] kd  epoch 80.0  step 400400/500400  loss 3.22  ce 1.2  kd 2.02  2560 img/s  wait "
            "3%  "
            "left 2:46:40",
        ),
        (
            100,
            "small  [4/4] kd  epoch 80.0  step 400400/500400  loss 3.22  2560 img/s  wait 3%  left 2:46:40",
        ),
        (90, "small  [4/4] kd  epoch 80.0  step 400400/500400  loss 3.22  2560 img/s  left 2:46:40"),
        (80, "small  [4/4] kd  step 400400/500400  loss 3.22  2560 img/s  left 2:46:40"),
        (60, "small  [4/4] kd  step 400400/500400  loss 3.22  left 2:46:40"),
        (40, "small  [4/4] kd  step 400400/500400"),
        (10, "step 400400/500400"),  # that tqdm cuts
    ],
)
def test_the_live_line_fits_the_terminal(width, shown):
    live = progress.live(IN_KD, ["ce", "kd"], phase=KD, timetable=TIMETABLE, name="small", width=width)
    assert live.format(n_fmt=400_400, total_fmt=500_400) == shown


def test_the_live_line_of_a_warm_up():
    assert progress.live(LINE, ["mse_pair2"], phase=WARMUP, timetable=TIMETABLE, name="", width=120) == (
        "[2/4] warmup 2/3  epoch 5.0  step {n_fmt}/{total_fmt}  loss 0.0123  2560 img/s  wait 3%  "
        "left 16:42, run ~13:12:20"
    )


def test_a_phase_that_may_end_early_takes_so_long_at_most():
    auto = replace(TIMETABLE, curriculum=replace(TIMETABLE.curriculum, order="auto"))
    assert progress.time_left(LINE, WARMUP, auto) == ("<16:42", "~13:12:20")
    assert progress.time_left(LINE, replace(WARMUP, end=25_000), auto) == ("00:00", "~13:12:20")
    assert progress.time_left(IN_KD, KD, auto) == ("2:46:40", "2:46:40")


def screen(text: str) -> list[str]:
    """The rows that a terminal shows at the end, for what tqdm uses of its language."""
    rows: dict[int, dict[int, str]] = {}
    y = x = 0
    for token in re.findall(r"\x1b\[A|.", text, re.DOTALL):
        match token:
            case "\r":
                x = 0
            case "\n":
                y += 1
            case "\x1b[A":
                y -= 1
            case _:
                rows.setdefault(y, {})[x] = token
                x += 1
    return ["".join(cell for _, cell in sorted(row.items())).strip() for _, row in sorted(rows.items())]


def in_terminal(path: Path, terminal: str) -> None:
    """Train with the standard error on a terminal and the standard output in a file."""
    sys.stderr = os.fdopen(os.open(terminal, os.O_RDWR | os.O_NOCTTY), "w", buffering=1)
    sys.stdout = path.with_name("stdout").open("w")
    training_runs.run(runs.load(path))


def test_students_share_a_terminal(tree, tmp_path):
    """One line each, which the terminal's width can hold; trackers of their own."""
    tree.pop("student")
    tree |= {
        "duration": "6 steps",
        "warmup": {"curriculum": "sequential", "durations": ["2 steps", "2 steps", "1 steps"]},
    }
    tree |= {"evaluate": {"every": "3 steps", "similarity_samples": 0}, "trackers": ["tensorboard"]}
    tree["students"] = [{"name": name, "student": {"name": "cnn32_student"}} for name in ("one", "two")]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    painted = bytearray()

    def read() -> None:
        while block := os.read(ours, 4096):
            painted.extend(block)

    threading.Thread(target=read, daemon=True).start()
    run_ranks(in_terminal, None, path, os.ttyname(theirs))
    text = painted.decode()
    texts = [part.strip() for part in re.split(r"[\r\n]|\x1b\[A", text) if part.strip()]
    assert max(map(len, texts)) <= 100
    left = [row for row in screen(text) if row.startswith(("one", "two"))]
    assert len(left) == 2
    for name, row in zip(("one", "two"), left):
        number = r"[\d.e+-]+"
        assert re.fullmatch(
            rf"{name}  \[4/4\] kd  epoch 1.0  step 6/6  loss {number}  ce {number}  kd {number}  \d+ img/s  "
            r"wait \d+%  left 00:00",
            row,
        )
        warmup = re.compile(rf"{name}  \[2/4\] warmup 2/3  .*left \d\d:\d\d, run ~\d\d:\d\d")
        assert any(warmup.fullmatch(part) for part in texts)
        assert list(Path(tree["run_dir"], name, "tensorboard").glob("events.*"))
    scores = [
        line for line in path.with_name("stdout").read_text().splitlines() if "evaluation at step" in line
    ]
    assert [line.split("  top1")[0] for line in scores] == [
        f"{name}  evaluation at step {step}/6" for step in (3, 6) for name in ("one", "two")
    ]


def test_a_terminal_without_a_size_is_none(monkeypatch):
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        mine = progress.Progress(TIMETABLE)
        mine.open(0)
        assert mine.bar is None
    os.close(ours)


def test_a_log_has_plain_lines_at_a_sane_rate(tree, capsys, monkeypatch):
    """The first line, the ends of phases, scores and the end; between them, one line in 10 seconds."""
    from indistill import config
    from indistill.training.loop import train

    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 600.0)
    train(config.parse(tree | {"evaluate": {"every": "8 steps", "similarity_samples": 0}}, "test"))
    lines = capsys.readouterr().out.splitlines()
    told = [(int(re.search(r"step (\d+)/24", line)[1]), "top1" in line) for line in lines[1:]]
    steps, scores = [[step for step, scored in told if scored == kind] for kind in (False, True)]
    assert steps == [1, 4, 8, 13, 24]
    assert scores == [8, 16, 24]
