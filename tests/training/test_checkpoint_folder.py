"""Whatever is in `checkpoints/` and the run directory, no work is lost, and nothing foreign is touched."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from conftest import losses, train_until
from safetensors.torch import load_file, save_file

from indistill import config
from indistill.config import UserError
from indistill.config.run_dir import CheckpointDir, RunDir, has_begun
from indistill.training import checkpoint
from indistill.training.loop import train


@pytest.fixture
def short_tree(tree: dict[str, Any]) -> dict[str, Any]:
    """8 steps without a teacher, with a checkpoint after each, of which two are kept."""
    tree |= {"duration": "8 steps", "warmup": None, "teacher": None, "kd": {"losses": [{"name": "ce"}]}}
    tree["checkpoint"] = {"every_steps": 1, "keep_last": 2, "keep_best": 0}
    return tree


@pytest.fixture
def stopped(short_tree: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """A run that was stopped after 4 steps: its tree, and its checkpoints, those of steps 3 and 4."""
    train_until(short_tree, 4)
    folder = Path(short_tree["run_dir"]) / "checkpoints"
    assert names(folder) == ["step-00000003", "step-00000004"]
    return short_tree, folder


def run(tree: dict[str, Any], resume: str = "auto") -> None:
    train(config.parse(tree, "test"), resume)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewrite(path: Path, content: bytes) -> None:
    """Change a file of a checkpoint together with its entry in the manifest, as somebody else might."""
    path.write_bytes(content)
    manifest = path.with_name("manifest.json")
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: entry}))


# --- what else may be in the folder -------------------------------------------------------------------------
def test_only_names_of_our_own_are_deleted(stopped, capfd):
    tree, folder = stopped
    for name in (".DS_Store", ".nfs0001", "notes.txt", ".partial", ".deleted-mine"):
        (folder / name).write_text("mine")
    for name in (".hidden", ".partial-step-1-backup", "step-last", "step-00000004.bak"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("mine")
    theirs = [name for name in names(folder) if name not in ("step-00000003", "step-00000004")]
    for name in (".partial-step-00000009", ".deleted-step-00000001", ".deleted-step-00000002-17"):
        (folder / name).mkdir()
        (folder / name / "optimizer-00000.pt").write_text("cut")
    (folder / ".deleted-step-00000002").symlink_to(folder / ".hidden")
    run(tree)
    assert names(folder) == sorted([*theirs, "step-00000007", "step-00000008"])
    assert (folder / ".hidden" / "file").read_text() == "mine"
    assert "cannot" not in capfd.readouterr().err


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def cut_state(path: Path) -> None:
    (path / "state.json").write_text('{"format_version": 4, "st')


def cut_state_with_hash(path: Path) -> None:
    rewrite(path / "state.json", b'{"format_version": 4, "st')


def cut_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"cut")


def file_instead(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def dangling(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "damage", [empty, cut_state, cut_state_with_hash, cut_weights, file_instead, dangling]
)
@pytest.mark.parametrize("step", [3, 4])
def test_a_damaged_checkpoint_costs_no_whole_one(stopped, capfd, damage, step):
    """The newest whole one is resumed, the new ones are written, and the damaged one does not count."""
    tree, folder = stopped
    damage(folder / f"step-{step:08d}")
    run(tree)
    out, err = capfd.readouterr()
    assert f"resumed from {folder}/step-0000000{3 if step == 4 else 4}" in out
    assert "NOT WRITTEN" not in err
    whole = [path.name for path in RunDir(folder.parent).saved_checkpoints() if not checkpoint.damaged(path)]
    assert whole == ["step-00000007", "step-00000008"]
    assert len(losses(folder.parent)) == 8


def test_an_older_checkpoint_that_is_a_link_loses_the_link_alone(stopped, tmp_path):
    tree, folder = stopped
    (folder / "step-00000003").rename(tmp_path / "elsewhere")
    (folder / "step-00000003").symlink_to(tmp_path / "elsewhere")
    run(tree)
    assert names(folder) == ["step-00000007", "step-00000008"]
    assert checkpoint.damaged(tmp_path / "elsewhere") is None


def test_what_cannot_be_deleted_is_a_warning_and_tried_again(stopped, monkeypatch, capfd):
    tree, folder = stopped
    rmtree = shutil.rmtree

    def busy(path: Path, ignore_errors: bool = False) -> None:
        if "step-00000003" in str(path) and not (folder / "step-00000007").exists():
            if not ignore_errors:
                raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        else:
            rmtree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    run(tree)
    err = capfd.readouterr().err
    assert err.count("cannot be deleted ([Errno 16] Device or resource busy") == 1
    assert "NOT WRITTEN" not in err
    assert names(folder) == ["step-00000007", "step-00000008"]


def test_what_cannot_be_renamed_is_a_warning(stopped, monkeypatch, capfd):
    tree, folder = stopped
    rename = Path.rename

    def fixed(path: Path, target: Path) -> Path:
        if path.name == "step-00000003":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fixed)
    run(tree)
    err = capfd.readouterr().err
    assert err.count("step-00000003 cannot be deleted") == 1
    assert "NOT WRITTEN" not in err
    assert names(folder) == ["step-00000003", "step-00000007", "step-00000008"]


def test_a_kill_just_before_the_last_rename_loses_nothing(stopped, capfd):
    tree, folder = stopped
    (folder / "step-00000004").rename(folder / ".partial-step-00000004")
    run(tree)
    assert "step-00000004 at step 4" in capfd.readouterr().out
    assert names(folder) == ["step-00000007", "step-00000008"]


def test_a_checkpoint_without_the_part_of_another_node_is_not_published(tmp_path, monkeypatch):
    """As under ZeRO, where each node has a disk of its own: it would be damaged, and replace whole ones."""
    monkeypatch.setattr(checkpoint, "VISIBLE_SECONDS", 0.0)
    partial, final = CheckpointDir(tmp_path / ".partial-step-00000001"), tmp_path / "step-00000001"
    partial.path.mkdir()
    (partial.path / "state.json").write_text("{}")
    manifest = {"state.json": {}, "optimizer-00001.pt": {}}
    with pytest.raises(OSError, match=r"optimizer-00001\.pt of another node is not there"):
        checkpoint._publish(partial, final, manifest)
    assert not final.exists()
    Timer(0.2, (partial.path / "optimizer-00001.pt").touch).start()  # a file system that shows it late
    monkeypatch.setattr(checkpoint, "VISIBLE_SECONDS", 60.0)
    checkpoint._publish(partial, final, manifest)
    assert {path.name for path in final.iterdir()} == manifest.keys()


def test_a_part_of_an_earlier_save_on_more_ranks_is_not_taken_over(stopped, monkeypatch):
    tree, folder = stopped
    delete = checkpoint._delete
    left_over = folder / ".partial-step-00000008"
    left_over.mkdir()
    (left_over / "optimizer-00001.pt").write_text("of an earlier save")
    monkeypatch.setattr(checkpoint, "_delete", lambda path: path == left_over or delete(path))
    run(tree)
    assert "optimizer-00001.pt" not in names(folder / "step-00000008")


def deep(path: Path) -> None:
    rewrite(path / "state.json", b"[" * 100_000)


def pipe(path: Path) -> None:
    os.mkfifo(path / "pipe")
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"pipe": {"bytes": 0, "sha256": ""}}))


def manifest_pipe(path: Path) -> None:
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def outside(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"../../config.yaml": {"bytes": 0}}))


def nothing(path: Path) -> None:
    (path / "manifest.json").write_text("{}")


def without_step(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    del state["step"]
    rewrite(path / "state.json", json.dumps(state).encode())


@pytest.mark.parametrize("damage", [deep, pipe, manifest_pipe, outside, nothing, without_step])
def test_a_forged_checkpoint_is_damaged(stopped, damage):
    _, folder = stopped
    damage(folder / "step-00000004")
    assert (why := checkpoint.damaged(folder / "step-00000004")) is not None
    assert "\n" not in why


# --- what does not fit the run ------------------------------------------------------------------------------
def set_exp_avg(value: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        states = saved["optimizer"]["state"].values()
        state = next(state for state in states if state["exp_avg"].dim() == 4)
        state["exp_avg"] = value(state["exp_avg"])

    return change


def drop(*keys: Any) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        *parents, last = keys
        for key in parents:
            saved = saved[key]
        del saved[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_exp_avg(lambda value: value[:1].clone()), r"parameter \d+: exp_avg is \[1, 3, 3, 3\] float32"),
        (set_exp_avg(lambda value: value.flatten()), "exp_avg is"),
        (set_exp_avg(lambda value: value.double()), r"float64, this run needs \[\d+, 3, 3, 3\] float32"),
        (set_exp_avg(lambda value: value.to(torch.int64)), "int64, this run needs"),
        (set_exp_avg(lambda _: 1.0), "exp_avg is a number"),
        (set_exp_avg(lambda _: "text"), "a value is a str"),
        (drop("optimizer", "state", 0, "exp_avg_sq"), "lacks 'exp_avg_sq'"),
        (drop("optimizer", "param_groups", 0), "has not the 2 groups"),
        (drop("optimizer", "param_groups", 0, "params", 0), "parameters, not"),
        (drop("optimizer"), "is not a state dict"),
        (drop("scaler", "scale"), "gradient scaler's scale is None"),
        (lambda saved: saved["scaler"].update(scale="x"), "gradient scaler's scale is 'x'"),
        (lambda saved: saved["optimizer"]["param_groups"][0].update(betas=(0.9,)), r"betas is \(0.9,\)"),
        (lambda saved: saved["optimizer"]["state"][0].update(more=torch.zeros(3)), "unexpected 'more'"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused_before_it_is_loaded(stopped, change, message):
    tree, folder = stopped
    path = folder / "step-00000004" / "optimizer-00000.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path.with_suffix(".new"))
    content = path.with_suffix(".new").read_bytes()
    path.with_suffix(".new").unlink()
    rewrite(path, content)
    with pytest.raises(UserError, match=rf"step-00000004: .*{message}.*--resume PATH") as error:
        run(tree)
    assert "\n" not in str(error.value)
    run(tree, resume=str(folder / "step-00000003"))


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_weights_that_do_not_fit_are_refused(short_tree, name):
    short_tree["ema"] = {"decay": 0.9}
    train_until(short_tree, 4)
    path = Path(short_tree["run_dir"]) / "checkpoints" / "step-00000004" / name
    weights = load_file(path)
    first = min(weights)
    for changed in (
        {**weights, first: weights[first].long()},
        {**weights, first: weights[first].flatten()[:1].clone()},
        {**weights, "more": torch.zeros(1)},
        {key: value for key, value in weights.items() if key != first},
    ):
        save_file(changed, path)
        rewrite(path, path.read_bytes())
        with pytest.raises(UserError, match=f"step-00000004: {name} (has|lacks)") as error:
            run(short_tree)
        assert "\n" not in str(error.value)


# --- the run directory --------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", [b"", b"run_dir: [", b"\xff\xfe\x00", b"- a list", b"seed: 1\n"])
def test_a_damaged_config_is_written_again_if_a_checkpoint_is_of_this_run(stopped, content, capfd):
    tree, folder = stopped
    file = folder.parent / "config.yaml"
    whole = file.read_bytes()
    file.write_bytes(content)
    assert has_begun(config.parse(tree, "test"))
    run(tree)
    assert file.read_bytes() == whole
    assert "resumed from" in (printed := capfd.readouterr()).out
    assert ("config.yaml" in printed.err) == (content != b"seed: 1\n")  # which is a mapping

    file.write_bytes(content)
    with pytest.raises(UserError, match="config"):
        run({**tree, "seed": 5})
    assert file.read_bytes() == content


def test_a_damaged_config_without_a_checkpoint(stopped):
    tree, folder = stopped
    shutil.rmtree(folder)
    (folder.parent / "config.yaml").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint says of which config the run is: put the file back"):
        run(tree)
    (folder.parent / "metrics.jsonl").unlink()  # then there is nothing to lose
    run(tree)


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(short_tree, tmp_path):
    run_dir = Path(short_tree["run_dir"])
    run_dir.mkdir()
    (run_dir / "thesis.tex").write_text("mine")
    with pytest.raises(
        UserError, match=r"is not empty, and no run of indistill \(it contains 'thesis.tex'\)"
    ):
        run(short_tree)
    assert names(run_dir) == ["thesis.tex"]
    (run_dir / "thesis.tex").rename(run_dir / ".thesis.tex")
    (run_dir / "slurm-17.out").write_text("of the scheduler")
    (run_dir / "status.27248.0491f58d.part").write_text("failed")  # another rank writes it, or was killed
    run(short_tree)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_file_has_the_mode_of_the_umask(short_tree, umask):
    before = os.umask(umask)
    try:
        run(short_tree)
    finally:
        os.umask(before)
    files = [path for path in Path(short_tree["run_dir"]).rglob("*") if path.is_file()]
    assert {"student.safetensors", "model.safetensors", "config.yaml", "state.json"} <= {
        f.name for f in files
    }
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in files} == {
        file.name: 0o666 & ~umask for file in files
    }
