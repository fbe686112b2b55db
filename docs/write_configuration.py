"""Write configuration.md from the sections and losses: `python docs/write_configuration.py`.

Types, limits and defaults come from pydantic; the meaning of a key is the comment on its line or above it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anchors import slug

from indistill import config
from indistill.commands.schema import in_yaml, meaning, meanings, models, of_config, sources

PAGE = Path(__file__).with_name("configuration.md")
MOST_CHOICES = 3  # sections that a cell of a table lists; of more it names the first
WIDTH = 110  # characters of a line of text
INTRODUCTION = """\
# Configuration

This page lists every key of a config. `python docs/write_configuration.py` writes it from the comments in
[indistill/config](../indistill/config) and [indistill/losses](../indistill/losses), and a test fails if it
differs from the code. An unknown key or a value of the wrong type ends the command before any work, with one
line and exit code 2:

```text
indistill: error: my.yaml data.worker=2: data: unknown key 'worker'; the nearest valid key is 'workers'
```

Keys are set in the file, or on the command line after it: `indistill train CONFIG data.workers=8
warmup=null`. The value is YAML, and a number indexes a list (`kd.losses.0.weight=0.5`). A text is taken as it
is: `'run_dir=runs/exp #2'` trains in `runs/exp #2`, where a file would need quotes. `~` at the start of a
path is the home directory. `run_dir/config.yaml` holds the values of all keys of a run.

A **duration** is a number with a unit: `3 epochs`, `500 steps`, `1e6 samples`, or `10 percent` of the run. A
number without a unit counts epochs.

`indistill schema > schema.json` writes a JSON Schema of all this. Editors with YAML's language server then
complete keys, and show what they mean, in a file beside it that has the line
`# yaml-language-server: $schema=schema.json`, as the recipes have.

A file may also list `stages` ([chains](method.md#chains)), or `students` with `student_groups`
([several students](students.md)). Each of them has a name and its own keys, which are merged with those of
the file; lists replace, and so does `null`: `warmup: null` turns off the file's warm-up.

{starts}
"""  # an error is quoted as it is printed
STARTS = """\
A run resumes with the same config only, except for {operational}, which may change. {node} may also differ
between the nodes of a run."""


def values(schema: dict[str, Any], heads: dict[str, str]) -> str:
    """Describe the values that a key accepts."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{heads[name]}](#{slug(heads[name])})"
    if "oneOf" in schema:  # one of several sections, chosen by its name
        choices = [values(one, heads) for one in schema["oneOf"]]
        return " or ".join(choices) if len(choices) <= MOST_CHOICES else f"{choices[0]} and the others below"
    if "anyOf" in schema:
        kinds = [one.get("type") for one in schema["anyOf"]]
        if kinds[:3] == ["string", "integer", "number"]:
            return "duration or `null`" if "null" in kinds else "duration"
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
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"mapping to {values(schema['additionalProperties'], heads)}"
        case "object":
            return "mapping"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(values(one, heads) for one in schema['prefixItems'])}]"
        case "array":
            return f"list of {values(schema['items'], heads)}"
        case kind:
            return kind + limits(kind, schema)


def limits(kind: str, schema: dict[str, Any]) -> str:
    """Describe the range of a number, with a leading space; empty if it has none."""
    schema = dict(schema)
    if kind == "integer" and "exclusiveMinimum" in schema:
        schema["minimum"] = schema.pop("exclusiveMinimum") + 1
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[limit]}" for limit, word in words.items() if limit in schema)


def default(schema: dict[str, Any], required: bool) -> str:
    """Describe the default of a key."""
    value = schema.get("default")
    if required:
        return "**required**"
    if isinstance(value, dict) and value:
        return ""  # a section, whose table has the defaults
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """Format a value in YAML's flow style."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {plain(one)}' for key, one in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def references(schema: Any) -> Iterator[str]:
    """Yield the names of the models that a schema refers to."""
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
    """Return the heading of each model, in reading order: a section is followed by those inside it."""
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
    name: str, schema: dict[str, Any], heads: dict[str, str], comments: dict[tuple[str, str], str]
) -> Iterator[str]:
    """Yield the lines of the table of a section's keys."""
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for key, one in schema["properties"].items():
        text = in_yaml(meaning(name, key, comments)).replace("|", "\\|")
        cells = [f"`{key}`", values(one, heads), default(one, key in schema.get("required", ())), text]
        yield f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the text of configuration.md."""
    comments = meanings(sources())
    tree = of_config()
    heads = sections(tree)
    operational = ", ".join(f"`{key}`" for key in config.OPERATIONAL_KEYS)
    node = ", ".join(f"`{key}`" for key in config.NODE_KEYS)
    starts = textwrap.fill(STARTS.format(operational=operational, node=node), WIDTH, break_on_hyphens=False)
    lines = [INTRODUCTION.format(starts=starts), "## The whole file\n"]
    lines += [*table("Config", tree, heads, comments), ""]
    for name, head in heads.items():
        depth = "##" if "." not in head.partition(":")[0] else "###"
        lines += [f"{depth} {head}\n"]
        if "description" in tree["$defs"][name]:
            lines += [in_yaml(tree["$defs"][name]["description"]) + "\n"]
        lines += [*table(name, tree["$defs"][name], heads, comments), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
