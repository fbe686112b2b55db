"""benchmarks/soak.py: what is counted of a run's log and of its readings."""

from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import soak


@pytest.mark.parametrize(
    ("steps", "found"), [([1, 2, 3, 4], 0), ([1, 2, 4], 1), ([1, 2, 2, 3], 1), ([2, 3, 3, 5], 3)]
)
def test_missing_and_repeated_steps_are_counted(tmp_path, steps, found):
    lines = [{"step": step, "loss": 0.5} for step in steps] + [{"step": steps[-1], "top1": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert soak.gaps(tmp_path) == found


def test_the_slope_is_that_of_the_settled_readings():
    """2 MB for each 10,000 steps, 1,000 steps every ten seconds; the first minute grows faster."""
    growing = [
        soak.Reading(second, 100 * second, 50 + 0.02 * second + (second <= 60) * second, 0.0, 5, 3)
        for second in range(0, 600, 10)
    ]
    short = [one for one in growing if one.seconds < 100]
    starts = [soak.Start(readings, 1.0, 0) for readings in (growing, short)]
    assert soak.slopes(starts, "main") == pytest.approx([2.0])
    assert soak.slopes(starts, "threads") == pytest.approx([0.0])


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux only")
def test_memory_of_its_own_is_read():
    before = soak.own_mb(os.getpid())
    with mmap.mmap(-1, 50_000_000) as pages:  # malloc might reuse what is resident already
        pages.write(bytes(50_000_000))
        grown = soak.own_mb(os.getpid()) - before
    assert grown > 45  # and the content that is written, perhaps
