"""The documentation: links are valid, blocks run or say why not, and quoted messages are in the code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from indistill.commands import cli
from indistill.commands.trainer import Trainer
from indistill.config import limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import run_commands
import test_imports
import write_configuration
import write_limits

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = run_commands.pages()
COMMAND = re.compile(r"(\$ )?(indistill|python|make|torchrun|accelerate|pip|git|docker|sbatch|kubectl) \S")
every_page = pytest.mark.parametrize("page", PAGES)


def prose(page: str) -> str:
    """Return a page without its code blocks."""
    return run_commands.BLOCK.sub("", (REPOSITORY / page).read_text())


@cache
def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", run_commands.BLOCK.sub("", path.read_text()), re.MULTILINE)
    return {write_configuration.slug(heading) for heading in headings}


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


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"]({page.removeprefix('docs/')})" in index


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
