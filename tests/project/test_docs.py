"""The documentation: links are valid, blocks run or say why not, and quoted messages are in the code."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from indistill.commands import cli
from indistill.commands.trainer import Trainer
from indistill.config import limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import run_commands
import site_hooks
import test_imports
import write_configuration
import write_limits
from anchors import slug

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = run_commands.pages()
NOTEBOOKS = run_commands.notebooks()
COMMAND = re.compile(r"(\$ )?(indistill|python|make|torchrun|accelerate|pip|git|docker|sbatch|kubectl) \S")
every_page = pytest.mark.parametrize("page", PAGES)


def prose(page: str) -> str:
    """Return a page without its code blocks."""
    return run_commands.BLOCK.sub("", (REPOSITORY / page).read_text())


@cache
def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", run_commands.BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {slug(heading) for heading in headings}


@every_page
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (REPOSITORY / page).parent / file if file else REPOSITORY / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def linked() -> set[str]:
    """Every page and notebook in docs/ but the index, relative to it."""
    pages = {page.removeprefix("docs/") for page in (*PAGES, *NOTEBOOKS) if page.startswith("docs/")}
    return pages - {"README.md"}


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    assert [page for page in sorted(linked()) if f"]({page})" not in index] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_notebooks_have_no_output_and_their_links_lead_somewhere(notebook):
    content = json.loads((REPOSITORY / notebook).read_text())
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = content["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", "".join(cell["source"])):
            assert (REPOSITORY / notebook).with_name(link).exists(), link
    compile(run_commands.program(notebook), notebook, "exec")


# --- the site -----------------------------------------------------------------------------------------------
def test_the_navigation_of_the_site_lists_every_page():
    def files(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for child in entry.values() if isinstance(entry, dict) else entry:
                yield from files(child)

    listed = list(files(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted({*linked(), "README.md", site_hooks.OVERVIEW})


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("README.md", "docs/data.md", "data.md"),
        ("README.md", "docs/images/layers.svg", "images/layers.svg"),
        ("README.md", "docs/README.md", "README.md"),
        ("docs/data.md", "data.md", "data.md"),
        ("docs/README.md", "../README.md", "overview.md"),
        ("docs/data.md", "../configs", "https://host/tree/main/configs"),
        ("docs/cluster.md", "../launch/torchrun.sh", "https://host/blob/main/launch/torchrun.sh"),
        ("docs/data.md", "write_limits.py", "https://host/blob/main/docs/write_limits.py"),
    ],
)
def test_links_on_the_site(page, link, expected):
    assert site_hooks.site_link(link, REPOSITORY / page, "https://host") == expected


def test_the_site_changes_links_of_the_text_alone():
    text = """<!-- docs-test
skip: a reason
-->
```bash
echo "](../README.md)"
```

[a](../README.md#train), [b](https://host/x), [c](#here)
"""
    expected = """```bash
echo "](../README.md)"
```

[a](overview.md#train), [b](https://host/x), [c](#here)
"""
    assert site_hooks.site_page(text, REPOSITORY / "docs" / "data.md", "https://host") == expected
    with pytest.raises(ValueError, match=r"docs/data.md: nowhere.md does not exist"):
        site_hooks.site_page("[a](nowhere.md)", REPOSITORY / "docs" / "data.md", "https://host")


def build_site(folder: Path, destination: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as `make docs` does."""
    pytest.importorskip("mkdocs", reason="pip install 'indistill[docs]' installs mkdocs-material")
    pytest.importorskip("material", reason="pip install 'indistill[docs]' installs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(destination)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_link_of_the_site_leads_to_a_page_and_a_heading(tmp_path):
    result = build_site(REPOSITORY, tmp_path)
    assert result.returncode == 0, result.stderr
    pages = {path: path.read_text() for path in tmp_path.rglob("*.html") if path.name == "index.html"}
    assert len(pages) == len([page for page in linked() if page.endswith(".md")]) + 2
    count = 0
    for path, text in pages.items():
        for link in re.findall(r'(?:href|src)="(?!\w+:)([^"]+)"', text):
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (path, link)
            assert not anchor or f'id="{anchor}"' in target.read_text(), (path, link)
            count += 1
    assert count > 500


@pytest.mark.parametrize("link", ["nowhere.md", "data.md#nowhere", "../launch/nowhere.sh"])
def test_a_broken_link_stops_the_build_of_the_site(link, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(REPOSITORY / "docs", copy / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if not (copy / path.name).exists():
            (copy / path.name).symlink_to(path)
    with (copy / "docs" / "api.md").open("a") as file:
        file.write(f"\n[a link]({link})\n")
    result = build_site(copy, tmp_path / "site")
    assert result.returncode == 1
    assert link.removeprefix("data.md") in result.stderr


# --- blocks -------------------------------------------------------------------------------------------------


@every_page
def test_every_block_runs_or_says_why_not(page):
    text = (REPOSITORY / page).read_text()
    blocks = run_commands.blocks(page)
    assert len(blocks) == len(re.findall(r"^```\w", text, re.MULTILINE)) == text.count("\n```\n")
    assert text.count("<!-- docs-test") == sum(block.marked for block in blocks)
    for block in blocks:
        assert block.language in run_commands.LANGUAGES
        if block.language == "text":
            assert not block.marked
            assert not any(COMMAND.match(line) for line in block.text.splitlines()), block.place
        run_commands.load_configs(block)


@every_page
def test_commands_in_the_text_exist(page, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)[1].split(",")
    for command in re.findall(r"`indistill ([a-z]+)\b(?!:)", prose(page)):
        assert command in known


@pytest.mark.parametrize("page", PAGES)
def test_patches_apply(page):
    for block in run_commands.blocks(page):
        if block.language == "diff":
            subprocess.run(
                ["git", "apply", "--check"], cwd=REPOSITORY, input=block.text, text=True, check=True
            )


def test_the_table_of_limits_is_what_the_module_says():
    text = write_limits.PAGE.read_text()
    assert text.count(write_limits.BEGIN) == text.count(write_limits.END) == 1
    assert text == write_limits.page(text), "run docs/write_limits.py"


def test_every_limit_is_listed_with_its_value_and_reason():
    source = """
A = 2**20  # of one thing; more is never needed
# --- others ---
# Of two things, for a reason
# on two lines.
B = 1.5
C = (
    2**10
)  # of three things
"""
    assert list(write_limits.rows(source, {"A": 2**20, "B": 1.5, "C": 2**10})) == [
        "| `A` | 1,048,576 | of one thing; more is never needed |",
        "| `B` | 1.5 | Of two things, for a reason on two lines. |",
        "| `C` | 1,024 | of three things |",
    ]
    text = write_limits.table()
    constants = {name for name in vars(limits) if name.isupper()}
    assert constants == set(re.findall(r"^\| `([A-Z_0-9]+)` \|", text, re.MULTILINE))
    assert not re.search(r"\|  \|$", text, re.MULTILINE), "a limit has no comment"


def test_the_reference_is_what_the_models_say():
    assert write_configuration.PAGE.read_text() == write_configuration.page(), (
        "run docs/write_configuration.py"
    )


def test_every_key_has_a_meaning():
    comments = write_configuration.meanings(write_configuration.sources())
    for name, model in write_configuration.models().items():
        for key in model.model_fields if issubclass(model, BaseModel) else ():
            assert write_configuration.meaning(name, key, comments), f"{name}.{key} has no comment"


def texts_in_the_code() -> list[str]:
    """Return every string in the package, with its variable parts as an ellipsis."""

    def text(node: ast.AST) -> str:
        match node:
            case ast.Constant(value=str()):
                return node.value
            case ast.JoinedStr():
                return "".join(text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
            case ast.BinOp(op=ast.Add()):
                return text(node.left) + text(node.right)
        return "…"

    trees = [ast.parse(path.read_text()) for path in (REPOSITORY / "indistill").rglob("*.py")]
    return [
        text(node).replace("……", "…")
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.expr)
    ]


def test_the_program_still_says_what_troubleshooting_quotes():
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text().partition("## No message at all")[0]
    rows = re.findall(r"^\| `([^|]*)` \|", page, re.MULTILINE)
    messages = [row.replace("\\`", "`") for row in rows]
    texts = texts_in_the_code()
    assert len(messages) > 50
    for message in messages:
        parts = [part.strip(": ") for part in message.split("…") if part.strip(": ")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_the_picture_of_the_folders_follows_the_layers():
    """README's "Where things are" has each entry of the package once, and higher layers come first."""
    picture = (REPOSITORY / "README.md").read_text().partition("## Where things are")[2]
    entries = re.findall(r"^  (\w+)(?:/|\.py) {2,}\S", picture, re.MULTILINE)
    hidden = {"__init__", "__main__"}
    assert sorted(entries) == sorted(set(test_imports.LEVEL) - hidden)
    levels = [test_imports.LEVEL[name] for name in entries]
    assert levels == sorted(levels, reverse=True)


def test_the_python_page_names_all_of_the_trainer():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in vars(Trainer):
        assert name.startswith("_") or f"`trainer.{name}" in page, name
