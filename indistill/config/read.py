"""Read a config from a YAML file with `key.sub=value` overrides, and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from indistill.config.base import UserError
from indistill.config.tree import Config


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file and apply `a.b=c` overrides (the value is YAML; a number indexes a list).

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
    """The plain tree that `load` parses, of any keys."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of keys at the top level")
    for override in overrides:
        _apply_override(tree, override)
    return tree


def load_recorded(path: str | Path) -> Config:
    """Read the `config.yaml` of a run, to look at it: without torch, and without the package of a loss."""
    return parse(read(path), source=str(path), recorded=True)


def parse(tree: dict[str, Any], source: str, recorded: bool = False) -> Config:
    """Validate a plain tree; `source` names it in error messages. `recorded`: as `load_recorded` does."""
    try:
        return Config.model_validate(tree, context={"recorded": recorded})
    except ValidationError as error:
        keys, message = _first_mistake(error, tree)
        raise UserError(f"{source}: {'.'.join(keys) + ': ' if keys else ''}{message}") from None


def _first_mistake(error: ValidationError, tree: dict[str, Any]) -> tuple[list[str], str]:
    """Where it is and what. Of a union's branches the one that read on the furthest says it."""
    mistakes = [
        (_keys(e, tree), e["msg"].removeprefix("Value error, ")) for e in error.errors(include_url=False)
    ]
    first = mistakes[0][0]
    return max((m for m in mistakes if m[0][: len(first)] == first), key=lambda mistake: len(mistake[0]))


def _keys(error: Any, tree: Any) -> list[str]:
    """The keys in pydantic's location of an error, which also names the branches of unions."""
    keys = []
    for part in error["loc"]:
        if (isinstance(tree, dict) and part in tree) or (isinstance(tree, list) and part in range(len(tree))):
            keys.append(str(part))
            tree = tree[part]
    return [*keys, str(error["loc"][-1])] if error["type"] == "missing" else keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {override!r}: expected key.sub=value")
    *parents, last = dotted.split(".")
    node: Any = tree
    try:
        value = yaml.safe_load(text)
        for part, following in zip(parents, [*parents[1:], last]):
            if isinstance(node, dict) and node.get(part) is None:
                if following.isdecimal():
                    raise KeyError(part)  # of a list that is not there
                node[part] = {}
            node = node[int(part) if isinstance(node, list) else part]
        node[int(last) if isinstance(node, list) else last] = value
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    except (TypeError, ValueError, IndexError, KeyError):
        raise UserError(f"override {override!r}: {dotted} does not lead to a key of the config") from None


def dump(config: Config) -> str:
    """The whole config as YAML, defaults included; `parse` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
