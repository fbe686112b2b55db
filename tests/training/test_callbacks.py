"""Callbacks: what is none is refused before a step; one that fails at the end fails the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from indistill import config
from indistill.commands.report.page import ReportAtEnd
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.training import runs
from indistill.training.callbacks import Callback


class Failing(Callback):
    def on_end(self, *_: Any) -> None:
        raise ValueError("no printer")


class NoCallback:
    pass


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([NoCallback()], "NoCallback is no callback: derive its class from indistill.Callback"),
        ([print], "builtin_function_or_method is no callback"),
        ([Failing], r"Failing is a class: give an object, Failing\(\)"),
        (Failing(), r"give a list, callbacks=\[Failing\(\)\]"),
    ],
    ids=["object", "function", "class", "no list"],
)
def test_what_is_no_callback_is_refused_before_anything_is_written(settings, callbacks, message):
    with pytest.raises(UserError, match=message):
        runs.run([("", settings)], callbacks=callbacks)
    assert not Path(settings.run_dir).exists()


def test_status_and_history_agree_on_a_callback_that_fails_at_the_end(tree):
    tree |= {"duration": "1 step", "warmup": None}
    run_dir = Path(tree["run_dir"])
    settings = config.parse(tree, "test")
    with pytest.raises(ValueError, match="no printer"):
        runs.run([("", settings)], callbacks=[ReportAtEnd(), Failing()])
    status, reason = (run_dir / "status").read_text().splitlines()
    assert status == "failed"
    assert "no printer" in reason
    assert [line.get("how") for line in read_lines(run_dir / "history.jsonl")] == [None, "failed"]
    runs.run([("", settings)], callbacks=[ReportAtEnd()])
    assert (run_dir / "status").read_text() == "done\n"
    assert [line.get("how") for line in read_lines(run_dir / "history.jsonl")][2:] == [None, "done"]
