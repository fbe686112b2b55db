"""What lies where a command writes, and links and names that lead elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import tars
import yaml
from hostile import Case, Inputs

TEXT = "written by hand"


def images(inputs: Inputs) -> Path:
    tars.folder(inputs.folder / "images")
    return inputs.folder / "images"


def pack(inputs: Inputs, *options: str) -> list[str]:
    return ["shards", "pack", str(images(inputs)), str(inputs.folder / "packed"), "--workers", "1", *options]


def pack_link(inputs: Inputs, *options: str) -> list[str]:
    arguments = pack(inputs, *options)
    (inputs.folder / "outside.jpg").write_bytes(tars.picture(1))
    (inputs.folder / "images" / "ant" / "link.jpg").symlink_to(inputs.folder / "outside.jpg")
    return arguments


def pack_links(inputs: Inputs) -> list[str]:
    arguments = pack_link(inputs)
    (inputs.folder / "images" / "root").symlink_to("/")
    return arguments


def pack_among_parts(inputs: Inputs) -> list[str]:
    (inputs.folder / "packed").mkdir()
    (inputs.folder / "packed" / "film.mkv.part").write_text(TEXT)
    return pack(inputs)


def run(inputs: Inputs) -> str:
    folder = inputs.folder / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(inputs.tree()))
    return str(folder)


def report_onto(name: str, kind: str = "file") -> Case:
    def arguments(inputs: Inputs) -> list[str]:
        output = inputs.folder / "run" / name
        folder = run(inputs)
        if kind == "file" and not output.exists():
            output.write_text(TEXT)
        if kind == "fifo":
            os.mkfifo(output)
        if kind == "folder":
            output.mkdir()
        return ["report", folder, "--output", str(output)]

    def unchanged(inputs: Inputs) -> None:
        output = inputs.folder / "run" / name
        if kind == "file":
            assert "<html" not in output.read_text()
        else:
            assert output.is_fifo() or output.is_dir()

    return Case(f"report onto {kind} {name}", arguments, error="choose another --output", after=unchanged)


def index_onto(inputs: Inputs) -> list[str]:
    shutil.copy(inputs.data / "eval-000000.tar", inputs.folder)
    (inputs.folder / "eval-000000.tar.index.json").write_text(TEXT)
    return ["shards", "index", str(inputs.folder / "eval-000000.tar"), "--workers", "1"]


def index_is_kept(inputs: Inputs) -> None:
    assert (inputs.folder / "eval-000000.tar.index.json").read_text() == TEXT


def part_is_kept(inputs: Inputs) -> None:
    assert (inputs.folder / "packed" / "film.mkv.part").read_text() == TEXT


def nothing_is_outside(inputs: Inputs) -> None:
    assert not list(inputs.folder.glob("x-*"))


CASES = [
    Case(
        "a prefix that leaves the folder",
        lambda inputs: pack(inputs, "--prefix", "../x"),
        error="--prefix .* must be a plain file name",
        after=nothing_is_outside,
    ),
    Case(
        "links out of an image folder", pack_links, output="images: links that lead out of it, left out: 2 "
    ),
    Case(
        "links out of an image folder to be followed",
        lambda inputs: pack_link(inputs, "--follow-links"),
        output='"samples": 22',
    ),
    Case(
        "shards in the folder that is packed",
        lambda inputs: ["shards", "pack", str(images(inputs)), str(inputs.folder / "images" / "shards")],
        error="is in the source folder",
    ),
    Case("a partial download beside shards", pack_among_parts, output='"samples": 21', after=part_is_kept),
    report_onto("config.yaml"),
    report_onto("notes.txt"),
    report_onto("report.html"),
    report_onto("pipe", kind="fifo"),
    report_onto("folder", kind="folder"),
    Case("another file in the place of an index", index_onto, error="is not an index", after=index_is_kept),
]
