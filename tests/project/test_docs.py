"""The documentation: links work, code blocks are run or say why not, and quoted messages are in the code."""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import run_commands
import write_configuration

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = run_commands.pages()
COMMAND = re.compile(r"(\$ )?(indistill|python|make|torchrun|accelerate|pip|git|docker|sbatch|kubectl) \S")
every_page = pytest.mark.parametrize("page", PAGES)


def prose(page: str) -> str:
    """A page without its blocks."""
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


def test_the_reference_is_what_the_models_say():
    assert write_configuration.PAGE.read_text() == write_configuration.page(), (
        "run docs/write_configuration.py"
    )


def test_every_key_has_a_meaning():
    told = write_configuration.meanings(write_configuration.sources())
    for name, model in write_configuration.models().items():
        for key in model.model_fields if issubclass(model, BaseModel) else ():
            assert write_configuration.meaning(name, key, told), f"{name}.{key} has no comment"


def told_by_the_code() -> list[str]:
    """Every text in the package, its variable parts as an ellipsis."""

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
    messages, told = [row.replace("\\`", "`") for row in rows], told_by_the_code()
    assert len(messages) > 50
    for message in messages:
        parts = [part.strip(": ") for part in message.split("…") if part.strip(": ")]
        pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
        assert any(pattern.search(text) for text in told), message


def test_the_python_page_names_all_of_the_trainer():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    for name in vars(Trainer):
        assert name.startswith("_") or f"`trainer.{name}" in page, name
