"""Configs that are no config, ask for too much, or say something else than they seem to, and overrides."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hostile import Case, Inputs
from tars import picture

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)
)
# What follows an ordinary config, and what the line says.
TEXTS = {
    "aliases that expand for ever": (BOMB, "more than 262,144 values"),
    "an alias that contains itself": ("trackers: &a [*a]\n", "an alias that contains itself"),
    "lists in each other": ("trackers: " + "[" * 10**5 + "\n", "more than 64 mappings and lists"),
    "a date that is none": ("run_id: 2024-99-99\n", "'2024-99-99' is no valid timestamp"),
    "an integer that is none": ("seed: !!int x\n", "'x' is no valid int"),
    "a number in base 60": (f"seed: 1{':1' * 10**6}\n", "a number of more than 100 characters"),
    "a key twice": ("seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
    "a tab": ("log:\n\tevery_steps: 1\n", "cannot start any token"),
    "a NUL": ("seed: 1\0\n", r"Not text \(a NUL at"),
    "a NUL that is escaped": ('data: {root: "a\\0b"}\n', "has a character that is none"),
    "half a character": ('data: {root: "\\ud800"}\n', "has a character that is none"),
    "a character beyond Unicode": ('data: {root: "\\U00110000"}\n', "not valid YAML"),
    "a URL with punctuation without end": (f"trackers: ['http://x?{':' * 10**6}x']\n", r"http://x\?REDACTED"),
    "an object": ("seed: !!python/object/apply:os.system [ls]\n", "has no use here"),
}
# Overrides, and what the line says.
OVERRIDES = {
    "grad_checkpointing=true": "grad_checkpointing: timm has none for cnn32_student",
    "data.augment={augmix: {}, auto_augment: 3a}": "auto_augment and augmix exclude each other",
    "duration=1e999999999 steps": "duration '1e999999999 steps'",
    "duration=1e99 steps": "more than 1,000,000,000,000,000",
    f"duration={'9' * 5000} steps": "duration",
    "duration=.inf": "duration inf is not understood",
    "warmup.durations=[1e-999999999 epochs]": "is not understood",
    f"data.num_classes=1{'0' * 90}": "data.num_classes: Input should be within",
    "data.num_classes=.nan": "data.num_classes: ",
    "data.workers=1000000": "data.workers: Input should be less than or equal to 256",
    "data.workers=true": "data.workers: Input should be a valid number, not true",
    "data.image_size=1000000": "data.image_size: Input should be less than or equal to 8192",
    "data.streams=1.0e+30": "data.streams: Input should be within",
    "data.augment={padding: 1000000000}": "data.augment.padding: Input should be less than",
    "collective_timeout_minutes=1.0e+300": "collective_timeout_minutes: Input should be less than",
    "optimizer.lr=1e400": "optimizer.lr: Input should be a finite number",
    f"optimizer.lr=1{'0' * 400}": "a number of more than 100 characters|not valid YAML",
    "data.train={0..1000000000}": "names more than 1,048,576 shards",
    "data.train=" + "{a,b}" * 30: "names more than 1,048,576 shards",
    "data.train=" + "*/" * 2000 + "*.tar": "no such shard",
    "data.train=" + "/*/.." * 20 + "/x*": "leads to too many files and folders",
    "data.eval=" + "{" * 1000: "more than 16 braces in each other",
    f"data.train={BOMB}": "no such shard|names",
    "run_dir=": "override 'run_dir=': has no value: write run_dir=null",
    "data={": "not valid YAML",
}


def _text(text: str) -> Callable[[Inputs], list[str]]:
    def arguments(inputs: Inputs) -> list[str]:
        tree = inputs.tree()
        added = yaml.safe_load(text.partition(":")[0] + ":")  # the key of its first line is in the text alone
        path = Path(inputs.write({key: value for key, value in tree.items() if key not in added}))
        path.write_text(path.read_text() + text)
        return ["train", str(path)]

    return arguments


def _override(override: str) -> Callable[[Inputs], list[str]]:
    return lambda inputs: ["train", inputs.write(inputs.tree()), override]


def _file(
    make: Callable[[Path], Any], command: Callable[[Inputs, Path], list[str]]
) -> Callable[[Inputs], list[str]]:
    def arguments(inputs: Inputs) -> list[str]:
        file = inputs.folder / "outside.json"
        make(file)
        return command(inputs, file)

    return arguments


def _sparse(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**30)


def _line_without_end(file: Path) -> None:
    file.write_bytes(b"a" * 2**25)


# In place of a file that a command reads.
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a FIFO": (os.mkfifo, "Not a regular file"),
    "/dev/zero": (lambda file: file.symlink_to("/dev/zero"), "Not a regular file"),
    "a folder": (Path.mkdir, "Is a directory|no class|neither class folders|not an image"),
    "1 GiB of zeros": (_sparse, "Larger than|Not text|longer than"),
    "a line without end": (_line_without_end, "Larger than|longer than"),
    "invalid UTF-8": (lambda file: file.write_bytes(b"\xff\xfea,b\n"), "not text in UTF-8|Not text in UTF-8"),
}


def _pack(inputs: Inputs, *arguments: str) -> list[str]:
    return ["shards", "pack", *arguments, str(inputs.folder / "packed"), "--workers", "1"]


def _pack_csv(inputs: Inputs, file: Path) -> list[str]:
    return _pack(inputs, str(file.rename(file.with_suffix(".csv"))))


def _pack_classes(inputs: Inputs, file: Path) -> list[str]:
    (inputs.folder / "images" / "a").mkdir(parents=True)
    (inputs.folder / "images" / "a" / "1.jpg").write_bytes(picture(1))
    if file.is_dir():
        file = file.rename(file.with_suffix(""))
    return [*_pack(inputs, str(inputs.folder / "images")), "--classes", str(file)]


def _deepspeed(inputs: Inputs, file: Path) -> list[str]:
    engine = {"name": "deepspeed", "config_file": str(file)}
    return ["doctor", inputs.write({**inputs.tree(), "engine": engine})]


READERS: dict[str, Callable[[Inputs, Path], list[str]]] = {
    "config": lambda inputs, file: ["train", str(file)],
    "CSV": _pack_csv,
    "--classes": _pack_classes,
}


def _rows(text: str) -> Callable[[Inputs], list[str]]:
    def arguments(inputs: Inputs) -> list[str]:
        (inputs.folder / "1.jpg").write_bytes(picture(1))
        file = inputs.folder / "list.csv"
        file.write_text(text)
        return _pack(inputs, str(file))

    return arguments


ROWS = {
    "a quote without end": ('1.jpg,"' + "x\n" * 10**6, r"list\.csv: line \d+: field larger than"),
    "a label of 5000 digits": (
        f"1.jpg,{'9' * 5000}\n",
        r"list\.csv: line 1: label 9+ ?.*is not below 16,777,216",
    ),
    "a path that is too long": (f"{'x/' * 5000}1.jpg,1\n", r"is not an image file"),
    "a device": ("/dev/zero,1\n", r"list\.csv: line 1: /dev/zero is not an image file"),
}


def _literal_run_dir(inputs: Inputs) -> list[str]:
    return ["train", inputs.write(inputs.tree()), f"run_dir={inputs.folder}/exp #2"]


def _trained_there(inputs: Inputs) -> None:
    assert (inputs.folder / "exp #2" / "summary.json").is_file()
    assert not (inputs.folder / "exp").exists()


CASES = [
    *(Case(f"config with {name}", _text(text), error=error) for name, (text, error) in TEXTS.items()),
    *(Case(f"override {text[:40]!r}", _override(text), error=error) for text, error in OVERRIDES.items()),
    *(
        Case(f"{name} in place of {reader}", _file(make, command), error=error)
        for reader, command in READERS.items()
        for name, (make, error) in FILES.items()
    ),
    *(Case(f"CSV with {name}", _rows(text), error=error) for name, (text, error) in ROWS.items()),
    Case(
        "a path that is too long",
        lambda inputs: [
            "plan",
            inputs.write(inputs.tree()),
            f"teacher={{name: cnn32_auxiliary, checkpoint: {'x' * 300}}}",
        ],
        error="File name too long: .*: correct the path",
    ),
    Case("override run_dir=exp #2", _literal_run_dir, after=_trained_there),
]
