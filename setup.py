"""Gives the package index README.md with absolute links; everything else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def with_absolute_links(text: str, address: str) -> str:
    """Make links to files of the repository lead to its pages under `address`; images, to their content."""
    text = text.replace("](#", "](README.md#")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?://)", rf"\1{address}/raw/main/", text)
    return re.sub(r"(?<!!)(\[[^]]*\]\()(?!https?://)", rf"\1{address}/blob/main/", text)


setup(
    long_description=with_absolute_links(
        (ROOT / "README.md").read_text(encoding="utf-8"), PROJECT["urls"]["Repository"]
    ),
    long_description_content_type="text/markdown",
)
