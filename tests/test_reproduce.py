"""The reproduction of the paper on CIFAR-10: its methods, its table, and that it goes on where it was stopped."""

import gzip
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import pack_images

from indistill import models
from indistill.curriculum import Timetable

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "reproduce_cifar10.py"


@pytest.fixture(scope="module")
def reproduce():
    spec = importlib.util.spec_from_file_location("reproduce_cifar10", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timetable(settings, steps_per_epoch=390):
    return Timetable.of(settings, steps_per_epoch, pairs=3 if settings.warmup else 0)


def phases(settings):
    return [(phase.pairs, phase.start, phase.end) for phase in timetable(settings).curriculum.phases()]


def settings(reproduce, method, epochs=70, **keywords):
    return reproduce.Run(method, 0, epochs, Path("data"), Path("out"), **keywords).settings()


def test_a_full_run_has_the_authors_phases(reproduce):
    found = settings(reproduce, "indistill_pkt")
    assert phases(found) == [((0,), 0, 1170), ((1,), 1170, 2730), ((2,), 2730, 4680), ((), 4680, None)]
    assert phases(settings(reproduce, "random_pruning")) == phases(found)
    assert phases(settings(reproduce, "pkt")) == [((), 0, None)]
    assert phases(settings(reproduce, "reversed"))[0] == ((2,), 0, 1950)
    assert phases(settings(reproduce, "all_at_once")) == [((0, 1, 2), 0, 4680), ((), 4680, None)]


@pytest.mark.parametrize("epochs", [7, 28, 70])
def test_all_methods_take_as_many_steps_and_a_tenth_of_the_rate_at_the_same_one(reproduce, epochs):
    for method in reproduce.METHODS:
        found = settings(reproduce, method, epochs)
        table = timetable(found)
        assert table.total_steps == 390 * epochs
        kd_begins = table.curriculum.phases()[-1].start
        assert kd_begins in (0, 390 * epochs * 12 // 70)
        assert [kd_begins + table.steps(text) for text in found.kd.schedule.decay_at] == [390 * epochs * 60 // 70]
        assert (found.optimizer.name, found.optimizer.lr, found.kd.lr) == ("adam", 1e-3, 1e-3)
        assert (found.data.global_batch, found.data.augment.recipe, found.data.augment.flip) == (128, "pad_crop", True)


def test_the_weight_of_information_flow_falls_as_far_in_a_shorter_run(reproduce):
    for epochs in (14, 28, 70):
        (loss,) = settings(reproduce, "information_flow", epochs).kd.losses
        assert loss.init * loss.decay**epochs == pytest.approx(100 * 0.7**70, rel=1e-3)


def test_what_each_method_learns_from(reproduce):
    names = {method: [loss.name for loss in settings(reproduce, method).kd.losses] for method in reproduce.METHODS}
    assert names.pop("alone") == ["ce"]
    assert names.pop("information_flow") == ["information_flow"]
    assert names.pop("indistill_kd") == ["ce", "kd"]
    assert set(map(tuple, names.values())) == {("pkt",)}
    assert settings(reproduce, "alone").teacher is None
    assert settings(reproduce, "random_pruning").warmup.prune.criterion == "random"


def test_mean_and_deviation(reproduce):
    scores = [0.5, 0.52, 0.57]
    mean = sum(scores) / 3
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    assert reproduce.mean_and_deviation(scores) == f"{100 * mean:.2f} ± {100 * deviation:.2f}"
    assert reproduce.mean_and_deviation([0.5]) == "50.00"
    assert reproduce.mean_and_deviation([None, None]) == ""


def test_data_that_are_not_there(reproduce, tmp_path, capsys):
    assert reproduce.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "name the folder that has it with DATA or --data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- on a few random images ------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Shards and a teacher under the names of the real ones: 640 images to train on, five steps an epoch."""
    for split, count, shards in (("train", 640, 5), ("test", 40, 1)):
        pack_images(tmp_path / split, "shard", count, per_shard=count // shards, seed=0)
        for number, tar in enumerate(sorted((tmp_path / split).glob("*.tar"))):
            path = tmp_path / "data" / "cifar10" / f"cifar10-{split}-{number:04d}.tar.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(tar.read_bytes(), compresslevel=1))
    (tmp_path / "data" / "published").mkdir()
    teacher = models.CNN32((16, 32, 64), 128)
    torch.save(teacher.state_dict(), tmp_path / "data" / "published" / "auxiliary_cifar10.pt")
    return tmp_path / "data"


def test_runs_and_their_table(reproduce, data, tmp_path, capsys, monkeypatch):
    options = ["--data", str(data), "--out", str(tmp_path / "out"), "--epochs", "3.5", "--methods", "alone", "reversed"]
    runs = [reproduce.Run(method, 0, 3.5, data, tmp_path / "out") for method in ("alone", "reversed")]
    for run in runs:
        assert run.summary() is None
        reproduce.train(run)
    monkeypatch.setattr(reproduce, "carry_out", lambda runs, jobs: pytest.fail("trained again") if runs else None)
    assert reproduce.main([*options, "--seeds", "1"]) == 0
    text = (tmp_path / "out" / "cifar10.md").read_text()
    assert text in capsys.readouterr().out
    alone, reversed_ = (json.loads((run.dir / "summary.json").read_text())["metrics"] for run in runs)
    rows = {cells[1].strip(): cells[2:-2] for line in text.splitlines() if len(cells := line.split("|")) > 3}
    maps = ("map_cosine_authors", "map_l2_authors", "map_cosine", "map_l2")
    assert [cell.strip() for cell in rows["student alone"]] == [f"{100 * alone[m]:.2f}" for m in (*maps, "top1")]
    found = [cell.strip() for cell in rows["InDistill + PKT, deep to shallow"]]
    assert found == [*(f"{100 * reversed_[m]:.2f}" for m in maps), ""]  # no labels, no top-1

    assert reproduce.main([*options, "--seeds", "1", "--epochs", "7"]) == 2
    assert "holds a run of another config (duration: 3.5 epochs -> 7.0 epochs)" in capsys.readouterr().err
