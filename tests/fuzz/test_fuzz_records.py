"""Made-up records of runs, stored targets and exports, as another person's folders may hold them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import conftest
import pytest
from fuzzing import BAD_JSON, VALUES, changed_trees, encoded, fuzz, mutated, mutated_json
from hypothesis import strategies as st

from indistill import config, prune
from indistill.commands.export import source
from indistill.commands.export.load import load_file, load_folder
from indistill.commands.export.write import export
from indistill.commands.report import page
from indistill.config import UserError
from indistill.targets.manifest import parse_manifest
from indistill.training import checkpoint
from indistill.training.loop import train

JSON_RECORDS = ["summary.json", "prune_plan.json", "networks.json", "classes.json"]
LINES = ["metrics.jsonl", "history.jsonl"]


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with a checkpoint, an evaluation, a pruning plan and a report."""
    folder = tmp_path_factory.mktemp("trained")
    tree = {
        "run_dir": str(folder / "run"), "duration": "4 steps", "data": conftest.data_section(data_dir),
        "student": {"name": "cnn32_student"}, "teacher": {"name": "cnn32_auxiliary", "random": True},
        "warmup": {"curriculum": "sequential", "durations": ["1 steps"] * 3},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"name": "sgd", "lr": 0.01}, "log": {"every_steps": 1}, "trackers": [],
    }  # fmt: skip
    train(config.parse(tree, "test"))
    page.write([folder / "run"])
    export(folder / "run", folder / "export")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def read_run(run: Path) -> None:
    """Read a run as `report` and `export` do, finished and unfinished; raises the last UserError of them."""
    mistakes = []
    for parse in (
        lambda: page.write([run], run.parent / "report.html", measure=False),
        lambda: source.find(run),
        lambda: source.find(run, "raw", "step-00000004"),
    ):
        try:
            parse()
        except UserError as error:
            mistakes.append(error)
    for error in mistakes:
        raise error


@pytest.mark.parametrize("name", JSON_RECORDS)
def test_records(run, name):
    file = run / name
    original = json.loads(file.read_bytes()) if file.exists() else ["ant", "bee"]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_run(run)

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_JSON)


@pytest.mark.parametrize("name", LINES)
def test_lines(run, name):
    file = run / name
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    one = st.sampled_from(lines).flatmap(changed_trees).map(encoded)
    several = st.lists(one | VALUES.map(encoded) | st.sampled_from(BAD_JSON[:9]), max_size=5).map(b"\n".join)
    assert len(lines) > 1

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_run(run)

    content = file.read_bytes()
    fuzz(read, several | mutated(content), ordinary=[content], first=BAD_JSON)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_checkpoints(run, name):
    (folder,) = (run / "checkpoints").glob("step-*")
    assert folder.name == "step-00000004"
    file = folder / name
    original = json.loads(file.read_bytes())
    kept = (folder / "manifest.json").read_bytes()
    (run / "summary.json").unlink()

    def read(content: bytes) -> None:
        file.write_bytes(content)
        if name == "state.json":  # with a manifest that vouches for it
            listed = json.loads(kept)
            size = len(content)
            entries = listed.get("files", listed)
            entries["state.json"] = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
            (folder / "manifest.json").write_text(json.dumps(listed))
        checkpoint.damaged(folder)
        read_run(run)

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_JSON)


def test_words_of_status(run):
    def read(content: bytes) -> None:
        (run / "summary.json").unlink(missing_ok=True)
        (run / "status").write_bytes(content)
        read_run(run)

    fuzz(
        read,
        mutated(b"failed\nUserError: no\n") | st.binary(max_size=50),
        ordinary=[b"done"],
        first=[b"", b"x" * 10**6],
    )


def test_pruning_plans(run, tmp_path):
    file = tmp_path / "plan.json"
    original = json.loads((run / "prune_plan.json").read_bytes())

    def read(content: bytes) -> None:
        file.write_bytes(content)
        plan = prune.Plan.read(file)
        assert prune.Plan.parse(plan.to_json()).hash == plan.hash

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_JSON)


def test_manifests_of_targets(run):
    record = {"format": "float32", "shape": [10], "dtype": "float32", "channels_last": False, "views": [0]}
    original = {
        "version": 1,
        "teacher": {
            "feature_info": [{"module": "stage1", "num_chs": 8, "reduction": 2}], "head_hidden_size": 8,
            "fingerprint": "0" * 64, "files": {"teacher.checkpoint": {"path": "a.pt", "sha256": "0" * 64}},
        },
        "config": {"data.augment.views": 2, "data.num_classes": 10},
        "plan": json.loads((run / "prune_plan.json").read_bytes()), "data": "0" * 64,
        "classes": ["ant", "bee"], "samples": [64, 64], "fields": {"logits": record}, "batch": 32,
    }  # fmt: skip

    def read(content: bytes) -> None:
        manifest = parse_manifest(content, "manifest.json")
        manifest.table()
        manifest.pruning()
        assert manifest.difference(manifest) is None
        for view in range(min(manifest.views, 3)):
            manifest.fields_in(view)

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_JSON)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_exports(trained, tmp_path, name):
    folder = Path(shutil.copytree(trained / "export", tmp_path / "export"))
    settings = config.load(trained / "run" / "config.yaml")
    content = (folder / name).read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    if name == "config.json":
        inputs = mutated_json(json.loads(content))
    else:  # mostly its header, which is JSON after 8 bytes of its length
        headers = mutated_json(json.loads(content[8:length]))
        inputs = mutated(content) | headers.map(
            lambda head: len(head).to_bytes(8, "little") + head + content[length:]
        )

    def read(content: bytes) -> None:
        (folder / name).write_bytes(content)
        load_folder(folder, settings)

    fuzz(read, inputs, ordinary=[content], first=BAD_JSON)


def test_weights(trained, tmp_path):
    settings = config.load(trained / "run" / "config.yaml")
    content = (trained / "run" / "student.safetensors").read_bytes()

    def read(content: bytes) -> None:
        for suffix in ("safetensors", "pt"):
            (tmp_path / f"a.{suffix}").write_bytes(content)
            with contextlib.suppress(UserError):
                load_file(settings, tmp_path / f"a.{suffix}")

    fuzz(read, mutated(content), ordinary=[content], first=[b"", b"\xff" * 8, b"cos\nsystem\n(S'true'\ntR."])
