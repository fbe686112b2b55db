"""How the command line presents itself: help, errors that name the nearest word, and shell completion."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from indistill import __version__

DESCRIPTION = """\
Knowledge distillation at cluster scale: train a small image classifier, the
student, from a large one, the teacher. A run that was stopped resumes when
the same command starts again."""
# Words under which other tools have a command, with the command that does it here.
_ELSEWHERE = {
    "distill": "train",
    "distillation": "train",
    "fit": "train",
    "resume": "train",
    "evaluate": "eval",
    "test": "eval",
    "validate": "eval",
    "convert": "export",
    "onnx": "export",
    "estimate": "plan",
    "check": "doctor",
    "cache": "targets",
    "index": "shards index",
    "pack": "shards pack",
    "verify": "shards verify",
}


class Parser(argparse.ArgumentParser):
    """A parser of a command, whose help ends with examples and whose errors name the nearest word."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def examples(self, *commands: str, page: str = "README.md") -> None:
        """End the help with examples and the page of the documentation."""
        lines = ["examples:", *(f"  {command}" for command in commands), "", f"documentation: {_docs(page)}"]
        self.epilog = "\n".join(lines)

    def error(self, message: str) -> NoReturn:
        """Print usage and message, with the nearest choice for one that does not exist, and exit."""
        if match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            word, choices = match[1], re.findall(r"[\w-]+", match[2])
            near = _ELSEWHERE.get(word) if "doctor" in choices else None
            message = f"{message}: perhaps {near or _nearest(word, choices)}"
        super().error(message)

    def refuse(self, rest: Sequence[str], keys: Iterable[str] = ()) -> NoReturn:
        """Print usage and what is wrong with the arguments `rest`, which no one has taken, and exit.

        keys: of the config, if the command takes overrides.
        """
        option = next((text for text in rest if text.startswith("-")), None)
        if option is None:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        name = option.partition("=")[0]
        if re.split(r"[.=]", option.lstrip("-"))[0] in keys:
            value = "" if "=" in option else "=VALUE"
            self.error(
                f"unknown option {name}: a key of the config has no dashes: {option.lstrip('-')}{value}"
            )
        self.error(f"unknown option {name}: the nearest is {_nearest(name, self._option_string_actions)}")


class PrintCompletion(argparse.Action):
    """Print the completion script of a shell, and exit."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None
    ) -> None:
        import shtab

        _complete_files(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Complete with file names what no list of choices and no type completes."""
    for action in parser._actions:
        if isinstance(action.choices, dict):  # subcommands
            for command in action.choices.values():
                _complete_files(command, files)
        elif action.nargs != 0 and action.type is None and action.choices is None:
            vars(action)["complete"] = files


def add_version_and_completion(parser: Parser) -> None:
    """Add the options that print something and end the program."""
    parser.add_argument("--version", action="version", version=f"indistill {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print a script for bash, zsh or tcsh that completes commands, options and files",
    )


def add_allow_pipe(parser: Parser) -> None:
    """Add the permission to run the commands of pipe: URLs."""
    parser.add_argument(
        "--allow-pipe", action="store_true", help="let pipe: URLs of shards run their commands"
    )


def integer(least: int, most: int) -> Callable[[str], int]:
    """Return the type of an option that takes an integer of this range, ends included."""

    def read(text: str) -> int:
        if not re.fullmatch(r"\d{1,20}", text, re.ASCII) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {least} to {most:,}")
        return int(text)

    return read


count = integer(1, 10**12)
processes = integer(1, 1024)  # more than a node has cores


def megabytes(text: str) -> float:
    """Read a size from a byte on, as the type of an option."""
    from indistill.config.limits import MAX_COUNT  # here, because its package imports pydantic

    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 1e-6 <= size <= MAX_COUNT / 1e6:  # not of a NaN either
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in megabytes: give a number such as 100")
    return size


def _nearest(word: str, words: Iterable[str]) -> str:
    return difflib.get_close_matches(word[:100], words, n=1, cutoff=0.0)[0]


def _docs(page: str) -> str:
    """Return where a page of the documentation is: on the project's site, if the package names one."""
    try:
        urls = metadata.metadata("indistill").get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        urls = []
    site = next((url.split(",", 1)[1].strip() for url in urls if url.startswith("Documentation,")), None)
    return f"docs/{page}" if site is None else f"docs/{page} ({site.removesuffix('README.md')}{page})"
