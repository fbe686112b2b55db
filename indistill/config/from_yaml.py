"""Read YAML from outside: bounded in size, depth and aliases, and without ambiguity."""

from __future__ import annotations

from typing import Any

import yaml

from indistill.config.limits import MAX_CONFIG_DEPTH, MAX_CONFIG_VALUES, MAX_NUMBER_CHARACTERS

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{kind}" for kind in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map")}
_CHARACTERS_PER_VALUE = 64  # a long text counts as several values


def load_yaml(text: str) -> Any:
    """Return the content of a YAML document, in which nothing is shared or refers to itself.

    Raises yaml.YAMLError for what is malformed or ambiguous, and for what would fill the memory.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader))  # nosec B506  # a SafeLoader
    except (ValueError, OverflowError) as error:  # of PyYAML's scanner, for "\U00110000"
        raise yaml.YAMLError(str(error)) from None


class _Loader(yaml.SafeLoader):
    """PyYAML's loader of plain values. An error of its own names the line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.values = 0  # so far, with aliases written out
        self.sizes: dict[yaml.Node, int] = {}  # values in each node that is complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        is_alias = self.check_event(yaml.AliasEvent)
        before = self.values
        self.depth += 1
        if self.depth > MAX_CONFIG_DEPTH:
            raise _refusal(mark, f"more than {MAX_CONFIG_DEPTH} mappings and lists in each other")
        node = super().compose_node(parent, index)
        assert node is not None  # an event was there
        self.depth -= 1
        if not is_alias:
            self.values += 1
            if isinstance(node, yaml.ScalarNode):
                self.values += len(node.value) // _CHARACTERS_PER_VALUE
            self.sizes[node] = self.values - before
        elif node in self.sizes:
            self.values += self.sizes[node]
        else:
            raise _refusal(mark, "an alias that contains itself")
        if self.values > MAX_CONFIG_VALUES:
            raise _refusal(mark, f"more than {MAX_CONFIG_VALUES:,} values, with aliases written out")
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
                continue
            if key.tag == f"{_TAG}bool":  # YAML reads a bare `on` as true, and keys are names
                key.tag = f"{_TAG}str"
            if (key.tag, key.value) in seen:
                raise _refusal(key.start_mark, f"the key {key.value!r} is given twice: keep one")
            seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag.startswith(_TAG) and node.tag not in _PLAIN:
            raise _refusal(node.start_mark, f"a value of type {node.tag.removeprefix(_TAG)} has no use here")
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
                raise _refusal(node.start_mark, f"{node.value!r} has a character that is none")
        elif len(node.value) > MAX_NUMBER_CHARACTERS:
            raise _refusal(node.start_mark, f"a number of more than {MAX_NUMBER_CHARACTERS} characters")
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            raise _refusal(
                node.start_mark, f"{node.value!r} is no valid {kind}: put text in quotes"
            ) from None


def _refusal(mark: yaml.Mark, problem: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {mark.line + 1}: {problem}")


def _unshared(value: Any) -> Any:
    """A copy in which every use of an alias has its own mappings and lists, so that it can be changed."""
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_unshared(child) for child in value]
    return value
