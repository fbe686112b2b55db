"""Packing folders, CSV files and shards."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from tars import folder, picture, samples, tree, webdataset_samples, write_tar

from indistill import packing
from indistill.config import UserError
from indistill.packing import pack
from indistill.shards import ShardSet


def test_folder_is_packed_whole_and_mixed(tmp_path):
    content = folder(tmp_path / "images")
    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "a", prefix="train", shard_bytes=8000)
    data = ShardSet(summary["urls"], root=str(tmp_path / "a"))
    read = list(data.iterate())
    assert {sample.image: sample.label for sample in read} == content
    assert len(read) == summary["samples"] == 21
    assert summary["classes"] == ["ant", "bee", "cat"]
    assert summary["class_counts"] == [7, 7, 7]
    assert summary["ignored_files"] == 1
    assert summary["mean_bytes"] == pytest.approx(np.mean([len(image) for image in content]), abs=0.1)
    assert summary["shards"] == len(data.paths) > 3
    assert all(0.5 * 8000 < os.path.getsize(path) < 2 * 8000 for path in data.paths)
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == summary
    assert list(webdataset_samples(data.paths)) == read
    assert [sample.label for sample in read] != sorted(sample.label for sample in read)
    other = packing.pack_source(str(tmp_path / "images"), tmp_path / "b", prefix="train", shard_bytes=8000, seed=1)
    assert [s.key for s in ShardSet(other["urls"], root=str(tmp_path / "b")).iterate()] != [s.key for s in read]


def test_packing_is_the_same_for_any_workers_and_resumes(tmp_path):
    folder(tmp_path / "images")
    arguments = {"shard_bytes": 2000, "resize": 12, "quality": 80}
    for name, workers in (("one", 1), ("two", 2), ("resumed", 1)):
        packing.pack_source(str(tmp_path / "images"), tmp_path / name, workers=workers, **arguments)
    first = tree(tmp_path / "one")
    assert tree(tmp_path / "two") == first
    # Killed half-way: some shards are missing, one has no index, one was being written.
    tars = sorted((tmp_path / "resumed").glob("*.tar"))
    kept = {path: path.stat().st_mtime_ns for path in tars[:2]}
    os.unlink(f"{tars[0]}.index.json")
    for path in tars[2:]:
        os.unlink(path)
        os.unlink(f"{path}.index.json")
    Path(f"{tars[2]}.1.part").write_bytes(b"half")
    packing.pack_source(str(tmp_path / "images"), tmp_path / "resumed", **arguments)
    assert tree(tmp_path / "resumed") == first
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    with pytest.raises(UserError, match=r"resumed: holds another packing.*empty directory"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "resumed", shard_bytes=2000)
    os.unlink(tmp_path / "resumed" / "dataset.json")
    with pytest.raises(UserError, match="not of this packing"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "resumed", **arguments)


def test_resize_reduces_only_what_is_larger(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    small, wide = picture(0, "png", (40, 10)), picture(1, "png", (60, 30))
    (tmp_path / "images" / "a" / "0.png").write_bytes(small)
    (tmp_path / "images" / "a" / "1.png").write_bytes(wide)
    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "out", resize=15)
    images = {s.key: s.image for s in ShardSet(summary["urls"], root=str(tmp_path / "out")).iterate()}
    assert images["00000000_0"] == small
    with Image.open(io.BytesIO(images["00000001_1"])) as reduced:
        assert (reduced.format, reduced.size) == ("JPEG", (30, 15))
    (tmp_path / "images" / "a" / "2.png").write_bytes(wide[:100])
    with pytest.raises(UserError, match=r"image '00000002_2': not a readable image.*mend or remove it"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "bad", resize=15)


def test_resize_turns_rotated_images_upright(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, :30] = 255  # the left half, which becomes the upper one
    Image.fromarray(pixels).save(tmp_path / "images" / "a" / "0.jpg", exif=exif)
    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "out", resize=20)
    (sample,) = ShardSet(summary["urls"], root=str(tmp_path / "out")).iterate()
    with Image.open(io.BytesIO(sample.image)) as reduced:
        assert reduced.size == (20, 30)
        upright = np.asarray(reduced).astype(int)
    assert upright[:13].min() > 200
    assert upright[17:].max() < 50


def test_csv_sources(tmp_path):
    content = folder(tmp_path / "images")
    files = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file() and path.suffix != ".txt")
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    labels = [content[path.read_bytes()] for path in files]
    for file, written, classes in (
        ("numbers.csv", labels, None),
        ("names.csv", [f"class {label}" for label in labels], ["class 0", "class 1", "class 2"]),
    ):
        rows = [f"{name},{label}\n" for name, label in zip(names, written)]
        (tmp_path / file).write_text("path,label\n" + "".join(rows))
        summary = packing.pack_source(str(tmp_path / file), tmp_path / file[:-4], shard_bytes=4000)
        data = ShardSet(summary["urls"], root=str(tmp_path / file[:-4]))
        assert {sample.image: sample.label for sample in data.iterate()} == content
        assert summary["classes"] == classes
    (tmp_path / "bad.csv").write_text(f"{names[0]},1\nnone.jpg,2\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 2: .*none\.jpg is not an image"):
        packing.pack_source(str(tmp_path / "bad.csv"), tmp_path / "bad")
    (tmp_path / "bad.csv").write_text(f"{names[0]}\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 1: holds 1 columns"):
        packing.pack_source(str(tmp_path / "bad.csv"), tmp_path / "bad")
    with pytest.raises(UserError, match="neither shards nor class folders"):
        packing.pack_source(str(tmp_path / "images" / "ant" / "more"), tmp_path / "bad")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shards_are_resharded_in_order(tmp_path, suffix):
    (tmp_path / "source").mkdir()
    images = [picture(i, ("jpg", "png", "webp")[i % 3]) for i in range(12)]
    for part in range(3):  # keys repeat from shard to shard, as some tools write them
        members = [
            member
            for i in range(4)
            for member in ((f"d/{i}.jpg", images[4 * part + i]), (f"d/{i}.cls", b"%d" % (4 * part + i)))
        ]
        write_tar(tmp_path / "source" / f"s{part}.{suffix}", members, "w:gz" if suffix == "tar.gz" else "w")
    for workers in (1, 2):
        summary = packing.pack_source(
            str(tmp_path / "source"), tmp_path / f"out{workers}", shard_bytes=5000, workers=workers
        )
        read = list(ShardSet(summary["urls"], root=str(tmp_path / f"out{workers}")).iterate())
        assert [(sample.image, sample.label) for sample in read] == list(zip(images, range(12)))
        assert len({sample.key for sample in read}) == 12
        assert summary["shards"] > 1
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


def test_pack_refuses_what_it_would_mix_up(tmp_path):
    pack(samples(9), tmp_path, "x", 3)
    with pytest.raises(UserError, match=r"x-000002\.tar: left from an earlier packing"):
        pack(samples(6), tmp_path, "x", 3)
    with pytest.raises(UserError, match=r"cannot pack 'a\.b\.jpg'"):
        pack([("a.b", b"", "jpg", 0)], tmp_path / "y", "x", 3)
