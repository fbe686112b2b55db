"""YAML from outside has PyYAML's values; what is ambiguous or fills the memory is refused by its line."""

from __future__ import annotations

import contextlib
import random

import pytest
import yaml

from indistill.config.from_yaml import load_yaml
from indistill.config.limits import MAX_CONFIG_DEPTH, MAX_CONFIG_VALUES

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(30)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}\n" for i in range(30)
)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\r\nb: [1.5, true, null, 2024-01-01, 0x1f, 1e3, 'x']\n",
        "a: &a {x: 1}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n",
        "a: &a {x: 1}\nb: &b {y: 2}\nc: {<<: *a, <<: *b}\n",
        "",
        "\ufeffa: ü",
        "[" * (MAX_CONFIG_DEPTH - 1) + "]" * (MAX_CONFIG_DEPTH - 1),
    ],
)
def test_values_are_those_of_pyyaml(text):
    assert load_yaml(text) == yaml.safe_load(text)


def test_a_key_is_a_name_even_if_yaml_reads_it_as_true():
    assert load_yaml("{on: maps, off: on, a: {no: 1}}") == {"on": "maps", "off": True, "a": {"no": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2024-99-99", "line 2: '2024-99-99' is no valid timestamp: put text in quotes"),
        ("a: !!int x", "line 1: 'x' is no valid int"),
        ("a: !!int ''", "line 1: '' is no valid int"),
        ("a: !!float x", "line 1: 'x' is no valid float"),
        ("a: !!bool maybe", "line 1: 'maybe' is no valid bool"),
        ("a: !!timestamp x", "line 1: 'x' is no valid timestamp"),
        ("a: 0b_", "line 1: '0b_' is no valid int"),
        (f"a: {'9' * 101}", "line 1: a number of more than 100 characters"),
        (f"a: 1{':1' * 10**6}", "line 1: a number of more than 100 characters"),
        (f"a: 0x{'f' * 10**6}", "line 1: a number of more than 100 characters"),
        ("a: !!binary aGk=", "line 1: a value of type binary has no use here"),
        ("a: !!set {x}", "line 1: a value of type set has no use here"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: a value of type python/object/apply:os.system"),
        ("lr: 1\nx: {}\nlr: 2", "line 3: the key 'lr' is given twice: keep one"),
        ("{a: {b: 1, 'b': 2}}", "line 1: the key 'b' is given twice: keep one"),
        ("a: &a [*a]", "line 1: an alias that contains itself"),
        ("a: &a {b: {c: *a}}", "line 1: an alias that contains itself"),
        (BOMB, "line 6: more than 262,144 values, with aliases written out"),
        (MERGED, "line 7: more than 262,144 values, with aliases written out"),
        (f"a: &a '{'x' * 10**5}'\nb: [{'*a, ' * 10**4}]", "line 2: more than 262,144 values"),
        ("[" + "1," * (MAX_CONFIG_VALUES + 1) + "]", "line 1: more than 262,144 values"),
        ("[" * 10**5, "line 1: more than 64 mappings and lists in each other"),
        ("{a: " * 10**4, "line 1: more than 64 mappings and lists in each other"),
        (r'a: "\0"', r"'\x00' has a character that is none"),
        (r'a: "\ud800"', r"'\ud800' has a character that is none"),
        (r'a: "\U00110000"', "not in range"),
        (r'a: "\UFFFFFFFF"', "too large"),
        ("a: \0", "special characters are not allowed"),
        ("a: \udcff", "special characters are not allowed"),
        ("a:\n\t- 1", "cannot start any token"),
        ("{[1]: 2}", "unhashable key"),
        ("a: *b", "undefined alias"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_refused(text, message):
    with pytest.raises(yaml.YAMLError) as error:
        load_yaml(text)
    assert message in str(error.value)


def test_every_use_of_an_alias_is_a_value_of_its_own():
    tree = load_yaml("a: &a {x: [1]}\nb: *a\nc: {<<: *a}\n")
    tree["a"]["x"][0] = 2
    assert tree == {"a": {"x": [2]}, "b": {"x": [1]}, "c": {"x": [1]}}


def test_any_text_is_a_value_or_refused_as_yaml():
    pieces = [*"{}[],:-?!&*#|>%@`'\" \n\t\\0123456789.eExob_~=<", "a", "b", "&a ", "*a", "<<: ", "!!int "]
    pieces += [
        "!!float ",
        "2024-99-99",
        "\\u",
        "\\x0",
        "\ud800",
        "\0",
        "\x85",
        "- ",
        ": ",
        "\n  ",
        "---\n",
        "...",
    ]
    source = random.Random(0)
    for _ in range(3000):
        text = "".join(source.choices(pieces, k=source.randint(1, 40)))
        with contextlib.suppress(yaml.YAMLError):
            load_yaml(text)
