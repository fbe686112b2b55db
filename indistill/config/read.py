"""Read a config from a YAML file with `key.sub=value` overrides, and write it as YAML."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from indistill.config.base import UserError, alternatives, in_one_line, nearest
from indistill.config.files import read_text
from indistill.config.from_yaml import load_yaml
from indistill.config.limits import MAX_CONFIG_BYTES
from indistill.config.tree import Config


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read the config of a single run, with `a.b=c` overrides (the value is YAML, or literal if the key is
    a text; a number indexes a list).

    Raises UserError, in one line, for a missing or malformed file and for any unknown or ill-typed key.
    """
    tree = read(path, overrides)
    for kind in ("stages", "students"):
        if kind in tree:
            raise UserError(
                f"{path} has several {kind}: give the config.yaml in the run directory of one instead"
            )
    return parse(tree, source=" ".join([str(path), *overrides]))


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the file's plain tree with overrides applied; its keys are not checked."""
    try:
        tree = load_yaml(read_text(path, MAX_CONFIG_BYTES))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {in_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys at the top level")
    for override in overrides:
        apply_override(tree, override)
    return tree


def load_recorded(path: str | Path) -> Config:
    """Read the `config.yaml` of a run to show it, without torch and without the packages of its losses."""
    tree = read(path)
    if isinstance(tree.get("warmup"), dict):
        tree["warmup"].setdefault("at_most", None)  # earlier versions had no limit
    return parse(tree, source=str(path), recorded=True)


def parse(tree: dict[str, Any], source: str, *, recorded: bool = False) -> Config:
    """Validate a plain tree; `source` names it in error messages. Raises UserError for the first mistake.

    recorded: allow losses whose class is not loaded, as `load_recorded` does.
    """
    try:
        return Config.model_validate(tree, context={"recorded": recorded})
    except ValidationError as error:
        keys, message = _first_mistake(error, tree)
        raise UserError(f"{source}: {'.'.join(keys) + ': ' if keys else ''}{message}") from None


def _first_mistake(error: ValidationError, tree: dict[str, Any]) -> tuple[list[str], str]:
    """Return keys and message of the first mistake; of a union, of the branches that parsed the furthest."""
    mistakes = [(_keys(e, tree), e) for e in error.errors(include_url=False)]
    first = mistakes[0][0]
    keys = max((keys for keys, _ in mistakes if keys[: len(first)] == first), key=len)
    return keys, _message([e for others, e in mistakes if others == keys])


def _message(errors: list[Any]) -> str:
    """Return one message for the errors of a value, which a union has for each branch.

    It ends with the nearest of the words that the value may be.
    """
    texts = []
    words: list[str] = []
    # Where a number or a section may stand, only the errors of the one that is there help.
    errors = [error for error in errors if error["type"] not in ("model_type", "int_type")] or errors
    for error in errors:
        text = error["msg"].removeprefix("Value error, ")
        match error["type"]:
            case "union_tag_invalid":
                text = f"Input should have one of these names: {error['ctx']['expected_tags']}"
            case "union_tag_not_found" | "model_attributes_type":
                text = "Input should be a mapping with the key 'name'"
        if error["type"] in ("literal_error", "union_tag_invalid"):
            words += re.findall(r"'([^']*)'", text)
        texts.append(text if len(errors) == 1 else text.partition(", unable to ")[0])
    message = ", or ".join([texts[0], *(text.removeprefix("Input should be ") for text in texts[1:])])
    word = errors[0]["ctx"]["tag"] if errors[0]["type"] == "union_tag_invalid" else errors[0]["input"]
    if words and isinstance(word, str):
        message += f"; the nearest valid value is {nearest(word, words)[0]!r}"
    return message


def _keys(error: Any, tree: Any) -> list[str]:
    """Return the keys in pydantic's location of an error, without the names of union branches."""
    keys = []
    for part in error["loc"]:
        # A part may be text, which `in range()` would compare with each number.
        in_list = isinstance(tree, list) and isinstance(part, int) and part < len(tree)
        if in_list or (isinstance(tree, dict) and part in tree):
            keys.append(str(part))
            tree = tree[part]
    return [*keys, str(error["loc"][-1])] if error["type"] == "missing" else keys


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the value of `a.b=c` in a plain tree. Raises UserError if it is malformed or leads nowhere."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected key.sub=value")
    if not text.strip():  # as of a shell variable that is not set
        raise UserError(
            f"override {override!r}: has no value: write {dotted}=null, or {dotted}='' for an empty text"
        )
    *parents, last = dotted.split(".")
    node: Any = tree
    try:
        value = _value(text, dotted.split("."))
        for part, following in zip(parents, [*parents[1:], last]):
            if isinstance(node, dict) and node.get(part) is None:
                if following.isdecimal():
                    raise KeyError(part)  # there is no list to index
                node[part] = {}
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = value
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    except (TypeError, ValueError, IndexError, KeyError):
        raise UserError(f"override {override!r}: {dotted} does not lead to a key of the config") from None


def _value(text: str, keys: list[str]) -> Any:
    """Return the value of an override. Raises yaml.YAMLError for a malformed one of a key that is not a text.

    A text is taken as it is, because `#`, `: ` and `no` mean something else in YAML than in a path. Only
    quotes around it, and what the key takes besides a text, remain YAML: a list, null, `{stage: NAME}`, or
    a mapping in braces.
    """
    kinds = _kinds(keys[2:] if keys[0] in ("stages", "students") else keys)
    if str not in kinds or int in kinds or float in kinds:
        return load_yaml(text)
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    quoted = isinstance(value, str) and text[0] == text[-1] and text[0] in "\"'"
    listed = isinstance(value, list) and any(get_origin(kind) is list for kind in kinds)
    absent = value is None and NoneType in kinds
    mapped = isinstance(value, dict) and any(get_origin(kind) is dict for kind in kinds)
    mapped = mapped and text[0] == "{" and None not in value.values()  # {a,b} is of a path
    reference = isinstance(value, dict) and "stage" in value
    return value if quoted or listed or absent or mapped or reference else text


def _kinds(keys: list[str]) -> list[Any]:
    """The types that the schema allows for a key; [] for one that it does not know."""
    kinds: list[Any] = [Config]
    for key in keys:
        children: list[Any] = []
        for kind in kinds:
            if get_origin(kind) is list and key.isdecimal():
                children += alternatives(get_args(kind)[0])
            elif get_origin(kind) is dict:
                children += alternatives(get_args(kind)[1])
            elif isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
                children += alternatives(kind.model_fields[key].annotation)
        kinds = children
    return kinds


def dump(config: Config) -> str:
    """Return the config as YAML, defaults included; `parse` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
