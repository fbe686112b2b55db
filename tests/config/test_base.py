"""The one-line form of an error."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from indistill.config import UserError, in_one_line


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
