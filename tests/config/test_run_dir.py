"""The names of the files in a run directory are known in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import indistill
from indistill.config import run_dir
from indistill.config.run_dir import CheckpointDir, RunDir

PACKAGE = Path(indistill.__file__).parent
NAMES = {
    entry.name
    for folder in (RunDir, CheckpointDir)
    for entry in vars(folder).values()
    if isinstance(entry, run_dir._Entry)
}
TARGETS = ("targets/manifest", "commands/targets/job", "commands/targets/write")
# Other folders have files of the same name: stored targets a manifest, the Hugging Face hub's and exports a
# model.
ELSEWHERE = {("manifest.json", f"{module}.py") for module in TARGETS}
ELSEWHERE |= {(name, "commands/doctor/inputs.py") for name in ("manifest.json", "model.safetensors")}
ELSEWHERE |= {("model.safetensors", "commands/export/load.py")}


def names_in(source: str) -> set[str]:
    """The names of NAMES that the code builds paths from; docstrings and sentences may mention them.

    A name with a suffix, such as config.yaml, is a path wherever a string consists of it; a word, such as
    status, only behind a slash, as in `folder / "status"`, or in a string, `f"{folder}/status"`.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        divided = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)
        text = node.right if divided else node
        if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
            continue
        for name in NAMES:
            as_path = rf"(.*/)?{re.escape(name)}(/.*)?"
            inside = "/" in text.value or "." in name or divided
            if inside and re.fullmatch(as_path, text.value) and " " not in text.value:
                found.add(name)
        if re.match(r"(.*/)?step-[^X]*$", text.value) and " " not in text.value:
            found.add("step-")
    return found


def test_names():
    files = RunDir(Path("runs/one"))
    assert files.config == Path("runs/one/config.yaml")
    assert files.traceback("3") == Path("runs/one/errors/rank-3.txt")
    assert CheckpointDir(files.checkpoint(40)).state == Path("runs/one/checkpoints/step-00000040/state.json")
    assert {"config.yaml", "metrics.jsonl", "summary.json", "history.jsonl", "status", "checkpoints"} < NAMES


def test_checkpoints_are_those_that_have_their_names_by_step(tmp_path):
    files = RunDir(tmp_path)
    assert files.saved_checkpoints() == []
    for step in (100_000_000, 20, 3):
        files.checkpoint(step).mkdir(parents=True)
    for name in (".partial-step-00000040", "superseded-step-00000050-1", "step-last"):
        (files.checkpoints / name).mkdir()
    steps = [run_dir.checkpoint_step(path) for path in files.saved_checkpoints()]
    assert steps == [3, 20, 100_000_000]


def test_no_other_module_knows_the_names():
    modules = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    del modules["config/run_dir.py"]
    found = {(name, module) for module, path in modules.items() for name in names_in(path.read_text())}
    assert found == ELSEWHERE


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ('folder / "status"', "status"),
        ('f"{folder}/status"', "status"),
        ('os.path.join(folder, "summary.json")', "summary.json"),
        ('path.glob("*/config.yaml")', "config.yaml"),
        ('(folder / "checkpoints").glob("step-*")', "checkpoints"),
        ('folder.glob("step-*")', "step-"),
    ],
)
def test_a_planted_name_is_found(source, name):
    assert name in names_in(source)


def test_words_and_sentences_are_no_paths():
    assert (
        names_in('"""Writes status and config.yaml."""\nfail(f"{run}: holds no config.yaml: give another")')
        == set()
    )
    assert names_in('settings["targets"], {"status": 1}, print("targets")') == set()
