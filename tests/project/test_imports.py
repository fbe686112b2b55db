"""The layers of the package: a module imports from its own folder and from lower layers only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from indistill.config.extras import EXTRAS

PACKAGE = Path(__file__).resolve().parents[2] / "indistill"
# From the ground up; the modules of one line may not import each other.
LAYERS = [
    ["config"],
    ["models", "order", "curriculum"],
    ["prune", "losses", "distributed"],
    ["data"],
    ["targets", "evaluate"],
    ["training"],
    ["commands"],
    ["__init__"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# `--help`, `indistill shards`, its worker processes, the watchdog and the checks of a config start fast.
WITHOUT_TORCH = [
    "__init__",
    "config",
    "data.shards",
    "data.index",
    "data.samples",
    "data.verify",
    "data.packing",
    "data.remote",
]
WITHOUT_TORCH += ["data.decode", "order", "curriculum", "distributed.preemption", "distributed.watchdog"]
WITHOUT_TORCH += ["distributed.deepspeed_config", "commands.cli", "commands.trainer", "commands.report"]
WITHOUT_TORCH += ["commands.init", "commands.demo"]
# Those of the extras; timm always needs huggingface_hub.
OPTIONAL = {module for packages in EXTRAS.values() for module in packages} - {"huggingface_hub"}


def modules(package: Path) -> dict[str, Path]:
    """Return each module's file, by dotted name without `indistill.`; the package itself is "__init__"."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        found[".".join(parts)] = path
    return found


def imports(path: Path, known: dict[str, Path], at_start: bool = False) -> dict[str, int]:
    """Return the line of each import of a file, by module; nested and TYPE_CHECKING imports are included.

    `at_start`: only imports that run when the module is imported.
    """
    tree = ast.parse(path.read_text())
    found: dict[str, int] = {}
    for node in statements_at_start(tree) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            found.setdefault(module_of(name, known), node.lineno)
    return found


def statements_at_start(tree: ast.AST) -> list[ast.AST]:
    """Return every node except the bodies of functions and of `if TYPE_CHECKING`."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        found += [node, *statements_at_start(node)]
    return found


def module_of(name: str, known: dict[str, Path]) -> str:
    """`indistill.data.shards.expand` -> `indistill:data.shards`; other packages' names are unchanged.

    A name of the package itself, such as `indistill.Trainer`, keeps it: `indistill:__init__.Trainer`.
    """
    if name.split(".")[0] != "indistill":
        return name
    names = name.split(".")[1:]
    parts = list(names)
    while parts and ".".join(parts) not in known:
        parts.pop()
    return "indistill:" + ".".join(parts or ["__init__", *names])


def ours(found: dict[str, int]) -> dict[str, int]:
    return {
        name.removeprefix("indistill:"): line for name, line in found.items() if name.startswith("indistill:")
    }


def upward(package: Path) -> list[str]:
    """Return every import of a module that is neither in the same folder nor on a lower layer."""
    known, wrong = modules(package), []
    for module, path in known.items():
        own = module.split(".")[0]
        for other, line in ours(imports(path, known)).items():
            folder = other.split(".")[0]
            allowed = LEVEL[folder] < LEVEL[own] or folder == own or allowed_upward(module, other)
            if not allowed:
                wrong.append(f"{path.relative_to(package.parent)}:{line}: {module} imports {other}")
    return wrong


def allowed_upward(module: str, other: str) -> bool:
    """`indistill.__version__`, which imports nothing, as `indistill.Trainer` would."""
    return other == "__init__.__version__" and module != "__init__"


def cycles(package: Path) -> list[list[str]]:
    """Return groups of modules that import each other, directly or not; `__init__.py` files are modules."""
    known = modules(package)
    graph = {
        module: [o for o in ours(imports(path, known)) if o in known and o != "__init__"]
        for module, path in known.items()
    }
    reached = {module: reach(graph, module) for module in graph}
    groups = {frozenset(b for b in graph if b in reached[a] and a in reached[b]) for a in graph}
    return sorted(sorted(group) for group in groups if group)


def reach(graph: dict[str, list[str]], start: str) -> set[str]:
    """Return the modules that can be reached from `start` in one step or more."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        new = set(graph.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def test_every_folder_has_its_layer():
    assert {module.split(".")[0] for module in modules(PACKAGE)} == set(LEVEL)
    assert len({path.name for path in PACKAGE.iterdir()} - {"__pycache__", "py.typed"}) <= 14


def test_imports_point_down():
    assert upward(PACKAGE) == []


def test_there_are_no_cycles():
    assert cycles(PACKAGE) == []


@pytest.mark.parametrize(
    "body",
    [
        "from indistill.training import loop",
        "from indistill.training.loop import train",
        "import indistill.training.loop",
        "def f():\n    from indistill.training import loop",
        "if TYPE_CHECKING:\n    from indistill.training.loop import train",
    ],
)
def test_a_planted_upward_import_is_named(body, tmp_path):
    package = tmp_path / "indistill"
    for name, text in {
        "data/__init__": "",
        "data/shards": body,
        "training/__init__": "",
        "training/loop": "",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    line = 2 if "\n" in body else 1
    assert upward(package) == [f"indistill/data/shards.py:{line}: data.shards imports training.loop"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("from indistill import __version__", None),
        ("def f():\n    from indistill import Trainer", "__init__.Trainer"),
        ("import indistill", "__init__"),
    ],
)
def test_a_lower_module_may_take_only_the_version_from_the_package(body, named, tmp_path):
    package = tmp_path / "indistill"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "data" / "__init__.py").write_text(body + "\n")
    lines = (
        []
        if named is None
        else [f"indistill/data/__init__.py:{len(body.splitlines())}: data imports {named}"]
    )
    assert upward(package) == lines


def test_a_planted_cycle_is_found(tmp_path):
    package = tmp_path / "indistill" / "data"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text("from indistill.data import b\n")
    (package / "b.py").write_text("def f():\n    from indistill.data.c import x\n")
    (package / "c.py").write_text("if TYPE_CHECKING:\n    from indistill.data.a import y\n")
    assert cycles(package.parent) == [["data.a", "data.b", "data.c"]]


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_must_not_import_torch_at_its_start(module):
    """Follows all imports in turn, including the `__init__.py` of every package on the way."""
    known = modules(PACKAGE)
    waiting, seen, why = [m for m in known if m == module or m.startswith(module + ".")], set(), {}
    while waiting:
        current = waiting.pop()
        seen.add(current)
        found = imports(known[current], known, at_start=True)
        heavy = {name.split(".")[0] for name in found} & {"torch", "torchvision", "timm", "accelerate"}
        assert not heavy, f"{current} imports {heavy}: {why.get(current, '')}"
        for other in ours(found):
            parts = other.split(".")
            for name in [".".join(parts[: i + 1]) for i in range(len(parts))]:
                if name in known and name not in seen:
                    why.setdefault(name, f"{current} <- {why.get(current, '')}")
                    waiting.append(name)


@pytest.mark.parametrize("module", sorted(modules(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(module):
    known = modules(PACKAGE)
    assert not {name.split(".")[0] for name in imports(known[module], known, at_start=True)} & OPTIONAL
