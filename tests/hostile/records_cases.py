"""Records of a run that are huge, or would command the terminal; test_records.py tries many other damages."""

import json
from collections.abc import Callable
from pathlib import Path

import yaml
from hostile import Case, Inputs

SIZE = {"name": "cnn32_student", "parameters": 80_000, "flops": 1_000_000}
SPEED = {
    "seconds": {"student": 0.01},
    "rounds": 3,
    "batch": 8,
    "precision": "no",
    "device": "CPU",
    "torch": "2",
}


def report(change: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    """The arguments that report a run whose networks are known, after `change(run_dir)`."""

    def arguments(inputs: Inputs) -> list[str]:
        run_dir = inputs.folder / "run"
        run_dir.mkdir()
        (run_dir / "config.yaml").write_text(yaml.safe_dump(inputs.tree()))
        (run_dir / "networks.json").write_text(json.dumps({"student": SIZE, "speed": SPEED}))
        change(run_dir)
        return ["report", str(run_dir)]

    return arguments


def huge_log(run_dir: Path) -> None:
    """Lines that each become 20 times as large in memory, and one without end."""
    with (run_dir / "metrics.jsonl").open("w") as file:
        for _ in range(5):
            file.write(f"[{'[],' * 300_000}[]]\n")
        file.truncate(file.tell() + 100_000_000)


def many_phases(run_dir: Path) -> None:
    lines = [json.dumps({"step": i, "loss": 1.0, "phase": f"warmup {i % 2}"}) + "\n" for i in range(10_000)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def huge_summary(run_dir: Path) -> None:
    with (run_dir / "summary.json").open("wb") as file:
        file.truncate(2**40)


CASES = [
    Case("100 MB of metrics", report(huge_log), output="shows its last"),
    Case("a phase for each step", report(many_phases)),
    Case("a summary of 1 TB", report(huge_summary), output="summary.json: cannot be read .Larger than"),
    Case(
        "a record whose key is a command to the terminal",
        report(
            lambda run_dir: (run_dir / "summary.json").write_text(
                '{"step": 1, "metrics": {"\\u001b[2J": []}}'
            )
        ),
        output="summary.json: damaged",
    ),
]
