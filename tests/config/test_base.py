"""The one-line form of an error, and text from outside as it is shown."""

from __future__ import annotations

import pickle
import re

import pytest
from torch.utils.data import DataLoader, Dataset

from indistill.config import UserError, in_one_line, printable
from indistill.config.limits import MAX_LINE_CHARACTERS

FORGED = "0\nindistill: all is well\r\x1b[1A"


class Failing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "without_type", "with_type"),
    [
        (ValueError("  two\n\tlines "), "two lines", "ValueError: two lines"),
        (KeyError("key"), "'key'", "KeyError: 'key'"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (UserError("data.root: missing"), "data.root: missing", "UserError: data.root: missing"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_an_error_in_one_line(error, without_type, with_type):
    assert in_one_line(error) == without_type
    assert in_one_line(error, with_type=True) == with_type
    assert in_one_line(error, 4) == without_type[:4]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.tar: the tar is cut"), "a.tar: the tar is cut"),
        (ValueError("damaged"), "ValueError: damaged"),
    ],
)
def test_an_error_of_a_loader_worker_is_its_own_message_without_the_traceback(error, line):
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    assert "Traceback" in raised.value.args[0]
    assert in_one_line(raised.value) == line


def test_a_name_cannot_replace_the_message_of_an_error_in_a_worker():
    error = UserError(f"a.tar: sample {FORGED}: has no label")
    with pytest.raises(UserError) as raised:
        next(iter(DataLoader(Failing(error), num_workers=1)))
    line = "a.tar: sample 0 indistill: all is well \\x1b[1A: has no label"
    assert in_one_line(raised.value) == str(raised.value) == str(error) == line


def test_a_message_that_begins_as_one_of_a_worker_is_shown_from_its_begin():
    assert str(UserError(f"Caught {FORGED}: no such file")).startswith("Caught 0 indistill: all is well")


def test_every_error_is_one_printable_line_of_limited_length():
    for error in (UserError("x" * 10**6), ValueError(f"{FORGED}\u202e\udcff\x85" * 10**4)):
        line = in_one_line(error)
        assert re.fullmatch(r"[ -~]+", line)
        assert len(line) <= MAX_LINE_CHARACTERS + 5
    assert str(UserError("a" * 5000 + " remedy")).endswith("a remedy")
    assert str(pickle.loads(pickle.dumps(UserError("a\nb")))) == "a b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 画像 🙂 a\\b", "Größe 画像 🙂 a\\b"),
        ("\x1b[31m\x07\x9b\x7f", r"\x1b[31m\x07\x9b\x7f"),
        ("a\r\nb\tc\x85\u2028", r"a\r\nb\tc\x85\u2028"),
        ("\u202egpj.exe\u2066\ufeff", r"\u202egpj.exe\u2066\ufeff"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), r"caf\udce9"),
        ("\0", r"\x00"),
    ],
)
def test_what_is_not_printable_is_shown_as_an_escape(text, shown):
    assert printable(text) == printable(printable(text)) == shown
    lines = printable(text, lines=True)
    assert lines == shown.replace(r"\n", "\n").replace(r"\t", "\t")
    lines.encode()
