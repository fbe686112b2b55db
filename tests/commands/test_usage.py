"""How the command line presents itself: help, unknown words, pipes and completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import refused

from indistill.commands import cli, shards
from indistill.commands.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("train", "eval", "export", "plan", "doctor", "report", "targets", "shards", "schema")
SHARDS = ("pack", "index", "verify")


def shown(capsys, *arguments: str, code: int) -> str:
    """Run a command that only prints, and return what it prints."""
    with pytest.raises(SystemExit) as exit_:
        main([*arguments])
    assert exit_.value.code == code
    out, err = capsys.readouterr()
    return out + err


@pytest.mark.parametrize(
    "command", [[], *([name] for name in COMMANDS), *(["shards", name] for name in SHARDS)], ids=" ".join
)
def test_help_ends_with_two_examples_and_a_page_that_exists(capsys, command):
    text = shown(capsys, *command, "--help", code=0)
    examples, page, address = re.search(
        r"examples:\n(.*)\n\ndocumentation: (\S+) \((\S+)\)", text, re.DOTALL
    ).groups()
    lines = examples.splitlines()
    assert len(lines) == 2
    assert all("indistill" in line for line in lines)
    assert (ROOT / page).is_file()
    assert re.fullmatch(rf"https://.*/{page}", address)


def test_only_what_is_missing_is_named(capsys):
    text = shown(capsys, "eval", code=2)
    assert text.endswith("error: the following arguments are required: config, checkpoint\n")
    text = shown(capsys, "init", "--slurm", "--nodes", "2", code=2)
    assert text == "indistill: error: --slurm is for a recipe: name one (`indistill init` lists them)\n"


def test_the_help_has_the_words_that_people_search_for(capsys):
    text = shown(capsys, "--help", code=0)
    for word in ("distillation", "teacher", "student", "resume", "evaluate", "export"):
        assert word in text


@pytest.mark.parametrize(
    ("arguments", "usage", "message"),
    [
        (["train", "c.yaml", "--resme", "auto"], "train", "unknown option --resme: the nearest is --resume"),
        (["plan", "c.yaml", "--wrld=4", "a=b"], "plan", "unknown option --wrld: the nearest is --world"),
        (["report", "run", "--ouput", "f"], "report", "unknown option --ouput: the nearest is --output"),
        (
            ["shards", "verify", "x.tar", "--num-clases", "5"],
            "shards verify",
            "unknown option --num-clases: the nearest is --num-classes",
        ),
        (
            ["train", "c.yaml", "--data.workers=8"],
            "train",
            "unknown option --data.workers: a key of the config has no dashes: data.workers=8",
        ),
        (
            ["train", "c.yaml", "--duration", "5"],
            "train",
            "unknown option --duration: a key of the config has no dashes: duration=VALUE",
        ),
        (["export", "run", "folder", "more"], "export", "unrecognized arguments: more"),
        (["export", "run", "folder", "a=b"], "export", "unrecognized arguments: a=b"),
        (["trian", "c.yaml"], "", "): perhaps train"),
        (["resume", "c.yaml"], "", "perhaps train"),
        (["onnx"], "", "perhaps export"),
        (["export", "run", "folder", "--format", "onnyx"], "export", "perhaps onnx"),
        (["shards", "verfy"], "shards", "perhaps verify"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unknown_word_prints_the_commands_usage_and_the_nearest(capsys, arguments, usage, message):
    lines = shown(capsys, *arguments, code=2).splitlines()
    assert lines[0].startswith(f"usage: indistill {usage}".rstrip() + " [-h]")
    assert re.match(f"indistill {usage}".rstrip() + ": error: ", lines[-1])
    assert message in lines[-1]


@pytest.mark.parametrize("kind", [pytest.param("plan", marks=pytest.mark.slow), "help", "completion"])
def test_a_reader_that_ended_first_ends_the_command_in_silence(config_file, kind):
    """As in `indistill plan CONFIG | head -1`."""
    arguments = {
        "plan": ["plan", str(config_file), "--world", "1"],
        "help": ["train", "--help"],
        "completion": ["--print-completion", "bash"],
    }
    if kind == "completion":
        pytest.importorskip("shtab", reason="make setup installs shtab")
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "indistill", *arguments[kind]]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
    )
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, "")


def test_completion_knows_commands_options_and_files(capsys):
    pytest.importorskip("shtab", reason="make setup installs shtab")
    script = shown(capsys, "--print-completion", "bash", code=0)
    complete = f"""{script}
ask() {{
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _shtab_indistill indistill "${{@: -1}}"
    echo "${{COMPREPLY[@]}}"
}}
ask indistill ex
ask indistill plan --wo
ask indistill export --format on
ask indistill train README.m
"""
    result = subprocess.run(["bash", "-c", complete], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert [line.strip() for line in result.stdout.splitlines()] == ["export", "--world", "onnx", "README.md"]


def test_a_mistake_in_a_plugin_of_report_and_export_is_one_line(capsys, tmp_path):
    for command in (["report", "run"], ["export", "run", "folder"]):
        line = refused(capsys, *command, "--plugin", tmp_path / "gone.py")
        assert line.endswith("gone.py: no such file")


NUMBERS = {  # the numeric options of all commands, with the ends of their ranges
    ("plan", "c.yaml", "--world"): ("1", "1000000000000"),
    ("plan", "c.yaml", "--samples"): ("1", "1000000000000"),
    ("targets", "c.yaml", "--verify"): ("1", "1000000000000"),
    ("init", "digits_demo", ".", "--nodes"): ("1", "1000000000000"),
    ("shards", "index", "a.tar", "--workers"): ("1", "1024"),
    ("shards", "verify", "a.tar", "--workers"): ("1", "1024"),
    ("shards", "verify", "a.tar", "--num-classes"): ("1", "1000000000000"),
    ("shards", "pack", "a", "b", "--workers"): ("1", "1024"),
    ("shards", "pack", "a", "b", "--shard-megabytes"): ("1e-6", "9e9"),
    ("shards", "pack", "a", "b", "--resize"): ("1", "65535"),
    ("shards", "pack", "a", "b", "--quality"): ("1", "100"),
    ("shards", "pack", "a", "b", "--seed"): ("0", "4294967295"),
}


@pytest.mark.parametrize("command", NUMBERS, ids=" ".join)
def test_a_number_out_of_range_is_one_error(capsys, command):
    *_, option = command
    for value in ("-1", "nan", "inf", "1e300", "1" + 30 * "0", "many", ""):
        text = shown(capsys, *command[:-1], f"{option}={value}", code=2)
        assert f"error: argument {option}: {value!r} is not a" in text.splitlines()[-1]
    if option != "--seed":
        shown(capsys, *command, "0", code=2)
    for value in NUMBERS[command]:
        arguments = cli._parse([*command, value])
        assert getattr(arguments, option.lstrip("-").replace("-", "_")) == float(value)


def test_every_numeric_option_is_tested():
    source = "".join(Path(module.__file__).read_text() for module in (cli, shards))
    assert not re.findall(r"type=(int|float)\b", source)
    assert source.count("type=usage.") == len(NUMBERS) - 2  # --workers is written once for three commands
