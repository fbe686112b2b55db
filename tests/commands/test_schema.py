"""The JSON Schema of a config accepts what the program accepts, and marks its mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pydantic
import pytest
from packaging.version import Version

from indistill.commands import schema
from indistill.commands.cli import main
from indistill.config import UserError, parse, read
from indistill.config.read import apply_override
from indistill.config.runs import load

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
CHAIN = {
    "run_dir": "r",
    "duration": "1 epoch",
    "data": {"train": "t", "num_classes": 10},
    "optimizer": {"name": "sgd"},
    "stages": [
        {
            "name": "teacher",
            "student": {"name": "resnet34"},
            "data": {"global_batch": 8},
            "optimizer": {"lr": 0.1},
        },
        {
            "name": "student",
            "student": {"name": "resnet18"},
            "teacher": {"stage": "teacher"},
            "data": {"global_batch": 16, "augment": {"flip": False}},
            "optimizer": {"lr": 0.1, "weight_decay": 0.1},
            "kd": {"losses": [{"name": "ce"}, {"name": "kd", "weight": 0.5}]},
            "targets": "live",
        },
    ],
}


@pytest.fixture(scope="module")
def mistakes():
    """Return the places at which the schema marks a tree."""
    jsonschema = pytest.importorskip("jsonschema", reason="make setup installs jsonschema")
    of_file = schema.of_file()
    jsonschema.Draft202012Validator.check_schema(of_file)
    validator = jsonschema.Draft202012Validator(of_file)
    return lambda tree: [".".join(map(str, error.absolute_path)) for error in validator.iter_errors(tree)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_name_the_schema(mistakes, path):
    assert mistakes(read(path)) == []
    (line,) = [line for line in path.read_text().splitlines() if "yaml-language-server" in line]
    assert line == "# yaml-language-server: $schema=schema.json"


@pytest.mark.skipif(
    Version(pydantic.VERSION) < Version("2.14"), reason="an older pydantic says the same in other words"
)
def test_the_file_beside_the_recipes_is_what_the_command_prints(capsys):
    main(["schema"])
    printed = capsys.readouterr().out
    assert json.loads(printed)["title"] == "A config of indistill"
    recorded = json.loads((ROOT / "configs" / "schema.json").read_text())
    assert recorded == json.loads(printed), "run indistill schema > configs/schema.json"


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("data.num_clases=3", "data"),
        ("data.num_classes=-1", "data.num_classes"),
        ("data.train=[3]", "data.train"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("student={kwargs: {}}", "student"),
        ("kd.losses=[{name: kd, temprature: 2}]", "kd.losses.0"),
        ("warmup.pairs=autoo", "warmup"),
        ("engine={name: deepspeed, stage: 4}", "engine"),
        ("targets=cahced", "targets"),
        ("sed=1", ""),
        ("schedule.name=cosin", "schedule.name"),
    ],
)
def test_a_mistake_is_marked(mistakes, tree, override, place):
    assert mistakes(tree) == []
    apply_override(tree, override)
    with pytest.raises(UserError):
        parse(tree, "test")
    assert mistakes(tree) == [place]


@pytest.mark.parametrize(
    "override",
    [
        "targets=live",
        "warmup=null",
        "warmup.pairs=[[0, 1]]",
        "data.train=[a, b]",
        "duration=3",
        "engine={name: deepspeed, stage: 3}",
        "data.eval_crop=auto",
        "optimizer.kwargs={betas: [0.9, 0.95]}",
    ],
)
def test_what_the_program_accepts_is_not_marked(mistakes, tree, override):
    apply_override(tree, override)
    parse(tree, "test")
    assert mistakes(tree) == []


@pytest.mark.parametrize("key", ["run_dir", "duration", "data", "optimizer"])
def test_a_missing_key_is_marked(mistakes, tree, key):
    del tree[key]
    assert mistakes(tree) == [""]


def test_runs_of_a_chain_may_have_parts_of_sections(mistakes):
    load(copy.deepcopy(CHAIN))
    assert mistakes(CHAIN) == []
    for change, place in (
        (lambda tree: tree["stages"][1].pop("name"), "stages.1"),
        (lambda tree: tree["stages"][1]["data"].update(global_bach=8), "stages.1.data"),
        (lambda tree: tree["optimizer"].update(lr="fast"), "optimizer"),
        (lambda tree: tree["stages"][1]["optimizer"].update(lr=None), "stages.1.optimizer"),
        (lambda tree: tree["stages"][1]["kd"]["losses"][1].update(wait=1), "stages.1.kd"),
    ):
        tree = copy.deepcopy(CHAIN)
        change(tree)
        (marked,) = mistakes(tree)
        assert place in (marked, marked[: len(place)])


def test_a_loss_of_a_plugin_may_have_any_keys(mistakes, tree):
    tree["kd"] = {"losses": [{"name": "mine", "power": 3}]}
    assert mistakes(tree) == []


def test_every_key_has_a_meaning():
    definitions = schema.of_file()["$defs"]
    whole = [definitions[name] for name in definitions if not name.startswith("Part.")]
    texts = [key["description"] for section in whole for key in section["properties"].values()]
    assert len(texts) > 150
    assert all(texts)
