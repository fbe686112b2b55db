"""Class lists of training data, evaluation data, stored targets, runs and exports, which must agree."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from conftest import pack_images
from tars import picture

from indistill import config
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.commands.export.load import load_for_eval
from indistill.commands.export.write import export
from indistill.commands.targets import write
from indistill.config import UserError
from indistill.data import class_names, packing
from indistill.data.class_names import Names
from indistill.models import timm_model
from indistill.models.network import Network, normalisation, save_network
from indistill.training import loop, parts

TEN = [f"animal {i}" for i in range(10)]
SWAPPED = ["animal 1", "animal 0", *TEN[2:]]


def pack_folders(tmp_path: Path, name: str, folders: str, **keys) -> None:
    """Two images in each class folder, packed into tmp_path/packed/NAME."""
    for label, folder in enumerate(folders):
        (tmp_path / name / folder).mkdir(parents=True)
        for i in range(2):
            (tmp_path / name / folder / f"{i}.png").write_bytes(picture(10 * label + i, "png", (32, 32)))
    packing.pack_source(str(tmp_path / name), tmp_path / "packed" / name, **keys)


def with_names(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"classes": names}))
    return folder


@pytest.fixture
def named(tree, tmp_path):
    """A config whose training and evaluation shards are in two folders, both with class names."""
    for name, samples in (("train", 64), ("eval", 20)):
        pack_images(with_names(tmp_path / name, TEN), name, samples=samples, per_shard=64, seed=len(name))
    tree["data"] |= {"root": str(tmp_path), "train": "train/*.tar", "eval": "eval/*.tar"}
    tree["duration"] = "1 step"
    tree["warmup"] = None
    return tree


def parsed(tree: dict, **keys: str) -> config.Config:
    return config.parse(tree | {"data": tree["data"] | keys}, "test")


# --- one list against another -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "parts"),
    [
        ("abc", "abc", None),
        ("ab", "abc", None),  # the same labels as far as it goes
        ("ac", "abc", ["label 1 is 'c' in x, in y it is 'b'", "only the latter has 'b'"]),
        ("abcd", "abc", ["label 3 is 'd' in x, in y there is no such label", "only the former has 'd'"]),
        ("ba", "ab", ["label 0 is 'b' in x, in y it is 'a'"]),
        ("hijklmn", "a", ["only the former has 'h', 'i', 'j', 'k', 'l' and 2 more"]),
    ],
)
def test_a_difference_names_the_classes(ours, theirs, parts):
    told = class_names.difference(Names("x", list(ours)), Names("y", list(theirs)))
    assert (told is None) == (parts is None)
    assert all(part in told for part in parts or ())


def test_lists_are_found_wherever_shards_are(tmp_path, monkeypatch):
    for name in ("a1", "a2", "b"):
        with_names(tmp_path / name, [name])
    (tmp_path / "none").mkdir()

    def found(urls, root: str | None = str(tmp_path)) -> list[str]:
        return [names.names[0] for names in class_names.beside(urls, root)]

    assert found("a{1..2}/x-{000000..000999}.tar") == ["a1", "a2"]
    assert found("a*/x-*.tar") == ["a1", "a2"]
    assert found(["b/x.tar", "none/x.tar", "gone/x.tar", f"file://{tmp_path}/a1/x.tar"]) == ["b", "a1"]
    assert found("pipe:cat b/x.tar") == found("{a1") == []
    monkeypatch.chdir(tmp_path / "b")
    assert found("*.tar", None) == ["b"]
    fsspec.filesystem("memory").pipe("/classes-test/set/dataset.json", b'{"classes": ["far"]}')
    assert found("set/x-{0..9}.tar", "memory://classes-test") == ["far"]
    assert found("memory://classes-test/other/x.tar?query=1") == []
    for content in ('{"plan": "", "complete": false}', '{"classes": null}', '["a"]', '{"classes": 3}'):
        (tmp_path / "b" / "dataset.json").write_text(content)
        assert found("*.tar", None) == []
    (tmp_path / "b" / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset.json: is not valid JSON"):
        found("*.tar", None)


# --- data ---------------------------------------------------------------------------------------------------


def test_evaluation_data_with_another_numbering_is_refused(tree, tmp_path):
    """The example that went through in silence: c is label 2 in one and 1 in the other."""
    pack_folders(tmp_path, "train", "abc")
    pack_folders(tmp_path, "eval", "ac")
    keys = {"root": str(tmp_path / "packed"), "train": "train/*.tar", "eval": "eval/*.tar"}
    keys |= {"num_classes": 3, "global_batch": 6, "streams": 1}
    tree |= {"duration": "1 step", "warmup": None, "data": tree["data"] | keys}
    with pytest.raises(UserError) as refused:
        loop.train(parsed(tree))
    message = str(refused.value)
    train_list, eval_list = (f"{tmp_path}/packed/{name}/dataset.json" for name in ("train", "eval"))
    assert message.startswith(f"data.eval: its classes are not those of {train_list}: ")
    assert f"label 1 is 'c' in {eval_list}, in {train_list} it is 'b'; only the latter has 'b'" in message
    remedy = f"--classes {train_list}"
    assert message.endswith(f"pack data.eval again with `shards pack {remedy}`")
    assert not Path(tree["run_dir"]).exists()
    # The remedy, taken literally.
    names = class_names.read(remedy.split()[1])
    packing.pack_source(str(tmp_path / "eval"), tmp_path / "packed" / "mended", classes=names)
    loop.train(parsed(tree, eval="mended/*.tar"))
    assert json.loads((Path(tree["run_dir"]) / "classes.json").read_text()) == ["a", "b", "c"]


def test_parts_of_the_training_data_agree(tmp_path):
    for name, names in (("one", "ab"), ("more", "abc"), ("other", "ac")):
        with_names(tmp_path / name, list(names))
    section = {"num_classes": 3, "global_batch": 1, "root": str(tmp_path)}
    assert class_names.check(config.Data(train="{one,more}/*.tar", **section)).names == ["a", "b", "c"]
    with pytest.raises(
        UserError, match=r"data.train: its parts have different classes: label 1 is 'c' in .*other"
    ):
        class_names.check(config.Data(train=["more/*.tar", "other/*.tar"], **section))
    assert class_names.check(config.Data(train="gone/*.tar", eval="other/*.tar", **section)) is None


# --- weights ------------------------------------------------------------------------------------------------


def test_a_run_keeps_its_classes(named, tmp_path):
    settings = parsed(named)
    loop.train(settings)
    run = Path(named["run_dir"])
    assert json.loads((run / "classes.json").read_text()) == TEN
    weights = [run / "student.safetensors", next((run / "checkpoints").glob("step-*/model.safetensors"))]
    assert [class_names.of_weights(path).names for path in weights] == [TEN, TEN]

    # The data change their names: neither the run goes on, nor are its weights scored or taken for a teacher.
    with_names(tmp_path / "train", SWAPPED)
    with_names(tmp_path / "eval", SWAPPED)
    with pytest.raises(
        UserError, match=r"data.train: .*label 0 is 'animal 1'.*in .*run/classes.json it is 'animal 0'"
    ):
        loop.train(settings)
    with pytest.raises(
        UserError, match=r"data.eval: its classes are not those of .*run/classes.json: label 0"
    ):
        evaluate_checkpoint(settings, str(run))
    for path in weights:
        teacher = {"name": "cnn32_student", "checkpoint": str(path)}
        of_teacher = config.parse(named | {"run_dir": str(tmp_path / "other"), "teacher": teacher}, "test")
        with pytest.raises(
            UserError, match=r"data.train: its classes are not those of .*run/classes.json: label 0"
        ):
            parts.create_teacher(of_teacher)
    with_names(tmp_path / "train", TEN)
    parts.create_teacher(of_teacher)
    with_names(tmp_path / "eval", TEN)
    evaluate_checkpoint(settings, str(run))


@pytest.mark.parametrize("form", ["timm", "onnx"])
def test_exports_are_used_with_their_classes(named, tmp_path, form):
    settings, run = parsed(named), Path(named["run_dir"])
    run.mkdir()
    net = timm_model.create(settings.student, 10, 32, "student")
    network = Network(net, normalisation(net, settings.student, "student"))
    save_network(network, settings.student, run / "student.safetensors")
    (run / "config.yaml").write_text(config.dump(settings))
    (run / "summary.json").write_text(json.dumps({"step": 1, "metrics": {}}))
    export(run, tmp_path / "export", form=form)
    load_for_eval(settings, str(tmp_path / "export"))
    with_names(tmp_path / "eval", SWAPPED)
    with pytest.raises(
        UserError, match=r"data.eval: its classes are not those of .*export: label 0 is 'animal 1'"
    ):
        load_for_eval(settings, str(tmp_path / "export"))
    (tmp_path / "eval" / "dataset.json").unlink()
    with_names(tmp_path / "train", SWAPPED)
    with pytest.raises(
        UserError, match=r"data.train: its classes are not those of .*export"
    ):  # eval has no names
        load_for_eval(settings, str(tmp_path / "export"))
    if form == "timm":
        teacher = {"name": f"local-dir:{tmp_path}/export", "pretrained": True}
        with pytest.raises(UserError, match=r"data.train: its classes are not those of local-dir:.*export"):
            parts.create_teacher(config.parse(named | {"teacher": teacher}, "test"))


def test_stored_targets_keep_the_classes(named, tmp_path):
    named["targets"] = {"dir": str(tmp_path / "targets")}
    named["data"]["augment"]["views"] = 1
    assert write.write(parsed(named)).classes == TEN
    cached = named | {"targets": named["targets"] | {"source": "cached"}}
    loop.train(parsed(cached))
    with_names(tmp_path / "train", SWAPPED)
    with_names(tmp_path / "eval", SWAPPED)
    message = r"data.train: its classes are not those of .*targets/manifest.json: label 0 is 'animal 1'"
    for attempt in (
        lambda: loop.train(config.parse(cached | {"run_dir": str(tmp_path / "other")}, "test")),
        lambda: write.write(parsed(named)),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
