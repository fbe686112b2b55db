"""Which checkpoints exist, which one counts, and what is said of a bad one."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import resource
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import losses, run_ranks, train_until
from safetensors.torch import load_file, save_file
from torch import Tensor

from indistill import config
from indistill.commands.cli import main
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.config.run_dir import CheckpointDir, RunDir
from indistill.training import checkpoint
from indistill.training.loop import train
from indistill.training.run_log import RunLog


def run(tree, resume="auto"):
    return train(config.parse(tree, "test"), resume)


@pytest.fixture
def finished(tree):
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 2, "keep_best": 0}
    run(tree)
    return tree, Path(tree["run_dir"]) / "checkpoints"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_nothing_else_is_left(finished):
    _, folder = finished
    assert names(folder) == ["step-00000020", "step-00000024"]
    assert names(folder / "step-00000024") == [
        "manifest.json", "model.safetensors", "optimizer-00000.pt", "state.json",
    ]  # fmt: skip


def test_the_best_is_kept(tree, monkeypatch):
    scores = iter([0.5, 0.9, 0.9, 0.6, 0.7])
    monkeypatch.setattr("indistill.evaluate.accuracy", lambda *_: {"top1": next(scores), "top5": 1.0})
    tree["evaluate"] = {"every": "5 steps"}  # 5, 10, 15, 20 and the end
    tree["checkpoint"] = {"every_steps": None, "keep_last": 1, "keep_best": 1}
    run(tree)
    folder = Path(tree["run_dir"]) / "checkpoints"
    assert names(folder) == ["step-00000010", "step-00000024"]
    assert json.loads((folder / "step-00000010" / "state.json").read_text())["scores"]["top1"] == 0.9


def test_saving_by_the_clock(tree):
    tree["checkpoint"] = {"every_steps": None, "every_minutes": 1e-9, "keep_last": 99}
    tree["log"]["every_steps"] = 6
    run(tree)
    saved = [int(name.split("-")[1]) for name in names(Path(tree["run_dir"]) / "checkpoints")]
    assert saved == [4, 6, 8, 12, 13, 18, 24]  # the logged steps: every sixth, and the phases' ends


def test_an_unfinished_save_does_not_count(finished):
    tree, folder = finished
    partial = folder / ".partial-step-00000099"
    partial.mkdir()
    (partial / "state.json").write_text("{}")
    assert [path.name for path in RunDir(folder.parent).saved_checkpoints()] == [
        "step-00000020",
        "step-00000024",
    ]
    run(tree)
    assert names(folder) == ["step-00000020", "step-00000024"]


def test_the_manifest_holds_sizes_and_hashes(finished):
    folder = finished[1] / "step-00000024"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == set(names(folder))
    for name, entry in manifest.items():
        content = (folder / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def bytes_read() -> tuple[int, int]:
    """The bytes that this thread has read so far, and those that are read by this call and counted later."""
    text = Path("/proc/thread-self/io").read_text()
    return int(text.split()[1]), len(text)


@pytest.mark.skipif(not Path("/proc/thread-self/io").exists(), reason="needs Linux's count of bytes read")
def test_no_file_is_read_to_be_hashed(tree, monkeypatch):
    """Of a whole save not a byte is read, from the first file to the rename."""
    counts: list[int] = []
    write = checkpoint.Checkpoints._write_and_publish

    def counting(self, *arguments):
        before, of_this_call = bytes_read()
        result = write(self, *arguments)
        counts.append(bytes_read()[0] - before - of_this_call)
        return result

    monkeypatch.setattr(checkpoint.Checkpoints, "_write_and_publish", counting)
    tree["checkpoint"] = {"every_steps": 5}
    tree["ema"] = {}
    run(tree)
    manifest = json.loads((Path(tree["run_dir"]) / "checkpoints/step-00000024/manifest.json").read_text())
    assert {"optimizer-00000.pt", "model.safetensors", "ema.safetensors", "state.json"} == manifest.keys()
    assert len(counts) > 2
    assert set(counts[1:]) == {0}  # during the first save libraries are still being imported


def layouts() -> dict[str, Tensor]:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn]  # fmt: skip
    of_types = {f"net.{i}": torch.randn(3, 5).to(dtype) for i, dtype in enumerate(dtypes)}
    return of_types | {
        "channels_last": torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last),
        "transposed": torch.randn(4, 5).t(),
        "every other": torch.randn(9)[::2],
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "größe": torch.ones(1),
    }


def test_weights_are_written_as_by_safetensors(tmp_path):
    """Byte for byte, for every layout in memory."""
    tensors = layouts()
    entry = checkpoint._write_file(tmp_path / "here.safetensors", tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "library")
    content = (tmp_path / "here.safetensors").read_bytes()
    assert content == (tmp_path / "library").read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_checkpoint_that_libraries_wrote_by_path_is_loaded(tree):
    """As of versions before files were hashed while they were written."""
    whole = copy.deepcopy(tree) | {"run_dir": str(Path(tree["run_dir"]).with_name("whole"))}
    run(whole)
    train_until(tree, 12)
    folder = Path(tree["run_dir"]) / "checkpoints/step-00000012"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("optimizer-00000.pt", "model.safetensors"):
        path = folder / name
        if path.suffix == ".pt":
            torch.save(torch.load(path, weights_only=True), path)
        else:
            save_file(load_file(path), path)
        content = path.read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run(tree)
    assert losses(tree["run_dir"]) == losses(whole["run_dir"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_found(finished):
    path = finished[1] / "step-00000024"
    assert checkpoint.damaged(path) is None
    for name in names(path):
        content = (path / name).read_bytes()
        for damage in (cut, flip_a_bit, Path.unlink):
            damage(path / name)
            assert (name if name != "manifest.json" else "") in checkpoint.damaged(path)
            (path / name).write_bytes(content)
    assert checkpoint.damaged(path) is None


@pytest.mark.parametrize(("name", "damage"), [("optimizer-00000.pt", cut), ("manifest.json", Path.unlink)])
def test_a_damaged_checkpoint_is_passed_over(finished, name, damage, capfd):
    tree, folder = finished
    lines = read_lines(folder.parent / "metrics.jsonl")
    student = load_file(folder.parent / "student.safetensors")
    damage(folder / "step-00000024" / name)
    with pytest.raises(UserError, match=r"step-00000024: damaged \(.*, and no other to go on from") as caught:
        run(tree, resume=str(folder / "step-00000024"))
    assert "\n" not in str(caught.value)
    capfd.readouterr()

    run(tree)
    out, err = capfd.readouterr()
    assert "step-00000024 is damaged (" in err
    assert name in err
    assert "step-00000020 at step 20" in out
    assert [name for name in names(folder) if name.startswith("step")] == ["step-00000020", "step-00000024"]
    assert checkpoint.damaged(folder / "step-00000024") is None
    again = read_lines(folder.parent / "metrics.jsonl")
    assert [line["loss"] for line in again if "loss" in line] == [
        line["loss"] for line in lines if "loss" in line
    ]
    for name, value in load_file(folder.parent / "student.safetensors").items():
        assert torch.equal(value, student[name])


def test_all_damaged(finished):
    tree, folder = finished
    for path in folder.iterdir():
        flip_a_bit(path / "model.safetensors")
    with pytest.raises(UserError, match=r"step-00000020: damaged \(model.safetensors has another SHA-256"):
        run(tree)


def rewrite(path: Path, content: dict[str, Any]) -> None:
    """With its entry in the manifest."""
    path.write_text(json.dumps(content))
    manifest = path.with_name("manifest.json")
    entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {path.name: entry}))


@pytest.mark.parametrize("key", ["plan", "data", "config"])
def test_another_identity_is_refused_by_name(finished, key):
    tree, folder = finished
    path = folder / "step-00000024" / "state.json"
    state = json.loads(path.read_text())
    state["identity"][key] = "0" * 64
    rewrite(path, state)
    with pytest.raises(UserError, match=f"another {key}"):
        run(tree)


def test_a_checkpoint_of_images_that_were_mixed_otherwise_is_refused(tree):
    tree["kd"]["mix"] = {"mixup": 0.8}
    tree["duration"] = "15 steps"
    train_until(tree, 14)
    path = Path(tree["run_dir"]) / "checkpoints" / "step-00000014" / "state.json"
    state = json.loads(path.read_text())
    del state["identity"]["version of kd.mix"]  # from before partners and coefficients depended on the sample
    rewrite(path, state)
    with pytest.raises(UserError, match=r"saved with another version of kd\.mix: resume with the one"):
        run(tree)


def test_another_format_is_refused(finished):
    tree, folder = finished
    path = folder / "step-00000024" / "state.json"
    rewrite(path, json.loads(path.read_text()) | {"format_version": 99})
    with pytest.raises(UserError, match="format 99"):
        run(tree)


def test_never_refuses_to_overwrite_a_run(finished):
    tree, folder = finished
    with pytest.raises(UserError, match="holds a run already"):
        run(tree, resume="never")
    assert names(folder) == ["step-00000020", "step-00000024"]


def test_resume_from_nowhere(tree):
    with pytest.raises(UserError, match="no checkpoint there"):
        run(tree, resume="nowhere/step-00000003")


def test_resume_from_a_folder_that_holds_checkpoints(finished, tmp_path):
    tree, folder = finished
    for choice in (folder, folder.parent):
        with pytest.raises(UserError, match=rf"is not a checkpoint itself: .*{folder}/step-00000024"):
            run(tree, resume=str(choice))
    with pytest.raises(UserError, match="is not a checkpoint itself"):
        run(tree, resume=str(tmp_path))


def test_the_run_directory_of_another_config(finished):
    tree, _ = finished
    other = copy.deepcopy(tree)
    other["optimizer"]["lr"] = 0.5
    with pytest.raises(UserError, match=r"optimizer.lr: 0.001 -> 0.5"):
        run(other)
    other = copy.deepcopy(tree)
    other["log"]["every_steps"] = 7  # changes nothing that is computed
    run(other)


def test_a_mended_config_takes_the_place_of_a_refused_one(tree):
    durations = tree["warmup"]["durations"]
    tree["warmup"] |= {"durations": durations[:1], "prune": {"criterion": "random"}}
    with pytest.raises(UserError, match=r"warmup\.durations"):  # after the pruning plan was written
        run(tree)
    tree["warmup"] |= {"durations": durations, "prune": {"criterion": "l2"}}
    run(tree)
    assert json.loads((Path(tree["run_dir"]) / "prune_plan.json").read_text())["criterion"] == "l2"


def resume_without_deepspeed(tree):
    sys.modules.pop("deepspeed", None)  # of other tests, whose processes begin with it
    run(tree)
    assert "deepspeed" not in sys.modules  # whose import prints a warning


def test_a_resumed_run_imports_no_deepspeed(tree):
    train_until(tree, 3)
    run_ranks(resume_without_deepspeed, 1, tree)


def test_a_failure_is_told_to_a_full_disk(tmp_path, monkeypatch):
    main_process = SimpleNamespace(is_main_process=True)
    saving = SimpleNamespace(accelerator=main_process, _write_and_publish=lambda *_: "no space left")
    full = SimpleNamespace(write=Mock(side_effect=OSError(errno.ENOSPC, "no space left")))
    monkeypatch.setattr(sys, "stderr", full)
    checkpoint.Checkpoints._write(saving, 3, CheckpointDir(tmp_path / ".partial"), tmp_path / "step", {})
    assert "CHECKPOINT NOT WRITTEN at step 3: no space left" in full.write.call_args.args[0]


def test_an_edited_plan_is_refused(finished):
    tree, folder = finished
    path = folder.parent / "prune_plan.json"
    plan = json.loads(path.read_text())
    plan["pairs"][0]["kept"][0] += 1
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match=r"prune_plan.json"):
        run(tree)


def limit_files(tree: dict[str, Any], bytes_per_file: int, first: int, last: int) -> None:
    """Train in a process that can write no larger files from step `first` on, until after step `last`."""
    end_step = RunLog.end_step

    def limiting_end_step(log, step, *arguments):
        if step == first:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # of an earlier step, on a slow machine
                    thread.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, resource.RLIM_INFINITY))
        if step == last + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return end_step(log, step, *arguments)

    RunLog.end_step = limiting_end_step
    with (Path(tree["run_dir"]).parent / "stderr").open("w", buffering=1) as sys.stderr:
        main(["train", tree["config"]])


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_told_and_costs_no_run(tree, tmp_path, world):
    """Nothing more can be written, then a few bytes, then all: the run goes on, and its record is whole."""
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 9}
    plain = {**copy.deepcopy(tree), "run_dir": str(tmp_path / "plain" / "run")}
    run_ranks(run, world, plain)

    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    limited = tree | {"config": str(path)}
    run_ranks(limit_files, world, limited, 500, 7, 13)  # steps 9 and 12
    run_dir = Path(tree["run_dir"])
    told = (run_dir.parent / "stderr").read_text()
    assert told.count("CHECKPOINT NOT WRITTEN at step") == 2
    assert "step 9: rank 0" in told
    assert told.count("METRICS NOT WRITTEN") == 1
    assert names(run_dir / "checkpoints") == [f"step-{step:08d}" for step in (3, 6, 15, 18, 21, 24)]
    losses, expected = (
        [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        for folder in (run_dir, Path(plain["run_dir"]))
    )
    assert losses == expected
    assert len(losses) == 24


def test_a_disk_that_stays_full_ends_the_run(tree, tmp_path):
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 9}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    run_ranks(limit_files, 2, tree | {"config": str(path)}, 30_000, 7, 99, exit_code=2)
    told = (tmp_path / "stderr").read_text()
    assert told.count("CHECKPOINT NOT WRITTEN") == 3
    assert "the last 3 checkpoints could not be written (rank 0" in told.splitlines()[-1]
    assert names(tmp_path / "run" / "checkpoints") == ["step-00000003", "step-00000006"]
    assert (tmp_path / "run" / "status").read_text().startswith("failed\n")


def test_a_step_waits_for_the_copy_alone(tree, monkeypatch):
    """The disk takes a second for each checkpoint; training takes steps meanwhile, and the stall says so."""
    begun, ended, steps = [], [], []
    write_file, end_step = checkpoint._write_file, RunLog.end_step

    def slow_write_file(path, content):
        if path.name == "state.json":
            begun.append(len(steps))
            time.sleep(1)
            ended.append(len(steps))
        return write_file(path, content)

    monkeypatch.setattr(checkpoint, "_write_file", slow_write_file)
    monkeypatch.setattr(
        RunLog, "end_step", lambda log, step, *a: (steps.append(step), end_step(log, step, *a))[1]
    )
    tree["checkpoint"] = {"every_steps": 20}
    run(tree)
    assert begun[0] >= 20  # the thread may be a step late
    assert ended[0] > 20
    stalls = {
        line["step"]: line["checkpoint_stall_seconds"]
        for line in read_lines(Path(tree["run_dir"]) / "metrics.jsonl")
        if "checkpoint_stall_seconds" in line
    }
    assert stalls.keys() == {20, 24}
    assert 0 < stalls[20] < 0.9
