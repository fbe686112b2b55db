"""A chain of three small runs, as a config file and as the configs that its stages are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from indistill import config
from indistill.config import runs


def chain_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a chain of teacher, auxiliary and student: 5, 6 and 7 steps."""
    shared = {key: tree[key] for key in ("run_dir", "data", "optimizer", "log")}
    shared["checkpoint"] = {"every_steps": 2}
    shared["duration"] = "5 steps"
    shared["stages"] = [
        {"name": "teacher", "student": {"name": "cnn32_auxiliary"}},
        {
            "name": "auxiliary",
            "duration": "6 steps",
            "teacher": {"stage": "teacher"},
            "student": {"name": "cnn32_auxiliary"},
            "kd": {"losses": [{"name": "ce"}, {"name": "pkt"}]},
        },
        {
            "name": "student",
            "seed": 3,
            "duration": "7 steps",
            "teacher": {"stage": "auxiliary"},
            "student": {"name": "cnn32_student"},
            "warmup": {"curriculum": "sequential", "durations": ["1 step", "1 step", "2 steps"]},
            "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
            "optimizer": {"lr": 2e-3},
        },
    ]
    return shared


def load(tree: dict[str, Any], *overrides: str) -> list[tuple[str, config.Config]]:
    """Write the tree beside its run directory and read it, as a command does."""
    path = Path(tree["run_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return runs.load(path, overrides)


def plain(chain: dict[str, Any], name: str, **own: Any) -> config.Config:
    """A stage written out by hand, without merging."""
    shared = {key: chain[key] for key in ("data", "optimizer", "log", "checkpoint", "duration")}
    return config.parse({**shared, "run_dir": f"{chain['run_dir']}/{name}", **own}, "test")


def written_out(chain: dict[str, Any]) -> list[tuple[str, config.Config]]:
    """The stages of `chain_of`, written out by hand."""

    def teacher(stage):
        return {"name": "cnn32_auxiliary", "checkpoint": f"{chain['run_dir']}/{stage}/student.safetensors"}

    _, auxiliary, student = chain["stages"]
    return [
        ("teacher", plain(chain, "teacher", student={"name": "cnn32_auxiliary"})),
        (
            "auxiliary",
            plain(
                chain,
                "auxiliary",
                duration="6 steps",
                teacher=teacher("teacher"),
                student={"name": "cnn32_auxiliary"},
                kd=auxiliary["kd"],
            ),
        ),
        (
            "student",
            plain(
                chain,
                "student",
                seed=3,
                duration="7 steps",
                teacher=teacher("auxiliary"),
                student={"name": "cnn32_student"},
                warmup=student["warmup"],
                kd=student["kd"],
                optimizer={"name": "adamw", "lr": 2e-3, "weight_decay": 0.01},
            ),
        ),
    ]
