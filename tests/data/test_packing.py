"""Packing folders, CSV files and shards."""

import csv
import io
import json
import os
import re
import tarfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from conftest import refused
from PIL import ExifTags, Image
from tars import folder, picture, samples, tree, webdataset_samples, write_tar
from torchvision.datasets import ImageFolder

from indistill.commands.cli import main
from indistill.config import UserError
from indistill.data import class_names, lists, packing
from indistill.data.packing import pack
from indistill.data.shards import ShardSet


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
    other = packing.pack_source(
        str(tmp_path / "images"), tmp_path / "b", prefix="train", shard_bytes=8000, seed=1
    )
    assert [s.key for s in ShardSet(other["urls"], root=str(tmp_path / "b")).iterate()] != [
        s.key for s in read
    ]


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
    half = [f"{tars[2]}.1.0123abcd.part", f"{tars[2]}.index.json.12.0123abcd.part"]
    half.append(tmp_path / "resumed" / "dataset.json.123.0123abcd.part")
    others = [f"{tars[2]}.part", f"{tars[2]}.1.0123ABCD.part", tmp_path / "resumed" / "film.1.0123abcd.part"]
    for part in [*half, *others]:
        Path(part).write_bytes(b"half")
    packing.pack_source(str(tmp_path / "images"), tmp_path / "resumed", **arguments)
    for part in others:  # none that a packing makes
        os.unlink(part)
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
    with pytest.raises(UserError, match=r"images/a/2\.png: not a readable image.*repair or remove it"):
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
    files = sorted(
        path for path in (tmp_path / "images").rglob("*") if path.is_file() and path.suffix != ".txt"
    )
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
    (tmp_path / "bad.csv").write_text(f"{names[0]},0,1\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 1: holds 3 columns"):
        packing.pack_source(str(tmp_path / "bad.csv"), tmp_path / "bad")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="neither shards nor class folders"):
        packing.pack_source(str(tmp_path / "texts"), tmp_path / "bad")


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_types_without_an_extension_in_shards_are_named(tmp_path, capsys, kind):
    folder(tmp_path / "images")
    for path in sorted(tmp_path.glob("images/*/*"))[:2]:
        Image.open(path).convert("RGB").save(path, kind)
    packed = packing.pack_source(str(tmp_path / "images"), tmp_path / "packed")
    (line,) = capsys.readouterr().err.splitlines()
    assert "GIF, BMP or TIFF under the name of another type" in line
    assert ": 2 (" in line
    assert packed["samples"] == len(list(ShardSet(packed["urls"], root=str(tmp_path / "packed")).iterate()))


def of_images(tmp_path, folders, name="images"):
    """A folder with one image in each class folder. Returns {image: name of its class}."""
    content = {}
    for number, class_name in enumerate(folders):
        (tmp_path / name / class_name).mkdir(parents=True)
        image = picture(number, "png")
        (tmp_path / name / class_name / "0.png").write_bytes(image)
        content[image] = class_name
    return content


def labels_by_class(content, destination):
    """{class name: label} of packed images, by their bytes."""
    return {content[sample.image]: sample.label for sample in ShardSet(str(destination / "*.tar")).iterate()}


@pytest.mark.parametrize(
    ("folders", "order"),
    [
        (["0", "1", "2", "10", "11", "3", "4", "5", "6", "7", "8", "9"], [str(i) for i in range(12)]),
        (["0", "1", "2", "10", "100"], ["0", "1", "2", "10", "100"]),
        (["001", "10", "2"], ["001", "2", "10"]),
        (["10", "2", "a"], ["10", "2", "a"]),  # not all are numbers: as torchvision's ImageFolder
    ],
)
def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path, folders, order):
    content = of_images(tmp_path, folders)
    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "out")
    expected = {name: label for label, name in enumerate(order)}
    assert labels_by_class(content, tmp_path / "out") == expected
    assert summary["classes"] == order
    assert class_names.read(tmp_path / "images") == order


def test_other_folders_are_in_the_order_of_torchvision(tmp_path):
    of_images(tmp_path, ["b", "B", "a10", "a9", "\u00e9t\u00e9", "_"])
    expected = ImageFolder(str(tmp_path / "images")).classes
    assert packing.pack_source(str(tmp_path / "images"), tmp_path / "out")["classes"] == expected


def test_a_second_split_takes_the_numbering_of_the_first(tmp_path):
    of_images(tmp_path, "abc", "train")
    content = of_images(tmp_path, "ac", "eval")
    packing.pack_source(str(tmp_path / "train"), tmp_path / "packed")
    (tmp_path / "names.txt").write_text("a\nb\n\n c \r\n")
    (tmp_path / "list.json").write_text('["a", "b", "c"]')
    (tmp_path / "index.json").write_text('{"c": 2, "a": 0, "b": 1}')
    files = ["train", "packed", "packed/dataset.json", "names.txt", "list.json", "index.json"]
    for i, file in enumerate(files):
        names = class_names.read(tmp_path / file)
        summary = packing.pack_source(str(tmp_path / "eval"), tmp_path / f"eval{i}", classes=names)
        assert labels_by_class(content, tmp_path / f"eval{i}") == {"a": 0, "c": 2}
        assert (summary["classes"], summary["class_counts"]) == (["a", "b", "c"], [1, 0, 1])
    with pytest.raises(UserError, match="holds another packing"):  # not the same without the list
        packing.pack_source(str(tmp_path / "eval"), tmp_path / "eval0")
    with pytest.raises(UserError, match=r"train: class 'b' is not in --classes \('a', 'c'\)"):
        packing.pack_source(str(tmp_path / "train"), tmp_path / "none", classes=["a", "c"])
    assert not (tmp_path / "none").exists()


def test_lists_take_a_csv_and_shards_by_name_or_number(tmp_path):
    content = of_images(tmp_path, "ac")
    for i, (labels, expected) in enumerate(
        ((("a", "c"), (0, 2)), (("0", "2"), (0, 2)), (("2", "01"), (2, 1)))
    ):
        rows = [f"images/{name}/0.png,{label}\n" for name, label in zip("ac", labels)]
        (tmp_path / "list.csv").write_text("".join(rows))
        packing.pack_source(str(tmp_path / "list.csv"), tmp_path / f"csv{i}", classes=["a", "b", "c"])
        assert labels_by_class(content, tmp_path / f"csv{i}") == dict(zip("ac", expected))
    for labels, message in (
        (("a", "d"), r"line 2: class 'd' is not in --classes"),
        (("0", "3"), "line 2: class '3'"),
    ):
        (tmp_path / "list.csv").write_text(
            "".join(f"images/{n}/0.png,{label}\n" for n, label in zip("ac", labels))
        )
        with pytest.raises(UserError, match=message):
            packing.pack_source(str(tmp_path / "list.csv"), tmp_path / "none", classes=["a", "b", "c"])
    # Shards: those with names are numbered anew, of the others the labels stay.
    packing.pack_source(str(tmp_path / "images"), tmp_path / "packed")
    summary = packing.pack_source(
        str(tmp_path / "packed"), tmp_path / "again", classes=["c", "b", "a"], workers=2
    )
    assert labels_by_class(content, tmp_path / "again") == {"a": 2, "c": 0}
    assert summary["classes"] == ["c", "b", "a"]
    (tmp_path / "packed" / "dataset.json").unlink()
    packing.pack_source(str(tmp_path / "packed"), tmp_path / "named", classes=["x", "y"])
    assert labels_by_class(content, tmp_path / "named") == {"a": 0, "c": 1}
    with pytest.raises(UserError, match=r"shard-000000\.tar: sample \w+: label 1 has no name among the 1"):
        packing.pack_source(str(tmp_path / "packed"), tmp_path / "none", classes=["x"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("twice.txt", "a\nb\na\n", "twice.txt: names the class 'a' twice"),
        ("empty.txt", "\n", "empty.txt: holds no class names"),
        ("gap.json", '{"a": 0, "b": 2}', "gap.json: is neither a list"),
        ("numbers.json", "[1, 2]", "numbers.json: is neither a list"),
        ("bad.json", "[", "bad.json: is not valid JSON"),
        ("dataset.json", '{"plan": "", "classes": null}', "dataset.json: holds no class names"),
    ],
)
def test_bad_class_lists_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        class_names.read(tmp_path / name)
    with pytest.raises(UserError, match="none: cannot be read"):
        class_names.read(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: has neither class folders nor"):
        class_names.read(tmp_path / "folder")


def csv_of(tmp_path, labels):
    """A CSV with an image for each label."""
    for i in range(len(labels)):
        (tmp_path / f"{i}.png").write_bytes(picture(i, "png"))
    with open(tmp_path / "list.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([f"{i}.png", label] for i, label in enumerate(labels))
    return str(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("labels", "line"),
    [
        (["0", "0;1"], 2), (["0", "1|0", "1"], 2), (["1", "0", "0, 1"], 3), (["0 1", "1 0"], 1),
        (["[0, 1]"], 1), (["cat", "cat;dog"], 2), (["cat|dog", "bird"], 1), (["cat", "dog", "dog,cat"], 3),
        (["['cat', 'dog']"], 1),
        (["cat,dog", "dog,bird", "bird,cat"], 1),
    ],
)  # fmt: skip
def test_what_looks_like_several_labels_is_refused(tmp_path, labels, line):
    with pytest.raises(UserError, match=rf"list\.csv: line {line}: .* looks like several labels"):
        packing.pack_source(csv_of(tmp_path, labels), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_with_separators_are_no_lists(tmp_path):
    """Those of ImageNet, and what a list of classes names."""
    info = resources.files("timm.data") / "_info"
    lemmas = dict(
        line.split("\t")[:2] for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    )
    names = sorted({lemmas[synset] for synset in (info / "imagenet_synsets.txt").read_text().split()})
    assert sum("," in name for name in names) > 100
    lists._refuse_several_labels([f"{i}.png" for i in range(len(names))], names, [""] * len(names), set())
    names = ["hot dog", "rock (music)", "tank", "tank, army tank"]
    assert packing.pack_source(csv_of(tmp_path, names), tmp_path / "out")["classes"] == names
    names = ["cat;dog", "cat"]
    assert packing.pack_source(csv_of(tmp_path, names), tmp_path / "given", classes=names)["classes"] == names


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0.png,0\n0.png,1\n", r"line 2: .*0\.png has the label '1' here and '0' above \(.*line 1\)"),
        ("0.png,0\n1.png,\n", "line 2: has no label"),
        ("0.png,0\n1.png,-1\n", "line 2: label '-1' is not a non-negative integer"),
        ("0.png,0.0\n1.png,10.5\n", "line 2: label '10.5' is not a non-negative integer"),
        ("0.png,nan\n1.png,1.0\n", "line 1: label 'nan' is not a non-negative integer"),
        ("0.png,cat\n1.png,-1\n", "line 2: label '-1' is not a non-negative integer"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, rows, message):
    csv_of(tmp_path, ["0", "1"])
    (tmp_path / "list.csv").write_text(rows)
    with pytest.raises(UserError, match=message):
        packing.pack_source(str(tmp_path / "list.csv"), tmp_path / "out")


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
    with pytest.raises(UserError, match=r"x-000002\.tar: left by an earlier packing"):
        pack(samples(6), tmp_path, "x", 3)
    with pytest.raises(UserError, match=r"cannot pack 'a\.b\.jpg'"):
        pack([("a.b", b"", "jpg", 0)], tmp_path / "y", "x", 3)


def packed_images(destination):
    urls = json.loads((destination / "dataset.json").read_text())["urls"]
    return {sample.image: sample.label for sample in ShardSet(urls, root=str(destination)).iterate()}


def test_links_out_of_a_folder_are_left_out_and_counted(tmp_path, capsys):
    content = folder(tmp_path / "images")
    outside = {picture(900 + i): i for i in range(2)}
    (tmp_path / "elsewhere").mkdir()
    for image, number in outside.items():
        (tmp_path / "elsewhere" / f"{number}.jpg").write_bytes(image)
    first = tmp_path / "images" / "ant" / "secret.jpg"
    first.symlink_to("../../elsewhere/0.jpg")
    (tmp_path / "images" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "bee" / "again.jpg").symlink_to("im.0.JPG")  # in the folder: packed
    within = next(image for image, label in content.items() if label == 1)
    content = {image: label for image, label in content.items() if label != 1} | {
        image: 1 for image, label in content.items() if label == 1
    }
    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "a")
    assert "images: links that lead out of it, left out: 2 (" in capsys.readouterr().err
    assert packed_images(tmp_path / "a") == content
    assert (summary["samples"], summary["class_counts"]) == (22, [7, 8, 7, 0])  # the numbering is kept
    assert within in packed_images(tmp_path / "a")

    summary = packing.pack_source(str(tmp_path / "images"), tmp_path / "b", follow_links=True)
    assert capsys.readouterr().err == ""
    assert set(packed_images(tmp_path / "b")) == {*content, *outside}
    assert summary["class_counts"] == [8, 8, 7, 2]

    for image in (tmp_path / "images").rglob("im.*"):
        image.unlink()
    with pytest.raises(UserError, match=r"links that lead out of it, left out: .*: set --follow-links"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "c")


def test_files_of_systems_are_left_out_at_every_depth_and_counted(tmp_path, capsys):
    content = folder(tmp_path / "images")
    images = tmp_path / "images"
    image = picture(999)
    names = ["__MACOSX", "lost+found", "@eaDir", ".ipynb_checkpoints", "#recycle"]
    for parent in (images, images / "ant", images / "bee" / "more"):
        for name in names:
            (parent / name / "sub").mkdir(parents=True)
            (parent / name / "sub" / "x.jpg").write_bytes(image)
        (parent / "._x.jpg").write_bytes(image)
    (images / "eel").mkdir()  # a class without an image
    (images / "loose.jpg").write_bytes(image)  # in no class
    summary = packing.pack_source(str(images), tmp_path / "a")
    assert packed_images(tmp_path / "a") == content
    assert summary["classes"] == ["ant", "bee", "cat", "eel"] == class_names.read(images)
    assert summary["ignored_files"] == 3 * 6 + 1
    notes = capsys.readouterr().err
    assert "names that begin with a dot or belong to the system, left out: 18 ('#recycle'" in notes
    assert "class folders without an image that is packed, which keep their labels: 1 ('eel')" in notes
    assert "images in none of the class folders, left out: 1 ('loose.jpg')" in notes


def test_linked_folders_are_packed_as_torchvision_reads_them(tmp_path, capsys):
    content = folder(tmp_path / "images")
    images = tmp_path / "images"
    (images / ".store" / "deep").mkdir(parents=True)  # in the folder, but no class
    added = {picture(700 + i): i for i in range(2)}
    for image, label in added.items():
        (images / ".store" / "deep" / f"{label}.jpg").write_bytes(image)
    (images / "ant" / "linked").symlink_to("../.store")
    (images / "dog").symlink_to(".store")  # a class that is a link
    summary = packing.pack_source(str(images), tmp_path / "a")
    packed = [(s.image, s.label) for s in ShardSet(str(tmp_path / "a" / "*.tar")).iterate()]
    assert sorted(packed) == sorted([*content.items(), *((image, k) for image in added for k in (0, 3))])
    assert capsys.readouterr().err.count("indistill:") == 1  # `.store` itself
    # torchvision, which has no rule for names with a dot, finds the same where there are none.
    (images / ".store").rename(tmp_path / "store")
    (images / "ant" / "linked").unlink()
    (images / "ant" / "linked").symlink_to("../../store")
    (images / "dog").unlink()
    found = ImageFolder(str(images))
    summary = packing.pack_source(str(images), tmp_path / "b", follow_links=True)
    assert summary["classes"] == found.classes
    packed = [(s.image, s.label) for s in ShardSet(str(tmp_path / "b" / "*.tar")).iterate()]
    assert sorted(packed) == sorted((Path(path).read_bytes(), label) for path, label in found.samples)


def test_links_that_lead_nowhere_or_in_a_circle_are_named(tmp_path, capsys):
    content = folder(tmp_path / "images")
    images = tmp_path / "images"
    (images / "ant" / "gone.jpg").symlink_to("nowhere.jpg")
    (images / "ant" / "gone").symlink_to("/nowhere/else")
    (images / "ant" / "self").symlink_to("self")
    (images / "ant" / "more" / "above").symlink_to("..")
    (images / "bee" / "all").symlink_to(images)
    (images / "bee" / "twice").symlink_to("more")
    packing.pack_source(str(images), tmp_path / "a", follow_links=True)
    assert packed_images(tmp_path / "a") == content
    notes = capsys.readouterr().err
    assert "links that lead nowhere, left out: 3 (" in notes
    assert "'ant/gone', 'ant/gone.jpg', 'ant/self'" in notes
    assert "links to a folder that contains them or is packed already, left out: 3 (" in notes
    assert "'ant/more/above', 'bee/all', 'bee/twice'" in notes
    (images / "ape").symlink_to("nowhere")
    for read in (lambda: packing.pack_source(str(images), tmp_path / "b"), lambda: class_names.read(images)):
        with pytest.raises(UserError, match=r"ape: is a link that leads nowhere, .* restore"):
            read()


def test_an_image_that_is_too_large_for_a_shard_is_named_by_its_path(tmp_path, monkeypatch):
    content = folder(tmp_path / "images")
    monkeypatch.setattr(packing, "MAX_IMAGE_BYTES", max(map(len, content)) - 1)
    with pytest.raises(UserError, match=r"images/\w+/.*im\.\d\.\w+: has \d+ bytes, .* --resize"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_image_of_shards_is_named_by_its_shard(tmp_path):
    (tmp_path / "source").mkdir()
    write_tar(tmp_path / "source" / "s.tar", [("d/0.jpg", b"no image"), ("d/0.cls", b"1")])
    with pytest.raises(UserError, match=r"s\.tar: sample d/0: not a readable image.*repair or remove it"):
        packing.pack_source(str(tmp_path / "source"), tmp_path / "out", resize=15)


@pytest.mark.parametrize(
    "prefix",
    ["../x", "a/b", "", ".hidden", "~root", "{0..9}", "pipe:x", "a\\b", "a\nb", "\x1b[2J", "x" * 201],
)
def test_a_prefix_is_a_plain_file_name(tmp_path, prefix):
    folder(tmp_path / "images")
    with pytest.raises(UserError, match=r"--prefix .* must be a plain file name"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "inner" / "out", prefix=prefix)
    with pytest.raises(UserError, match=r"--prefix .* must be a plain file name"):
        pack([("a", b"b", "jpg", 0)], tmp_path / "inner" / "out", prefix, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_shards_are_not_packed_into_their_source(tmp_path):
    folder(tmp_path / "images")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    before = sorted((tmp_path / "images").rglob("*"))
    for destination in ("images", "images/shards", "images/ant/a/b", "link/shards", "other/../images"):
        with pytest.raises(UserError, match=r"is in the source folder .*choose a folder outside of it"):
            packing.pack_source(str(tmp_path / "images"), tmp_path / destination)
    assert sorted((tmp_path / "images").rglob("*")) == before
    packing.pack_source(str(tmp_path / "images"), tmp_path / "images-packed")


def test_a_destination_that_cannot_be_written_is_named(tmp_path):
    folder(tmp_path / "images")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: File exists: .*shards that are finished are kept"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "file")
    with pytest.raises(UserError, match="Not a directory"):
        packing.pack_source(str(tmp_path / "images"), tmp_path / "file" / "below")


# --- images without labels ----------------------------------------------------------------------------------
def unlabelled(images):
    return dict.fromkeys(images, -1)


def read_and_record(destination):
    read = {sample.image: sample.label for sample in ShardSet(str(destination / "*.tar")).iterate()}
    return read, json.loads((destination / "dataset.json").read_text())


def test_a_folder_of_images_alone_is_packed_without_labels(tmp_path, capsys):
    images = [picture(i) for i in range(9)]
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(image)
    main(["shards", "pack", str(tmp_path / "photos"), str(tmp_path / "out"), "--workers", "1"])
    read, record = read_and_record(tmp_path / "out")
    assert read == unlabelled(images)
    assert (record["samples"], record["unlabelled"], record["classes"]) == (9, 9, None)
    err = capsys.readouterr().err
    assert "photos: has no class folders: its images are packed without labels" in err
    assert "labels:" not in err
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())


def test_folders_that_are_no_classes_need_the_option(tmp_path, capsys):
    """Folders by date, or one beside the images; by default, folders are classes as ever."""
    content = folder(tmp_path / "photos")
    stray = picture(777)
    (tmp_path / "photos" / "stray.jpg").write_bytes(stray)
    main(["shards", "pack", str(tmp_path / "photos"), str(tmp_path / "a"), "--workers", "1"])
    assert read_and_record(tmp_path / "a")[0] == content
    main(["shards", "pack", str(tmp_path / "photos"), str(tmp_path / "b"), "--unlabelled", "--workers", "1"])
    assert read_and_record(tmp_path / "b")[0] == unlabelled([*content, stray])
    (tmp_path / "other" / "empty").mkdir(parents=True)
    (tmp_path / "other" / "a.jpg").write_bytes(stray)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "pack", str(tmp_path / "other"), str(tmp_path / "c"), "--workers", "1"])
    assert "set --unlabelled if its folders are no classes" in capsys.readouterr().err


@pytest.mark.parametrize("header", ["", "path\n", "file name\n"])
@pytest.mark.parametrize("names", [["a.jpg", "sub/b.jpg", "c.jpg"], ["my, photo.jpg", "a 1.jpg", "b;c.jpg"]])
def test_a_list_of_paths_is_packed_without_labels(tmp_path, names, header):
    images = [picture(i) for i in range(len(names))]
    for name, image in zip(names, images):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(image)
    (tmp_path / "list.txt").write_text(header + "".join(f"{name}\n" for name in names))
    packing.pack_source(str(tmp_path / "list.txt"), tmp_path / "out")
    assert read_and_record(tmp_path / "out")[0] == unlabelled(images)


def test_shards_without_labels_are_packed_again(tmp_path):
    images = [picture(i) for i in range(6)]
    write_tar(tmp_path / "old.tar", [(f"{i}.jpg", image) for i, image in enumerate(images)])
    packing.pack_source(str(tmp_path / "old.tar"), tmp_path / "out")
    read, record = read_and_record(tmp_path / "out")
    assert read == unlabelled(images)
    assert record["unlabelled"] == 6


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a.jpg\nb.jpg,1\n", [], r"list\.csv: line 2: holds 2 columns instead of a path alone, as above"),
        ("a.jpg,0\nb.jpg\n", [], r"list\.csv: line 2: holds 1 columns instead of path,label"),
        ("a.jpg\nc.jpg\n", [], r"list\.csv: line 2: .*c\.jpg is not an image file"),
        ("a.jpg\nb.jpg\n", ["--classes", "names.txt"], r"list\.csv: holds paths without labels: leave out"),
        ("a.jpg\nb.jpg\n", ["--unlabelled"], r"list\.csv: is no folder of images and no Parquet file: leave"),
    ],
)
def test_mistakes_in_lists_of_paths(tmp_path, monkeypatch, capsys, text, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(picture(0))
    (tmp_path / "list.csv").write_text(text)
    (tmp_path / "names.txt").write_text("cat\n")
    assert re.search(message, refused(capsys, "shards", "pack", "list.csv", "out", *options))


def test_class_names_need_class_folders(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(picture(0))
    (tmp_path / "names.txt").write_text("cat\n")
    options = ["--classes", str(tmp_path / "names.txt")]
    line = refused(capsys, "shards", "pack", str(tmp_path / "photos"), str(tmp_path / "out"), *options)
    assert "photos: is packed without labels: leave out --classes, or use class folders" in line
