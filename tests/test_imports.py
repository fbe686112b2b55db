"""Dependencies point down: the rule of the design, read from the import statements."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "indistill"
LEAVES = ["config", "remote", "class_names", "shards", "packing", "overlap", "order", "decode", "augment"]
LEAVES += [
    "outputs",
    "files",
    "runs",
    "taps",
    "prune",
    "losses",
    "curriculum",
    "models",
    "projectors",
    "store",
    "targets",
    "data",
]
LEAVES += ["similarity", "history", "preemption", "watchdog", "deepspeed_config", "environment", "charts"]
WITHOUT_TORCH = [
    "config",
    "remote",
    "class_names",
    "shards",
    "packing",
    "overlap",
    "order",
    "decode",
    "curriculum",
    "runs",
    "api",
    "cli",
    "files",
]
WITHOUT_TORCH += ["history", "preemption", "watchdog", "deepspeed_config", "environment", "charts", "report"]
MAY_USE_ACCELERATE = {"train", "build", "checkpoint", "engine", "evaluate", "health", "metrics", "trackers"}
MAY_USE_ACCELERATE |= {"estimate", "sources", "together", "precompute", "apart"}
OPTIONAL = ("deepspeed", "transformers", "onnx", "onnxscript", "onnxruntime")  # of the extras
TOP = {"train", "api", "cli", "demo", "pipeline", "together", "precompute", "apart", "doctor"}


def imports(module: str, top_level_only: bool = False) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def uses(module: str, package: str, **keywords: bool) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(module, **keywords))


@pytest.mark.parametrize("module", sorted(path.stem for path in PACKAGE.glob("*.py")))
def test_who_may_import_what(module):
    if module in WITHOUT_TORCH:
        assert not any(uses(module, name, top_level_only=True) for name in ("torch", "torchvision", "timm"))
    assert not any(uses(module, name, top_level_only=True) for name in OPTIONAL)
    if module not in MAY_USE_ACCELERATE:
        assert not uses(module, "accelerate")
    if module not in TOP:
        assert not uses(module, "indistill.training.loop")
    if module in LEAVES:
        ours = {name.split(".")[1] for name in imports(module) if name.startswith("indistill.")}
        assert ours <= set(LEAVES) | {"UserError"}, ours


def test_the_lists_name_modules_that_exist():
    assert all((PACKAGE / f"{name}.py").exists() for name in [*LEAVES, *WITHOUT_TORCH, *MAY_USE_ACCELERATE, *TOP])
