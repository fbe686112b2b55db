"""The studies in benchmarks/: what the methods train, which runs are due, and the tables of scores."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
import yaml
from conftest import pack_images
from scipy import stats

from indistill import Trainer
from indistill.curriculum import Timetable
from indistill.distributed.preemption import Preempted
from indistill.models.cnn32 import CNN32

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # also for the processes that a study starts
import imagenette_teacher  # noqa: E402
import study  # noqa: E402

STUDIES = sorted((BENCHMARKS / "studies").glob("*.yaml"))
RETRIEVAL = BENCHMARKS / "studies" / "cifar10_retrieval.yaml"


def plan(path: Path, *options: str) -> tuple[list[study.Run], list[study.Run]]:
    return study.plan(study.load(path), study.parse([str(path), *options]))


def settings(run: study.Run) -> Any:
    return Trainer(run.base, *run.overrides()).settings


# --- the studies that are there -----------------------------------------------------------------------------


def timetable(run: study.Run) -> Timetable:
    found = settings(run)
    return Timetable.of(found, steps_per_epoch=390, pairs=3 if found.warmup else 0)


def phases(run: study.Run) -> list[tuple]:
    return [(phase.pairs, phase.start, phase.end) for phase in timetable(run).curriculum.phases()]


@pytest.fixture(scope="module")
def retrieval() -> dict[tuple, study.Run]:
    return {run.key: run for run in plan(RETRIEVAL)[1]}


def test_a_full_run_has_the_authors_phases(retrieval):
    sequential = phases(retrieval["sequential", 0, 70, 0.001])
    assert sequential == [((0,), 0, 1170), ((1,), 1170, 2730), ((2,), 2730, 4680), ((), 4680, None)]
    assert phases(retrieval["random", 0, 70, 0.001]) == sequential
    assert phases(retrieval["pkt", 0, 70, 0.001]) == [((), 0, None)]
    assert phases(retrieval["reversed", 0, 70, 0.001])[0] == ((2,), 0, 1950)
    assert phases(retrieval["all_at_once", 0, 70, 0.001]) == [((0, 1, 2), 0, 4680), ((), 4680, None)]
    assert phases(retrieval["cumulative", 0, 70, 0.001])[1:3] == [
        ((0, 1), 1170, 2730),
        ((0, 1, 2), 2730, 4680),
    ]


def test_all_methods_take_as_many_steps_and_a_tenth_of_the_rate_at_the_same_one(retrieval):
    for (_, seed, epochs, rate), run in retrieval.items():
        found, table = settings(run), timetable(run)
        assert table.total_steps == 390 * epochs
        kd_begins = table.curriculum.phases()[-1].start
        assert kd_begins == pytest.approx(390 * epochs * 12 / 70 if found.warmup else 0, abs=1.5)
        decays = [kd_begins + table.steps(text) for text in found.kd.schedule.decay_at]
        assert decays == pytest.approx([390 * epochs * 60 / 70], abs=2)
        assert (found.seed, found.optimizer.name, found.optimizer.lr, found.kd.lr) == (
            seed,
            "adam",
            0.001,
            rate,
        )
        assert (found.data.global_batch, found.data.augment.recipe, found.data.augment.flip) == (
            128,
            "pad_crop",
            True,
        )


def test_what_each_method_learns_from(retrieval):
    names = {
        method: [loss.name for loss in settings(run).kd.losses]
        for (method, seed, epochs, rate), run in retrieval.items()
        if (seed, epochs, rate) == (0, 70, 0.001)
    }
    assert names.pop("alone") == ["ce"]
    assert names.pop("information_flow") == ["information_flow"]
    assert names.keys() == {"pkt", "sequential", "cumulative", "all_at_once", "reversed", "random"}
    assert all(losses == ["pkt"] for losses in names.values())
    assert settings(retrieval["alone", 0, 70, 0.001]).teacher is None
    assert settings(retrieval["random", 0, 70, 0.001]).warmup.prune.criterion == "random"


def test_the_most_useful_runs_come_first():
    runs = plan(RETRIEVAL)[1]
    assert {(run.seed, run.epochs, run.rate) for run in runs[:4]} == {(0, 70, 0.001)}
    assert {run.method for run in runs[:3]} == {"pkt", "sequential", "cumulative"}
    assert [run.seed for run in runs[:12]] == [0] * 4 + [1] * 4 + [2] * 4


def test_the_weight_of_information_flow_falls_as_far_in_a_shorter_run():
    _, runs = plan(BENCHMARKS / "studies" / "fashionmnist_retrieval.yaml")
    (loss,) = settings(next(run for run in runs if run.method == "information_flow")).kd.losses
    assert loss.init * loss.decay**30 == pytest.approx(100 * 0.7**70, rel=0.01)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_every_study_is_a_valid_config_of_its_own(path):
    prepared, runs = plan(path)
    assert len({run.fingerprint() for run in (*prepared, *runs)}) == len(prepared) + len(runs)
    assert len({run.directory for run in (*prepared, *runs)}) == len(prepared) + len(runs)
    for run in (*prepared, *runs):
        assert settings(run).seed == run.seed


def test_a_method_with_and_without_warmup_differs_in_nothing_else():
    for name in ("cnn", "vit"):
        _, runs = plan(BENCHMARKS / "studies" / f"imagenette_{name}.yaml")
        found = {run.method: settings(run).model_dump() for run in runs if run.seed == 0}
        pairs = {
            "kd": "kd_warmup",
            "dist": "dist_all_at_once",
            "dkd": "dkd_all_at_once",
            "hint": "hint_all_at_once",
        }
        for method, prepared in pairs.items():
            with_warmup = found[prepared]
            assert with_warmup["warmup"] is not None
            assert {**with_warmup, "warmup": None, "run_dir": None} == {**found[method], "run_dir": None}


# --- a small study ------------------------------------------------------------------------------------------

SMALL = {
    "title": "Small",
    "config": "base.yaml",
    "overrides": ["data.root=$data/images", "optimizer.lr=$rate"],
    "baseline": "kd",
    "methods": {
        "kd": {"title": "KD", "overrides": ["warmup=null"]},
        "warm": {"title": "**InDistill**"},
        "alone": {"title": "alone", "overrides": ["teacher=null", "warmup=null", "kd.losses=[{name: ce}]"]},
    },
    "seeds": [0, 1],
    "cells": [{"methods": ["kd", "warm"], "epochs": [2], "rates": [0.001]}],
    "metrics": {"top1": "top-1"},
    "quick": {"epochs": 1},
}


@pytest.fixture
def small(tree, data_dir, tmp_path) -> Callable[..., list[str]]:
    """Write the study, changed by the keywords; returns the options to run it with."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(data_dir)
    tree |= {
        "warmup": {"curriculum": "sequential", "durations": ["2 steps", "2 steps", "2 steps"]},
        "checkpoint": {"every_steps": 3},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))

    def options(**changed: Any) -> list[str]:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**SMALL, **changed}))
        folders = {"data": tmp_path / "data", "runs": tmp_path / "runs", "results": tmp_path / "results"}
        return [str(tmp_path / "small.yaml"), *(f"--{name}={folder}" for name, folder in folders.items())]

    return options


def in_this_process(runs, action, jobs, keep=lambda result: None):
    for run in runs:
        keep(action(run))


@pytest.fixture
def no_processes(monkeypatch):
    monkeypatch.setattr(study, "carry_out", in_this_process)


def refuse(runs, action, jobs, keep=None):
    assert not runs, f"{action.__name__} again: {[run.directory.name for run in runs]}"


def read(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "results" / "small.jsonl").read_text().splitlines()]


def test_runs_in_processes_of_their_own(small, tmp_path, capfd):
    options = small(seeds=[0], cells=[{"methods": ["kd", "alone"], "epochs": [1], "rates": [0.001]}])
    assert study.main([*options, "--jobs", "2"]) == 0
    assert "done: train kd-1epochs-rate0.001-seed0" in capfd.readouterr().out
    lines = read(tmp_path)
    assert sorted(line["method"] for line in lines) == ["alone", "kd"]
    for line in lines:
        summary = tmp_path / "runs" / "small" / f"{line['method']}-1epochs-rate0.001-seed0" / "summary.json"
        assert line["scores"] == json.loads(summary.read_text())["metrics"]
        assert line["cpu_seconds"] > 0
        assert line["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_a_mistake_that_a_run_finds_ends_the_study(small, tmp_path, capfd):
    options = small(overrides=["data.root=$data/images", "data.train=nothing-*.tar"])
    assert study.main(options) == 2
    assert "nothing-*.tar" in capfd.readouterr().err
    assert not (tmp_path / "results" / "small.jsonl").exists()


@pytest.mark.usefixtures("no_processes")
def test_the_lines_alone_are_enough_to_go_on_elsewhere(small, tmp_path, monkeypatch):
    assert study.main(small()) == 0
    assert [(line["method"], line["seed"]) for line in read(tmp_path)] == [
        ("kd", 0), ("warm", 0), ("kd", 1), ("warm", 1),
    ]  # fmt: skip
    text = (tmp_path / "results" / "small.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    options = [*small(), f"--data={tmp_path / 'elsewhere'}", f"--runs={tmp_path / 'other'}"]
    with monkeypatch.context() as patched:
        patched.setattr(study, "carry_out", refuse)
        assert study.main(options) == 0
    assert (tmp_path / "results" / "small.md").read_text() == text

    # One more budget: only its runs are due.
    cells = [{"methods": ["kd"], "epochs": [2, 1], "rates": [0.001]}]
    assert study.main([*small(cells=cells), *options[1:]]) == 0
    assert [(line["method"], line["epochs"]) for line in read(tmp_path)[4:]] == [("kd", 1), ("kd", 1)]


@pytest.mark.usefixtures("no_processes")
def test_a_line_of_other_settings_does_not_count(small, tmp_path, capsys):
    cells = [{"methods": ["kd"], "epochs": [1], "rates": [0.001]}]
    assert study.main(small(seeds=[0], cells=cells)) == 0
    changed = small(seeds=[0], cells=cells, overrides=[*SMALL["overrides"], "optimizer.weight_decay=0.5"])
    assert study.main(changed) == 2
    assert "holds a run of other settings" in capsys.readouterr().err
    assert study.main([*changed, f"--runs={tmp_path / 'other'}"]) == 0
    assert len(read(tmp_path)) == 2
    text = (tmp_path / "results" / "small.md").read_text()
    assert "Left out are 1 more lines" in text
    assert f"| KD | 1 | {100 * read(tmp_path)[1]['scores']['top1']:.2f} |" in text


def test_an_interrupted_run_goes_on_from_its_checkpoint(small):
    options = small()
    run = study.plan(study.load(Path(options[0])), study.parse(options))[1][0]
    with pytest.raises(Preempted):
        Trainer(run.base, *run.overrides(), "max_hours=1e-9").train()
    line = study.train(run)
    starts = [json.loads(text) for text in (run.directory / "history.jsonl").read_text().splitlines()]
    steps = [start["step"] for start in starts if start["event"] == "start"]
    assert len(steps) == 2
    assert 0 < steps[1] < line["steps"] == 12
    # Trained, but stopped before its line was kept: the line is made without training.
    (run.directory / "metrics.jsonl").unlink()
    assert study.train(run) == line
    assert line["cpu_seconds"] is None
    assert not (run.directory / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"baseline": "none"}, "small.yaml: none is not among the methods (alone, kd, warm)"),
        ({"seed": [0]}, "seed: Extra inputs are not permitted"),
        ({"overrides": ["data.root=$images"]}, "kd: unknown variable in its overrides ('images')"),
        ({"overrides": ["data.root=$data/cifar"]}, "name the folder that has it with --data"),
        ({"overrides": ["data.rot=1"]}, "unknown key 'rot'"),
        ({"prepare": {"kd": {"epochs": 1}}}, "kd is a method, and something to prepare"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(small, changed, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "carry_out", lambda *_: pytest.fail("it began"))
    assert study.main(small(**changed)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_damaged_line_is_named(small, tmp_path, capsys):
    options = small()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.jsonl").write_text('{"method": "kd"\n')
    assert study.main(options) == 2
    assert "small.jsonl: line 1 is not a result of a run" in capsys.readouterr().err


# --- tables and plots ---------------------------------------------------------------------------------------


def test_a_paired_difference_and_its_interval():
    own, base = {0: 49.9, 1: 49.6, 2: 49.7, 7: 1.0}, {0: 48.5, 1: 49.0, 2: 48.6, 3: 90.0}
    differences = [own[seed] - base[seed] for seed in (0, 1, 2)]
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    mean = sum(differences) / 3
    assert study.paired(own, base) == f"{mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
    assert study.paired({0: 2.5}, {0: 3.0}) == "-0.50"
    assert study.paired({0: 2.5}, {1: 3.0}) == ""


def test_mean_and_deviation():
    assert study.mean_and_deviation([50.0, 52.0, 57.0]) == "53.00 ± 3.61"  # the root of (9 + 1 + 16) / 2
    assert study.mean_and_deviation([50.0]) == "50.00"
    assert study.mean_and_deviation([]) == ""


def made_up(small, tmp_path: Path, scores: dict[tuple[str, int], list[float]]) -> list[str]:
    """Write a study whose lines have these scores per seed, by method and budget; return its options."""
    methods, epochs = ({key[i] for key in scores} for i in (0, 1))
    cells = [{"methods": sorted(methods), "epochs": sorted(epochs), "rates": [0.001]}]
    options = small(cells=cells)
    (tmp_path / "results").mkdir()
    for run in study.plan(study.load(Path(options[0])), study.parse(options))[1]:
        line = {"method": run.method, "seed": run.seed, "epochs": run.epochs, "rate": run.rate}
        line |= {"fingerprint": run.fingerprint(), "teacher": None, "cpu_seconds": 60.0, "date": "2026-01-01"}
        line |= {"commit": "c", "machine": "m", "versions": {}, "scores": {}}
        line["scores"] = {"top1": scores[run.method, run.epochs][run.seed]}
        study.append(tmp_path / "results" / "small.jsonl", line)
    return options


def test_the_table(small, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carry_out", refuse)
    options = made_up(small, tmp_path, {("kd", 1): [0.5, 0.52], ("warm", 1): [0.53, 0.53]})
    assert study.main(options) == 0
    text = (tmp_path / "results" / "small.md").read_text()
    assert "4 of 4 runs are finished" in text
    assert "| KD | 2 | 51.00 ± 1.41 |  |  | 1.0 |" in text
    half = stats.t.ppf(0.975, 1) * 1.0  # differences 3 and 1: their deviation is the root of 2
    assert (
        f"| **InDistill** | 2 | 53.00 ± 0.00 | +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] | KD | 1.0 |" in text
    )
    assert not (tmp_path / "results" / "small.svg").exists()  # of one budget


def test_the_plot(small, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "carry_out", refuse)
    scores = {("kd", 1): [0.5, 0.5], ("kd", 2): [0.6, 0.6], ("warm", 1): [0.4, 0.4], ("warm", 2): [0.7, 0.7]}
    assert study.main(made_up(small, tmp_path, scores)) == 0
    assert "(small.svg)" in (tmp_path / "results" / "small.md").read_text()
    root = ElementTree.parse(tmp_path / "results" / "small.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"KD", "InDistill", "top-1, %", "epochs", "40", "70"} <= set(texts)
    (inner,) = root.findall("{http://www.w3.org/2000/svg}svg")
    lines = [path.get("d") for path in inner if path.get("class") in ("s0", "s1")]
    heights = [[float(point.split()[1].removesuffix("h0")) for point in d[1:].split("L")] for d in lines]
    assert [len(of_line) for of_line in heights] == [2, 2]
    (kd, warm) = heights  # downwards
    assert warm[0] > kd[0] > kd[1] > warm[1]
    assert (kd[0] - kd[1]) * 3 == pytest.approx(warm[0] - warm[1], abs=1)


# --- Imagenette's teacher -----------------------------------------------------------------------------------


@pytest.mark.portable
def test_the_teachers_ten_logits_are_those_of_its_thousand():
    torch.manual_seed(0)
    whole = timm.create_model("tf_efficientnet_lite0").double().eval()
    package = {f"package.{i}": value for i, value in enumerate(whole.state_dict().values())}
    restricted = timm.create_model("tf_efficientnet_lite0", num_classes=10).double().eval()
    restricted.load_state_dict(imagenette_teacher.convert(package))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = whole(images)[:, [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]]
        torch.testing.assert_close(restricted(images), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="order and shapes"):
        imagenette_teacher.convert(dict(reversed(package.items())))


# --- all studies, on a few random images --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Shards and weights under the names of the real ones: 96 images to train on."""
    root = tmp_path_factory.mktemp("studies")
    for name, size in (("cifar10", 32), ("fashionmnist", 28), ("imagenette", 96), ("tinyimagenet", 64)):
        for split, count in (("train", 96), ("test", 20)):
            pack_images(root / name, split, count, per_shard=count, seed=0, size=size)
            (tar,) = (root / name).glob(f"{split}-*.tar")
            path = root / "data" / name / f"{name}-{split}-0000.tar.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(tar.read_bytes(), compresslevel=1))
    for name, file, network in (
        ("data/published", "auxiliary_cifar10.pt", CNN32((16, 32, 64), 128)),
        (
            "weights",
            "efficientnet_lite0_imagenette.pt",
            timm.create_model("tf_efficientnet_lite0", num_classes=10),
        ),
    ):
        (root / name).mkdir()
        torch.save(network.state_dict(), root / name / file)
    return {name: root / name for name in ("data", "weights")}


@pytest.mark.usefixtures("no_processes")
@pytest.mark.parametrize(
    "path",
    # Those that are left out are as imagenette_cnn and cifar10_heads, with other networks.
    [
        pytest.param(path, marks=() if path.stem == "cifar10_heads" else pytest.mark.slow)
        for path in STUDIES
        if path.stem not in ("imagenette_vit", "tinyimagenet_heads")
    ],
    ids=lambda path: path.stem,
)
def test_the_quick_version_of_a_study(path, folders, tmp_path):
    written = yaml.safe_load(path.read_text())
    written["config"] = str((path.parent / written["config"]).resolve())
    written["quick"]["epochs"] = 1
    left_out = ("dist", "dkd", "vit_")  # they run as others do
    for cells in written["cells"]:
        cells["methods"] = [method for method in cells["methods"] if not method.startswith(left_out)]
    written["quick"]["overrides"] += ["data.global_batch=4", "data.streams=4", "checkpoint.every_steps=null"]
    (tmp_path / path.name).write_text(yaml.safe_dump(written, sort_keys=False))
    options = [f"--{name}={folder}" for name, folder in folders.items()]
    assert study.main([str(tmp_path / path.name), "--quick", f"--runs={tmp_path / 'runs'}", *options]) == 0
    text = (tmp_path / "runs" / f"{path.stem}.md").read_text()
    for name in {name for cells in written["cells"] for name in cells["methods"]}:
        assert f"| {written['methods'][name]['title']} | 1 |" in text
    for name in written.get("prepare", {}):
        assert f"Before them, `{name}` was trained" in text
