"""benchmarks/step.py compares equal things: the same loss by every tool, and each process's own memory."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
from conftest import LOGGED

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import step


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "GPU", False)
    monkeypatch.setattr(step, "SIZE", 64)
    monkeypatch.setattr(step, "PAIRS", {"small": step.Pair("resnet18", "resnet10t", 2, 2)})
    step.save_weights("small", str(tmp_path))
    return step.Job("", "small", "fp32", None, 2, str(tmp_path), None)


@pytest.mark.portable
def test_contestants_compute_the_same_loss(float64, job):
    """Networks and steps in float64; the loss itself is computed in float32."""
    losses = {
        name: step.BY_HAND[name](job)().item()
        for name in ("by hand", "timm task", "timm task, channels_last")
    }
    assert list(losses.values()) == pytest.approx([losses["by hand"]] * 3, rel=LOGGED)
    for stage in (1, 4):
        names = ("by hand", "by hand, every layer", "as published")
        of_stage = [step.BY_HAND[name](job._replace(stage=stage))().item() for name in names]
        assert of_stage == pytest.approx([of_stage[0]] * 3, rel=LOGGED)


def test_fewer_operations_are_counted_where_layers_are_left_out(job, monkeypatch):
    monkeypatch.setattr(step, "_counted", {})
    names = ("by hand", "by hand, every layer", "as published")
    counts = [step.operations(job._replace(contestant=name, stage=1)) for name in names]
    assert counts == sorted(set(counts))
    assert step.operations(job._replace(contestant="by hand")) > counts[0]


def test_verdicts():
    assert step.verdict("speed", 0.97, 0.97).endswith("met")
    assert step.verdict("speed", 0.9, 1.0).endswith("not met, missed by 10.0%")
    assert step.verdict("memory", 1.1, 1.0, most=True).endswith("not met, missed by 10.0%")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_the_peak_of_memory_can_begin_anew(monkeypatch):
    monkeypatch.setattr(step, "GPU", False)
    step.reset_peak()
    before = step.resident("VmRSS")
    with mmap.mmap(-1, 2**26) as pages:  # 64 MiB, freed at once; malloc might reuse what is resident already
        pages.write(bytes(2**26))
    assert step.resident("VmHWM") - before > 2**25
    step.reset_peak()
    assert step.resident("VmHWM") - step.resident("VmRSS") < 2**23
