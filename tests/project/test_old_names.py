"""No file outside CHANGELOG.md names a module of the flat package that came before the folders."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "indistill"
# Modules that were directly in `indistill/`, except those that are still there (curriculum, order, prune).
OLD = re.findall(
    r"\w+",
    """
    apart api augment build callbacks charts checkpoint class_names cli config data decode deepspeed_config
    demo doctor engine environment estimate evaluate export files health history losses metrics models
    objective optim outputs overlap packing pipeline precompute preemption progress projectors relational
    remote report runs shards similarity sources store stream taps targets together trackers train watchdog
    """,
)


def old_names(text: str, package: Path = PACKAGE) -> list[str]:
    """Return `line: match` for each old module in `text`: a path, dotted name, import or file name.

    Dotted names that are now folders (`indistill.targets`) are allowed, and so are file names that a file
    of the package still has (`runs.py`).
    """
    folders = {path.name for path in package.iterdir() if path.is_dir()}
    gone = "|".join(name for name in OLD if name not in folders)
    files = {path.name for path in package.rglob("*.py")}
    bare = "|".join(name for name in OLD if f"{name}.py" not in files | {"train.py"})  # timm has a train.py
    patterns = [
        rf"\bindistill/(?:{'|'.join(OLD)})\.py\b",
        rf"\bindistill\.(?:{gone})\b",
        rf"\bfrom indistill import (?:\w+, )*(?:{gone})\b",
        rf"(?<![\w/.-])(?:{bare})\.py\b",
    ]
    return [
        f"{number}: {match[0]}"
        for number, line in enumerate(text.splitlines(), start=1)
        for match in re.finditer("|".join(patterns), line)
    ]


def test_no_file_names_an_old_module():
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    names = [name for name in listed.stdout.split("\0") if name and (REPOSITORY / name).is_file()]
    assert "README.md" in names
    matches = {
        name: old_names((REPOSITORY / name).read_text(errors="replace"))
        for name in names
        if name != "CHANGELOG.md"
    }
    assert {name: lines for name, lines in matches.items() if lines} == {}


def test_old_modules_are_gone():
    assert not [name for name in OLD if (PACKAGE / f"{name}.py").exists()]


@pytest.mark.parametrize("name", ["apart", "health", "store", "taps", "together", "pipeline"])
@pytest.mark.parametrize(
    "text",
    [
        "see indistill/{}.py",
        "`indistill.{}.Name`",
        "from indistill import config, {}",
        "the first rank ({}.py)",
        "import indistill.{} as x",
    ],
)
def test_a_planted_name_is_found(text, name, tmp_path):
    matches = old_names(f"first line\n{text.format(name)}\n", package=tmp_path)
    assert [match.partition(":")[0] for match in matches] == ["2"]
    assert name in matches[0]


@pytest.mark.parametrize("name", ["targets", "losses", "train"])
def test_a_path_is_found_even_if_the_name_is_now_a_folder(name):
    assert old_names(f"(indistill/{name}.py)") == [f"1: indistill/{name}.py"]


@pytest.mark.parametrize(
    "text",
    [
        "indistill.targets.live",
        "from indistill import losses, prune",
        "indistill/training/runs.py",
        "runs.py and charts.py",
        "benchmarks/report.py",
        "`tools/train.py`, `mdistiller/engine/trainer.py`, timm's train.py",
        "students are trained together",
    ],
)
def test_what_exists_now_is_allowed(text):
    assert old_names(text) == []
