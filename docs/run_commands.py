"""Run the commands of README.md, docs/*.md and docs/*.ipynb in copies of the repository (`make docs-test`).

The code cells of a notebook run in order in one process, except `%pip`. Of a page, fenced blocks of `bash`,
`python` and `diff` run; a `diff` is a patch for the rest of its page. A `yaml` block must be a config or a
part of one, and is only loaded. `text` does not run. A comment right before a block changes how it runs:

    <!-- docs-test
    skip: the reason why it cannot run here, and what checks it instead
    before: commands to run first
    after: commands to run last
    shown text => replacement
    -->
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess  # nosec B404  # for git and the commands of the pages
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from indistill.commands import cli
from indistill.config import runs
from indistill.config.from_yaml import load_yaml

ROOT = Path(__file__).resolve().parents[1]
FIRST = "README.md"
PAGES_AT_ONCE = 2
LANGUAGES = ("bash", "python", "diff", "yaml", "text")
BASE = ROOT / "configs" / "imagenet_r34_r18.yaml"  # completes a block that is a part of a config
TIMEOUT_SECONDS = 900  # for each block
BLOCK = re.compile(
    r"(?:^<!-- docs-test\n(?P<marker>.*?)-->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_CONFIG = re.compile(
    r"(configs/[\w-]+\.yaml|\bCONFIG\b)((?: +[a-z][\w.]*=(?:'[^']*'|\"[^\"]*\"|[^\s'\"]+))*)"
)
_PRELOAD = [
    "indistill.training.loop",
    "indistill.commands.plan.estimate",
    "indistill.commands.export.write",
    "indistill.commands.targets.write",
    "indistill.training.students",
]


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    skip: str | None  # the reason for not running the block
    before: str
    after: str
    replace: tuple[tuple[str, str], ...]
    marked: bool

    @property
    def place(self) -> str:
        """The page and line of the block."""
        return f"{self.page}:{self.line}"

    @property
    def title(self) -> str:
        return self.text.strip().splitlines()[0][:60]

    def as_run(self) -> str:
        """Return the text with all replacements."""
        text = self.text
        for old, new in self.replace:
            text = text.replace(old, new)
        return text


def pages() -> list[str]:
    names = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    return [FIRST, *names]


def notebooks() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.ipynb"))


def program(notebook: str) -> str:
    """Return the code cells of a notebook as a Python program, without the installation."""
    cells = json.loads((ROOT / notebook).read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = re.sub(r"^%pip .*$", "", code, flags=re.MULTILINE)
    return re.sub(
        r"^!(.*)$", lambda line: f"_run({line[1]!r}, shell=True, check=True)", code, flags=re.MULTILINE
    )


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page, or the only one of a notebook.

    Raises ValueError for an invalid line in a docs-test comment.
    """
    if page in notebooks():
        text = f"from subprocess import run as _run\n{program(page)}"
        return [Block(page, 1, "python", text, None, "", "", (), False)]
    text = (ROOT / page).read_text()
    return [_block(page, text.count("\n", 0, match.start("text")), match) for match in BLOCK.finditer(text)]


def _block(page: str, line: int, match: re.Match[str]) -> Block:
    options: dict[str, str] = {}
    replace = []
    for entry in (match["marker"] or "").splitlines():
        old, arrow, new = entry.partition(" => ")
        kind, colon, rest = entry.partition(": ")
        if kind in ("skip", "before", "after") and colon:
            options[kind] = rest
        elif arrow and old in match["text"]:
            replace.append((old, new))
        else:
            raise ValueError(f"{page}:{line}: docs-test: {entry!r} is neither an option nor in the block")
    return Block(
        page,
        line,
        match["language"],
        match["text"],
        skip=options.get("skip"),
        before=options.get("before", ""),
        after=options.get("after", ""),
        replace=tuple(replace),
        marked=bool(match["marker"]),
    )


# --- checks without running ---------------------------------------------------------------------------------


def load_configs(block: Block) -> int:
    """Load the config of a yaml block, or each `CONFIG key=value ...` of a skipped block; return how many.

    Raises UserError, or YAMLError.
    """
    if block.language == "yaml":
        tree = load_yaml(block.text)
        if not {"data", "optimizer"} <= tree.keys():
            tree = runs.merge(yaml.safe_load(BASE.read_text()), tree)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(yaml.safe_dump(tree))
            runs.load(file)
        return 1
    commands = _CONFIG.findall(re.sub(r"\\\n\s*", "", block.text)) if block.skip else []
    for name, overrides in commands:
        runs.load(BASE if name == "CONFIG" else ROOT / name, shlex.split(overrides))
    return len(commands)


# --- running ------------------------------------------------------------------------------------------------


def scratch_copy(folder: Path) -> None:
    """Copy the repository's files, except those that git ignores."""
    listed = subprocess.run(  # nosec B603 B607  # git, as on the PATH, with constant arguments
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target, follow_symlinks=False)


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def plain_commands(block: Block) -> list[list[str]] | None:
    """Return the arguments of each `indistill` command of a block; None if the block needs a shell."""
    text = re.sub(r"\\\n", "", block.as_run())
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    lines = [line for line in lines if line]
    shell = re.search(r"[|<>;&$`]", re.sub(r"'[^']*'", "", text))
    if block.before or block.after or shell or any(line[0] != "indistill" for line in lines):
        return None
    return [line[1:] for line in lines]


def run(block: Block, folder: Path, log: Path) -> bool:
    """Run a block, with its output in `log`; return whether it succeeded."""
    if block.language == "diff":
        return call(["git", "apply"], folder, log, block.as_run())
    if block.language == "python":
        return fork(execute, folder, log, block.as_run(), block.place)
    commands = plain_commands(block)
    if commands is not None:  # forked, so that torch is imported only once
        return all(fork(cli.main, folder, log, arguments) for arguments in commands)
    script = "\n".join(["set -euo pipefail", block.before, block.as_run(), block.after])
    return call(["bash", "-c", script], folder, log)


def call(command: Sequence[str], folder: Path, log: Path, given: str | None = None) -> bool:
    with log.open("a") as output, contextlib.suppress(subprocess.TimeoutExpired):
        result = subprocess.run(  # nosec B603  # a command of our own pages
            command, cwd=folder, env=os.environ | environment(folder), input=given, text=True,
            stdout=output, stderr=subprocess.STDOUT, timeout=TIMEOUT_SECONDS,
        )  # fmt: skip
        return result.returncode == 0
    return False


_context = multiprocessing.get_context("forkserver")


def fork(function: Any, folder: Path, log: Path, *arguments: Any) -> bool:
    process = _context.Process(target=_child, args=(function, folder, log, arguments))
    process.start()
    process.join(TIMEOUT_SECONDS)
    process.kill()
    return process.exitcode == 0


def _child(function: Any, folder: Path, log: Path, arguments: tuple[Any, ...]) -> None:
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment(folder))
    sys.path.insert(0, str(folder))
    function(*arguments)


def execute(text: str, place: str) -> None:
    code = compile(text, place, "exec")
    exec(code, {"__name__": "__main__"})  # nosec B102  # Python of our own pages


class Row(NamedTuple):
    block: Block
    done: str  # ran, failed, skipped or a config
    seconds: float


def run_page(page: str, temporary: Path) -> list[Row]:
    """Run the blocks of a page in a copy of the repository; all pages share the folder `runs`."""
    folder = temporary / page.replace("/", "-")
    rows = []
    scratch_copy(folder)
    (folder / "runs").symlink_to(temporary / "runs")
    log = folder.with_suffix(".log")
    for block in blocks(page):
        begin = time.monotonic()
        if block.language == "text":
            continue
        log.write_text("")
        if block.language == "yaml":
            done = "a config" if load_configs(block) else "failed"
        elif block.skip:
            done = "skipped"
        else:
            done = "ran" if run(block, folder, log) else "failed"
        rows.append(Row(block, done, time.monotonic() - begin))
        print(f"{done:8}  {rows[-1].seconds:5.0f} s  {block.place:28}  {block.title}", flush=True)
        if done == "failed":
            print(log.read_text(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the commands of the documentation.")
    parser.add_argument("pages", nargs="*", help="run only these pages, after README.md (default: all pages)")
    chosen = parser.parse_args().pages or [*pages(), *notebooks()]
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    _context.set_forkserver_preload(_PRELOAD)
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="docs-test-") as temporary,
        ThreadPoolExecutor(PAGES_AT_ONCE) as pool,
    ):
        (Path(temporary) / "runs").mkdir()
        rows = run_page(FIRST, Path(temporary))  # includes the demo, whose data and runs the other pages use
        for of_page in pool.map(
            lambda page: run_page(page, Path(temporary)), [p for p in chosen if p != FIRST]
        ):
            rows += of_page
    counts = Counter(row.done for row in rows)
    print(f"\n{time.monotonic() - begin:.0f} s: {', '.join(f'{n} {done}' for done, n in counts.items())}")
    for row in rows:
        if row.done == "skipped":
            print(f"skipped: {row.block.place}: {row.block.title}: {row.block.skip}")
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
