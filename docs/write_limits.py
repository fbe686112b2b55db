"""Write the table of limits in security.md, from the constants of config/limits.py and their comments."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from indistill.config import limits

PAGE = Path(__file__).with_name("security.md")
BEGIN = "<!-- `python docs/write_limits.py` writes this table -->\n"
END = "<!-- end of the table -->\n"


def rows(source: str, values: dict[str, Any]) -> Iterator[str]:
    """Yield a row of the table for each constant that the source assigns; `values` has their values."""
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        name = node.targets[0].id
        assert node.end_lineno is not None  # `ast.parse` sets it
        start = node.lineno - 1
        while start and lines[start - 1].startswith("# ") and not lines[start - 1].startswith("# ---"):
            start -= 1
        comments = [line.partition("#")[2].strip() for line in lines[start : node.end_lineno] if "#" in line]
        yield f"| `{name}` | {shown(values[name])} | {' '.join(comments)} |"


def shown(value: Any) -> str:
    """A number with commas, or as a power of ten."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.15g}"


def table() -> str:
    """The table, with the lines around it."""
    head = ["| constant | value | of what, and why so many |", "|---|---|---|"]
    source = Path(limits.__file__).read_text()
    return BEGIN + "\n" + "\n".join([*head, *rows(source, vars(limits))]) + "\n\n" + END


def page(text: str) -> str:
    """The text of security.md with the table as it is now."""
    return re.sub(re.escape(BEGIN) + ".*" + re.escape(END), lambda _: table(), text, flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
