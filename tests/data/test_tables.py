"""Packing Parquet files, as pandas and the library `datasets` write them; needs pyarrow (extra `hf`)."""

from __future__ import annotations

import http.server
import json
import os
import pickle
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import refused
from packaging.version import Version
from tars import picture, write_tar

from indistill.commands.cli import main
from indistill.config import UserError, extras
from indistill.data import packing, tables
from indistill.data.shards import ShardSet

NAMES = ["cat", "ant", "bee"]  # not in text order: the numbers are those of the file


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'indistill[hf]'")


def images(count: int) -> list[bytes]:
    return [picture(i, ("jpg", "png", "webp")[i % 3]) for i in range(count)]


def of_datasets(
    pa: Any, path: Path, content: Sequence[bytes], labels: Sequence[int | None], **more: Any
) -> str:
    """Write a file as the library `datasets` does: structs of bytes and path, and names of the classes."""
    from pyarrow import parquet

    rows = [{"bytes": image, "path": f"photo.{i}.JPEG"} for i, image in enumerate(content)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())} | more
    features = {
        "image": {"_type": "Image"},
        "label": {"names": NAMES, "_type": "ClassLabel"},
    } | {name: {"names": ["x", "y"], "_type": "ClassLabel"} for name in more}
    table = pa.table(columns)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=5)
    return str(path)


def plain(pa: Any, path: Path, **columns: Any) -> str:
    """Write a file as pandas does: columns of bytes, numbers and texts."""
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return str(path)


def packed(destination: Path) -> tuple[list[tuple[bytes, int]], dict[str, Any]]:
    """Image and label of each sample, in order, and the content of `dataset.json`."""
    samples = [(sample.image, sample.label) for sample in ShardSet(str(destination / "*.tar")).iterate()]
    return samples, json.loads((destination / "dataset.json").read_text())


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_keep_their_order_labels_and_number(pa, tmp_path, capsys, workers):
    content, labels = images(23), [i * 7 % 3 for i in range(23)]
    of_datasets(pa, tmp_path / "data" / "train-00000-of-00002.parquet", content[:12], labels[:12])
    of_datasets(pa, tmp_path / "data" / "train-00001-of-00002.parquet", content[12:], labels[12:])
    options = ["--workers", str(workers), "--shard-megabytes", "0.008"]
    for source in (tmp_path / "data", f"{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet"):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        main(["shards", "pack", str(source), str(out), *options])
        samples, record = packed(out)
        assert samples == list(zip(content, labels))
        assert record["shards"] > 3
        assert (record["samples"], record["unlabelled"], record["classes"]) == (23, 0, NAMES)
        assert record["class_counts"] == [labels.count(label) for label in range(3)]
        assert "labels: 0 = cat, 1 = ant, 2 = bee" in capsys.readouterr().err
    keys = [sample.key for sample in ShardSet(str(out / "*.tar")).iterate()]
    assert keys[:2] == ["00000000_photo_0", "00000001_photo_1"]
    assert keys[-1] == "00000022_photo_10"


def test_an_interrupted_packing_continues_with_the_same_bytes(pa, tmp_path):
    path = of_datasets(pa, tmp_path / "a.parquet", images(20), [0] * 20)
    packing.pack_source(path, tmp_path / "whole", shard_bytes=8000)
    packing.pack_source(path, tmp_path / "part", shard_bytes=8000)
    for shard in sorted((tmp_path / "part").glob("*.tar"))[1:]:
        os.unlink(shard)
    packing.pack_source(path, tmp_path / "part", shard_bytes=8000)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "part" / file.name).read_bytes() == file.read_bytes()
    other = of_datasets(pa, tmp_path / "b.parquet", images(20), [1] * 20)
    with pytest.raises(UserError, match="holds another packing"):
        packing.pack_source(other, tmp_path / "part", shard_bytes=8000)


def test_a_part_holds_the_rows_that_it_needs(pa, tmp_path):
    path = of_datasets(pa, tmp_path / "a.parquet", content := images(20), [0] * 20)
    table = tables.read(path, tables.Wanted(), given=None, cache_dir=None)
    for begin, end in ((0, 20), (3, 4), (4, 11), (5, 10), (19, 20)):
        part = pickle.loads(pickle.dumps(table.slice(begin, end)))
        assert [image for _, (_, image, _, _) in part.rows(begin, end)] == content[begin:end]
        assert len(part.groups) == len({row // 5 for row in range(begin, end)})
    where = [where for where, _ in table.slice(7, 9).rows(7, 9)]
    assert where == [f"{path}: row 7", f"{path}: row 8"]


@pytest.mark.parametrize(
    ("labels", "options", "expected", "classes"),
    [
        ([2, 0, None, -1], [], [2, 0, -1, -1], None),
        ([2.0, 0.0, None, float("nan")], [], [2, 0, -1, -1], None),
        (["dog", "ape", None, "dog"], [], [1, 0, -1, 1], ["ape", "dog"]),
        (["10", "9", "10", "9"], [], [1, 0, 1, 0], ["9", "10"]),
        (["dog", "ape", "dog", ""], ["--classes", "names.txt"], [2, 0, 2, -1], ["ape", "cat", "dog"]),
        ([2, 0, 1, 1], ["--classes", "names.txt"], [2, 0, 1, 1], ["ape", "cat", "dog"]),
        ([2, 0, 1, 1], ["--unlabelled"], [-1] * 4, None),
        ([[0], [1], [2], [0, 1]], ["--unlabelled"], [-1] * 4, None),
    ],
)
def test_labels_of_a_plain_table(pa, tmp_path, monkeypatch, labels, options, expected, classes):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("ape\ncat\ndog\n")
    plain(pa, Path("a.parquet"), jpg=images(4), label=labels, caption=["x"] * 4)
    main(["shards", "pack", "a.parquet", "out", "--workers", "1", *options])
    samples, record = packed(Path("out"))
    assert samples == list(zip(images(4), expected))
    assert record["classes"] == classes
    assert record["unlabelled"] == expected.count(-1)


def test_a_split_is_numbered_like_another_by_names(pa, tmp_path):
    path = of_datasets(pa, tmp_path / "a.parquet", images(4), [0, 1, 2, -1])
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    main(["shards", "pack", path, str(tmp_path / "out"), "--classes", str(tmp_path / "names.txt")])
    samples, record = packed(tmp_path / "out")
    assert [label for _, label in samples] == [2, 0, 1, -1]
    assert record["classes"] == ["ant", "bee", "cat"]


def test_images_alone_have_no_labels_and_are_resized(pa, tmp_path):
    path = plain(pa, tmp_path / "a.parquet", image=images(6))
    packing.pack_source(path, tmp_path / "out", resize=12)
    samples, record = packed(tmp_path / "out")
    assert {label for _, label in samples} == {-1}
    assert (record["samples"], record["unlabelled"]) == (6, 6)
    assert all(image[:2] == b"\xff\xd8" for image, _ in samples)


def test_columns_are_chosen_by_name(pa, tmp_path):
    more = {"coarse": pa.array([1, 0, 1, 0], pa.int64())}
    path = of_datasets(pa, tmp_path / "a.parquet", images(4), [2, 1, 0, 0], **more)
    with pytest.raises(
        UserError, match=r"has several columns \('label', 'coarse'\) that may be labels among"
    ):
        packing.pack_source(path, tmp_path / "out")
    packing.pack_source(path, tmp_path / "out", reading=packing.Reading(label_column="coarse"))
    samples, record = packed(tmp_path / "out")
    assert [label for _, label in samples] == [1, 0, 1, 0]
    assert record["classes"] == ["x", "y"]


def columns_of(pa: Any) -> dict[str, dict[str, Any]]:
    content = images(3)
    files = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return {
        "several labels": {"image": content, "label": [[0], [1, 2], []]},
        "no labels": {"image": content, "caption": ["a", "b", "c"]},
        "fractions": {"image": content, "label": [0.5, 1.0, 2.0]},
        "bytes": {"image": content, "label": [b"0", b"1", b"2"]},
        "no images": {"label": [0, 1, 2]},
        "two images": {"image": content, "mask": content, "label": [0, 1, 2]},
        "missing": {"image": [content[0], None, content[2]], "label": [0, 1, 2]},
        "path": {"image": pa.array([{"path": "a.jpg"}] * 3, files), "label": [0, 1, 2]},
        "negative": {"image": content, "label": [0, -5, 2]},
        "huge": {"image": content, "label": [0, 1, 2**40]},
        "empty": {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
    }


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ("several labels", [], r"the column 'label' has several labels for an image \(list<.*int64>\), but"),
        ("no labels", [], "has no known column of labels among 'image', 'caption': name it with "
                          "--label-column, or set --unlabelled"),
        ("fractions", [], r"a\.parquet: row 0: label 0\.5 is not from 0 to"),
        ("bytes", ["--image-column", "image"], "the column 'label' is binary: a label is an integer"),
        ("no images", [], "has no known column of images among 'label': name it with --image-column"),
        ("two images", [], r"has several columns \('image', 'mask'\) that may be images among"),
        ("two images", ["--image-column", "label"], "the column 'label' is int64, which holds no image"),
        ("two images", ["--image-column", "x"], "has no column 'x', but 'image', 'mask', 'label': correct"),
        ("missing", [], r"a\.parquet: row 1: holds no image: remove the row"),
        ("path", [], r"row 0: holds no image, but the name of a file, 'a\.jpg': remove the row, or pack the"),
        ("negative", [], r"a\.parquet: row 1: label -5 is not from 0 to"),
        ("huge", [], rf"a\.parquet: row 2: label {2**40} is not from 0 to"),
        ("missing", ["--classes", "two.txt"], r"a\.parquet: row 2: label 2 is not from 0 to 1: correct the"),
        ("no labels", ["--unlabelled", "--classes", "two.txt"], "is packed without labels: leave out"),
        ("no labels", ["--images", "."], "is not a list of labels: leave out --images"),
        ("empty", [], "holds no rows: name another file"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_packed_is_one_line(
    pa, tmp_path, monkeypatch, capsys, table, options, message
):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("a\nb\n")
    plain(pa, Path("a.parquet"), **columns_of(pa)[table])
    assert re.search(
        message, refused(capsys, "shards", "pack", "a.parquet", "out", "--workers", "1", *options)
    )


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"x" * 200 + b"PAR1", None])
def test_damaged_files_are_named(pa, tmp_path, capsys, content):
    path = tmp_path / "a.parquet"
    if content is None:  # cut in the middle
        content = Path(of_datasets(pa, path, images(9), [0] * 9)).read_bytes()
        content = content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]
    path.write_bytes(content)
    line = refused(capsys, "shards", "pack", str(path), str(tmp_path / "out"), "--workers", "1")
    assert re.search(r"a\.parquet: (is not a readable Parquet file|row 0: )", line)


def test_files_of_two_data_sets_are_refused(pa, tmp_path):
    of_datasets(pa, tmp_path / "data" / "a.parquet", images(3), [0, 1, 2])
    plain(pa, tmp_path / "data" / "b.parquet", image=images(3), label=[0, 1, 2])
    with pytest.raises(UserError, match=r"b\.parquet: has other columns or classes than .*a\.parquet"):
        packing.pack_source(str(tmp_path / "data" / "*.parquet"), tmp_path / "out")
    with pytest.raises(UserError, match=r"data: holds several sets of files: name one of them: '.*/a\.parq"):
        packing.pack_source(str(tmp_path / "data"), tmp_path / "out")


def test_a_row_group_has_a_limit(pa, tmp_path, monkeypatch):
    path = of_datasets(pa, tmp_path / "a.parquet", images(9), [0] * 9)
    monkeypatch.setattr(tables, "MAX_ROW_GROUP_BYTES", 1000)
    with pytest.raises(UserError, match=r"a row group of [\d,]+ bytes of images, more than 1,000"):
        packing.pack_source(path, tmp_path / "out")


def test_files_that_change_meanwhile_are_noticed(pa, tmp_path, monkeypatch):
    path = of_datasets(pa, tmp_path / "a.parquet", images(9), [0] * 9)
    rows = tables.Table.rows
    monkeypatch.setattr(
        tables.Table, "rows", lambda table, begin, end: (row for row in [*rows(table, begin, end)][:-1])
    )
    with pytest.raises(UserError, match=r"has 8 of the source's 9 images: the source was changed meanwhile"):
        packing.pack_source(path, tmp_path / "out")


# --- the Hub ------------------------------------------------------------------------------------------------
class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub's API that its file system uses, of one data set, lab/animals, in a folder."""

    folder: Path

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix("/datasets/lab/animals/resolve/main/")
        if path.startswith("/api/datasets/lab/animals/tree/main"):
            folder = self.folder / path.removeprefix("/api/datasets/lab/animals/tree/main").strip("/")
            below = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.glob("*")
            listed = [
                {
                    "type": "file" if file.is_file() else "directory",
                    "path": str(file.relative_to(self.folder)),
                    "size": file.stat().st_size,
                    "oid": "0",
                }
                for file in sorted(below)
            ]
            return self.answer(json.dumps(listed).encode(), "application/json")
        if path.startswith("/api/datasets/lab/animals"):
            record = {"id": "lab/animals", "sha": "0" * 40, "private": False, "tags": [], "siblings": []}
            return self.answer(json.dumps(record).encode(), "application/json")
        if name != path and (self.folder / name).is_file():
            return self.answer((self.folder / name).read_bytes(), "application/octet-stream")
        return self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, kind: str) -> None:
        begin, end = 0, len(content)
        if ranges := self.headers.get("Range"):
            first, _, last = ranges.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last or end) + 1, end)
        self.send_response(206 if ranges else 200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"0"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[begin:end])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(pa: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a data set that `hf://datasets/lab/animals` leads to."""
    import huggingface_hub

    if Version(huggingface_hub.__version__) < Version("1.0"):
        pytest.skip("an older huggingface-hub cannot be led to this stand-in")
    monkeypatch.setattr(Hub, "folder", tmp_path / "hub", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield tmp_path / "hub"
    huggingface_hub.HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_data_set_of_the_hub_is_one_set_in_order(pa, hub, tmp_path):
    content, labels = images(12), [i % 3 for i in range(12)]
    of_datasets(pa, hub / "data" / "train-00000-of-00002.parquet", content[:5], labels[:5])
    of_datasets(pa, hub / "data" / "train-00001-of-00002.parquet", content[5:], labels[5:])
    options = ["--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
    main(["shards", "pack", "hf://datasets/lab/animals", str(tmp_path / "whole"), *options])
    assert packed(tmp_path / "whole")[0] == list(zip(content, labels))

    of_datasets(pa, hub / "data" / "test-00000-of-00001.parquet", content[:2], labels[:2])
    import huggingface_hub

    huggingface_hub.HfFileSystem.clear_instance_cache()  # a new process would list the data set again
    files = "hf://datasets/lab/animals/data"
    several = (
        r"animals: holds several sets of files: name one of them: "
        rf"'{files}/test\*.parquet', '{files}/train\*.parquet'"
    )
    with pytest.raises(UserError, match=several):
        packing.pack_source("hf://datasets/lab/animals", tmp_path / "out", cache_dir=str(tmp_path / "cache"))
    for name in ("data/test*.parquet", "data/test-{00000..00000}-of-00001.parquet"):
        out = tmp_path / f"out{len(name)}"
        main(["shards", "pack", f"hf://datasets/lab/animals/{name}", str(out), *options])
        assert packed(out)[0] == list(zip(content[:2], labels[:2]))


def test_names_on_the_hub_that_hold_nothing(hub, tmp_path, capsys):
    hub.mkdir()
    (hub / "README.md").write_text("none")
    for name, message in (
        ("animals", "animals: holds no Parquet files: name the files that it has"),
        ("plants", "plants: (cannot be listed|holds no Parquet files)"),
    ):
        options = ["--cache-dir", str(tmp_path / "cache"), "--workers", "1"]
        line = refused(capsys, "shards", "pack", f"hf://datasets/lab/{name}", str(tmp_path / "out"), *options)
        assert re.search(message, line)


# --- without pyarrow ----------------------------------------------------------------------------------------
def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    line = refused(capsys, "shards", "pack", str(tmp_path / "a.parquet"), str(tmp_path / "out"))
    assert line.endswith("Parquet needs pyarrow: pip install 'indistill[hf]', or pyarrow")


def test_what_is_a_table_by_its_name(tmp_path, capsys):
    hub = "hf://datasets/timm/imagenet-1k-wds"
    assert tables.is_table("a.parquet")
    assert tables.is_table([f"{hub}/data/x-{{00..03}}.PARQUET", hub])
    assert not tables.is_table(f"{hub}/imagenet1k-train-{{0000..1023}}.tar")
    assert not tables.is_table("https://host/a.tar")
    assert not tables.is_table("labels.csv")
    write_tar(tmp_path / "a.tar", [("a.jpg", picture(0))])
    line = refused(
        capsys, "shards", "pack", str(tmp_path / "a.tar"), str(tmp_path / "out"), "--label-column", "x"
    )
    assert "is no Parquet file: leave out --image-column and --label-column" in line
