"""Runs on images without labels: every command on `data.num_classes: 0`, and what needs labels by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from conftest import CLASSES, losses, refused
from safetensors.torch import load_file

from indistill import config
from indistill.commands.cli import main
from indistill.data import packing
from indistill.data.shards import ShardSet
from indistill.training.loop import train


@pytest.fixture(scope="module")
def without_labels(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `data_dir`, in the same order, in shards without a .cls; those of eval keep theirs."""
    folder = tmp_path_factory.mktemp("unlabelled")
    samples = ShardSet("train-*.tar", str(data_dir)).iterate()
    packing.pack(((key, image, "png", -1) for key, image, _ in samples), folder, "train", 64)
    for path in data_dir.glob("eval-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def unlabelled(tree: dict[str, Any], without_labels: Path) -> dict[str, Any]:
    """A CNN that learns the embedding of another one, from images without labels."""
    tree["data"] |= {"root": str(without_labels), "num_classes": 0, "eval": None}
    tree["kd"] = {"losses": [{"name": "feature"}]}
    tree["duration"] = "8 steps"
    tree["warmup"]["durations"] = ["2 steps", "0 steps", "0 steps"]
    return tree


def write(tree: dict[str, Any], path: Path) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("access", ["index", "stream"])
def test_a_run_is_the_same_with_and_without_labels(unlabelled, data_dir, access):
    """Labels that are there are not read, and neither access needs them."""
    if access == "stream":
        unlabelled["data"] |= {"access": "stream", "epoch_samples": 192, "in_memory": False, "workers": 0}
    train(config.parse(unlabelled, "test"))
    labelled = copy.deepcopy(unlabelled)
    labelled["run_dir"] += "-labelled"
    labelled["data"]["root"] = str(data_dir)
    train(config.parse(labelled, "test"))
    assert len(losses(unlabelled["run_dir"])) == 8
    assert losses(unlabelled["run_dir"]) == losses(labelled["run_dir"])
    student = load_file(Path(unlabelled["run_dir"], "student.safetensors"))
    headless = timm.create_model("cnn32_student", num_classes=0)
    assert set(student) == set(headless.state_dict())


def test_every_command_works_without_labels(unlabelled, tmp_path, capsys):
    unlabelled["data"]["augment"]["views"] = 2
    path = write(unlabelled, tmp_path / "config.yaml")
    main(["plan", path, "--world", "1"])
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", path])
    said = capsys.readouterr().out
    assert "data.num_classes: 0: training reads no labels" in said
    assert "0 FAIL" in said
    main(["train", path])
    main(["targets", path, f"targets.dir={tmp_path / 'targets'}"])
    cached = f"{unlabelled['run_dir']}-cached"
    main(["train", path, "targets.source=cached", f"targets.dir={tmp_path / 'targets'}", f"run_dir={cached}"])
    assert losses(cached) == losses(unlabelled["run_dir"])
    main(["report", unlabelled["run_dir"]])
    assert "without labels" in Path(unlabelled["run_dir"], "report.html").read_text()
    main(["export", unlabelled["run_dir"], str(tmp_path / "student")])
    net = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True, num_classes=0)
    exported = net.state_dict()
    for name, value in load_file(Path(unlabelled["run_dir"], "student.safetensors")).items():
        assert exported[name].equal(value)


def test_a_labelled_bank_scores_a_student_without_labels(unlabelled, without_labels, capsys, tmp_path):
    """k-NN, probe and retrieval read the labels of data.eval and of evaluate.bank alone."""
    unlabelled["data"]["eval"] = {"val": "eval-*.tar"}
    unlabelled["evaluate"] = {
        "every": "4 steps", "knn": {"k": 5}, "linear_probe": {"l2": [0.01]}, "retrieval": True,
        "bank": "eval-*.tar", "similarity_samples": 0,
    }  # fmt: skip
    summary = train(config.parse(unlabelled, "test"))
    metrics = summary["metrics"]
    assert metrics["val/knn_top1"] > 0.5  # each image is its own nearest neighbour
    assert {"val/probe_top1", "val/precision_at_1_l2"} <= set(metrics)
    assert "val/top1" not in metrics
    path = write(unlabelled, tmp_path / "config.yaml")
    capsys.readouterr()
    main(["eval", path, unlabelled["run_dir"], "--json"])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["val/knn_top1"] == pytest.approx(metrics["val/knn_top1"])


def test_a_label_map_names_classes_of_the_bank(unlabelled, tmp_path, capsys):
    bank = tmp_path / "bank"
    samples = ShardSet("eval-*.tar", unlabelled["data"]["root"]).iterate()
    packing.pack(((key, image, "png", label) for key, image, label in samples), bank, "eval", 64)
    names = [f"class {label}" for label in range(CLASSES)]
    (bank / "dataset.json").write_text(json.dumps({"plan": "x", "classes": names}))
    (tmp_path / "map.txt").write_text("\n".join(names))
    section = {"shards": "eval-*.tar", "label_map": str(tmp_path / "map.txt")}
    unlabelled["data"]["eval"] = {"own": section}
    unlabelled["evaluate"] = {"knn": {"k": 1}, "bank": str(bank / "*.tar"), "similarity_samples": 0}
    metrics = train(config.parse(unlabelled, "test"))["metrics"]
    assert metrics["own/knn_top1"] == 1  # each image is its own nearest neighbour
    (tmp_path / "map.txt").write_text("\n".join([*names[:-1], "class x"]))
    line = refused(capsys, "eval", write(unlabelled, tmp_path / "c.yaml"), unlabelled["run_dir"])
    assert "the class 'class x' is none of" in line


def test_logits_teach_without_labels(unlabelled):
    """A loss that reads the teacher's logits needs its number of classes, and no label."""
    unlabelled["data"]["num_classes"] = CLASSES
    unlabelled["kd"] = {"losses": [{"name": "kd"}], "mix": {"mixup": 0.4, "cutmix": 1.0}}
    train(config.parse(unlabelled, "test"))
    assert len(losses(unlabelled["run_dir"])) == 8


def test_images_without_labels_are_mixed(unlabelled):
    unlabelled["kd"]["mix"] = {"mixup": 0.4, "cutmix": 1.0}
    train(config.parse(unlabelled, "test"))
    assert len(losses(unlabelled["run_dir"])) == 8


LABELS = "reads labels, and data.num_classes: 0 says that the images have none"
KNN = {"knn": {"k": 3}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kd": {}}, f"kd.losses: ce {LABELS}"),
        ({"kd": {"losses": [{"name": "feature"}, {"name": "bce"}]}}, f"kd.losses: bce {LABELS}"),
        ({"kd": {"losses": [{"name": "dkd"}]}}, f"kd.losses: dkd {LABELS}"),
        ({"kd": {"losses": [{"name": "kd"}]}}, "kd.losses: kd reads logits, and with data.num_classes: 0"),
        ({"warmup": {"prune": {"criterion": "taylor"}}}, f"warmup.prune.criterion: taylor {LABELS}"),
        (
            {"stage": "heads", "student": None, "warmup": None},
            "stage: heads trains classifiers, and data.num_classes: 0 has no classes",
        ),
        ({"targets": {"top_k": 5}}, "targets.top_k stores probabilities of classes"),
        (
            {"data": {"eval": {"v2": {"shards": "eval-*.tar", "label_map": "x.txt"}}}},
            "data.eval.v2.label_map translates labels, and with data.num_classes: 0 nothing reads them",
        ),
        (
            {"data": {"eval": "eval-*.tar"}, "evaluate": KNN},
            "evaluate.knn: data.train has images without a label",
        ),
        (
            {"data": {"eval": "eval-*.tar"}, "evaluate": {"linear_probe": {}}},
            "evaluate.linear_probe: data.train has images without a label",
        ),
        (
            {"data": {"eval": "train-*.tar"}, "evaluate": {"retrieval": True, "bank": "eval-*.tar"}},
            "evaluate.retrieval: data.eval has images without a label",
        ),
        (
            {"data": {"num_classes": 10}, "kd": {"losses": [{"name": "kd"}, {"name": "ce"}]}},
            "has no label, because there is no train0000.cls: write it into KEY.cls, an integer in ASCII, "
            "beside the image KEY.jpg (kd.losses: ce reads labels)",
        ),
        (
            {"data": {"num_classes": 10, "eval": "train-*.tar"}, "kd": {"losses": [{"name": "kd"}]}},
            "has no label, because there is no train0000.cls: write it into KEY.cls, an integer in ASCII, "
            "beside the image KEY.jpg (top-1 on data.eval reads labels)",
        ),
        ({"data": {"num_classes": -1}}, "data.num_classes"),
    ],
)
def test_what_needs_labels_is_named_before_any_step(unlabelled, tmp_path, capsys, changes, message):
    for key, value in changes.items():
        section = unlabelled.get(key)
        merged = isinstance(value, dict) and isinstance(section, dict) and key not in ("kd", "targets")
        unlabelled[key] = section | value if merged else value
    assert message in refused(capsys, "train", write(unlabelled, tmp_path / "config.yaml"))
    assert not Path(unlabelled["run_dir"], "metrics.jsonl").exists()
