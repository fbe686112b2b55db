"""The table of hostile inputs: each ends in one clear line and exit code 2, or the run goes on.

Never a traceback, a hang, another program started, a process left behind, or 1 GiB more than an ordinary run.
`python -m pytest tests/hostile -rA` lists every case.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from hostile import CONTROL, EXTRA_MEMORY, Case, Inputs, run

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("*_cases.py"))
CASES: list[Case] = [case for name in MODULES for case in importlib.import_module(name).CASES]


@pytest.fixture(scope="session")
def ordinary_peak(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """Bytes that an ordinary training run takes; it starts no other program."""
    inputs = Inputs(tmp_path_factory.mktemp("ordinary"), data_dir)
    outcome = run(inputs.train(), inputs.folder, limit=2**40)
    assert (outcome.code, outcome.programs, outcome.orphans) == (0, [], []), outcome
    return outcome.peak


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_outcome(case: Case, data_dir: Path, tmp_path: Path, ordinary_peak: int) -> None:
    inputs = Inputs(tmp_path, data_dir)
    limit = ordinary_peak + EXTRA_MEMORY
    outcome = run(case.arguments(inputs), tmp_path, limit, case.environment)
    assert outcome.code is not None, f"it hangs or fills memory ({outcome.peak} bytes): {outcome.err[-2000:]}"
    assert (outcome.programs, outcome.orphans) == ([], [])
    assert outcome.peak <= limit
    assert "Traceback" not in outcome.out + outcome.err
    assert not CONTROL.search(outcome.out + outcome.err.replace("\r", ""))
    assert re.search(case.output, outcome.out + outcome.err)
    if case.error is None:
        assert outcome.code == case.code, outcome.err
    else:
        last = outcome.err.strip().splitlines()[-1]
        assert outcome.code == 2, outcome.err
        assert re.search(case.error, last), last
    if case.after is not None:
        case.after(inputs)


def test_names_differ() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
