"""Print the lowest versions that pyproject.toml allows, as constraints for pip."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

_FLOOR = re.compile(r"(?P<name>[\w.-]+)>=(?P<version>[\d.]+)(?P<marker>\s*;.*)?")


def floors() -> dict[str, str]:
    """Return name to lowest version of every dependency, those of the extras included, that has one."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    matches = [_FLOOR.fullmatch(text) for texts in lists for text in texts]
    return {match["name"]: match["version"] for match in matches if match}


if __name__ == "__main__":
    for name, version in floors().items():
        print(f"{name}=={version}")
