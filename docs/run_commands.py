"""`make docs-test`: run what README.md and docs/*.md tell a reader to run, in order, in copies of the repository.

Of the fenced blocks `bash`, `python` and `diff` (a patch, for the rest of its page) run, `yaml` has to be a
config or a part of one, and `text` is only shown. A comment right before a block says how it differs here:

    <!-- docs-test
    skip: why it cannot run here, and what checks it instead
    before: commands to run first
    after: commands to run last
    shown text => what stands in for it
    -->
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
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

ROOT = Path(__file__).resolve().parents[1]
FIRST = "README.md"
PAGES_AT_ONCE = 2
LANGUAGES = ("bash", "python", "diff", "yaml", "text")
BASE = ROOT / "configs" / "imagenet_r34_r18.yaml"  # what a part of a config is a part of
TIMEOUT_SECONDS = 900  # of a block
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
    "indistill.commands.targets",
    "indistill.training.students",
]


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    skip: str | None  # the reason
    before: str
    after: str
    replace: tuple[tuple[str, str], ...]
    marked: bool

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def title(self) -> str:
        return self.text.strip().splitlines()[0][:60]

    def as_run(self) -> str:
        text = self.text
        for old, new in self.replace:
            text = text.replace(old, new)
        return text


def pages() -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    return [FIRST, *found]


def blocks(page: str) -> list[Block]:
    """Raises ValueError for a marker that is not understood, or speaks of text that is not in its block."""
    text, found = (ROOT / page).read_text(), []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text"))
        told: dict[str, str] = {}
        replace = []
        for entry in (match["marker"] or "").splitlines():
            old, arrow, new = entry.partition(" => ")
            kind, colon, rest = entry.partition(": ")
            if kind in ("skip", "before", "after") and colon:
                told[kind] = rest
            elif arrow and old in match["text"]:
                replace.append((old, new))
            else:
                raise ValueError(
                    f"{page}:{line}: docs-test: {entry!r} is neither understood nor in the block"
                )
        before, after = (told.get(kind, "") for kind in ("before", "after"))
        skip = told.get("skip")
        found.append(
            Block(
                page,
                line,
                match["language"],
                match["text"],
                skip,
                before,
                after,
                tuple(replace),
                bool(match["marker"]),
            )
        )
    return found


# --- what can be checked without running it --------------------------------------------------------------------------


def load_configs(block: Block) -> int:
    """Load what a yaml block holds, and each `CONFIG key=value ...` of a bash block that is skipped; returns how many.

    Raises UserError, or what YAML raises.
    """
    if block.language == "yaml":
        tree = yaml.safe_load(block.text)
        if not {"data", "optimizer"} <= tree.keys():
            tree = runs.merge(yaml.safe_load(BASE.read_text()), tree)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(yaml.safe_dump(tree))
            runs.load(file)
        return 1
    found = _CONFIG.findall(re.sub(r"\\\n\s*", "", block.text)) if block.skip else []
    for name, overrides in found:
        runs.load(BASE if name == "CONFIG" else ROOT / name, shlex.split(overrides))
    return len(found)


# --- running ---------------------------------------------------------------------------------------------------------


def scratch_copy(folder: Path) -> None:
    listed = subprocess.run(
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
            shutil.copy2(ROOT / name, target)


def environment(folder: Path) -> dict[str, str]:
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}


def plain_commands(block: Block) -> list[list[str]] | None:
    """The arguments of each `indistill` of a block of nothing else; None for one that needs a shell."""
    text = re.sub(r"\\\n", "", block.as_run())
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    lines = [line for line in lines if line]
    shell = re.search(r"[|<>;&$`]", re.sub(r"'[^']*'", "", text))
    if block.before or block.after or shell or any(line[0] != "indistill" for line in lines):
        return None
    return [line[1:] for line in lines]


def run(block: Block, folder: Path, log: Path) -> bool:
    """Whether it did what it should; its output goes to `log`."""
    if block.language == "diff":
        return call(["git", "apply"], folder, log, block.as_run())
    if block.language == "python":
        return fork(execute, folder, log, block.as_run(), block.place)
    commands = plain_commands(block)
    if commands is not None:  # torch is imported once, not by each of them
        return all(fork(cli.main, folder, log, arguments) for arguments in commands)
    script = "\n".join(["set -euo pipefail", block.before, block.as_run(), block.after])
    return call(["bash", "-c", script], folder, log)


def call(command: Sequence[str], folder: Path, log: Path, given: str | None = None) -> bool:
    with log.open("a") as output, contextlib.suppress(subprocess.TimeoutExpired):
        result = subprocess.run(
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
    exec(compile(text, place, "exec"), {"__name__": "__main__"})


class Row(NamedTuple):
    block: Block
    done: str  # ran, failed, skipped or a config
    seconds: float


def run_page(page: str, temporary: Path) -> list[Row]:
    """Every page has the repository for itself, and all pages one folder of runs."""
    folder, rows = temporary / page.replace("/", "-"), []
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
    parser = argparse.ArgumentParser(description="Run what the documentation tells a reader to run.")
    parser.add_argument("pages", nargs="*", help="these alone, after README.md (default: all)")
    chosen = parser.parse_args().pages or pages()
    os.environ.update(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    _context.set_forkserver_preload(_PRELOAD)
    begin = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="docs-test-") as temporary,
        ThreadPoolExecutor(PAGES_AT_ONCE) as pool,
    ):
        (Path(temporary) / "runs").mkdir()
        rows = run_page(FIRST, Path(temporary))  # with the demo, whose data and runs the others use
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
