"""`profile`: trace and table are of the steps that the config names, and the run is the same with them."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import refused, run_ranks

from indistill import config
from indistill.config import runs
from indistill.distributed import preemption
from indistill.training import runs as training_runs
from indistill.training.callbacks import Callback
from indistill.training.loop import train
from indistill.training.profile import Profile


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "profile").iterdir())


def events(run_dir: Path, name: str) -> Counter[str]:
    """How often each event is in a trace."""
    with gzip.open(run_dir / "profile" / f"{name}.json.gz") as file:
        return Counter(event["name"] for event in json.load(file)["traceEvents"] if event.get("ph") == "X")


class StopAt(Callback):
    """Asks the run to stop after a step, or raises there."""

    def __init__(self, step: int, error: Exception | None = None) -> None:
        self.step = step
        self.error = error

    def on_step(self, run: Any, phase: Any, line: Any) -> None:
        if run.done == self.step:
            if self.error:
                raise self.error
            run.stop.reached = lambda *_: True


def trained(
    tree: dict[str, Any], run_dir: Path, callbacks: list[Callback] | None = None, **keys: Any
) -> Path:
    settings = config.parse({**tree, **keys, "run_dir": str(run_dir)}, "test")
    with contextlib.suppress(preemption.Preempted):
        train(settings, callbacks=callbacks or ())
    return run_dir


def test_the_steps_are_in_the_trace_by_phase_and_the_run_is_the_same(tree, tmp_path):
    tree["duration"] = "14 steps"
    plain = trained(tree, tmp_path / "plain")
    assert not (plain / "profile").exists()
    run_dir = trained(tree, tmp_path / "profiled", profile={"from": 3, "steps": 3})
    assert files(run_dir) == ["steps-4-6-rank-00000.json.gz", "steps-4-6-rank-00000.txt"]
    found = events(run_dir, "steps-4-6-rank-00000")
    # Step 4 is the last of the first phase.
    assert (found["warmup 1/3"], found["warmup 2/3"], found["warmup 3/3"]) == (1, 2, 0)
    assert found["Optimizer.step#AdamW.step"] == 3
    table = (run_dir / "profile" / "steps-4-6-rank-00000.txt").read_text()
    rows = [line.split() for line in table.splitlines() if "%" in line and "Self" not in line]
    assert len(rows) == 10
    assert "aten::convolution_backward" in found
    for row in rows:  # which are the slowest depends on the processor
        assert any(name.startswith(row[0].removesuffix("...")) for name in found), row[0]
    shares = [float(next(cell for cell in row if cell.endswith("%"))[:-1]) for row in rows]  # of its own time
    assert shares == sorted(shares, reverse=True)
    for name in ("student.safetensors", "checkpoints/step-00000014/model.safetensors"):
        assert (run_dir / name).read_bytes() == (plain / name).read_bytes()


def test_a_run_that_stops_within_the_steps_records_the_others_when_it_resumes(tree, tmp_path):
    keys = {"duration": "14 steps", "profile": {"from": 3, "steps": 3}}
    run_dir = trained(tree, tmp_path / "run", [StopAt(5)], **keys)
    assert files(run_dir) == ["steps-4-5-rank-00000.json.gz", "steps-4-5-rank-00000.txt"]
    trained(tree, run_dir, **keys)
    assert files(run_dir)[2:] == ["steps-6-6-rank-00000.json.gz", "steps-6-6-rank-00000.txt"]
    assert events(run_dir, "steps-4-5-rank-00000")["Optimizer.step#AdamW.step"] == 2
    assert events(run_dir, "steps-6-6-rank-00000")["Optimizer.step#AdamW.step"] == 1
    assert Profile.recording is None


def test_the_section_may_come_and_change_when_a_run_resumes(tree, tmp_path):
    run_dir = trained(tree, tmp_path / "run", [StopAt(5)], duration="14 steps")
    trained(tree, run_dir, [StopAt(9)], duration="14 steps", profile={"from": 5, "steps": 1})
    trained(tree, run_dir, duration="14 steps", profile={"from": 4, "steps": 10})
    assert [name for name in files(run_dir) if name.endswith("txt")] == [
        "steps-10-14-rank-00000.txt",
        "steps-6-6-rank-00000.txt",
    ]
    assert (run_dir / "summary.json").exists()


def test_a_start_that_failed_while_it_recorded_does_not_keep_the_next_from_it(tree, tmp_path):
    keys = {"duration": "14 steps", "profile": {"from": 3, "steps": 3}}
    with pytest.raises(ZeroDivisionError):
        trained(tree, tmp_path / "run", [StopAt(5, ZeroDivisionError())], **keys)
    assert files(trained(tree, tmp_path / "run", **keys))[0] == "steps-4-6-rank-00000.json.gz"
    assert events(tmp_path / "run", "steps-4-6-rank-00000")["Optimizer.step#AdamW.step"] == 3


def test_a_profile_that_cannot_be_written_costs_the_run_nothing(tree, tmp_path, capfd):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile").write_text("a file")
    (run_dir / "status").write_text("requeue\n")
    trained(tree, run_dir, duration="14 steps", profile={"from": 3, "steps": 1})
    assert "profile: the profile cannot be written (" in capfd.readouterr().err
    assert (run_dir / "summary.json").exists()


@pytest.mark.parametrize("section", [{"from": 22, "steps": 3}, {"from": 24, "steps": 1}, {}])
@pytest.mark.parametrize("command", ["train", "plan"])
def test_steps_that_the_run_does_not_have_are_refused(config_file, tree, capsys, section, command):
    config_file.write_text(json.dumps({**tree, "profile": section}))
    last = section.get("from", 100) + section.get("steps", 5)
    line = refused(capsys, command, config_file)
    assert (
        f"profile: its last step is {last}, and the run has 24: lower profile.from or profile.steps" in line
    )
    assert not list(Path(tree["run_dir"]).glob("checkpoints/*"))


def test_the_last_steps_of_a_run_are_its_own(tree, tmp_path):
    run_dir = trained(tree, tmp_path / "run", duration="14 steps", profile={"from": 12, "steps": 2})
    assert files(run_dir)[0] == "steps-13-14-rank-00000.json.gz"


def test_the_section_is_no_part_of_the_run(tree):
    with_it = config.parse({**tree, "profile": {"from": 1, "steps": 2}}, "test")
    assert config.parse(yaml.safe_load(config.dump(with_it)), "dump") == with_it
    assert config.fingerprint(with_it) == config.fingerprint(config.parse(tree, "test"))


def test_students_that_take_turns_are_in_the_profile_of_the_first(tree, tmp_path, capfd):
    tree |= {"duration": "6 steps", "warmup": None, "profile": {"from": 2, "steps": 2}}
    student = tree.pop("student")
    tree["students"] = [{"name": name, "student": student} for name in ("one", "two")]
    training_runs.run(runs.load(tree))
    names = ["steps-3-4-rank-00000.json.gz", "steps-3-4-rank-00000.txt"]
    assert files(tmp_path / "run" / "one") == names
    assert not (tmp_path / "run" / "two" / "profile").exists()
    # Steps 3 and 4 of the first, and step 3 of the other between them.
    assert events(tmp_path / "run" / "one", "steps-3-4-rank-00000")["Optimizer.step#AdamW.step"] == 3
    line = "two/profile: the steps are in .*one/profile, which is being recorded"
    assert len(re.findall(line, capfd.readouterr().err)) == 1


def test_each_rank_has_files_of_its_own(tree, tmp_path):
    tree |= {"duration": "4 steps", "warmup": None, "profile": {"from": 1, "steps": 2}}
    run_ranks(trained, 2, tree, tmp_path / "run")
    for rank in range(2):
        name = f"steps-2-3-rank-{rank:05d}"
        assert {f"{name}.json.gz", f"{name}.txt"} <= {*files(tmp_path / "run")}
        found = events(tmp_path / "run", name)
        assert (found["kd"], found["Optimizer.step#AdamW.step"]) == (2, 2)
    assert len(files(tmp_path / "run")) == 4
