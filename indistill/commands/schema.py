"""The JSON Schema of a config file, with which editors complete keys, show what they mean and mark mistakes.

Types, limits and defaults come from pydantic; the meaning of a key is the comment on its line or above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from indistill import config
from indistill.config import plugins

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCE: dict[str, Any] = {  # in a chain: to an earlier stage
    "type": "object",
    "properties": {"stage": {"type": "string", "description": "Name of an earlier stage."}},
}


def of_file() -> dict[str, Any]:
    """Return the schema of a file: a config, or one that several `stages` or `students` share.

    What several runs share, and what each of them adds, may be parts of sections.
    """
    whole = _described(of_config())
    _allow_short_forms(whole)
    parts = _parts(whole)
    run = {"$ref": "#/$defs/Part.Run"}
    several = {
        "stages": {"type": "array", "items": run, "description": "A chain of runs (docs/method.md)."},
        "students": {"type": "array", "items": run, "description": "Concurrent runs (docs/students.md)."},
        "student_groups": {"enum": ["equal", "disjoint"], "default": "equal"},
    }
    lists = {"anyOf": [{"required": ["stages"]}, {"required": ["students"]}]}
    shared = parts["Part.Config"]
    name = {"type": "string", "description": "Name of this run, and of its folder in the file's run_dir."}
    parts["Part.Run"] = {
        **shared,
        "properties": {"name": name, **shared["properties"]},
        "required": ["name"],
    }
    definitions = {**whole.pop("$defs"), **parts, "Config": whole}
    definitions["Part.Config"] = {**shared, "properties": {**shared["properties"], **several}}
    return {
        "$schema": _DIALECT,
        "title": "A config of indistill",
        "type": "object",
        "if": lists,
        "then": {"$ref": "#/$defs/Part.Config"},
        "else": {"$ref": "#/$defs/Config"},
        "$defs": definitions,
    }


def of_config() -> dict[str, Any]:
    """Return pydantic's schema of a config, in which lists of losses name every built-in one."""
    tree = config.Config.model_json_schema()
    for loss in losses():
        tree["$defs"][loss.__name__] = loss.model_json_schema()
    del tree["$defs"]["Loss"]
    for choices in _lists_of_losses(tree):
        choices["items"] = {"oneOf": [{"$ref": f"#/$defs/{loss.__name__}"} for loss in losses()]}
    tree["$defs"]["KD"]["properties"]["losses"]["default"] = config.KD().model_dump()["losses"]
    tree["properties"]["kd"]["default"] = config.KD().model_dump()
    return tree


def _lists_of_losses(tree: dict[str, Any]) -> list[dict[str, Any]]:
    of_teacher = tree["$defs"]["OneTeacher"]["properties"]["losses"]["anyOf"]
    return [tree["$defs"]["KD"]["properties"]["losses"], of_teacher[0]]


def _allow_short_forms(tree: dict[str, Any]) -> None:
    """Add what a file may have in place of a section: the word of `targets`, the shards of an evaluation set,
    and losses of plugins.
    """
    source = tree["$defs"]["Targets"]["properties"]["source"]
    targets = tree["properties"]["targets"]
    targets["anyOf"] = [{"$ref": targets.pop("$ref")}, {"enum": source["enum"]}]
    (sets,) = (one for one in tree["$defs"]["Data"]["properties"]["eval"]["anyOf"] if one["type"] == "object")
    shards = tree["$defs"]["EvalSet"]["properties"]["shards"]["anyOf"]
    sets["additionalProperties"] = {"anyOf": [sets["additionalProperties"], *shards]}
    other = {"type": "string", "not": {"enum": plugins.built_in()}}
    of_plugin = {"type": "object", "properties": {"name": other}, "required": ["name"]}
    for choices in _lists_of_losses(tree):
        choices["items"]["oneOf"].append(of_plugin)


def _parts(whole: dict[str, Any]) -> dict[str, Any]:
    """Return the definitions of parts of sections, in which no key is required.

    A loss is always whole, because a list replaces the shared one.
    """
    sections: dict[str, Any] = {**whole["$defs"], "Config": whole}
    for loss in losses():
        del sections[loss.__name__]
    parts: dict[str, Any] = {}
    for name, section in sections.items():
        keys = {}
        for key, value in section["properties"].items():
            part = _part(value, sections)
            if part == value:
                part = {"$ref": f"#/$defs/{name}/properties/{key}"}
            keys[key] = part
        parts[f"Part.{name}"] = {"type": "object", "properties": keys, "additionalProperties": False}
    for name in ("Part.Teacher", "Part.OneTeacher"):
        teacher = parts[name]["properties"]
        teacher["stage"] = _REFERENCE["properties"]["stage"]
        teacher["heads"] = {"anyOf": [teacher["heads"], _REFERENCE]}
    return parts


def _part(value: Any, sections: Collection[str]) -> Any:
    """Return a schema whose references to sections lead to their parts, of which several may fit."""
    if isinstance(value, list):
        return [_part(child, sections) for child in value]
    if not isinstance(value, dict):
        return value
    if value.get("$ref", "").removeprefix("#/$defs/") in sections:
        return {**value, "$ref": value["$ref"].replace("#/$defs/", "#/$defs/Part.")}
    children = {key: _part(child, sections) for key, child in value.items() if key != "discriminator"}
    if "discriminator" in value:  # it is OpenAPI's, and names whole sections
        children["anyOf"] = children.pop("oneOf")
    return children


# --- what the keys mean -------------------------------------------------------------------------------------
def _described(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the meaning of each key to a schema."""
    comments = meanings(sources())
    for name, section in {**tree["$defs"], "Config": tree}.items():
        for key, value in section["properties"].items():
            value.pop("title", None)  # pydantic's: the key in other words
            value["description"] = in_yaml(meaning(name, key, comments))
    return tree


def sources() -> str:
    """Return the text of all files that define sections."""
    folder = Path(config.__file__).parent
    files = sorted(folder.glob("*.py")) + sorted((folder.parent / "losses").glob("*_loss.py"))
    return "\n".join(path.read_text() for path in files)


def meanings(source: str) -> dict[tuple[str, str], str]:
    """Return the comment of each annotated field, above it and on its own lines, by class and field."""
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts = {}
    for class_ in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in (node for node in class_.body if isinstance(node, ast.AnnAssign)):
            assert isinstance(field.target, ast.Name)  # in the body of a class
            first = field.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            end = field.end_lineno or field.lineno
            words = [comments[line] for line in range(first, end + 1) if line in comments]
            texts[class_.name, field.target.id] = " ".join(words)
    return texts


def meaning(section: str, key: str, comments: dict[tuple[str, str], str]) -> str:
    """Return the comment of a key in the class that declares it; empty if it has none."""
    names = [key, f"{key}_"]  # a field whose key is a word of Python has an underscore
    owners = [(base.__name__, name) for base in models()[section].__mro__ for name in names]
    return next((comments[owner] for owner in owners if owner in comments), "")


def in_yaml(text: str) -> str:
    """Return a comment with `null`, as YAML has it, for Python's None."""
    return re.sub(r"\bNone\b", "`null`", text)


def models() -> dict[str, type[BaseModel]]:
    """Return every section and loss class, by name."""
    named: dict[str, Any] = {name: value for name, value in vars(config).items() if inspect.isclass(value)}
    return named | {loss.__name__: loss for loss in losses()}


def losses() -> list[type[config.Loss]]:
    """The built-in losses, `ce` first."""
    return [plugins.find(name) for name in sorted(plugins.built_in(), key=lambda name: (name != "ce", name))]
