"""Students on disjoint groups of ranks train as they would alone, and the teacher sees each image once."""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import (
    EPS,
    LOGGED,
    SMOOTH,
    assert_rounding_explains,
    in_float64,
    losses,
    run_each_alone,
    run_moved,
    run_ranks,
    strayed,
)

from indistill import config
from indistill.commands.cli import main
from indistill.config import runs
from indistill.models.network import Network
from indistill.training import groups
from indistill.training import runs as training_runs
from indistill.training.loop import train

STUDENTS = [
    {"name": "small", "student": {"name": "cnn32_student"}},
    {
        "name": "resnet",
        "student": {"name": "resnet10t", "kwargs": {**SMOOTH, "channels": [8, 8, 16, 16]}},
        "warmup": {
            "curriculum": "sequential",
            "pairs": [[0, 0], [1, 3]],
            "durations": ["3 steps", "6 steps"],
        },
        "kd": {"losses": [{"name": "ce"}, {"name": "at"}, {"name": "pkt"}]},
    },
]


@pytest.fixture
def path(tree, tmp_path):
    tree.pop("student")
    tree |= {"students": copy.deepcopy(STUDENTS), "student_groups": "disjoint", "duration": "18 steps"}
    tree["checkpoint"] = {"every_steps": 4, "keep_last": 9}
    tree["run_dir"] = str(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def run(path: Path, folder: Path) -> None:
    """Train, and record how many images the teacher saw and how many bytes each all-gather sent."""
    recorded: dict[str, Any] = {"images": 0, "sent": []}
    rank, normalise, begin_groups = os.environ["RANK"], Network.normalise, groups._Groups.begin

    def noting_normalise(network, images):
        # But not in an evaluation, nor the black images on which a run begins.
        if not network.training and torch.is_inference_mode_enabled() and images.dtype == torch.uint8:
            recorded["images"] += len(images)
        return normalise(network, images)

    class Noting:
        def __init__(self, group):
            self.group = group

        def allgather(self, parts, sent):
            recorded["sent"].append(sent[0].numel())
            return self.group.allgather(parts, sent)

    Network.normalise = noting_normalise
    groups._Groups.begin = lambda *arguments: Noting(begin_groups(*arguments))
    training_runs.run(runs.load(path))
    assert os.environ["RANK"] == rank
    (folder / f"recorded-{rank}.json").write_text(json.dumps(recorded))


def run_with_a_slow_reader(path: Path) -> None:
    """Train; the last rank reads the other students' results after all else have them."""
    if os.environ["RANK"] == "1":
        gather = groups._Groups.gather

        def late(here, key, value):
            if key == "summary":
                here.store.set(f"summary {here.group}", json.dumps(value))
                time.sleep(3)
            return gather(here, key, value)

        groups._Groups.gather = late
    training_runs.run(runs.load(path))


def test_no_rank_leaves_before_all_have_the_results(path):
    """Rank 0 holds the store, where no launcher does."""
    run_ranks(run_with_a_slow_reader, 2, path)


def alone_moved(path: Path, folder: Path) -> None:
    """Like `run_each_alone`, from slightly changed weights."""
    for name, settings in runs.load(path):
        tree = {**settings.model_dump(mode="json"), "run_dir": str(folder / name)}
        run_moved(lambda tree: train(config.parse(tree, "test")), tree, EPS)


def plainly(function: Callable, *arguments: Any) -> None:
    function(*arguments)


@pytest.mark.portable
@pytest.mark.parametrize(
    ("size", "precision"),
    [
        pytest.param(1, "no", marks=pytest.mark.slow),
        (2, "no"),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
    ],
)
def test_each_student_is_what_it_would_be_alone(path, tmp_path, size, precision):
    """On 2 groups of `size` ranks. The last bits of a convolution depend on the size of its batch."""
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"mixed_precision": precision}))
    in_precision = in_float64 if precision == "no" else plainly
    run_ranks(in_precision, 2 * size, run, path, tmp_path)
    run_ranks(in_precision, size, run_each_alone, path, tmp_path / "alone")
    if precision == "bf16":
        run_ranks(alone_moved, size, path, tmp_path / "alone")
    for name in ("small", "resnet"):
        summary = json.loads((tmp_path / "run" / name / "summary.json").read_text())
        assert summary["world_size"] == size
        ours, expected = losses(tmp_path / "run" / name), losses(tmp_path / "alone" / name)
        assert len(ours) == 18
        if precision == "no":
            assert ours == pytest.approx(expected, rel=LOGGED)
        else:
            assert_rounding_explains(ours, expected, strayed(losses, str(tmp_path / "alone" / name)))
    assert (tmp_path / "run" / "status").read_text() == "done\n"
    for rank in range(2 * size):
        recorded = json.loads((tmp_path / f"recorded-{rank}.json").read_text())
        assert recorded["images"] == 18 * 32 // (2 * size)  # each training image once, over all ranks
        assert len(recorded["sent"]) == 18
        # First the maps of both students' first pair, 8 and 16 channels of 15 x 15. Last the inputs of the
        # losses of KD: logits for the first student; the maps of two stages and the embedding for the other.
        part, width = 32 // (2 * size), 8 if precision == "no" else 2
        assert recorded["sent"][0] == width * part * (8 + 16) * 15 * 15
        assert recorded["sent"][-1] == width * part * (10 + 16 * 15 * 15 + 32 * 6 * 6 + 128)


def test_mixed_images_have_the_targets_that_they_would_have_alone(path, tmp_path):
    tree = yaml.safe_load(path.read_text())
    tree["kd"]["mix"] = {"mixup": 0.8}
    tree["students"][1]["warmup"]["durations"] = ["3 steps", "10 steps"]  # KD begins for both at step 13
    path.write_text(yaml.safe_dump(tree))
    run_ranks(in_float64, 2, run, path, tmp_path)
    run_ranks(in_float64, 1, run_each_alone, path, tmp_path / "alone")
    for name in ("small", "resnet"):
        ours, expected = losses(tmp_path / "run" / name), losses(tmp_path / "alone" / name)
        assert len(ours) == 18
        assert ours == pytest.approx(expected, rel=LOGGED)


def test_groups_go_on_from_a_step_that_both_have(path, tmp_path):
    run_ranks(run, 2, path, tmp_path)
    run_dirs = tmp_path / "run"
    whole = {name: losses(run_dirs / name) for name in ("small", "resnet")}
    for name, steps in (("small", (18, 16)), ("resnet", (18,))):  # as after a kill
        (run_dirs / name / "summary.json").unlink()
        for step in steps:
            (run_dirs / name / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"{name}-{step}")
    run_ranks(run, 2, path, tmp_path)
    assert {name: losses(run_dirs / name) for name in ("small", "resnet")} == whole
    assert len(list((run_dirs / "resnet" / "checkpoints").glob("superseded-step-00000016-*"))) == 1
    assert not list((run_dirs / "small" / "checkpoints").glob("superseded-*"))


def refused(path: Path, folder: Path) -> None:
    with (folder / f"stderr-{os.environ['RANK']}").open("w", buffering=1) as sys.stderr:
        main(["train", str(path)])


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (
            3,
            {},
            "student_groups: disjoint: 3 processes cannot be cut into 2 equal groups: start a multiple of 2",
        ),
        (
            2,
            {"grad_accumulation": 32},
            "1 images of a rank and accumulation step cannot be shared out to 2 teachers",
        ),
        (
            2,
            {"kd": {"losses": [{"name": "ce"}, {"name": "kd"}], "mix": {"mixup": 0.8}}},
            "student_groups: disjoint: KD begins at steps 9 and 13 of the students",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(path, tmp_path, world, overrides, message):
    tree = yaml.safe_load(path.read_text())
    tree["data"]["streams"] = 1 if world == 3 else 8
    path.write_text(yaml.safe_dump(tree | overrides))
    run_ranks(refused, world, path, tmp_path, exit_code=2)
    assert message in (tmp_path / "stderr-0").read_text()
