"""Input that tries to run a program: commands in URLs, pickles, formats that start an interpreter."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Case, Inputs

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
        changed(["eval", "cnn32_student"], data={"eval": "pipe:echo"}),
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
]
