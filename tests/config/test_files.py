"""Files that are replaced at once, and hashes of files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import struct
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from indistill.config.files import (
    HashedFile,
    read_bytes,
    read_json,
    read_lines,
    read_text,
    replace_text,
    replacing,
    sha256,
    sort_metadata,
)

SIZE = 1 << 20  # bytes, several times what one write call buffers


def test_a_file_is_replaced_at_the_end(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file) as stream:
        stream.write(b"ne")
        assert file.read_text() == "old"
        stream.write(b"w")
    assert file.read_text() == "new"
    replace_text(file, "ü\n")
    assert file.read_bytes() == "ü\n".encode()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, error):
    (tmp_path / "file").write_text("old")

    def fail(file: Path) -> None:
        with replacing(file) as stream:
            stream.write(b"x" * SIZE)
            raise error("why")

    for name in ("file", "new"):
        with pytest.raises(error, match="why"):
            fail(tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_target_that_cannot_be_replaced_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_text(tmp_path / "folder", "text")
    with pytest.raises(FileNotFoundError):
        replace_text(tmp_path / "missing" / "file", "text")
    assert os.listdir(tmp_path) == ["folder"]


def test_the_mode_is_that_of_any_new_file(tmp_path):
    replace_text(tmp_path / "replaced", "text")
    (tmp_path / "plain").write_text("text")
    assert (tmp_path / "replaced").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        calls.append(f"fsync {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def recorded_replace(source: str, target: str | Path) -> None:
        calls.append(f"replace {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    replace_text(tmp_path / "file", "text")
    assert calls == ["fsync 4", "replace file"]


def write_often(file: Path, letter: str, start: Barrier, times: int) -> None:
    start.wait()
    for _ in range(times):
        replace_text(file, letter * SIZE)


def test_two_processes_that_write_one_file_leave_one_whole_content(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(3)
    writers = [
        context.Process(target=write_often, args=(tmp_path / "file", letter, start, 20)) for letter in "ab"
    ]
    for writer in writers:
        writer.start()
    start.wait(timeout=60)
    while any(writer.is_alive() for writer in writers):
        if (tmp_path / "file").exists():
            assert (tmp_path / "file").read_text() in ("a" * SIZE, "b" * SIZE)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() in ("a" * SIZE, "b" * SIZE)


def safetensors(metadata: dict[str, str], weights: bytes = b"\1\2\3\4") -> bytes:
    """A file of one float32 number, with the metadata in the order given."""
    weight = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": metadata, "weight": weight}).encode()
    return struct.pack("<Q", len(header)) + header + weights


def test_sha256(tmp_path):
    files = {
        "a.safetensors": safetensors({"name": "x", "kwargs": "{}"}),
        "b.safetensors": safetensors({"kwargs": "{}", "name": "x"}),
        "c.safetensors": safetensors({"kwargs": "{}", "name": "y"}),
        "d.safetensors": safetensors({"kwargs": "{}", "name": "x"}, b"\1\2\3\5"),
        "damaged.safetensors": b"\xff" * 100,
        "empty.safetensors": b"",
        "weights.pth": bytes(range(256)) * 10_000,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert sha256(tmp_path / name) == hashlib.sha256(content).hexdigest()
    a, b, c, d, *others = (sha256(tmp_path / name, ignore_metadata_order=True) for name in files)
    assert a == b
    assert len({a, c, d, *others}) == 6
    assert others[-1] == hashlib.sha256(files["weights.pth"]).hexdigest()


def test_equal_weights_with_equal_metadata_are_equal_files(tmp_path):
    """The library's order is random at each save: five keys come out in one order four times in 10^6."""
    metadata = dict.fromkeys(("name", "kwargs", "num_classes", "mean", "std"), 'é "\\ \x7f\n\x01 😀')
    for i in range(4):
        path = tmp_path / f"{i}.safetensors"
        save_file({"b": torch.ones(3), "a": torch.arange(2)}, path, metadata)
        size = path.stat().st_size
        sort_metadata(path)
        assert path.stat().st_size == size
        assert path.read_bytes() == (tmp_path / "0.safetensors").read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    loaded = load_file(path)
    assert torch.equal(loaded["b"], torch.ones(3))
    assert torch.equal(loaded["a"], torch.arange(2))


def test_lines_are_read_as_the_json_module_reads_them(tmp_path):
    """To the last bit of a number, and also what only that module takes: a mark, and half characters."""
    random = np.random.RandomState(0)
    numbers = np.frombuffer(random.bytes(8 * 5000), np.float64).tolist()  # of any exponent, and some NaN
    lines = ["\ufeff{}", *map(json.dumps, numbers), "-0", "1e400", "9" * 400, r'"\ud800"', '{"a": 1, "a": 2}']
    file = tmp_path / "log"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    expected = [{}, *(json.loads(line) for line in lines[1:])]
    assert list(map(repr, read_lines(file))) == list(map(repr, expected))


def test_lines_that_were_cut_off_are_skipped(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_lines(file) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "Not a regular file"),
        (lambda file: file.symlink_to("/dev/zero"), "Not a regular file"),
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: None, "No such file or directory"),
        (lambda file: file.write_bytes(b"x" * 11), "Larger than 10 bytes"),
        (lambda file: (file.touch(), os.truncate(file, 1 << 40)), "Larger than 10 bytes"),
        (lambda file: file.write_bytes(b"ab\xff"), r"Not text in UTF-8 \(byte 2\)"),
        (lambda file: file.write_bytes(b"ab\0"), r"Not text \(a NUL at character 2\)"),
    ],
)
def test_a_file_from_outside_is_an_ordinary_text_within_the_limit(tmp_path, make, reason):
    file = tmp_path / "file"
    make(file)
    with pytest.raises(OSError, match=reason) as error:
        read_text(file, 10)
    assert re.fullmatch(reason, error.value.strerror)


def test_text_and_bytes_of_an_ordinary_file(tmp_path):
    (tmp_path / "file").write_bytes("\ufeffü\r\nx".encode())
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link", 100) == "ü\r\nx"
    assert read_bytes(tmp_path / "link", 8) == "\ufeffü\r\nx".encode()
    with pytest.raises(ValueError, match="too many lists"):
        read_json("[" * 10**6)


def test_half_characters_are_written_as_escapes(tmp_path):
    replace_text(tmp_path / "file", "a\udcffü")
    assert (tmp_path / "file").read_bytes() == "a\\udcffü".encode()


def test_a_file_is_hashed_while_it_is_written(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"longer than what replaces it" * 9)
    parts = [b"", b"begin", np.arange(SIZE).data, memoryview(b"end")]
    with HashedFile(path) as file:
        assert [file.write(part) for part in parts] == [0, 5, 8 * SIZE, 3]
    content = b"begin" + np.arange(SIZE).tobytes() + b"end"
    assert path.read_bytes() == content
    assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert file.closed


@pytest.mark.parametrize("fails", [False, True])
def test_a_hashed_file_is_on_the_disk_when_it_is_closed(tmp_path, monkeypatch, fails):
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((tmp_path / "file").read_bytes()))
    with contextlib.suppress(ZeroDivisionError), HashedFile(tmp_path / "file") as file:
        file.write(b"content")
        1 // (not fails)
    assert synced == ([] if fails else [b"content"])
    assert file.closed
