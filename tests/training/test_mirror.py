"""A run whose directory is lost goes on from its mirror, as if nothing had happened."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import fsspec
import pytest
import torch
from conftest import losses, train_until
from safetensors.torch import load_file

from indistill import config
from indistill.config import UserError, run_lock, runs
from indistill.config.run_dir import CheckpointDir, RunDir
from indistill.distributed import preemption
from indistill.training import checkpoint
from indistill.training.loop import train
from indistill.training.mirror import uploads
from indistill.training.mirror.fetch import check_mirror, fetch_run
from indistill.training.mirror.store import Store, complete_checkpoints
from indistill.training.runs import run


@pytest.fixture(autouse=True)
def empty_memory():
    """fsspec keeps the files of memory:// as long as the process lives."""
    fsspec.filesystem("memory").store.clear()
    yield
    uploads.close_all()


@pytest.fixture(params=["memory://bucket/run", "file"])
def mirrored(request, tree, tmp_path) -> dict[str, Any]:
    tree["mirror"] = f"file://{tmp_path}/mirror/run" if request.param == "file" else request.param
    tree["checkpoint"] = {"every_steps": 5, "keep_last": 2, "keep_best": 0}
    return tree


def contents(url: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/"): system.cat_file(path) for path in system.find(root)}


def local(run_dir: str | Path) -> dict[str, bytes]:
    root = Path(run_dir)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def elsewhere(tree: dict[str, Any], name: str = "elsewhere") -> dict[str, Any]:
    """The config on another node, whose disk is empty."""
    return tree | {"run_dir": str(Path(tree["run_dir"]).with_name(name))}


def train_all(tree: dict[str, Any]) -> None:
    run([("", config.parse(tree, "test"))])


def assert_same_run(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert losses(first["run_dir"]) == losses(second["run_dir"])
    weights = [load_file(Path(one["run_dir"]) / "student.safetensors") for one in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_mirror_has_what_the_run_directory_has(mirrored):
    train_all(mirrored)
    there, here = contents(mirrored["mirror"]), local(mirrored["run_dir"])
    checkpoints = {name for name in here if name.startswith("checkpoints/")}
    records = {
        "config.yaml", "metrics.jsonl", "history.jsonl", "summary.json", "student.safetensors",
        "prune_plan.json",
    }  # fmt: skip
    assert {name.split("/")[1] for name in checkpoints} == {"step-00000020", "step-00000024"}
    assert set(there) == checkpoints | records | {"mirror.json"}
    for name in checkpoints | records:
        assert there[name] == here[name], name
    assert not json.loads(there["mirror.json"])["held"]


def test_a_node_with_an_empty_run_dir_goes_on(mirrored):
    whole = {name: value for name, value in elsewhere(mirrored, "whole").items() if name != "mirror"}
    train_all(whole)
    train_until(mirrored, 12)
    uploads.close_all()
    second = elsewhere(mirrored)
    train_until(second, 17)
    uploads.close_all()
    third = elsewhere(mirrored, "third")
    train_all(third)
    assert_same_run(third, whole)
    starts = [
        json.loads(line) for line in (Path(third["run_dir"]) / "history.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in starts if line["event"] == "start"] == [0, 12, 17]
    assert set(contents(mirrored["mirror"])) >= {"summary.json", "checkpoints/step-00000024/manifest.json"}


def test_a_run_dir_that_is_behind_is_brought_up_to_date(mirrored):
    """As of a node that comes back with its old disk, after another one has gone on with the run."""
    train_until(mirrored, 7)
    uploads.close_all()
    train_until(elsewhere(mirrored), 17)
    uploads.close_all()
    fetch_run(config.parse(mirrored, "test"))
    saved = RunDir(Path(mirrored["run_dir"])).saved_checkpoints()
    assert [path.name for path in saved][-2:] == ["step-00000015", "step-00000017"]
    assert all(checkpoint.damaged(path) is None for path in saved)
    assert losses(mirrored["run_dir"]) == losses(elsewhere(mirrored)["run_dir"])


def test_a_record_that_is_lost_does_not_bring_old_ones_back(mirrored):
    train_until(mirrored, 7)
    uploads.close_all()
    alone = {name: value for name, value in mirrored.items() if name != "mirror"}
    train_until(alone, 12)
    (Path(mirrored["run_dir"]) / "config.yaml").unlink()
    before = losses(mirrored["run_dir"])
    fetch_run(config.parse(mirrored, "test"))
    assert losses(mirrored["run_dir"]) == before
    assert len(before) == 12


def test_a_damaged_owner_is_named(mirrored, monkeypatch):
    train_until(mirrored, 5)
    uploads.close_all()
    monkeypatch.setattr("indistill.training.mirror.store.ATTEMPTS", 1)
    for content in (b"", b"[]", b'{"run": 1}', b"\xff"):
        Store(mirrored["mirror"]).write("mirror.json", content)
        with pytest.raises(UserError, match=r"cannot be used \(mirror.json is damaged\)"):
            train_all(elsewhere(mirrored))


def test_a_run_that_has_finished_is_not_trained_again(mirrored, capfd):
    train_all(mirrored)
    second = elsewhere(mirrored)
    capfd.readouterr()
    train_all(second)
    assert "resumed from" in capfd.readouterr().out
    assert_same_run(mirrored, second)


def test_another_run_is_refused(mirrored):
    train_until(mirrored, 5)
    uploads.close_all()
    other = elsewhere(mirrored) | {"seed": 1}
    with pytest.raises(UserError, match=r"mirror: .* holds a run of another config \(seed: 0 -> 1\)"):
        train_all(other)
    # The same config, but begun for itself.
    alone = {name: value for name, value in elsewhere(mirrored).items() if name != "mirror"}
    train_until(alone, 5)
    with pytest.raises(UserError, match=r"mirror: .* holds another run than .*elsewhere"):
        train_all(elsewhere(mirrored))


def test_a_config_that_was_refused_may_be_corrected(mirrored, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("indistill.training.lessons.networks", Mock(side_effect=UserError("no such network")))
        with pytest.raises(UserError, match="no such network"):
            train_all(mirrored)
    assert "config.yaml" in contents(mirrored["mirror"])
    train_until(mirrored | {"seed": 1}, 5)
    uploads.close_all()
    with pytest.raises(UserError, match=r"holds a run of another config \(seed: 1 -> 0\)"):
        train_all(elsewhere(mirrored))


def test_the_only_checkpoint_is_not_replaced(mirrored, monkeypatch):
    """One that is saved again after the evaluation that a preemption had stopped."""
    mirrored["checkpoint"] = {"every_steps": None, "keep_last": 1, "keep_best": 0}
    train_until(mirrored, 5)
    uploads.close_all()
    state = CheckpointDir(Path(mirrored["run_dir"]) / "checkpoints/step-00000005").state
    text = state.read_text()
    state.write_text(text.replace('"scores": {}', '"scores": null'))
    manifest = json.loads((state.parent / "manifest.json").read_text())
    manifest["state.json"] = {
        "bytes": state.stat().st_size, "sha256": hashlib.sha256(state.read_bytes()).hexdigest(),
    }  # fmt: skip
    (state.parent / "manifest.json").write_text(json.dumps(manifest))
    assert contents(mirrored["mirror"])[marks("step-00000005")] != json.dumps(manifest).encode()
    seen = []
    upload = Store.upload

    def looking(self, *arguments: Any) -> None:
        upload(self, *arguments)
        seen.append(complete_checkpoints(self.names()))

    monkeypatch.setattr(Store, "upload", looking)
    train_until(mirrored, 10)
    uploads.close_all()
    assert seen
    assert all(seen)
    assert complete_checkpoints(contents(mirrored["mirror"])) == ["step-00000010"]


def test_a_start_that_is_at_work_is_not_disturbed(mirrored, monkeypatch):
    """On this machine, whose processes are known, and on another one that gives signs of life."""
    train_until(mirrored, 5)
    uploads.close_all()
    store = Store(mirrored["mirror"])
    owner = store.owner()
    alive = owner | {"held": True, "id": "another", "pid": os.getppid()}
    store.write("mirror.json", json.dumps(alive | {"start": run_lock._start_of(os.getppid())}).encode())
    with pytest.raises(UserError, match=r"mirror: .*: another start of this run is at work there \(host"):
        train_all(elsewhere(mirrored))

    remote = alive | {"machine": "another"}
    store.write("mirror.json", json.dumps(remote).encode())
    beats = iter(range(100))

    def beating(_seconds: float) -> None:
        store.write("mirror.json", json.dumps(remote | {"beat": next(beats)}).encode())

    monkeypatch.setattr(time, "sleep", beating)
    with pytest.raises(UserError, match="another start of this run is at work there"):
        train_all(elsewhere(mirrored))


def test_a_start_that_is_gone_is_followed(mirrored, monkeypatch):
    train_until(mirrored, 5)
    uploads.close_all()
    store = Store(mirrored["mirror"])
    gone = store.owner() | {"held": True, "id": "another"}
    second, third = elsewhere(mirrored), elsewhere(mirrored, "third")
    store.write("mirror.json", json.dumps(gone | {"start": "earlier"}).encode())  # of this process number
    train_until(second, 10)
    uploads.close_all()
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.1)
    store.write("mirror.json", json.dumps(gone | {"machine": "another"}).encode())
    train_until(third, 15)
    assert RunDir(Path(third["run_dir"])).saved_checkpoints()[-1].name == "step-00000015"


def test_a_start_that_is_followed_ends(mirrored, monkeypatch):
    ended = threading.Event()
    reasons = []
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(preemption, "lost", lambda reason: (reasons.append(reason), ended.set()))
    train_until(mirrored, 5)
    store = Store(mirrored["mirror"])
    record = None
    for _ in range(100):  # its own writing may come in between, and a read then finds half a file
        with contextlib.suppress(OSError):
            record = record or store.owner()
            store.write("mirror.json", json.dumps(record | {"id": "another", "host": "node7"}).encode())
        if ended.wait(0.2):
            break
    assert ended.is_set()
    assert "taken over by host node7" in reasons[0]


def test_a_damaged_checkpoint_of_the_mirror_is_passed_over(mirrored, capfd):
    whole = {name: value for name, value in elsewhere(mirrored, "whole").items() if name != "mirror"}
    train_all(whole)
    train_until(mirrored, 12)
    uploads.close_all()
    store = Store(mirrored["mirror"])
    name = "checkpoints/step-00000012/model.safetensors"
    good = store.read(name, 10**9)
    store.write(name, good[:-1] + bytes([good[-1] ^ 1]))
    second = elsewhere(mirrored)
    train_all(second)
    assert "step-00000012 is damaged (model.safetensors has another SHA-256" in capfd.readouterr().err
    assert_same_run(second, whole)
    assert store.names() >= {"checkpoints/step-00000024/manifest.json"}

    for path in [name for name in store.names() if name.endswith("model.safetensors")]:
        store.write(path, b"no weights")
    with pytest.raises(UserError, match=r"step-00000024 is damaged \(.*\), and no other to go on from"):
        train_all(elsewhere(mirrored, "third"))


def test_what_arrives_changed_does_not_count(mirrored, monkeypatch, capfd):
    """The store changes a bit of the first uploads."""
    monkeypatch.setattr("indistill.training.mirror.store.PAUSE_SECONDS", 0.01)
    upload, changed = Store.upload, []

    def changing(self, file: Path, name: str, digest: str) -> None:
        if len(changed) < 3:
            changed.append(name)
            other = file.with_name("changed")
            other.write_bytes(file.read_bytes()[:-1] + b"!")
            return upload(self, other, name, digest)
        return upload(self, file, name, digest)

    monkeypatch.setattr(Store, "upload", changing)
    train_all(mirrored)
    assert "MIRROR NOT UP TO DATE" in capfd.readouterr().err
    there = contents(mirrored["mirror"])
    manifest = json.loads(there["checkpoints/step-00000024/manifest.json"])
    for name, entry in manifest.items():
        assert hashlib.sha256(there[f"checkpoints/step-00000024/{name}"]).hexdigest() == entry["sha256"]
    assert not [name for name in there if name.endswith(".part")]


def test_a_checkpoint_is_read_once_to_be_uploaded(mirrored, monkeypatch):
    """What arrives is compared with the hashes of its manifest; nothing here is hashed before."""
    hashed: list[Path] = []
    monkeypatch.setattr(checkpoint, "sha256", hashed.append)
    train_all(mirrored)
    assert "checkpoints/step-00000024/manifest.json" in contents(mirrored["mirror"])
    assert hashed == []


def test_a_checkpoint_that_is_damaged_here_is_not_on_the_mirror(mirrored, monkeypatch, capfd):
    """Its size is right: that it differs is seen when it arrives."""
    upload_checkpoint = uploads.Uploads._upload_checkpoint

    def damaging(self, path, names):
        if path.name == "step-00000020":
            file = path / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-1] + b"!")
        return upload_checkpoint(self, path, names)

    monkeypatch.setattr(uploads.Uploads, "_upload_checkpoint", damaging)
    train_until(mirrored, 20)
    uploads.close_all()
    there = {name for name in contents(mirrored["mirror"]) if "step-00000020" in name}
    told = capfd.readouterr().err
    assert there == set()
    assert "step-00000020 is damaged (model.safetensors has another SHA-256 than when it was written)" in told
    assert "and not uploaded" in told
    assert "NOT UP TO DATE" not in told


def test_the_mark_comes_last_and_goes_first(mirrored, monkeypatch):
    """Whenever the mirror is looked at, a checkpoint that is marked is complete, and there is always one."""
    seen: list[list[str]] = []
    faults: list[str] = []
    store = Store(mirrored["mirror"])

    def look() -> None:
        there = store.names()
        steps = complete_checkpoints(there)
        for step in steps:
            files = {f"checkpoints/{step}/{name}" for name in json.loads(store.read(marks(step)))}
            lines = (store.read("metrics.jsonl") or b"").splitlines()
            if not files <= there:
                faults.append(f"{step} lacks {files - there}")
            if not any(json.loads(line)["step"] == int(step[5:]) for line in lines):
                faults.append(f"the log ends before {step}")
        seen.append(steps)

    def looking(method: Callable) -> Callable:
        def call(*arguments: Any, **keywords: Any) -> Any:
            result = method(*arguments, **keywords)
            look()
            return result

        return call

    for name in ("put_file", "pipe_file", "mv", "rm_file"):
        monkeypatch.setattr(type(store.system), name, looking(getattr(type(store.system), name)))
    train_all(mirrored)
    assert not faults
    first = next(i for i, steps in enumerate(seen) if steps)
    assert all(seen[first:])
    assert seen[-1] == ["step-00000020", "step-00000024"]


def test_a_run_that_saves_faster_than_it_uploads_has_checkpoints_there(mirrored, monkeypatch, capfd):
    """Each is deleted locally while it is uploaded."""
    mirrored["checkpoint"] = {"every_steps": 1, "keep_last": 1, "keep_best": 0}
    store, upload = Store(mirrored["mirror"]), Store.upload
    files = RunDir(Path(mirrored["run_dir"]))
    complete, gone = set[str](), set[str]()

    def slow(self, file: Path, name: str, digest: str) -> None:
        step = name.split("/")[1] if name.startswith("checkpoints/") else None
        if step and step != "step-00000024":
            deadline = time.monotonic() + 20
            while (files.checkpoints / step).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            gone.add(step)
        upload(self, file, name, digest)
        complete.update(complete_checkpoints(store.names()))

    monkeypatch.setattr(Store, "upload", slow)
    train_all(mirrored)
    assert "NOT UP TO DATE" not in capfd.readouterr().err
    assert complete & gone
    assert complete_checkpoints(store.names()) == ["step-00000024"]
    assert not [path.name for path in files.path.iterdir() if path.name.startswith(".mirror-")]


def test_a_run_that_is_stopped_has_its_end_there(mirrored, monkeypatch):
    reached = lambda _, done, __: preemption.settle(done == 7)  # noqa: E731
    monkeypatch.setattr(preemption.Agreement, "reached", reached)
    with pytest.raises(preemption.Preempted):
        train_all(mirrored)
    there = contents(mirrored["mirror"])
    assert marks("step-00000007") in there
    assert json.loads(there["history.jsonl"].splitlines()[-1])["how"] == "requeue"
    assert json.loads(there["mirror.json"])["held"] is False  # nobody has to wait for a sign of life


def test_students_have_a_mirror_each(mirrored):
    students = [{"name": "one"}, {"name": "other", "optimizer": {"lr": 1e-2}}]
    run(runs.load(mirrored | {"students": students}))
    for name in ("one", "other"):
        there = contents(f"{mirrored['mirror']}/{name}")
        path = Path(mirrored["run_dir"], name, "student.safetensors")
        assert there["student.safetensors"] == path.read_bytes()
    with pytest.raises(
        UserError, match="student one: mirror is always the file's mirror/one: remove the key"
    ):
        runs.load(mirrored | {"students": [{"name": "one", "mirror": "memory://a"}]})


def marks(step: str) -> str:
    return f"checkpoints/{step}/manifest.json"


def test_a_store_that_hangs_does_not_hold_up_the_run(mirrored, monkeypatch, capfd):
    hang = threading.Event()
    monkeypatch.setattr("indistill.training.mirror.uploads.END_SECONDS", 0.2)
    upload = Store.upload
    monkeypatch.setattr(Store, "upload", lambda *arguments: hang.wait() and upload(*arguments))
    train_all(mirrored)
    assert (Path(mirrored["run_dir"]) / "summary.json").exists()
    err = capfd.readouterr().err
    hang.set()
    assert err.count("MIRROR NOT UP TO DATE") == 1
    assert "0 s were not enough" in err


def test_a_chain_goes_on_from_its_mirror(chain, tmp_path):
    chain["mirror"] = f"file://{tmp_path}/mirror"
    run(runs.load(chain))
    assert {path.name for path in (tmp_path / "mirror").iterdir()} == {name for name, _ in runs.load(chain)}
    lost = Path(chain["run_dir"]).rename(tmp_path / "lost")
    stages = runs.load(chain)
    run(stages)
    for name, settings in stages:
        assert_same_run({"run_dir": settings.run_dir}, {"run_dir": lost / name})
        history = (Path(settings.run_dir) / "history.jsonl").read_text()
        assert history.count('"start"') == 1  # finished before, and kept


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("/mirror", "is no URL to write to"),
        ("https://host/run", "is no URL to write to"),
        ("nothing://bucket/run", "is not a URL that is read"),
        ("s3://REDACTED@bucket/run", "a saved config does not keep"),
    ],
)
def test_what_cannot_be_a_mirror_is_named(tree, url, reason):
    tree["mirror"] = url
    with pytest.raises(UserError, match=f"^mirror: .*{reason}") as caught:
        train_all(tree)
    assert "\n" not in str(caught.value)
    assert not (Path(tree["run_dir"]) / "config.yaml").exists()


def test_a_missing_package_is_named(tree, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    tree["mirror"] = "s3://bucket/run"
    with pytest.raises(UserError, match=r"^mirror: s3:// needs s3fs: pip install 'indistill\[s3\]'"):
        fetch_run(config.parse(tree, "test"))


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind, as root is not bound")
def test_a_mirror_that_cannot_be_written_is_named(tree, tmp_path):
    (tmp_path / "mirror").mkdir(mode=0o500)
    tree["mirror"] = f"file://{tmp_path}/mirror/run"
    with pytest.raises(UserError, match=r"^mirror: .*Permission denied"):
        train_all(tree)


def test_permission_is_needed(tree, monkeypatch):
    tree["mirror"] = "memory://bucket/run"

    def denied(*_: Any) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Store, "write", denied)
    with pytest.raises(
        UserError, match=r"^mirror: memory://bucket/run cannot be used \(Access Denied\): mend"
    ):
        train(config.parse(tree, "test"))
    with pytest.raises(UserError, match=r"cannot be written \(Access Denied\)"):
        check_mirror(config.parse(tree, "test"))
    monkeypatch.undo()
    check_mirror(config.parse(tree, "test"))
    assert contents(tree["mirror"]) == {}
    monkeypatch.setattr(Store, "delete", lambda *_: None)
    with pytest.raises(UserError, match="a file that was deleted there is still there"):
        check_mirror(config.parse(tree, "test"))
