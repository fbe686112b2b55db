"""Labels as other people's tars have them: `data.label`, in index and stream access."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import losses, refused
from tars import picture, write_tar

from indistill import config
from indistill.commands.cli import main
from indistill.config import UserError
from indistill.data import class_names, verify
from indistill.data.dataset import open_shards
from indistill.data.index import load_index
from indistill.data.samples import Others
from indistill.data.shards import ShardSet
from indistill.data.stream import StreamedTraining, read_shard
from indistill.training.loop import train

NAMES = ["ant", "bee", "cat"]


def section_of(path: Path | str, label: dict[str, Any] | None, num_classes: int = 3) -> config.Data:
    return config.Data(train=str(path), num_classes=num_classes, global_batch=1, label=label)


def labels_of(section: config.Data) -> list[int]:
    """The labels of the images, the same by index, by reading at random and by streaming."""
    shards = open_shards(section, section.train)
    labels = shards.labels.tolist()
    assert [sample.label for sample in shards.iterate()] == labels
    assert streamed_labels(section) == labels
    return labels


def streamed_labels(section: config.Data) -> list[int]:
    section = section.model_copy(update={"epoch_samples": 9, "workers": 0})
    streamed = StreamedTraining(section, 0, rank=0, world=1, accumulation=1)
    return [
        label
        for path in streamed.urls
        for *_, label in read_shard(path, section.num_classes, others=Others(), labels=streamed.labels)
    ]


def of_members(tmp_path: Path, extension: str, contents: list[bytes | None]) -> Path:
    """A tar of images, each with a member that says its label, if it has any."""
    members = []
    for i, content in enumerate(contents):
        members.append((f"{i:05d}.jpg", picture(i)))
        if content is not None:
            members.append((f"{i:05d}.{extension}", content))
    write_tar(tmp_path / "x.tar", members)
    return tmp_path / "x.tar"


def img2dataset(label: Any) -> bytes:
    """What img2dataset writes beside an image, with a column of labels."""
    return json.dumps(
        {"caption": "an animal, perhaps", "url": "http://host/1.jpg", "key": "0", "status": "success",
         "error_message": None, "width": 24, "height": 16, "exif": "{}", "sha256": "0", "label": label}
    ).encode()  # fmt: skip


@pytest.mark.parametrize(
    ("extension", "contents", "label"),
    [
        ("json", [img2dataset(name) for name in ("cat", "ant", "cat")], {"key": "json", "field": "label"}),
        ("txt", [b"cat", b" ant\n", b"\xef\xbb\xbfcat\r\n"], {"key": "txt"}),
        ("cls", [b"cat", b"ant", b"cat"], {"key": "cls"}),
        (
            "json",
            [json.dumps({"meta": {"class": [name]}}).encode() for name in ("cat", "ant", "cat")],
            {"key": "json", "field": "meta.class"},
        ),
    ],
)
@pytest.mark.parametrize("kind", ["list", "json list", "mapping"])
def test_names_are_numbered_by_a_list_or_a_mapping(tmp_path, extension, contents, label, kind):
    path = of_members(tmp_path, extension, contents)
    files = {
        "list": ("classes.txt", "ant\nbee\ncat\n"),
        "json list": ("classes.json", json.dumps(NAMES)),
        "mapping": ("map.json", json.dumps({"cat": 2, "bee": 1, "ant": 0})),
    }
    name, text = files[kind]
    (tmp_path / name).write_text(text)
    section = section_of(path, label | {"map": str(tmp_path / name)})
    assert labels_of(section) == [2, 0, 2]
    names = class_names.of_training(section)
    assert names is not None
    assert names.names == NAMES


@pytest.mark.parametrize(
    ("extension", "contents", "label"),
    [
        ("json", [img2dataset(2), img2dataset("0"), img2dataset(1.0)], {"key": "json", "field": "label"}),
        ("txt", [b"2", b"0\n", b"1"], {"key": "txt"}),
        ("cls", [b"2", b"0", b"1"], None),
        ("cls", [b"2", b"0", b"1"], {"key": "cls"}),
    ],
)
def test_numbers_need_no_list(tmp_path, extension, contents, label):
    assert labels_of(section_of(of_members(tmp_path, extension, contents), label)) == [2, 0, 1]


def test_wordnet_ids_and_several_names_of_a_class(tmp_path):
    path = of_members(tmp_path, "txt", [b"n01443537", b"n01440764"])
    synsets = "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(synsets)
    section = section_of(path, {"key": "txt", "map": str(tmp_path / "LOC_synset_mapping.txt")}, 2)
    assert labels_of(section) == [1, 0]
    (tmp_path / "fish.json").write_text('{"n01440764": 0, "n01443537": 0, "n01484850": 1}')
    section = section_of(path, {"key": "txt", "map": str(tmp_path / "fish.json")}, 2)
    assert labels_of(section) == [0, 0]
    assert class_names.of_training(section) is None  # two names for one label


def test_members_without_an_image_are_left_aside(tmp_path):
    """A file about the data set, or the record of an image that could not be downloaded."""
    members = [("stats.json", b"[1]"), ("a.jpg", picture(0)), ("a.json", b'{"label": 1}'), ("b.json", b"{")]
    path = write_tar(tmp_path / "x.tar", members)
    assert labels_of(section_of(path, {"key": "json", "field": "label"})) == [1]


# --- indices ------------------------------------------------------------------------------------------------
def test_each_kind_of_label_has_its_index(tmp_path):
    """The usual index, also one of an earlier version, stays as it is, and another map needs no new one."""
    members = []
    for i, name in enumerate(("cat", "ant")):
        members += [
            (f"{i}.jpg", picture(i)), (f"{i}.cls", b"1"), (f"{i}.txt", name.encode()),
            (f"{i}.json", img2dataset(i)),
        ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    usual = ShardSet(path)
    before = Path(f"{path}.index.json").read_bytes()
    assert set(json.loads(before)) == {"version", "bytes", "keys", "offsets", "sizes", "labels"}
    for count, order in enumerate((NAMES, NAMES[::-1])):
        (tmp_path / "classes.txt").write_text("\n".join(order))
        section = section_of(path, {"key": "txt", "map": str(tmp_path / "classes.txt")})
        shards = open_shards(section, path)
        assert shards.labels.tolist() == [order.index("cat"), order.index("ant")]
        assert shards.fingerprint != usual.fingerprint
        assert len(list(tmp_path.glob("x.tar.*.index.json"))) == 1, count
    assert open_shards(section_of(path, {"key": "json", "field": "label"}), path).labels.tolist() == [0, 1]
    assert open_shards(section_of(path, None), path).labels.tolist() == [1, 1]
    assert Path(f"{path}.index.json").read_bytes() == before

    # A shard that was replaced: `shards index` forgets all of them.
    write_tar(tmp_path / "x.tar", [("0.jpg", picture(5)), ("0.txt", b"bee"), ("notes", bytes(10**5))])
    with pytest.raises(UserError, match="run `indistill shards index` on it"):
        open_shards(section, path)
    verify.index(path)
    assert open_shards(section, path).labels.tolist() == [1]


def test_compressed_shards_and_the_cache(tmp_path):
    path = of_members(tmp_path, "txt", [b"cat", b"ant"])
    members = [("0.jpg", picture(0)), ("0.txt", b"cat"), ("1.jpg", picture(1)), ("1.txt", b"ant")]
    packed = write_tar(tmp_path / "y.tar.gz", members, "w:gz")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    label = {"key": "txt", "map": str(tmp_path / "classes.txt")}
    for shard in (str(path), packed):
        section = section_of(shard, label).model_copy(
            update={"cache_dir": str(tmp_path / "cache"), "in_memory": True}
        )
        for _ in range(2):  # built, and read again
            shards = open_shards(section, shard)
            assert [sample.label for sample in shards.iterate()] == [2, 0]
        assert not list(tmp_path.glob("*.index.json"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a server of `tmp_path`/bucket."""
    (tmp_path / "bucket").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "bucket"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_remote_shards_and_the_index_beside_them(tmp_path, server):
    path = of_members(tmp_path / "bucket", "txt", [b"cat", b"ant"])
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    label = {"key": "txt", "map": str(tmp_path / "classes.txt")}
    section = section_of(f"{server}/x.tar", label).model_copy(update={"cache_dir": str(tmp_path / "cache")})
    for _ in range(2):  # built from the shard, and read again
        shards = open_shards(section, section.train)
        assert [sample.label for sample in shards.iterate()] == [2, 0]
    load_index(str(path), label=config.Label(key="txt"))
    (beside,) = (tmp_path / "bucket").glob("*.index.json")
    beside.write_text(beside.read_text().replace('"texts": ["cat", "ant"]', '"texts": ["bee", "ant"]'))
    other = section.model_copy(update={"cache_dir": str(tmp_path / "other")})
    assert open_shards(other, other.train).labels.tolist() == [1, 0]  # it was fetched


@pytest.mark.parametrize(
    ("key", "value"), [("texts", "ab"), ("texts", [1, 2]), ("texts", ["cat"]), ("labels", [0, 2])]
)
def test_damaged_texts_of_an_index_are_refused(tmp_path, key, value):
    path = of_members(tmp_path, "txt", [b"cat", b"ant"])
    label = config.Label(key="txt")
    load_index(str(path), label=label)
    (file,) = tmp_path.glob("*.index.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match="not an index that this version reads"):
        load_index(str(path), label=label)


# --- mistakes -----------------------------------------------------------------------------------------------
SEVERAL = "an image has one, because losses for several are not built yet"
JSON = {"key": "json", "field": "label"}


@pytest.mark.parametrize(
    ("label", "content", "message"),
    [
        (JSON, img2dataset([1, 2]), rf"00001\.json has several labels \('1', '2'\), but {SEVERAL}"),
        (JSON, img2dataset("1,2"), rf"sample '?00001'? has several labels \('1', '2'\), but {SEVERAL}"),
        ({"key": "txt"}, b"1\n2\n", rf"00001\.txt has several labels \('1', '2'\), but {SEVERAL}"),
        ({"key": "txt"}, b"1 2", rf"has several labels \('1', '2'\), but {SEVERAL}"),
        ({"key": "txt", "map": "3"}, b"cat; ant", rf"has several labels \('cat', 'ant'\), but {SEVERAL}"),
        (
            {"key": "txt", "map": "3"},
            b"dog",
            r"'00001' has the label 'dog', which is no class in 3\.txt: add",
        ),
        (
            {"key": "txt"},
            b"cat",
            "has the label 'cat', which is no number: name a list of the classes in data",
        ),
        ({"key": "txt"}, b"-1", "has the label '-1', which is no number"),
        ({"key": "txt"}, b"7", r"label 7 is none of the data\.num_classes, 0 to 2"),
        ({"key": "txt"}, b"\xff", r"00001\.txt is not text in UTF-8"),
        ({"key": "txt"}, b"x" * 2000, r"00001\.txt has more than 1024 bytes"),
        ({"key": "txt"}, None, r"00001: has no label, because there is no 00001\.txt: add it"),
        ({"key": "txt"}, b" \n", r"00001: has no label, because there is no 00001\.txt: add it"),
        (JSON, b"{}", r"has no label, because there is no 00001\.json with the key 'label': add it"),
        (JSON, img2dataset(None), "has no label, because there is no"),
        (JSON, img2dataset([]), "has no label, because there is no"),
        (JSON, img2dataset({"a": 1}), r"00001\.json has .* for a label: a label is a number or a name"),
        (JSON, img2dataset(True), r"00001\.json has 'True' for a label"),
        (JSON, img2dataset(1.5), r"00001\.json has '1\.5' for a label"),
        (JSON, b"[3]", r"00001\.json has no keys, of which 'label' \(data\.label\.field\) could be one"),
        (JSON, b'{"label": ', r"00001\.json is not valid JSON"),
        (JSON, b"[" * 10**5, r"00001\.json (is not valid JSON|too many lists)"),
        (
            {"key": "txt", "map": "2"},
            b"bee",
            r"data\.label\.map: 2\.txt has 2 classes, data\.num_classes is 3",
        ),
        (
            {"key": "txt", "map": "gap"},
            b"bee",
            r"gap\.json: no class has the label 1, and others have larger",
        ),
        ({"key": "txt", "map": "bad"}, b"bee", r"bad\.json: does not have a label, 0 or more"),
        ({"key": "txt", "map": "none"}, b"bee", r"none\.txt: cannot be read"),
    ],
)
def test_a_label_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, label, content, message):
    monkeypatch.chdir(tmp_path)
    for count in (2, 3):
        Path(f"{count}.txt").write_text("\n".join(NAMES[:count]))
    Path("gap.json").write_text('{"ant": 0, "bee": 2, "cat": 3}')
    Path("bad.json").write_text('{"ant": 0, "bee": -1}')
    if "map" in label:
        files = {"gap": "gap.json", "bad": "bad.json"}
        label = label | {"map": files.get(label["map"], f"{label['map']}.txt")}
    first = b"ant" if "map" in label else b"0"
    path = of_members(tmp_path, label["key"], [img2dataset(0) if label == JSON else first, content])
    section = section_of(path, label)
    with pytest.raises(UserError, match=message) as by_index:
        open_shards(section, section.train)
    with pytest.raises(UserError, match=message):
        streamed_labels(section)
    assert "\n" not in str(by_index.value)


# --- runs ---------------------------------------------------------------------------------------------------
@pytest.fixture
def elsewhere(tree: dict[str, Any], data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """The images of `data_dir` with names of classes in JSON; a run that learns from them."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for pattern in ("train-*.tar", "eval-*.tar"):
        for path in ShardSet(pattern, str(data_dir)).paths:
            members = []
            for sample in ShardSet(path).iterate():
                name = f"class {sample.label}"
                members += [(f"{sample.key}.png", sample.image), (f"{sample.key}.json", img2dataset(name))]
            write_tar(folder / Path(path).name, members)
    (tmp_path / "classes.txt").write_text("".join(f"class {label}\n" for label in range(10)))
    tree["data"] |= {"root": str(folder), "label": JSON | {"map": str(tmp_path / "classes.txt")}}
    del tree["warmup"]
    tree["duration"] = "6 steps"
    return tree


@pytest.mark.parametrize("access", ["index", "stream"])
def test_a_run_is_that_of_the_same_labels_in_cls(elsewhere, data_dir, tmp_path, access):
    if access == "stream":
        elsewhere["data"] |= {"access": "stream", "epoch_samples": 192, "in_memory": False, "workers": 0}
    summary = train(config.parse(elsewhere, "test"))
    usual = elsewhere | {"data": elsewhere["data"] | {"root": str(data_dir), "label": None}}
    usual["run_dir"] += "-usual"
    expected = train(config.parse(usual, "test"))
    assert losses(elsewhere["run_dir"]) == losses(usual["run_dir"])
    assert summary["metrics"] == expected["metrics"]
    names = json.loads(Path(elsewhere["run_dir"], "classes.json").read_text())
    assert names == [f"class {label}" for label in range(10)]


def test_a_run_resumes_with_a_map_that_was_moved_and_not_with_another(elsewhere, tmp_path, capsys):
    settings = config.parse(elsewhere, "test")
    train(settings)
    moved = tmp_path / "moved.txt"
    moved.write_text((tmp_path / "classes.txt").read_text())
    elsewhere["data"]["label"]["map"] = str(moved)
    assert config.fingerprint(config.parse(elsewhere, "test")) == config.fingerprint(settings)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(elsewhere))
    with pytest.raises(SystemExit, match="0"):
        main(["doctor", str(path)])
    said = capsys.readouterr().out
    assert "data.train: 3 shards, 192 samples" in said
    assert "data.train has 10 class names, data.eval has the same" in said
    lines = moved.read_text().splitlines()
    moved.write_text("\n".join(lines[::-1]))
    assert "its classes are not those of" in refused(capsys, "train", str(path))
    moved.write_text("\n".join(lines[:-1]))
    for command in ("train", "eval"):
        line = refused(capsys, command, str(path), *([elsewhere["run_dir"]] if command == "eval" else []))
        assert re.search(r"data\.label\.map: .*moved\.txt has 9 classes, data\.num_classes is 10", line)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"key": "json"}, "data.label: key: json needs field"),
        ({"key": "txt", "field": "a"}, "data.label: field is a key of JSON, and key is txt"),
        ({"key": "png"}, "data.label.key"),
        ({}, "data.label.key"),
    ],
)
def test_a_config_says_where_labels_are(tree, tmp_path, capsys, label, message):
    tree["data"]["label"] = label
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert message in refused(capsys, "train", str(path))


# --- packing ------------------------------------------------------------------------------------------------
def test_packing_writes_labels_of_others_as_numbers(tmp_path, capsys):
    """Names by a list, and numbers; without the option, labels in JSON are no labels, as ever."""
    path = of_members(tmp_path, "json", [img2dataset("cat"), img2dataset("ant"), img2dataset(None)])
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    packed = {
        "named": ["--label", "json:label", "--classes", str(tmp_path / "names.txt"), "--unlabelled"],
        "bare": [],
    }
    expected = {"named": ([2, 0, -1], NAMES), "bare": ([-1] * 3, None)}
    for name, options in packed.items():
        main(["shards", "pack", str(path), str(tmp_path / name), "--workers", "1", *options])
        record = json.loads((tmp_path / name / "dataset.json").read_text())
        samples = ShardSet(str(tmp_path / name / "*.tar"))
        assert (samples.labels.tolist(), record["classes"]) == expected[name]
        assert [sample.image for sample in samples.iterate()] == [picture(i) for i in range(3)]
    numbers = of_members(tmp_path, "txt", [b"7", b"0"])
    main(["shards", "pack", str(numbers), str(tmp_path / "numbers"), "--workers", "1", "--label", "txt"])
    assert ShardSet(str(tmp_path / "numbers" / "*.tar")).labels.tolist() == [7, 0]
    capsys.readouterr()
    path = of_members(tmp_path, "json", [img2dataset(1), img2dataset(None)])
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(picture(0))
    for source, label, message in (
        (path, "json:label", "sample 00001: has no json with the key 'label'"),
        (path, "json:typo", "sample 00000: has no json with the key 'typo': correct --label, or set"),
        (tmp_path / "photos", "txt", "photos: contains no tars: leave out --label"),
    ):
        line = refused(capsys, "shards", "pack", str(source), str(tmp_path / "no"), "--label", label)
        assert message in line
    for label, message in (
        ("json", "write json:FIELD, txt or cls"),
        ("txt:a", "write json:FIELD, txt or cls"),
    ):
        line = refused(capsys, "shards", "pack", str(path), str(tmp_path / "no"), "--label", label)
        assert f"--label {label}: {message}" in line
    line = refused(
        capsys, "shards", "pack", str(tmp_path / "names.txt"), str(tmp_path / "no"), "--label", "txt"
    )
    assert "names.txt: is no tar: leave out --label" in line
