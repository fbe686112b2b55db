"""Input that tries to run a program: commands in URLs, pickles, formats that start an interpreter."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hostile import Case, Inputs
from PIL import Image
from safetensors.torch import save_model

from indistill.config import Model
from indistill.models import timm_model

REFUSED = "--allow-pipe"
ALLOWED = {"INDISTILL_ALLOW_PIPE": "1"}


def changed(command: list[str], **sections: dict[str, Any]) -> Callable[[Inputs], list[str]]:
    """Run a command on the ordinary config with other values in its sections."""

    def arguments(inputs: Inputs) -> list[str]:
        tree = inputs.tree()
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return [*command[:1], inputs.write(tree), *command[1:]]

    return arguments


class Pickled:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple:
        return os.system, ("true",)


def weights(inputs: Inputs, file: str = "student.safetensors") -> str:
    """Write the ordinary student's weights."""
    data = inputs.tree()["data"]
    net = timm_model.create(Model(name="cnn32_student"), data["num_classes"], data["image_size"], "student")
    save_model(net, str(inputs.folder / file))
    return str(inputs.folder / file)


def pickled(inputs: Inputs, file: str = "weights.pt") -> str:
    """Write weights that run a command when they are unpickled."""
    torch.save({"fc.weight": Pickled()}, inputs.folder / file)
    return str(inputs.folder / file)


def local_dir(inputs: Inputs) -> str:
    """Write a folder that timm loads, with pickled weights."""
    record = {"architecture": "resnet10t", "num_classes": 4, "pretrained_cfg": {"mean": [0.5] * 3}}
    (inputs.folder / "config.json").write_text(json.dumps(record))
    pickled(inputs, "pytorch_model.bin")
    return str(inputs.folder)


def foreign_run(inputs: Inputs, **student: Any) -> str:
    """Write the finished run of somebody whose config reads commands."""
    tree = inputs.tree()
    tree["data"] |= {"root": None, "train": "pipe:echo", "eval": "file://pipe:echo", "allow_pipe": True}
    tree["student"] |= student
    run = Path(tree["run_dir"])
    run.mkdir()
    (run / "config.yaml").write_text(Path(inputs.write(tree)).read_text())
    (run / "summary.json").write_text(json.dumps({"step": 2, "metrics": {}, "seconds": 1.0}))
    (run / "metrics.jsonl").write_text("")
    weights(inputs, "run/student.safetensors")
    return str(run)


def postscript(inputs: Inputs) -> list[str]:
    """Pack a CSV of files that are called like photographs and are PostScript."""
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    for name in ("x.jpg", "y.png"):
        image.save(inputs.folder / name, "EPS")
    (inputs.folder / "list.csv").write_text("path,label\nx.jpg,0\ny.png,1\n")
    shards = str(inputs.folder / "shards")
    return ["shards", "pack", str(inputs.folder / "list.csv"), shards, "--resize", "4", "--workers", "1"]


CASES = [
    Case("pipe: in data.train", changed(["train"], data={"train": "pipe:echo"}), error=REFUSED),
    Case(
        "pipe: and the key that once allowed it",
        changed(["plan"], data={"train": "pipe:echo", "allow_pipe": True}),
        error=REFUSED,
    ),
    Case(
        "pipe: behind file://", changed(["plan"], data={"train": "file://pipe:echo"}), error="run a command"
    ),
    Case("pipe: in braces", changed(["plan"], data={"train": "{p,x}ipe:echo"}), error=REFUSED),
    Case(
        "pipe: in data.root",
        changed(["train", "--allow-pipe"], data={"root": "pipe:echo;cat", "train": "x.tar"}),
        error="data.root",
    ),
    Case(
        "pipe: in targets.dir",
        changed(["targets", "--allow-pipe"], targets={"dir": "pipe:echo"}),
        error="targets.dir",
    ),
    Case(
        "pipe: in run_dir",
        lambda inputs: ["train", inputs.write(inputs.tree() | {"run_dir": "pipe:echo"}), "--allow-pipe"],
        error="run_dir",
    ),
    Case(
        "pipe: to eval",
        lambda inputs: changed(["eval", weights(inputs)], data={"eval": "pipe:echo"})(inputs),
        error=REFUSED,
    ),
    Case("pipe: to shards", lambda inputs: ["shards", "verify", "pipe:echo"], error=REFUSED),
    Case(
        "pipe: forbidden by WDS_SECURE",
        lambda inputs: ["shards", "index", "--allow-pipe", "pipe:echo"],
        error="WDS_SECURE",
        environment={"WDS_SECURE": "1"},
    ),
    Case(
        "a URL that opens what a file names",
        lambda inputs: ["shards", "verify", "reference://x::file:///refs.json"],
        error="is not a URL that is read",
    ),
    Case(
        "report of a run that reads commands",
        lambda inputs: ["report", foreign_run(inputs)],
        environment=ALLOWED,
    ),
    Case(
        "export of a run that reads commands",
        lambda inputs: ["export", foreign_run(inputs), str(inputs.folder / "export")],
        environment=ALLOWED,
    ),
    Case(
        "eval of a run that reads commands",
        lambda inputs: ["eval", foreign_run(inputs) + "/config.yaml", str(inputs.folder / "run")],
        error="run a command",
    ),
    Case(
        "a report of a run whose network names a file",
        lambda inputs: ["report", foreign_run(inputs, kwargs={"checkpoint_path": pickled(inputs)})],
    ),
    Case(
        "a network that names a file, to plan",
        lambda inputs: changed(["plan"], student={"kwargs": {"checkpoint_path": pickled(inputs)}})(inputs),
        error="student.kwargs.checkpoint_path",
    ),
    Case(
        "a network whose record names a file",
        lambda inputs: changed(
            ["train"], student={"kwargs": {"pretrained_cfg_overlay": {"file": pickled(inputs)}}}
        )(inputs),
        error="student.kwargs.pretrained_cfg_overlay",
    ),
    Case(
        "pickled code as a checkpoint",
        lambda inputs: changed(["eval", pickled(inputs)])(inputs),
        error="holds objects other than tensors",
    ),
    Case(
        "pickled code in a folder for timm",
        lambda inputs: changed(["eval", f"local-dir:{local_dir(inputs)}"])(inputs),
        error="blocked loading this checkpoint",
    ),
    Case(
        "pickled code in an exported folder",
        lambda inputs: changed(["eval", local_dir(inputs)])(inputs),
        error="blocked loading this checkpoint",
    ),
    Case("PostScript called jpg and png", postscript, error="not a readable image: none of JPEG"),
]
