"""From Python: the same as on the command line, in few lines."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import indistill
from indistill import Trainer, UserError
from indistill.config import Model
from indistill.data import shards


def test_plan_train_score_and_take_home(config_file, tree, tmp_path):
    trainer = Trainer(config_file, "evaluate.similarity_samples=0")
    assert [phase.steps for phase in trainer.plan(world=1).phases] == [4, 4, 5, 11]

    summary = trainer.train()
    assert summary == json.loads((Path(tree["run_dir"]) / "summary.json").read_text())
    assert trainer.evaluate() == summary["metrics"]
    with pytest.raises(UserError, match=r"^\.: is neither a run nor an export"):
        trainer.evaluate("")  # as of a shell variable that is not set

    samples = list(shards.ShardSet(f"{tree['data']['root']}/eval-*.tar").iterate())
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(sample.image))) for sample in samples]
    )  # [B, H, W, 3]
    with torch.inference_mode():
        guesses = trainer.student()(torch.from_numpy(images).permute(0, 3, 1, 2)).logits.argmax(1)
    right = [guess == sample.label for guess, sample in zip(guesses.tolist(), samples)]
    assert sum(right) / len(right) == pytest.approx(summary["metrics"]["top1"])

    page = trainer.report(tmp_path / "page.html").read_text()
    assert f"{100 * summary['metrics']['top1']:.2f}" in page

    trainer.export(tmp_path / "student")
    assert trainer.evaluate(tmp_path / "student") == summary["metrics"]
    with pytest.raises(UserError, match="holds a run of another config"):
        Trainer(config_file, "optimizer.lr=0.5").train()


def test_a_file_of_several_runs(tree, tmp_path):
    tree["students"] = [{"name": "one"}, {"name": "two", "warmup": None}]
    path = tmp_path / "students.yaml"
    path.write_text(yaml.safe_dump(tree))
    trainer = Trainer(path)
    assert trainer.plan(world=1).keys() == {"one", "two"}
    with pytest.raises(UserError, match=r"students.yaml has several students: give the config.yaml"):
        trainer.evaluate()


def test_a_mapping_and_a_config_are_what_the_file_is(config_file, tree, tmp_path):
    from_file = Trainer(config_file, "seed=3").settings
    before = copy.deepcopy(tree)
    assert Trainer(tree, "seed=3", "data.workers=1").settings != from_file
    assert tree == before  # overrides change a copy
    assert Trainer(tree, "seed=3").settings == from_file
    assert Trainer(from_file).settings == from_file
    assert Trainer(Trainer(tree).settings, "seed=3").settings == from_file
    as_python = tree | {"run_dir": Path(tree["run_dir"]), "student": Model(**tree["student"])}
    as_python["warmup"] = MappingProxyType(
        {"durations": ("4 steps", "4 steps", "5 steps"), "curriculum": "sequential"}
    )
    assert Trainer(as_python, "seed=3").settings == from_file
    chain = Trainer(tree | {"students": [{"name": "one"}, {"name": "two", "warmup": None}]})
    assert [name for name, _ in chain.runs] == ["one", "two"]
    with pytest.raises(UserError, match=r"^config has several students: "):
        chain.evaluate()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda tree: tree | {"sed": 3}, r"^config: unknown key 'sed'; the nearest valid key is 'seed'"),
        (lambda tree: {**tree, "optimizer": None}, r"^config: optimizer: "),
        (lambda tree: [tree], r"^config: list is no path of a YAML file, mapping or Config: give one"),
        (lambda tree: None, r"^config: NoneType is no path"),
    ],
    ids=["key", "value", "list", "None"],
)
def test_a_mistake_from_python_is_one_line(tree, given, message):
    with pytest.raises(UserError, match=message):
        Trainer(given(tree))


def test_a_mistake_is_found_where_the_config_is_read(config_file):
    with pytest.raises(
        UserError, match="data: unknown key 'num_clases'; the nearest valid key is 'num_classes'"
    ):
        Trainer(config_file, "data.num_clases=3")


def test_one_version():
    root = Path(indistill.__file__).parents[1]
    assert "version" in tomllib.loads((root / "pyproject.toml").read_text())["project"]["dynamic"]
    assert "version" not in yaml.safe_load((root / "CITATION.cff").read_text())
    assert f"{indistill.__version__}" in (root / "CHANGELOG.md").read_text()


def test_the_package_has_nothing_heavy_and_its_types():
    code = "import indistill, sys; print({'torch', 'numpy', 'pydantic'} & set(sys.modules)); "
    code += "print(indistill.Trainer.__module__, 'torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout == "set()\nindistill.commands.trainer False\n"
    assert (Path(indistill.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'Trainr'"):
        _ = indistill.Trainr
