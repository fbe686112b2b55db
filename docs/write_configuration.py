"""`python docs/write_configuration.py` writes configuration.md from the config's sections and the losses.

Types, limits and defaults are pydantic's; a key's meaning is the comment beside it, or on the lines above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from indistill import config
from indistill.config import plugins

PAGE = Path(__file__).with_name("configuration.md")
MOST_CHOICES = 3  # of sections that a cell of a table lists
INTRODUCTION = """\
# Configuration

Every key of a config, written by `python docs/write_configuration.py` from the comments in
[indistill/config](../indistill/config) and [indistill/losses](../indistill/losses); a test fails where this page
and the code differ. An unknown key, or a value of another type, is one line before any work, with exit code 2:

```text
indistill: error: configs/digits_demo.yaml data.worker=2: data: unknown key 'worker'; the nearest valid key is 'workers'
```

A key is set in the file or after it, `indistill train CONFIG data.workers=8 warmup=null`: the value is YAML, and
a number indexes a list (`kd.losses.0.weight=0.5`). `run_dir/config.yaml` holds all keys of a run with their
values.

A **duration** is a number with a unit, `3 epochs`, `500 steps`, `1e6 samples` or `10 percent` of the run; a bare
number counts epochs.

Besides, a file may list `stages` ([chains](method.md#chains)) or `students` with `student_groups`
([several students](students.md)): each has a name and its own keys, merged with those of the file.

{starts}
"""  # noqa: E501  # an error is quoted as it is printed
STARTS = """\
A run that is started again must have the same config, except for {operational}. Between the nodes of a run
{node} may differ."""


def sources() -> str:
    """The text of every file of the sections and losses."""
    folder = Path(config.__file__).parent
    files = sorted(folder.glob("*.py")) + sorted((folder.parent / "losses").glob("*_loss.py"))
    return "\n".join(path.read_text() for path in files)


def meanings(source: str) -> dict[tuple[str, str], str]:
    """The comments of each class's annotated fields: the lines above it, and the one on its last line."""
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for class_ in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for field in (node for node in class_.body if isinstance(node, ast.AnnAssign)):
            first = field.lineno
            while lines[first - 2].lstrip().startswith("#"):
                first -= 1
            words = [comments[line] for line in range(first, field.end_lineno + 1) if line in comments]
            found[class_.name, field.target.id] = " ".join(words)
    return found


def models() -> dict[str, type[BaseModel]]:
    named = {name: value for name, value in vars(config).items() if inspect.isclass(value)}
    return named | {loss.__name__: loss for loss in losses()}


def losses() -> list[type[config.Loss]]:
    """The built-in losses, `ce` first."""
    return [plugins.find(name) for name in sorted(plugins.built_in(), key=lambda name: (name != "ce", name))]


def schema_of_the_config() -> dict[str, Any]:
    """The JSON schema, in which `kd.losses` lists every built-in loss, and default sections are filled in."""
    tree = config.Config.model_json_schema()
    for loss in losses():
        tree["$defs"][loss.__name__] = loss.model_json_schema()
    choices = tree["$defs"]["KD"]["properties"]["losses"]
    choices["items"] = {"oneOf": [{"$ref": f"#/$defs/{loss.__name__}"} for loss in losses()]}
    choices["default"] = config.KD().model_dump()["losses"]
    tree["properties"]["kd"]["default"] = config.KD().model_dump()
    return tree


def meaning(section: str, key: str, told: dict[tuple[str, str], str]) -> str:
    """What is said of a key where it is declared; empty if nothing is."""
    owners = [base.__name__ for base in models()[section].__mro__ if (base.__name__, key) in told]
    return told[owners[0], key] if owners else ""


def values(schema: dict[str, Any], heads: dict[str, str]) -> str:
    """What a key takes, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{heads[name]}](#{slug(heads[name])})"
    if "oneOf" in schema:  # one of several sections, by its name
        choices = [values(one, heads) for one in schema["oneOf"]]
        return " or ".join(choices) if len(choices) <= MOST_CHOICES else f"{choices[0]} and the others below"
    if "anyOf" in schema:
        kinds = [one.get("type") for one in schema["anyOf"]]
        if kinds[:3] == ["string", "integer", "number"]:
            rest = kinds[3:]
            return "duration" + " or `null`" * ("null" in rest)
        return " or ".join(values(one, heads) for one in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    match schema["type"]:
        case "null":
            return "`null`"
        case "boolean":
            return "`true`, `false`"
        case "string":
            return "text"
        case "object":
            return "mapping"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(values(one, heads) for one in schema['prefixItems'])}]"
        case "array":
            return f"list of {values(schema['items'], heads)}"
        case kind:
            return kind + limits(kind, schema)


def limits(kind: str, schema: dict[str, Any]) -> str:
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if kind == "integer" and above is not None:
        low, above = above + 1, None
    words = [f"from {low}"] * (low is not None) + [f"above {above}"] * (above is not None)
    words += [f"to {high}"] * (high is not None) + [f"below {below}"] * (below is not None)
    return "".join(f" {word}" for word in words)


def default(schema: dict[str, Any], required: bool) -> str:
    value = schema.get("default")
    if required:
        return "**required**"
    if isinstance(value, dict) and value:
        return ""  # a section, which tells its own
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """A value as YAML's flow style has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {plain(one)}' for key, one in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def slug(heading: str) -> str:
    """The anchor that a Git forge gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for key, child in schema.items():
            if key != "discriminator":
                yield from references(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from references(child)


def sections(tree: dict[str, Any]) -> dict[str, str]:
    """Heading of each model, in reading order: a section is followed by those inside it."""
    top = tree["properties"]
    named = {name: key for key, schema in top.items() for name in references(schema)}
    heads: dict[str, str] = {}

    def visit(name: str, path: str) -> None:
        if name in heads:
            return
        kind = models()[name].model_fields.get("name")
        choices = tree["$defs"][name]["properties"]["name"] if kind else {}
        choices = choices.get("enum", [choices["const"]] if "const" in choices else [])
        several = path in ("kd.losses", "engine")
        heads[name] = f"{path}: {', '.join(choices)}" if several else path
        for key, schema in tree["$defs"][name]["properties"].items():
            for child in references(schema):
                if child not in named or named[child] == path:
                    visit(child, f"{path}.{key}")

    for key, schema in top.items():
        for name in references(schema):
            visit(name, key)
    return heads


def table(
    name: str, schema: dict[str, Any], heads: dict[str, str], told: dict[tuple[str, str], str]
) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for key, one in schema["properties"].items():
        said = re.sub(r"\bNone\b", "`null`", meaning(name, key, told)).replace("|", "\\|")
        cells = [f"`{key}`", values(one, heads), default(one, key in schema.get("required", ())), said]
        yield f"| {' | '.join(cells)} |"


def page() -> str:
    told, tree = meanings(sources()), schema_of_the_config()
    heads = sections(tree)
    operational, node = (
        ", ".join(f"`{key}`" for key in keys) for keys in (config.OPERATIONAL_KEYS, config.NODE_KEYS)
    )
    starts = textwrap.fill(STARTS.format(operational=operational, node=node), 120, break_on_hyphens=False)
    lines = [INTRODUCTION.format(starts=starts), "## The whole file\n"]
    lines += [*table("Config", tree, heads, told), ""]
    for name, head in heads.items():
        depth = "##" if "." not in head.partition(":")[0] else "###"
        lines += [f"{depth} {head}\n"]
        if "description" in tree["$defs"][name]:
            lines += [re.sub(r"\bNone\b", "`null`", tree["$defs"][name]["description"]) + "\n"]
        lines += [*table(name, tree["$defs"][name], heads, told), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
