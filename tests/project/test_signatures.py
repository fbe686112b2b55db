"""Functions of the package are short, and calls with many arguments name them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_public_names import PUBLIC

PACKAGE = Path(__file__).resolve().parents[2] / "indistill"
MOST_LINES = 40
MOST_PARAMETERS = 4  # in a signature whose parameters may all be positional; in a longer one only two may
# Public functions keep the signatures that other programs call, and so do methods of public classes.
STABLE = {name for names in PUBLIC.values() for name in names.split()} | {"rank_batch"}
# Called by timm and urllib, with their signatures.
FOREIGN = {"forward_intermediates", "redirect_request"}


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def too_long(source: str) -> list[str]:
    """Names of functions of more than MOST_LINES lines."""
    return [f.name for f in functions(source) if f.end_lineno - f.lineno + 1 > MOST_LINES]


def too_positional(source: str) -> list[str]:
    """Names of functions of more than MOST_PARAMETERS parameters that have a third positional one."""
    names = []
    for function in functions(source):
        arguments = function.args
        positional = [
            argument.arg
            for argument in (*arguments.posonlyargs, *arguments.args)
            if argument.arg not in ("self", "cls")
        ]
        if len(positional) > 2 and len(positional) + len(arguments.kwonlyargs) > MOST_PARAMETERS:
            names.append(function.name)
    return names


def test_both_checks_find_what_they_look_for():
    long = "def long():\n" + "    x = 1\n" * MOST_LINES
    assert too_long(long) == ["long"]
    assert too_long(long.replace("    x = 1\n", "", 1)) == []
    assert too_positional("def f(a, b, c, d, e): ...") == ["f"]
    assert too_positional("class A:\n    def f(self, a, b, *, c, d, e): ...") == []
    assert too_positional("def f(a, b, c, d): ...") == []
    assert too_positional("def f(a, b, c, *, d, e): ...") == ["f"]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_functions_are_short_and_name_their_arguments(path):
    source = path.read_text()
    assert too_long(source) == []
    assert [name for name in too_positional(source) if name not in STABLE | FOREIGN] == []
