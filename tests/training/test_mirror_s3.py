"""The mirror on an S3 server that stalls, resets connections and answers 500, and runs that are killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import losses, start
from safetensors.torch import load_file

from indistill import config
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.training import mix as training_mix
from indistill.training.mirror import store, uploads
from indistill.training.mirror.fetch import check_mirror
from indistill.training.mirror.store import Store, complete_checkpoints
from indistill.training.runs import run

pytest.importorskip("s3fs", reason="needs s3fs: pip install 's3fs'")
moto_server = pytest.importorskip("moto.server", reason="needs an S3 server: pip install 'moto[server]'")
serving = pytest.importorskip("werkzeug.serving", reason="needs an S3 server: pip install 'moto[server]'")

URL = "s3://bucket/run"
STALL_SECONDS = 3.0  # longer than the client waits
KILLS = 3


class Faults:
    """WSGI middleware that does to some requests what a bad network and a busy store do."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.random = random.Random(0)
        self.share = 0.0  # of the requests
        self.done: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if self.random.random() >= self.share:
            return self.application(environ, start_response)
        fault = self.random.choice(["500 before", "500 after", "reset before", "reset after", "stall"])
        self.done.append(fault)
        if fault.endswith("after"):  # the server has done what the client will ask for again
            list(self.application(environ, lambda *_: None))
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        if fault.startswith("500"):
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"the server is busy"]
        environ["werkzeug.socket"].close()
        raise ConnectionResetError


@pytest.fixture
def s3(monkeypatch) -> Iterator[tuple[Faults, dict[str, str]]]:
    """The faults of a server with one bucket, and the variables by which s3fs finds it."""
    faults = Faults(moto_server.DomainDispatcherApplication(moto_server.create_backend_app))
    server = serving.make_server("127.0.0.1", 0, faults, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    variables = {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    import s3fs

    reset = f"{variables['AWS_ENDPOINT_URL_S3']}/moto-api/reset"  # of what an earlier test has left
    urllib.request.urlopen(urllib.request.Request(reset, method="POST")).close()
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield faults, variables
    uploads.close_all()
    server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def train_slowly(tree: dict[str, Any], variables: dict[str, str]) -> None:
    """Train with 50 ms more for each step, and a client that is quick to give up."""
    os.environ.update(variables)
    import s3fs

    s3fs.S3FileSystem.read_timeout = 1
    store.PAUSE_SECONDS = 0.1
    store.ATTEMPTS = 20
    make_mix = training_mix.make_mix

    def slow_mix(*arguments: Any) -> Any:
        inner = make_mix(*arguments)

        def mix(batch: Any, phase: Any) -> Any:
            time.sleep(0.05)
            return inner(batch, phase)

        return mix

    from indistill.training import loop

    loop.make_mix = slow_mix
    run([("", config.parse(tree, "test"))])


@pytest.fixture
def mirrored(tree) -> dict[str, Any]:
    tree["mirror"] = URL
    tree["duration"] = "60 steps"
    tree["checkpoint"] = {"every_steps": 3, "keep_last": 2, "keep_best": 0}
    return tree


def start_of(process: Any, run_dir: Path) -> int | None:
    """The step at which a process began, from the history; None if it did not."""
    lines = read_lines(run_dir / "history.jsonl")
    return next((line["step"] for line in lines if line.get("pid") == process.pid), None)


def kill_within(process: Any, run_dir: Path, seconds: float) -> None:
    """Kill a process some time after it began its steps."""
    deadline = time.monotonic() + 120
    while start_of(process, run_dir) is None and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.join(timeout=seconds)
    process.kill()


def test_a_run_that_is_killed_again_and_again_loses_nothing(mirrored, s3, tmp_path):
    """Each time on an empty disk, at a random moment, with a store of which one in 16 requests fails."""
    faults, variables = s3
    whole = {name: value for name, value in mirrored.items() if name != "mirror"}
    whole["run_dir"] = str(tmp_path / "whole")
    run([("", config.parse(whole, "test"))])
    chance = random.Random(1)
    store = Store(URL)
    newest = 0  # of the steps that were complete on the mirror when a node was lost
    for i in range(KILLS + 1):
        faults.share = 0.06
        run_dir = tmp_path / f"node{i}"
        process = start(train_slowly, mirrored | {"run_dir": str(run_dir)}, variables)
        if i < KILLS:
            kill_within(process, run_dir, chance.uniform(0, 4))
        process.join(timeout=240)
        faults.share = 0.0
        begun = start_of(process, run_dir)
        assert begun is None or begun >= newest
        there = complete_checkpoints(store.names())
        newest = max([newest, *(int(step.removeprefix("step-")) for step in there)])
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    assert newest > 0
    assert {fault.split()[0] for fault in faults.done} == {"500", "reset", "stall"}
    assert losses(run_dir) == losses(whole["run_dir"])
    weights = [load_file(Path(one) / "student.safetensors") for one in (run_dir, whole["run_dir"])]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    summaries = [json.loads((Path(one) / "summary.json").read_text()) for one in (run_dir, whole["run_dir"])]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert (store.read("student.safetensors", 10**9) or b"") == (run_dir / "student.safetensors").read_bytes()


def test_parts_of_a_large_file_arrive(s3, tmp_path):
    """Of 120 MB, which s3fs uploads in several parts."""
    file = tmp_path / "large"
    file.write_bytes(random.Random(0).randbytes(120 * 10**6))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    store = Store(URL)
    store.replace(file, "large", digest)
    store.download("large", tmp_path / "again")
    assert hashlib.sha256((tmp_path / "again").read_bytes()).hexdigest() == digest
    assert store.names() == {"large"}


def test_a_bucket_that_does_not_exist_is_named(mirrored, s3):
    mirrored["mirror"] = "s3://nowhere/run"
    with pytest.raises(
        UserError, match=r"^mirror: s3://nowhere/run cannot be used \(.*bucket does not exist"
    ):
        run([("", config.parse(mirrored, "test"))])
    with pytest.raises(UserError, match="bucket does not exist"):
        check_mirror(config.parse(mirrored, "test"))
    check_mirror(config.parse(mirrored | {"mirror": URL}, "test"))
    assert Store(URL).names() == set()


def test_missing_credentials_are_named(mirrored, s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("another attempt"))
    with pytest.raises(UserError, match=r"^mirror: s3://bucket/run cannot be used \(.*redentials"):
        run([("", config.parse(mirrored, "test"))])
