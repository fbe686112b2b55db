"""Find a loss class by its name: registered, built in, or in an installed package. Imports no torch."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Collection
from functools import cache
from importlib.machinery import SourceFileLoader
from importlib.metadata import EntryPoint, entry_points
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

from indistill.config.base import UserError, in_one_line, nearest
from indistill.config.files import denied, sha256

GROUP = "indistill.losses"  # of the entry points of installed packages
_BUILT_IN = Path(__file__).parents[1] / "losses"  # NAME_loss.py defines the loss NAME
_PLUGIN = "indistill_plugin_"  # of the modules of plugin files
_NAME = re.compile(r"[a-z][a-z0-9_]*")

_classes: dict[str, type[Any]] = {}  # registered losses by name
_files: set[Path] = set()  # loaded plugin files


def register(name: str, loss: type[Any]) -> None:
    """Make a loss class known by its name. Raises ValueError for a name that is not valid or taken.

    A class replaces an earlier one of the same module and name, as when a notebook's cell runs again.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"loss name {name!r}: use lower-case letters, digits and _, beginning with a letter")
    own = f"{GROUP}.{name}_loss"
    if name in built_in() and loss.__module__ != own:
        raise ValueError(f"loss {name!r} is built in: choose another name for {loss.__qualname__}")
    other = _classes.get(name, loss)
    if (other.__module__, other.__qualname__) != (loss.__module__, loss.__qualname__):
        raise ValueError(
            f"two losses are named {name!r}, in {_origin(other)} and {_origin(loss)}: rename one"
        )
    _classes[name] = loss


def registered(name: str) -> type[Any] | None:
    """Return the class if it is registered already; imports nothing."""
    return _classes.get(name)


def find(name: str) -> type[Any]:
    """Return the class of a loss; imports its module (and so torch) if need be.

    Raises ValueError, without importing anything, for an unknown name, and for one that several plugins have.
    """
    packages = [point for point in _entry_points() if point.name == name]
    if name in built_in():
        if packages:
            raise ValueError(
                f"loss {name!r} of the package {_package(packages[0])} is built in: uninstall that package"
            )
        importlib.import_module(f"{GROUP}.{name}_loss")
    elif len(packages) > 1:
        several = " and ".join(sorted(map(_package, packages)))
        raise ValueError(f"two losses are named {name!r}, in the packages {several}: uninstall one")
    elif packages:
        _load_package(packages[0])
    elif name not in _classes:
        near = ", ".join(nearest(name, names(), n=3))
        raise ValueError(
            f"unknown loss {name!r}; the nearest are {near}; a loss of your own needs "
            "--plugin FILE, or its package installed (docs/losses.md)"
        )
    return _classes[name]


def built_in() -> list[str]:
    """Return the names of the losses in `indistill/losses/`."""
    return sorted(path.stem.removesuffix("_loss") for path in _BUILT_IN.glob("*_loss.py"))


def names() -> list[str]:
    """Return the names of all losses that `find` finds."""
    return sorted({*built_in(), *_classes, *(point.name for point in _entry_points())})


def load_file(path: str) -> None:
    """Run a Python file that defines losses (`--plugin FILE`). A file that is loaded already is skipped.

    Raises UserError, in one line, for a file that is missing, fails, or defines no loss.
    """
    file = Path(path).resolve()
    if file in _files:
        return
    if denied(file):
        raise UserError(f"--plugin {path}: permission denied")
    if not file.exists():
        raise UserError(f"--plugin {path}: no such file")
    if not file.is_file():
        raise UserError(f"--plugin {path}: not a file")
    before = dict(_classes)
    name = f"{_PLUGIN}{len(_files)}_{file.stem}"
    loader = SourceFileLoader(name, str(file))
    spec = spec_from_loader(name, loader)
    assert spec is not None  # a loader was given
    module = module_from_spec(spec)
    sys.modules[name] = module  # pydantic looks up the names in annotations there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        _classes.clear()
        _classes.update(before)
        raise UserError(f"--plugin {path}{_line(error, file)}: {_one_line(error)}") from error
    if _classes.keys() == before.keys():
        raise UserError(
            f'--plugin {path}: defines no loss: add a class such as `class Mine(Loss, name="mine")`'
        )
    _files.add(file)


def source_hashes(used: Collection[str] | None = None) -> dict[str, str]:
    """Return a hash of the source file of each loss that is not built in, keyed by `loss NAME`.

    used: only of losses with these names.
    """
    hashes = {}
    for name in sorted(_classes.keys() - set(built_in())):
        if used is not None and name not in used:
            continue
        file = getattr(sys.modules.get(_classes[name].__module__), "__file__", None)
        if file is not None and Path(file).is_file():  # a notebook has none
            hashes[f"loss {name}"] = f"source file {sha256(Path(file))[:12]}"
    return hashes


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _load_package(point: EntryPoint) -> None:
    try:
        point.load()
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"loss {point.name!r} of the package {_package(point)}: {_one_line(error)}"
        ) from error
    if point.name not in _classes:
        raise ValueError(
            f"loss {point.name!r} of the package {_package(point)}: its entry point {point.value} defines no "
            "loss of that name"
        )


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _origin(loss: type[Any]) -> str:
    """The plugin file that defines a loss, or its module."""
    if loss.__module__.startswith(_PLUGIN):
        return str(sys.modules[loss.__module__].__file__)
    return loss.__module__


def _line(error: BaseException, file: Path) -> str:
    """`, line N`: the last line of the file that the error passed through."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f", line {error.lineno}"
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
    ]
    return f", line {lines[-1]}" if lines else ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, SyntaxError):  # as text it would repeat the file and line
        return f"{type(error).__name__}: {error.msg}"
    return in_one_line(error, with_type=True)
