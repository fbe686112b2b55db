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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from indistill import cli, pipeline

ROOT = Path(__file__).resolve().parents[1]
FIRST = ("README.md", "docs/quickstart.md")  # what they make, the others use
LANGUAGES = ("bash", "python", "diff", "yaml", "text")
BASE = ROOT / "configs" / "imagenet_r34_r18.yaml"  # what a part of a config is a part of
TIMEOUT_SECONDS = 900  # of a block
BLOCK = re.compile(
    r"(?:^<!-- docs-test\n(?P<marker>.*?)-->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_CONFIG = re.compile(r"(configs/[\w-]+\.yaml|\bCONFIG\b)((?: +[a-z][\w.]*=(?:'[^']*'|\"[^\"]*\"|[^\s'\"]+))*)")
_PRELOAD = ["indistill.train", "indistill.estimate", "indistill.export", "indistill.precompute", "indistill.together"]


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

    def as_run(self) -> str:
        text = self.text
        for old, new in self.replace:
            text = text.replace(old, new)
        return text


def pages() -> list[str]:
    found = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))
    return [*FIRST, *(page for page in found if page not in FIRST)]


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
                raise ValueError(f"{page}:{line}: docs-test: {entry!r} is neither understood nor in the block")
        before, after = (told.get(kind, "") for kind in ("before", "after"))
        skip = told.get("skip")
        found.append(
            Block(
                page, line, match["language"], match["text"], skip, before, after, tuple(replace), bool(match["marker"])
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
            tree = pipeline._merge(yaml.safe_load(BASE.read_text()), tree)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "config.yaml")
            file.write_text(yaml.safe_dump(tree))
            pipeline.load(file)
        return 1
    found = _CONFIG.findall(re.sub(r"\\\n\s*", "", block.text)) if block.skip else []
    for name, overrides in found:
        pipeline.load(BASE if name == "CONFIG" else ROOT / name, shlex.split(overrides))
    return len(found)


# --- running ---------------------------------------------------------------------------------------------------------


def scratch_copy(folder: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)


def environment(folder: Path) -> dict[str, str]:
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description="Run what the documentation tells a reader to run.")
    parser.add_argument("pages", nargs="*", help="these alone, after README.md (default: all)")
    chosen = parser.parse_args().pages
    _context.set_forkserver_preload(_PRELOAD)
    rows, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="docs-test-") as temporary:
        runs = Path(temporary, "runs")  # the demo's are for all pages; else each has the repository for itself
        runs.mkdir()
        for page in [page for page in pages() if not chosen or page in (FIRST[0], *chosen)]:
            folder = Path(temporary, page.replace("/", "-"))
            scratch_copy(folder)
            (folder / "runs").symlink_to(runs)
            for number, block in enumerate(blocks(page)):
                if block.language == "text":
                    continue
                begin, log = time.monotonic(), Path(temporary, f"{number}.log")
                if block.language == "yaml":
                    load_configs(block)
                    done = "a config"
                elif block.skip:
                    done = f"skipped: {block.skip}"
                elif run(block, folder, log):
                    done = "ran"
                else:
                    done, failed = "FAILED", failed + 1
                what = block.text.strip().splitlines()[0][:60]
                rows.append((block.place, done, f"{time.monotonic() - begin:.1f}", what))
                print(f"{'  '.join(rows[-1])}", flush=True)
                if done == "FAILED":
                    print(log.read_text(), flush=True)
                log.unlink(missing_ok=True)
    ran = sum(done == "ran" for _, done, _, _ in rows)
    skipped = [row for row in rows if row[1].startswith("skipped")]
    configs = len(rows) - ran - failed - len(skipped)
    print(f"\n{ran} blocks ran, {failed} failed, {configs} are configs, {len(skipped)} were skipped:")
    for place, done, _, what in skipped:
        print(f"  {place}: {what}: {done.removeprefix('skipped: ')}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
