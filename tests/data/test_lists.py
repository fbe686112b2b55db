"""Lists of images with labels: how they are written by spreadsheets, pandas, Caffe, Kaggle and ImageNet."""

import json
import tarfile
from importlib import resources

import numpy as np
import pytest
import torch
from scipy.io import savemat
from tars import folder, picture, write_tar
from torchvision.datasets import imagenet

from indistill.commands import cli
from indistill.config import UserError
from indistill.data import class_names, lists, packing
from indistill.data.shards import ShardSet


def pack(tmp_path, source, classes=None, **options):
    """Pack a list. Returns {image: label} and what `pack_source` returned."""
    destination = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
    reading = packing.Reading(**options)
    summary = packing.pack_source(str(source), destination, classes=classes, reading=reading)
    return {s.image: s.label for s in ShardSet(str(destination / "*.tar")).iterate()}, summary


def images(path, names):
    """Write an image of each name. Returns them in order."""
    path.mkdir(parents=True, exist_ok=True)
    content = [picture(i) for i in range(len(names))]
    for name, image in zip(names, content):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(image)
    return content


# --- folders with tars --------------------------------------------------------------------------------------
def test_class_folders_beside_tars_are_refused_with_the_option_that_chooses(tmp_path):
    content = folder(tmp_path / "images")
    image = picture(999)
    write_tar(tmp_path / "images" / "ant.tar", [("x.jpg", image), ("x.cls", b"7")])
    with pytest.raises(UserError, match=r"images: contains class folders \(ant\) and tars \(ant\.tar\): set "
                       "--take folders or --take tars"):  # fmt: skip
        pack(tmp_path, tmp_path / "images")
    assert pack(tmp_path, tmp_path / "images", take="folders")[0] == content
    assert pack(tmp_path, tmp_path / "images", take="tars")[0] == {image: 7}
    # Neither an empty folder beside shards nor a copy of a shard's metadata makes a difference.
    (tmp_path / "shards" / "logs").mkdir(parents=True)
    (tmp_path / "shards" / "._s.tar").write_bytes(b"\0\5\x16\7")
    write_tar(tmp_path / "shards" / "s.tar", [("x.jpg", image), ("x.cls", b"3")])
    assert pack(tmp_path, tmp_path / "shards")[0] == {image: 3}
    (tmp_path / "images" / "ant.tar").unlink()
    with pytest.raises(UserError, match=r"images: contains no shards"):
        pack(tmp_path, tmp_path / "images", take="tars")


# --- spreadsheets and pandas --------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings_are_named_and_chosen(tmp_path, encoding):
    (one,) = images(tmp_path, ["caf\u00e9.jpg"])
    (tmp_path / "list.csv").write_bytes("path,label\ncaf\u00e9.jpg,th\u00e9\n".encode(encoding))
    with pytest.raises(UserError, match=rf"list\.csv: is not text in UTF-8.*: set --encoding {encoding}$"):
        pack(tmp_path, tmp_path / "list.csv")
    packed, summary = pack(tmp_path, tmp_path / "list.csv", encoding=encoding)
    assert (packed, summary["classes"]) == ({one: 0}, ["th\u00e9"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("name", ["classes.txt", "classes.json"])
def test_encodings_of_class_lists_are_named_and_chosen(tmp_path, capsys, encoding, name):
    for number, class_name in enumerate(("the", "th\u00e9", "caf\u00e9")):
        (tmp_path / "images" / class_name).mkdir(parents=True)
        (tmp_path / "images" / class_name / "0.png").write_bytes(picture(number, "png"))
    names = ["th\u00e9", "the", "caf\u00e9"]
    file = tmp_path / name
    text = "\r\n".join(names) if name.endswith("txt") else json.dumps(names, ensure_ascii=False)
    file.write_bytes(text.encode(encoding))
    message = rf"{name}: is not text in UTF-8.*: set --encoding {encoding}$"
    with pytest.raises(UserError, match=message):
        class_names.read(file)
    assert class_names.read(file, encoding) == names
    with pytest.raises(UserError, match=r"'utf-17': is not an encoding that Python knows"):
        class_names.read(file, "utf-17")

    arguments = ["shards", "pack", str(tmp_path / "images"), str(tmp_path / "a"), "--workers", "1"]
    cli.main([*arguments, "--classes", str(file), "--encoding", encoding])
    file.write_text(text, encoding="utf-8")  # beside a list in another encoding
    assert class_names.read(file, encoding) == names
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert class_names.read(tmp_path / "a") == names
    with pytest.raises(SystemExit):  # a folder of classes has no encoding
        cli.main([*arguments, "--classes", str(tmp_path / "a"), "--encoding", encoding])
    assert "is not a list of labels: leave out --images and --encoding" in capsys.readouterr().err


def test_encodings_that_do_not_fit(tmp_path):
    images(tmp_path, ["a.jpg"])
    (tmp_path / "list.csv").write_bytes(b"a.jpg,\xff\n")
    for encoding, message in (
        ("ascii", "is not text in ascii: set another --encoding"),
        ("utf-17", "--encoding 'utf-17': is not an encoding that Python knows"),
        ("base64", "--encoding 'base64': is not an encoding that Python knows"),
    ):
        with pytest.raises(UserError, match=message):
            pack(tmp_path, tmp_path / "list.csv", encoding=encoding)
    with pytest.raises(UserError, match="is not a list of labels: leave out --images and --encoding"):
        pack(tmp_path, tmp_path, encoding="ascii")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", " "])
@pytest.mark.parametrize("header", ["path{}label", "Filename{}Class", "Schl\u00fcssel{}class-id", None])
def test_delimiters_and_headers(tmp_path, capsys, delimiter, header):
    content = images(tmp_path, ["a,b.jpg" if delimiter != "," else "a;b.jpg", "c.jpg"])
    names = sorted(path.name for path in tmp_path.glob("*.jpg"))
    rows = [f"{name}{delimiter}{label}" for name, label in zip(names, (5, 2))]
    text = "\r\n".join(([header.format(delimiter)] if header else []) + rows)
    (tmp_path / "list.csv").write_bytes(text.encode())
    assert pack(tmp_path, tmp_path / "list.csv")[0] == dict(zip(content, (5, 2)))
    note = "line 1: is taken for the names of the columns ("
    assert (note in capsys.readouterr().err) == (header not in ("path{}label", None))


def test_labels_that_pandas_wrote_are_integers(tmp_path):
    pandas = pytest.importorskip("pandas")
    content = images(tmp_path, [f"{i}.jpg" for i in range(4)])
    table = pandas.DataFrame({"path": [f"{i}.jpg" for i in range(4)], "label": [0, None, 10, 2]})
    table.to_csv(tmp_path / "list.csv", index=False)
    assert "10.0" in (tmp_path / "list.csv").read_text()
    with pytest.raises(UserError, match=r"line 3: has no label: add it, or remove the line"):
        pack(tmp_path, tmp_path / "list.csv")
    table.dropna().to_csv(tmp_path / "list.csv", index=False)
    packed, summary = pack(tmp_path, tmp_path / "list.csv")
    assert packed == dict(zip((content[0], content[2], content[3]), (0, 10, 2)))
    assert summary["classes"] is None


def test_integers_with_a_point_are_integers_unless_they_are_names(tmp_path):
    content = images(tmp_path, ["0.jpg", "1.jpg"])
    (tmp_path / "list.csv").write_text("0.jpg,1.0\n1.jpg,0\n")
    assert pack(tmp_path, tmp_path / "list.csv")[0] == dict(zip(content, (1, 0)))
    assert pack(tmp_path, tmp_path / "list.csv", classes=["a", "b"])[0] == dict(zip(content, (1, 0)))
    assert pack(tmp_path, tmp_path / "list.csv", classes=["0", "x", "1.0"])[0] == dict(zip(content, (2, 0)))


def test_an_image_has_one_label_however_its_path_is_written(tmp_path):
    images(tmp_path, ["a/0.jpg"])
    (tmp_path / "list.csv").write_text("a/0.jpg,1\n./a/../a/0.jpg,2\n")
    with pytest.raises(UserError, match=r"line 2: .*has the label '2' here and '1' above"):
        pack(tmp_path, tmp_path / "list.csv")


def test_names_without_extension_are_found_below_images(tmp_path, capsys):
    content = images(tmp_path / "images", ["x/1.jpg", "y/2.jpg", "y/3.jpg", "z/3.jpg"])
    (tmp_path / "list.csv").write_text("id,cat\n1,cat\ny/2.jpg,dog\n")
    packed, summary = pack(tmp_path, tmp_path / "list.csv", images=str(tmp_path / "images"))
    assert packed == dict(zip(content[:2], (0, 1)))
    assert summary["ignored_files"] == 2
    assert "images: images that are not in the list, left out: 2 ('y/3.jpg'" in capsys.readouterr().err
    for row, message in (
        ("3,cat", r"line 1: 3 is the name of .*y/3\.jpg and .*z/3\.jpg"),
        ("4,cat", r"line 1: .*images/4 is not an image file .* or --images"),
    ):
        (tmp_path / "list.csv").write_text(row)
        with pytest.raises(UserError, match=message):
            pack(tmp_path, tmp_path / "list.csv", images=str(tmp_path / "images"))


# --- ImageNet -----------------------------------------------------------------------------------------------
SYNSETS = (resources.files("timm.data") / "_info" / "imagenet_synsets.txt").read_text().split()  # by label
CHOSEN = [999, 0, 500, 2]  # labels of the validation images 1 to 4


def validation(tmp_path):
    return images(tmp_path / "val", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)])


def devkit(tmp_path):
    """A folder as the development kit unpacks to: its classes have numbers in another order."""
    order = np.random.RandomState(0).permutation(1000)  # number - 1 -> label
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    rows = [(i + 1, SYNSETS[label], "words", "gloss", 0, [], 0, 1300) for i, label in enumerate(order)]
    rows.append((1001, "n00001740", "entity", "gloss", 2, [1, 2], 19, 0))
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    synsets = np.zeros((len(rows), 1), dtype=[(field, object) for field in fields])
    for synset, row in zip(synsets, rows):
        synset[0] = row
    savemat(data / "meta.mat", {"synsets": synsets}, do_compression=True)
    numbers = {label: i + 1 for i, label in enumerate(order.tolist())}
    text = "".join(f"{numbers[label]}\n" for label in CHOSEN)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
    return data.parent


def test_sorted_wordnet_ids_are_numbered_as_in_timm():
    lines = [""] * 1000
    labels, classes = lists._number(
        [SYNSETS[i] for i in np.random.RandomState(0).permutation(1000)], lines, None
    )
    assert classes == SYNSETS == sorted(SYNSETS)
    assert labels == {wnid: label for label, wnid in enumerate(SYNSETS)}


def test_kaggles_list_gives_the_labels_of_timm(tmp_path):
    content = validation(tmp_path)
    boxes = ("85 1 499 272", "131 0 499 254 {0} 0 5 500 254", "1 2 3 4", "0 0 500 300")
    rows = [
        f"ILSVRC2012_val_{i:08d},{SYNSETS[label]} {box.format(SYNSETS[label])} \n"
        for i, (label, box) in enumerate(zip(CHOSEN, boxes), 1)
    ]
    source = tmp_path / "LOC_val_solution.csv"
    source.write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    packed, summary = pack(tmp_path, source, images=str(tmp_path / "val"), classes=SYNSETS)
    assert packed == dict(zip(content, CHOSEN))
    assert (summary["classes"], summary["unlabelled"], summary["ignored_files"]) == (SYNSETS, 0, 0)
    with pytest.raises(UserError, match="set --images to the folder of the images"):
        pack(tmp_path, source)
    source.write_text(f"ILSVRC2012_val_00000001,{SYNSETS[0]} 1 2 3 4 {SYNSETS[1]} 1 2 3 4\n")
    with pytest.raises(UserError, match="looks like several labels"):
        pack(tmp_path, source, images=str(tmp_path / "val"), classes=SYNSETS)


def test_the_development_kit_gives_the_labels_of_timm(tmp_path, monkeypatch):
    content = validation(tmp_path)
    kit = devkit(tmp_path)
    archive = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(kit, kit.name)
    truth = kit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    monkeypatch.setattr(imagenet, "_verify_archive", lambda *_: None)  # torchvision's reading of the kit
    imagenet.parse_devkit_archive(str(tmp_path))
    names, wnids = torch.load(tmp_path / "meta.bin")
    assert (sorted(names), wnids) == (SYNSETS, [SYNSETS[label] for label in CHOSEN])
    for source in (archive, kit, kit / "data", truth):
        packed, summary = pack(tmp_path, source, images=str(tmp_path / "val"), classes=SYNSETS)
        assert packed == dict(zip(content, CHOSEN))
        assert summary["classes"] == SYNSETS
    with pytest.raises(UserError, match="names no images: set --images to the folder of the validation"):
        pack(tmp_path, kit)
    (kit / "data" / "meta.mat").write_bytes(b"no matrix")
    with pytest.raises(UserError, match=r"its meta\.mat cannot be read .*download the development kit again"):
        pack(tmp_path, truth, images=str(tmp_path / "val"))
    (kit / "data" / "meta.mat").unlink()
    with pytest.raises(UserError, match=r"line 1: '\d+' is a class number .*put the kit's meta\.mat beside"):
        pack(tmp_path, truth, images=str(tmp_path / "val"))


def test_lists_of_the_validation_images_give_the_labels_of_timm(tmp_path):
    """One WordNet id on each line, as in TensorFlow's list; paths and labels, as in Caffe's."""
    content = validation(tmp_path)
    column = "".join(f"{SYNSETS[label]}\n" for label in CHOSEN)
    pairs = "".join(f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate(CHOSEN, 1))
    for text in (column, pairs):
        (tmp_path / "val.txt").write_text(text)
        packed, _ = pack(tmp_path, tmp_path / "val.txt", images=str(tmp_path / "val"), classes=SYNSETS)
        assert packed == dict(zip(content, CHOSEN))
    (tmp_path / "val.txt").write_text(column + f"{SYNSETS[3]}\n")
    with pytest.raises(UserError, match=r"line 5: .*ILSVRC2012_val_00000005 is not an image file"):
        pack(tmp_path, tmp_path / "val.txt", images=str(tmp_path / "val"), classes=SYNSETS)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("begin", ["", "\ufeff"])
def test_a_column_of_labels_has_one_on_each_line(tmp_path, begin, end):
    """A label too many or too few would give all later images the label of another one."""
    content = validation(tmp_path)
    list_, options = tmp_path / "val.txt", {"images": str(tmp_path / "val"), "classes": SYNSETS}
    lines = [SYNSETS[label] for label in CHOSEN]
    list_.write_bytes((begin + end.join([*lines, ""])).encode())
    assert pack(tmp_path, list_, **options)[0] == dict(zip(content, CHOSEN))
    for wrong in ("", f"{lines[1]} {lines[2]}"):
        list_.write_bytes((begin + end.join([lines[0], wrong, *lines[2:], ""])).encode())
        with pytest.raises(UserError, match=rf"line 2: '{wrong}' is not one class number or WordNet id"):
            pack(tmp_path, list_, **options)


# --- quotes -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ['a.png,"cat\nb.png,dog\n', 'a.png,"cat\nb.png,"dog\n', 'a.png,"c\nd"\n'])
def test_a_quote_that_does_not_end_on_its_line_is_named(tmp_path, text):
    images(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "list.csv").write_text(f"c.png,cat\n{text}")
    with pytest.raises(UserError, match=r"list\.csv: line 2: .*: correct the line"):
        pack(tmp_path, tmp_path / "list.csv")


def test_a_list_is_a_local_file(tmp_path):
    with pytest.raises(UserError, match=r"http://host/list\.csv: a list is read from a local file"):
        pack(tmp_path, "http://host/list.csv")
