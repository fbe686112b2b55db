"""The file with all indices of a set that processes map, against the JSON indices that it is made from."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from tars import expected, picture, samples, write_tar

from indistill import config
from indistill.config import UserError
from indistill.data import index, mapped
from indistill.data.dataset import open_shards
from indistill.data.loader import IndexedTraining
from indistill.data.packing import pack
from indistill.data.shards import ShardSet

SHARDS = 3


@pytest.fixture(autouse=True)
def small_sets_too(monkeypatch):
    monkeypatch.setattr(mapped, "MIN_JSON_BYTES", 1)


@pytest.fixture
def urls(tmp_path):
    """Three shards, whose keys differ in length."""
    for number in range(SHARDS):
        pack(samples(9, seed=number, first=10 ** (4 + 2 * number)), tmp_path, f"x{number}", 9)
    index.build_index(f"{tmp_path}/x0-000000.tar", hashed=True)
    return f"{tmp_path}/x*.tar"


@pytest.fixture
def from_json(urls, monkeypatch):
    with monkeypatch.context() as without:
        without.setattr(mapped, "MIN_JSON_BYTES", 2**62)
        return ShardSet(urls)


@pytest.fixture
def parsed(monkeypatch):
    """The index files that were parsed, in order."""
    files: list[str] = []
    parse = index.parse_index
    monkeypatch.setattr(index, "parse_index", lambda file: files.append(file) or parse(file))
    return files


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.indices.map")
    return file


def equal(ours: ShardSet, theirs: ShardSet) -> bool:
    columns = ("keys", "offsets", "sizes", "labels")
    alike = all(
        one[0] == other[0]
        and one[5:] == other[5:]
        and all(
            np.array_equal(getattr(one, name), getattr(other, name))
            and getattr(one, name).dtype == getattr(other, name).dtype
            for name in columns
        )
        for one, other in zip(ours._indices, theirs._indices, strict=True)
    )
    return alike and ours.fingerprint == theirs.fingerprint and list(ours.iterate()) == list(theirs.iterate())


def is_mapped(data: ShardSet) -> bool:
    return isinstance(data._indices, mapped.MappedIndices)


# --- the same content ---------------------------------------------------------------------------------------
def test_it_has_the_content_of_the_indices_and_is_parsed_once(urls, from_json, parsed):
    packed = [
        sample for number in range(SHARDS) for sample in samples(9, seed=number, first=10 ** (4 + 2 * number))
    ]
    for _ in range(3):
        data = ShardSet(urls)
        assert is_mapped(data)
        assert equal(data, from_json)
        assert list(data.iterate()) == expected(packed)
        assert len(parsed) == SHARDS
    assert not any(array.flags.writeable for one in data._indices for array in one[1:5])


def test_batches_are_the_same(tree, tmp_path, monkeypatch):
    section = config.Data(
        **tree["data"] | {"in_memory": False, "workers": 2, "cache_dir": str(tmp_path / "cache")}
    )

    def batches():
        training = IndexedTraining(section, 3, rank=0, world=1, accumulation=1)
        return training, list(training.loader(4, 8, torch.device("cpu")))

    _, mapped_batches = batches()
    training, again = batches()
    assert mapped_batches
    assert is_mapped(training.dataset.shards)
    monkeypatch.setattr(mapped, "MIN_JSON_BYTES", 2**62)
    training, parsed_batches = batches()
    assert not is_mapped(training.dataset.shards)
    for one, other in [*zip(mapped_batches, parsed_batches), *zip(again, parsed_batches)]:
        assert all(torch.equal(a, b) for a, b in zip(one[:3], other[:3]))


def test_hashes_and_problems_are_kept(tmp_path, caplog):
    members = [("a.jpg", b"x" * 700), ("a.cls", b"1"), ("b.0.jpg", b"y"), ("c.jpg", b"z")]
    path = write_tar(tmp_path / "x.tar", members)
    built = index.build_index(path, hashed=True)
    ShardSet(path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = ShardSet(path)
    assert is_mapped(data)
    assert (data._indices[0].sha256, data._indices[0].problem) == (built.sha256, built.problem)
    assert built.sha256
    assert caplog.text.count("b.0.jpg") == 1
    assert data.labels.tolist() == [1, -1]


def test_labels_in_other_forms_have_files_of_their_own(tmp_path):
    members = [("a.jpg", picture(1)), ("a.txt", b"cat"), ("b.jpg", picture(2)), ("b.txt", b"ant")]
    write_tar(tmp_path / "x.tar", members)

    def labels(names, num_classes):
        (tmp_path / "names.txt").write_text("\n".join(names))
        label = {"key": "txt", "map": str(tmp_path / "names.txt")}
        section = config.Data(
            root=str(tmp_path), train="x.tar", num_classes=num_classes, label=label, image_size=8,
            global_batch=2, streams=1,
        )  # fmt: skip
        data = open_shards(section, section.train)
        assert is_mapped(data)
        return data.labels.tolist()

    for _ in range(2):
        assert labels(["ant", "cat"], 2) == [1, 0]
        assert labels(["cat", "ant", "bee"], 3) == [0, 1]
    assert ShardSet(str(tmp_path / "x.tar")).labels.tolist() == [-1, -1]
    with pytest.raises(UserError, match="'a' has the label 'cat'"):
        labels(["ant", "bee"], 2)


def test_a_small_set_has_none(urls, tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "MIN_JSON_BYTES", 2**22)
    assert not is_mapped(ShardSet(urls))
    assert not list(tmp_path.glob("*.indices.map*"))


def test_it_is_in_the_cache_directory_and_no_shard(urls, tmp_path):
    assert is_mapped(ShardSet(urls, cache_dir=str(tmp_path / "cache")))
    assert the_file(tmp_path / "cache")
    assert not list(tmp_path.glob("*.indices.map"))
    ShardSet(urls)
    assert the_file(tmp_path)
    assert len(ShardSet("*", root=str(tmp_path)).paths) == SHARDS


# --- processes ----------------------------------------------------------------------------------------------
def test_processes_that_start_together_parse_once(urls, from_json, parsed):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ShardSet(urls), range(8)))
    assert len(parsed) == SHARDS
    assert all(is_mapped(data) and equal(data, from_json) for data in found)


def test_a_worker_is_sent_the_name_of_the_file(urls, from_json, tmp_path):
    data = ShardSet(urls)
    sent = pickle.dumps(data)
    assert is_mapped(pickle.loads(sent))
    assert equal(pickle.loads(sent), from_json)
    keys = b"".join(one.keys.tobytes() for one in data._indices)
    assert keys[:50] not in sent
    # Another process has replaced the file: what is mapped is sent instead.
    os.replace(the_file(tmp_path), tmp_path / "moved")
    assert equal(pickle.loads(pickle.dumps(data)), from_json)
    with pytest.raises(UserError, match="was replaced while a loader worker started"):
        pickle.loads(sent)
    part = ShardSet(urls)._slice(9, 18)  # as `shards pack` sends it
    assert pickle.loads(pickle.dumps(part)).read(10) == from_json.read(10)


# --- indices that change, and damaged files -----------------------------------------------------------------
def test_an_edited_index_counts_even_with_its_old_size_and_time(urls, tmp_path):
    before = ShardSet(urls).labels.tolist()
    file = tmp_path / "x1-000000.tar.index.json"
    content = json.loads(file.read_text())
    content["labels"][0] = (content["labels"][0] + 1) % 10
    times = os.stat(file)
    file.write_text(json.dumps(content))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert os.stat(file).st_size == times.st_size
    data = ShardSet(urls)
    assert is_mapped(data)
    assert data.labels.tolist() == [*before[:9], (before[9] + 1) % 10, *before[10:]]
    index.build_index(str(tmp_path / "x1-000000.tar"))
    assert ShardSet(urls).labels.tolist() == before


def test_a_changed_shard_or_index_is_refused_as_before(urls, tmp_path):
    ShardSet(urls)
    shard = tmp_path / "x2-000000.tar"
    os.truncate(shard, os.path.getsize(shard) - 512)
    with pytest.raises(UserError, match=r"x2-000000\.tar: the shard is cut or changed: it has"):
        ShardSet(urls)
    (tmp_path / "x1-000000.tar.index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index that this version reads"):
        ShardSet([str(tmp_path / "x0-000000.tar"), str(tmp_path / "x1-000000.tar")])


def test_sets_of_the_same_folder_have_files_of_their_own(urls, tmp_path, parsed):
    for _ in range(2):
        assert len(ShardSet(urls)) == 27
        assert len(ShardSet(urls.replace("x*", "x[01]*"))) == 18
    assert len(list(tmp_path.glob("*.indices.map"))) == 2
    assert len(parsed) == SHARDS + 2


def test_a_moved_folder_keeps_its_file(urls, from_json, tmp_path, parsed):
    ShardSet(urls)
    moved = tmp_path.with_name(f"{tmp_path.name}-moved")
    tmp_path.rename(moved)
    data = ShardSet(f"{moved}/x*.tar")
    moved.rename(tmp_path)
    assert is_mapped(data)
    assert data.fingerprint == from_json.fingerprint
    assert len(parsed) == SHARDS


@pytest.mark.parametrize("damage", ["cut", "flip", "longer", "other", "fifo"])
def test_a_damaged_file_is_noticed_and_made_again(urls, from_json, tmp_path, caplog, damage):
    ShardSet(urls)
    file = the_file(tmp_path)
    content = file.read_bytes()
    places = {"cut": range(0, len(content), 41), "flip": range(0, len(content), 17)}.get(damage, [0])
    for place in places:
        broken = bytearray(content)
        broken[place] ^= 0x41
        file.unlink()
        if damage == "fifo":
            os.mkfifo(file)
        else:
            file.write_bytes(
                {"cut": content[:place], "flip": broken, "longer": content + b"x" * 64}.get(damage, b"text")
            )
        caplog.clear()
        data = ShardSet(urls)
        assert is_mapped(data)
        assert equal(data, from_json)
        outdated = damage == "flip" and not caplog.text  # another version, or of other indices
        assert outdated or re.search(r"indices\.map: cannot be used, and is made again", caplog.text)
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sizes", 2**40, "MAX_IMAGE_BYTES"),
        ("sizes", -1, "MAX_IMAGE_BYTES"),
        ("offsets", 5, "overlap"),
        ("offsets", 2**62, "too large"),
        ("offsets", 10**9, "behind the end"),
        ("labels", -2, "negative"),
    ],
)
def test_bounds_are_checked(urls, from_json, tmp_path, caplog, name, value, message):
    """A file from elsewhere may have any content, with the right hashes."""
    ShardSet(urls)
    file = the_file(tmp_path)
    paths = from_json.paths
    source = mapped.source_of(paths, [index.index_files(path, None) for path in paths], "")
    assert source.file == str(file)
    values = getattr(from_json._indices[1], name).copy()
    values[-1] = value
    indices = [*from_json._indices]
    indices[1] = indices[1]._replace(**{name: values})
    mapped._write(source, indices, mapped.fingerprint_of(paths, indices))
    with caplog.at_level(logging.WARNING):
        assert equal(ShardSet(urls), from_json)
    assert re.search(f"made again: .*{message}", caplog.text)


def test_another_version_makes_it_again(urls, from_json, tmp_path, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr(mapped, "_VERSION", 2)
        ShardSet(urls)
    theirs = the_file(tmp_path).read_bytes()
    assert equal(ShardSet(urls), from_json)
    assert the_file(tmp_path).read_bytes() != theirs


# --- places that cannot be written --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("where", "name", "error"),
    [
        (mapped, "replacing", OSError(28, "No space left on device")),
        (FileLock, "acquire", PermissionError(13, "Permission denied")),
        (FileLock, "acquire", OSError(37, "No locks available")),
    ],
)
def test_where_none_can_be_written_each_process_parses(
    urls, from_json, monkeypatch, parsed, where, name, error
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(where, name, fail)
    data = ShardSet(urls)
    assert not is_mapped(data)
    assert equal(data, from_json)
    assert len(parsed) == SHARDS


def test_a_file_that_is_there_is_used_where_none_can_be_written(urls, from_json, monkeypatch, parsed):
    ShardSet(urls)
    parsed.clear()
    monkeypatch.setattr(mapped, "locked", lambda file: pytest.fail("a lock needs a folder to write to"))
    data = ShardSet(urls)
    assert is_mapped(data)
    assert parsed == []


def test_missing_indices_are_built_first(urls, from_json, tmp_path):
    for file in tmp_path.glob("*.index.json"):
        file.unlink()
    data = ShardSet(urls)
    assert is_mapped(data)
    assert data.fingerprint == from_json.fingerprint
    assert list(data.iterate()) == list(from_json.iterate())
    assert len(list(tmp_path.glob("*.index.json"))) == SHARDS
