"""Several named evaluation sets, k-NN and a linear probe: in training, in `indistill eval`, and refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import CLASSES, pack_images, refused, train_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from indistill import config, evaluate
from indistill.commands.cli import main
from indistill.commands.doctor import inputs
from indistill.commands.doctor.findings import FAIL, Here
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.commands.export.load import load_for_eval
from indistill.commands.export.write import export
from indistill.commands.report import page
from indistill.config import metric_names, runs
from indistill.config.files import read_lines
from indistill.config.records import Summary
from indistill.data import packing, training
from indistill.data.batch import Request
from indistill.data.class_names import read_label_map
from indistill.data.shards import ShardSet
from indistill.models.network import Network
from indistill.models.timm_model import TimmModel
from indistill.training import loop
from indistill.training import runs as train_runs
from indistill.training.start import start_accelerator

FEW = [7, 2, 5]  # classes of a set that numbers them from 0


def pack_few(data_dir: Path, folder: Path, labels: list[int]) -> str:
    """The evaluation images of FEW, of which the i-th class gets labels[i]; returns their shards."""
    samples = ShardSet(str(data_dir / "eval-*.tar")).iterate()
    packed = [
        (one.key, one.image, "png", labels[FEW.index(one.label)]) for one in samples if one.label in FEW
    ]
    packing.pack(packed, folder, "few", samples_per_shard=100)
    return str(folder / "few-*.tar")


@pytest.fixture
def few(data_dir: Path, tmp_path: Path) -> dict[str, str]:
    """A set of 3 of the 10 classes, with its label map."""
    (tmp_path / "map.txt").write_text("7\n2\n5\n")
    return {"shards": pack_few(data_dir, tmp_path / "few", [0, 1, 2]), "label_map": str(tmp_path / "map.txt")}


@pytest.fixture
def supervised(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}, "duration": "6 steps"}


@pytest.fixture
def several(supervised: dict[str, Any], few: dict[str, str]) -> dict[str, Any]:
    supervised["data"]["eval"] = {"val": "eval-*.tar", "few": few}
    supervised["evaluate"] = {"every": "3 steps", "knn": {}, "linear_probe": {}, "retrieval": True}
    return supervised


def parsed(tree: dict[str, Any]) -> config.Config:
    return config.parse(tree, "test")


def test_each_set_has_its_own_scores(several, capsys):
    several["trackers"] = ["tensorboard"]
    metrics = loop.train(parsed(several))["metrics"]
    run_dir = Path(several["run_dir"])
    printed = capsys.readouterr().out.splitlines()

    # A line per set in metrics.jsonl and on the screen, after each evaluation.
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if any("/top1" in key for key in line)]
    assert [(line["step"], "val/top1" in line, "few/top1" in line) for line in lines] == [
        (3, True, False), (3, False, True), (6, True, False), (6, False, True)
    ]  # fmt: skip
    assert all({"val/top1", "val/top5", "val/knn_top1", "val/knn_top5"} <= line.keys() for line in lines[::2])
    for name in ("val", "few"):
        shown = [line for line in printed if line.startswith(f"evaluation on {name} at step")]
        assert [line.split()[5] for line in shown if "knn_top1" in line] == ["3/6", "6/6"]
        assert "probe_top1" in shown[-1]
        assert {f"{name}/probe_top1", f"{name}/probe_l2", f"{name}/map_cosine"} <= metrics.keys()

    # And the same for trackers, which group by the part before the stroke.
    folders = sorted({path.parent for path in (run_dir / "tensorboard").rglob("events.*")})
    events = EventAccumulator(str(folders[0])).Reload()  # a folder in it has the hyperparameters
    for key in ("val/top1", "val/knn_top1", "few/top1", "few/knn_top1"):
        logged = {line["step"]: line[key] for line in lines if key in line}
        assert {one.step: one.value for one in events.Scalars(key)} == pytest.approx(logged)

    # The scores of the first set are those of a run that has no other, under names without it.
    alone = {**several["data"], "eval": "eval-*.tar"}
    expected = evaluate_checkpoint(parsed({**several, "data": alone}), str(run_dir))
    whole = evaluate_checkpoint(parsed(several), str(run_dir))
    assert {key.removeprefix("val/"): value for key, value in whole.items() if "val/" in key} == expected
    assert whole == pytest.approx(metrics, rel=1e-6)

    # Of the other set only its three classes are candidates: by plain computation, from the logits.
    settings = parsed(several)
    network = load(settings)
    hits = []
    dataset = training.open_eval_sets(settings)["few"]
    assert sorted(set(dataset.shards.labels)) == sorted(FEW)
    for images, labels in evaluate.passes.each_batch(start_accelerator(settings), dataset, 4, network):
        with torch.no_grad():
            logits = network(images).logits
        hits += [max(FEW, key=lambda one: row[one]) == label for row, label in zip(logits.tolist(), labels)]
    assert metrics["few/top1"] == sum(hits) / len(hits)


def test_students_of_one_teacher_and_stages_of_a_chain_are_scored_alike(several, tmp_path):
    del several["student"]
    several["evaluate"] = {"knn": {}}
    several |= {"teacher": {"name": "cnn32_auxiliary", "random": True}, "kd": {"losses": [{"name": "kd"}]}}
    several["students"] = [{"name": name, "student": {"name": "cnn32_student"}} for name in ("a", "b")]
    (tmp_path / "students.yaml").write_text(json.dumps(several))
    own = train_runs.run(runs.load(tmp_path / "students.yaml"))
    assert own["a"]["metrics"] == own["b"]["metrics"]
    assert {"val/knn_top1", "few/knn_top1", "cka_embedding"} <= own["a"]["metrics"].keys()

    del several["students"]
    stages = [
        {"name": "heads", "stage": "heads", "kd": {"losses": [{"name": "ce"}]}, "evaluate": {"knn": None}}
    ]
    stages += [{"name": "student", "student": {"name": "cnn32_student"}}]
    (tmp_path / "stages.yaml").write_text(
        json.dumps({**several, "stages": stages, "run_dir": str(tmp_path / "chain")})
    )
    chained = train_runs.run(runs.load(tmp_path / "stages.yaml"))
    assert {"val/top1_head1", "few/top1_head1"} <= chained["heads"]["metrics"].keys()
    assert {"val/knn_top1", "few/knn_top1"} <= chained["student"]["metrics"].keys()
    assert "top1_head1" not in chained["heads"]["metrics"]
    text = page.write([tmp_path / "chain"], measure=False).read_text()
    assert "val/head1" in text
    stages[1]["evaluate"] = {"knn": {"k": 1000}}
    (tmp_path / "late.yaml").write_text(
        json.dumps({**several, "stages": stages, "run_dir": str(tmp_path / "late")})
    )
    with pytest.raises(config.UserError, match=r"stage student: evaluate.knn.k: 1000 neighbours are more"):
        train_runs.run(runs.load(tmp_path / "late.yaml"))  # before the first stage begins
    assert not (tmp_path / "late" / "heads" / "metrics.jsonl").exists()


def load(settings: config.Config) -> Network:
    network, _ = load_for_eval(settings, settings.run_dir)
    assert isinstance(network, Network)
    return network.eval()


def test_every_command_takes_several_sets(several, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(several))
    main(["plan", str(file)])
    main(["train", str(file)])
    run_dir = Path(several["run_dir"])
    capsys.readouterr()
    main(["eval", str(file), str(run_dir), "--json"])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores == pytest.approx(json.loads((run_dir / "summary.json").read_text())["metrics"], rel=1e-6)
    assert Summary.model_validate_json((run_dir / "summary.json").read_text()).metrics == pytest.approx(
        scores, rel=1e-6
    )

    text = page.write([run_dir], measure=False).read_text()
    assert "% of data.eval" in text
    for title in ("Evaluation sets", "k-NN top-1 %", "linear probe top-1 %", "val/knn_top1", "few/top1"):
        assert title in text
    assert page.write([run_dir, run_dir], tmp_path / "both.html", measure=False).exists()

    export(run_dir, tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert "evaluated on val: `eval-*.tar`, few: `" in card
    assert "| few/top1 |" in card
    assert "label_map: map.txt" in card  # without the folder, which is of this machine
    assert str(tmp_path / "map.txt") not in card

    here = Here([("", parsed(several))])
    said = [*inputs.data_shards(here), *inputs.class_lists(here), *inputs.evaluation_images(here)]
    assert not [item for item in said if item[0] == FAIL]
    told = "\n".join(str(item[1]) for item in said)
    for key in ("data.eval.val: 1 shard", "data.eval.few: 1 shard", "data.eval.few: of "):
        assert key in told


def test_the_first_set_decides_which_checkpoints_are_the_best(several, monkeypatch):
    """The other set is at its best after step 9, the first one after step 6."""
    values = {"val": iter([0.2, 0.4, 0.3]), "few": iter([0.9, 0.1, 0.95])}
    monkeypatch.setattr(
        loop.evaluate, "accuracy", lambda *arguments: {"top1": next(values[name_of(arguments[2])])}
    )

    def name_of(dataset) -> str:
        return "val" if dataset.shards.label_map is None else "few"

    several |= {"checkpoint": {"every_steps": None, "keep_last": 1, "keep_best": 1}, "duration": "9 steps"}
    loop.train(parsed(several))
    kept = sorted(path.name for path in (Path(several["run_dir"]) / "checkpoints").glob("step-*"))
    assert kept == ["step-00000006", "step-00000009"]  # the best and the last


def test_a_resumed_run_has_the_scores_of_an_uninterrupted_one(several, tmp_path):
    whole = {**several, "run_dir": str(tmp_path / "whole")}
    loop.train(parsed(whole))
    train_until(several, 4)
    train_until(several)
    scores = [
        [
            {key: value for key, value in line.items() if "/" in key or key == "step"}
            for line in read_lines(Path(tree["run_dir"]) / "metrics.jsonl")
            if any("/" in key for key in line)
        ]
        for tree in (whole, several)
    ]
    assert scores[0] == scores[1]
    assert len(scores[0]) == 6  # two sets after steps 3 and 6, and the probe of both


def test_a_bank_of_its_own_and_no_labels_in_training(supervised, data_dir, tmp_path):
    """Streamed training data is no bank; shards of their own are. k-NN of each image's own copy is right."""
    supervised["data"] |= {"access": "stream", "epoch_samples": 192, "in_memory": False, "workers": 1}
    supervised["data"] |= {"shuffle_buffer": 10, "streams": 1}
    supervised["evaluate"] = {"knn": {"k": 1}, "bank": str(data_dir / "eval-*.tar"), "linear_probe": {}}
    metrics = loop.train(parsed(supervised))["metrics"]
    assert metrics["knn_top1"] == 1.0
    assert "probe_top1" in metrics


def test_without_a_classifier_embeddings_are_scored_alone(supervised):
    """A student with `num_classes: 0`: k-NN, probe and retrieval of what timm's own network returns."""
    settings = parsed(supervised | {"evaluate": {"knn": {}, "linear_probe": {}, "retrieval": True}})
    torch.manual_seed(0)
    net: TimmModel = timm.create_model("test_vit", num_classes=0, img_size=32)  # type: ignore[assignment]
    network = Network(net, ([0.5] * 3, [0.5] * 3)).eval()
    accelerator = start_accelerator(settings)
    dataset = training.open_eval_set(settings)
    assert evaluate.accuracy(accelerator, network, dataset, 16) == {}
    embedding, labels = evaluate.embeddings(accelerator, network, dataset, 16)
    images = torch.stack([dataset[one].images[0] for one in requests(len(dataset))])
    with torch.no_grad():
        assert torch.allclose(embedding, net((images / 255 - 0.5) / 0.5), atol=1e-5)
    bank = training.open_bank(settings)
    assert bank is not None
    (scores,) = evaluate.bank_scores(
        accelerator,
        network,
        section=settings.evaluate,
        keys=settings.evaluate.on_bank,
        bank=bank,
        sets={"": dataset},
    ).values()
    of_bank = evaluate.embeddings(accelerator, network, bank.for_evaluation(dataset.view), 16)
    own = evaluate.knn(*of_bank, queries=embedding, query_labels=labels)
    assert own.items() <= scores.items()
    assert {"probe_top1", "map_cosine"} <= scores.keys()


def test_without_classes_labels_are_those_of_the_bank(supervised, data_dir, tmp_path):
    """As for a student and a teacher without classifiers: training reads no label, the scores do."""
    settings = parsed(supervised | {"evaluate": {"knn": {}, "linear_probe": {}}})
    headless = settings.data.model_copy(update={"num_classes": 0})
    settings = settings.model_copy(update={"data": headless})
    bank, sets = training.bank_shards(settings), {"": training.eval_shards(headless, "", None)}
    evaluate.check_bank(settings, bank, sets)
    none = headless.model_copy(update={"train": unlabelled(data_dir, tmp_path / "none")})
    settings = settings.model_copy(update={"data": none})
    with pytest.raises(
        config.UserError, match=r"probe: data.train has images without a label .*in evaluate.bank"
    ):
        evaluate.check_bank(settings, training.bank_shards(settings), sets)


def test_images_of_the_bank_that_cannot_be_decoded_are_left_out(supervised, data_dir, tmp_path, capsys):
    """As in training, which goes on without them. The scores are those of a bank that never had them."""
    images = [
        (one.key, one.image, "png", one.label) for one in ShardSet(str(data_dir / "train-*.tar")).iterate()
    ]
    bad = [(f"bad{i}", b"no image", "png", i) for i in range(2)]
    packing.pack([*images[:90], bad[0], *images[90:], bad[1]], tmp_path / "bad", "bad", samples_per_shard=100)
    keys = {"knn": {}, "linear_probe": {"l2": [0.01]}, "retrieval": True}
    run_dir = loop.train(parsed(supervised)) and supervised["run_dir"]
    scores = []
    for in_memory in (True, False):
        supervised["data"] |= {"in_memory": in_memory, "workers": 0}
        for bank in ({}, {"bank": str(tmp_path / "bad" / "bad-*.tar")}):
            scores.append(evaluate_checkpoint(parsed(supervised | {"evaluate": keys | bank}), run_dir))
    assert scores[0] == scores[1] == scores[2] == scores[3]
    assert "2 images of the bank cannot be decoded" in capsys.readouterr().out
    packing.pack(bad, tmp_path / "none", "none", samples_per_shard=100)
    only = {"knn": {"k": 1}, "bank": str(tmp_path / "none" / "none-*.tar")}
    labels = [0, 1]
    supervised["data"]["eval"] = one_of_each(data_dir, tmp_path / "two", labels)
    with pytest.raises(config.UserError, match="no image of the bank can be decoded"):
        evaluate_checkpoint(parsed(supervised | {"evaluate": only}), run_dir)


def one_of_each(data_dir: Path, folder: Path, labels: list[int]) -> str:
    samples = ShardSet(str(data_dir / "eval-*.tar")).iterate()
    packed = [(one.key, one.image, "png", one.label) for one in samples if one.label in labels]
    packing.pack(packed, folder, "two", samples_per_shard=100)
    return str(folder / "two-*.tar")


def requests(count: int) -> list[Any]:
    return [Request(0, 0, 0, np.array([i])) for i in range(count)]


def test_by_knn_where_there_is_no_top1_checkpoints_are_the_best():
    assert metric_names.deciding({"val/knn_top1": 0.3, "v2/knn_top1": 0.9}) == 0.3
    assert metric_names.deciding({"val/knn_top1": 0.3, "val/top1": 0.2}) == 0.2
    assert metric_names.deciding({"top5": 1.0}) is None


def test_a_network_that_diverges_loses_the_score_and_not_the_run(supervised, monkeypatch, capfd):
    supervised["evaluate"] = {"every": "3 steps", "knn": {}}
    supervised["optimizer"] = {"name": "sgd", "lr": 1e30}
    metrics = loop.train(parsed(supervised))["metrics"]
    assert set(metrics) == {"top1", "top5"}
    assert "evaluate.knn: an embedding is not finite, and the score is left out" in capfd.readouterr().out


# --- bad input: one line, before any step -------------------------------------------------------------------


def unlabelled(data_dir: Path, folder: Path) -> str:
    return pack_few(data_dir, folder, [-1, -1, -1])


def one_line(tree: dict[str, Any], tmp_path: Path, capsys, *overrides: str) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(tree))
    line = refused(capsys, "train", file, *overrides)
    assert not list(Path(tree["run_dir"]).glob("checkpoints/*"))
    metrics = Path(tree["run_dir"]) / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()
    return line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval=null", "evaluate.knn={}"], "evaluate.knn needs query shards: set data.eval"),
        (["evaluate.knn={k: 193}"], "evaluate.knn.k: 193 neighbours are more than the 192 images of data.t"),
        (["evaluate.knn={k: 52}", "evaluate.bank=eval-*.tar"], "more than the 51 images of evaluate.bank"),
        (["evaluate.linear_probe={}", "evaluate.bank=no.tar"], "evaluate.bank: .*no such shard"),
        (["evaluate.knn={k: 0}"], "evaluate.knn.k: Input should be greater than 0"),
        (["evaluate.linear_probe={l2: []}"], "evaluate.linear_probe.l2: List should have at least 1 item"),
        (["data.eval={}"], "data.eval: has no set: name at least one"),
        (["data.eval={a/b: eval-*.tar}"], "data.eval: 'a/b' is no name of a set"),
        (["data.eval={val: eval-*.tar, v2: no.tar}"], "data.eval.v2: .*no such shard"),
        (["data.eval={a: {shard: x}}"], "data.eval.a: unknown key 'shard'; the nearest valid key is"),
        (["data.eval={a: {shards: eval-*.tar, label_map: no.txt}}"], "data.eval.a: no.txt: cannot be read"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_evaluated_is_refused(supervised, tmp_path, capsys, overrides, message):
    line = one_line(supervised, tmp_path, capsys, *overrides)
    assert re.search(message, line), line


def test_a_probe_without_labels_is_refused(supervised, data_dir, tmp_path, capsys):
    """Of a bank whose labels training itself does not need."""
    shards = ShardSet(unlabelled(data_dir, tmp_path / "none"))
    assert set(shards.labels) == {-1}
    settings = parsed(supervised | {"evaluate": {"linear_probe": {}}})
    labelled = ShardSet(str(data_dir / "eval-*.tar"))
    with pytest.raises(
        config.UserError, match=r"evaluate.linear_probe: data.train has images without a label \("
    ):
        evaluate.check_bank(settings, shards, {"": labelled})
    with pytest.raises(
        config.UserError, match=r"evaluate.linear_probe: data.eval.v2 has images without a label"
    ):
        evaluate.check_bank(settings, labelled, {"v2": shards})
    line = one_line(
        supervised, tmp_path, capsys, "evaluate.linear_probe={}", f"evaluate.bank={tmp_path}/none/few-*.tar"
    )
    assert "evaluate.linear_probe: evaluate.bank has images without a label (few-000000.tar" in line


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ([0, 1, 12], None, "data.eval.few: few-000000.tar: sample .*: label 12 is none of the data.num"),
        ([0, 1, 2], "7\n2\n10\n", "data.eval.few: .*: the class '10' is none of the data.num"),
        ([0, 1, 2], "7\n2\nwren\n", "data.eval.few: .*: the class 'wren' is none of"),
        ([0, 1, 2], "7\n2\n", "data.eval.few: few-000000.tar: sample .*: label 2 has no entry among the 2"),
        ([0, 1, 2], "7\n2\n7\n", "names the class '7' twice"),
        ([0, 1, 2], "", "data.eval.few: .*map.txt: holds no class names"),
    ],
)  # fmt: skip
def test_a_set_with_classes_outside_of_the_students_is_refused(
    supervised, data_dir, tmp_path, capsys, labels, content, message
):
    one = {"shards": pack_few(data_dir, tmp_path / "other", labels)}
    if content is not None:
        (tmp_path / "map.txt").write_text(content)
        one["label_map"] = str(tmp_path / "map.txt")
    supervised["data"]["eval"] = {"val": "eval-*.tar", "few": one}
    line = one_line(supervised, tmp_path, capsys)
    assert re.search(message, line), line
    here = Here([("", parsed(supervised))])
    said = [item[1] for item in inputs.evaluation_images(here) if item[0] == FAIL]
    assert len(said) == 1
    assert re.search(message, said[0])


def test_a_class_that_the_bank_lacks_is_refused(supervised, data_dir, tmp_path, capsys):
    pack_images(tmp_path / "part", "part", samples=8, per_shard=8, seed=1)  # of classes 0 to 7
    supervised["data"]["eval"] = {"val": "eval-*.tar"}
    overrides = ["evaluate.knn={k: 1}", f"evaluate.bank={tmp_path}/part/part-*.tar"]
    line = one_line(supervised, tmp_path, capsys, *overrides)
    assert "evaluate.knn: evaluate.bank has no image of 2 of data.eval.val's classes (label 8, 9)" in line


def test_names_of_classes_are_a_label_map_too(data_dir, tmp_path):
    """By the names in the dataset.json of data.train."""
    names = [f"class {i}" for i in range(CLASSES)]
    images = ShardSet(str(data_dir / "train-*.tar")).iterate(0, 20)
    packing.pack(
        [(one.key, one.image, "png", one.label) for one in images],
        tmp_path / "named",
        "train",
        samples_per_shard=20,
    )
    record = tmp_path / "named" / "dataset.json"
    record.write_text(json.dumps({"plan": "", "classes": names}))
    (tmp_path / "map.txt").write_text("class 7\nclass 2\nclass 5\n")
    section = config.Data(train="train-*.tar", root=str(tmp_path / "named"), num_classes=10, global_batch=8)
    assert read_label_map(str(tmp_path / "map.txt"), section) == FEW
    (tmp_path / "map.txt").write_text("7\n2\n5\n")
    assert read_label_map(str(tmp_path / "map.txt"), section) == FEW
