"""The braces of shard patterns: expanded as braceexpand does, but never more than the limit."""

from __future__ import annotations

import random

import pytest
from braceexpand import braceexpand

from indistill.config import UserError
from indistill.config.limits import MAX_SHARDS
from indistill.data import class_names, shards
from indistill.data.braces import _count, expand_braces


@pytest.mark.parametrize(
    "pattern",
    [
        "{0..1000000000}",
        "{a,b}" * 30,
        "{a..z}" * 30,
        "{0..9}" * 7,
        "{" * 4 + "{a,b}" * 30 + ",c}" * 4,
        f"{{{'9' * 5000}..1}}",
        f"{{0..{'1' * 20}..1}}",
        "{0..1048576}",
        "{0..1000000}" + "x" * 200,
    ],
    ids=lambda pattern: pattern[:20],
)
def test_too_many_are_refused_before_the_first_is_made(pattern):
    with pytest.raises(UserError, match=r"names .*shards.*: correct the braces"):
        expand_braces(pattern)
    assert class_names.beside(pattern) == []


@pytest.mark.parametrize("pattern", ["{" * 1000, "{a,b", "a}b", "}{a,b}{", "{a{1..2}"])
def test_braces_that_do_not_match_are_refused(pattern):
    with pytest.raises(UserError, match=r"brace"):
        expand_braces(pattern)


def test_a_list_of_shards_is_limited_as_a_whole(tmp_path):
    some = [f"http://host/{i}-{{0..999999}}.tar" for i in range(3)]
    with pytest.raises(UserError, match=f"more than {MAX_SHARDS:,}"):
        shards.expand(some)


def test_the_count_is_no_less_than_what_braceexpand_makes():
    source = random.Random(1)
    tokens = [
        "{",
        "}",
        "{",
        "}",
        ",",
        "a",
        "..",
        "1",
        "3",
        "12",
        "\\",
        "-",
        "x..z",
        "1..3",
        "{1..4}",
        "{a,b}",
    ]
    exact = 0
    for _ in range(5000):
        pattern = "".join(source.choices(tokens, k=source.randint(1, 12)))
        try:
            paths = expand_braces(pattern)
        except UserError:
            continue
        assert paths == list(braceexpand(pattern))
        number, length = _count(pattern)
        assert number >= len(paths)
        assert length >= max(map(len, paths))
        exact += number == len(paths)
    assert exact > 1000


def test_long_lists_of_real_names_expand():
    names = [f"{i:06d}" for i in range(30_000)]
    assert expand_braces(f"train-{{{','.join(names)}}}.tar") == [f"train-{name}.tar" for name in names]
    assert len(expand_braces("train-{000000..299999}.tar")) == 300_000
