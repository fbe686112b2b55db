"""Read a config file that describes one run or several: a chain of `stages`, or concurrent `students`.

The config of a stage or student is what all of them share, merged with its own keys. The teacher of a stage
may be the student of an earlier one, `teacher: {stage: NAME}`, and `teacher.heads` the output of an earlier
stage with `stage: heads`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from indistill.config.base import Section, UserError
from indistill.config.read import apply_override, parse, read
from indistill.config.run_dir import weights_file
from indistill.config.sections import ONE_RUN_TRACKERS, Warmup
from indistill.config.tree import Config, flatten

_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # a directory, and a part of an override's dotted key
# Keys and sections that determine the images and the teacher's outputs, which students share.
_SHARED = (
    "seed",
    "duration",
    "data",
    "teacher",
    "teachers",
    "stage",
    "mixed_precision",
    "grad_accumulation",
    "compile",
    "kd.mix",
    "engine",
    "collective_timeout_minutes",
    "max_hours",
)


class Students(list[tuple[str, Config]]):
    """Name and config of students that train concurrently, on the same images and with one teacher.

    `groups` is `equal`, all students on all ranks (training/students.py), or `disjoint`, each student on its
    own ranks (training/groups.py).
    """

    groups: str = "equal"


def load(
    config: str | Path | Mapping[str, Any] | Config, overrides: list[str] | tuple[str, ...] = ()
) -> list[tuple[str, Config]]:
    """Return name and config of every stage of a chain, or `Students`; a plain config has the empty name.

    config: a YAML file, its content as a mapping, or the `Config` of a single run. Overrides change what the
    runs share (`data.root=X`, unless a run sets the key itself) or a single run, by index or name
    (`stages.0.duration=X`, `stages.NAME.duration=X`). Raises UserError for a mistake in any run.
    """
    tree, name = _tree(config)
    for override in overrides:
        apply_override(tree, _by_position(override, tree))
    source = " ".join([name, *overrides])
    if "students" in tree and "stages" in tree:
        raise UserError(f"{source}: students and stages exclude each other: keep one")
    if "student_groups" in tree and "students" not in tree:
        raise UserError(f"{source}: student_groups is for several students: add the list students")
    if "stages" in tree:
        return list(_parse_all(tree, "stages", source).items())
    if "students" not in tree:
        return [("", parse(tree, source))]

    groups = tree.pop("student_groups", "equal")
    if groups not in ("equal", "disjoint"):
        raise UserError(f"{source}: student_groups is {groups!r}: set it to equal or disjoint")
    students = Students(_parse_all(tree, "students", source).items())
    students.groups = groups
    for name, settings in students:
        _check_student(students[0][1], settings, groups, where=f"{source}: student {name}")
    return students


def _tree(config: str | Path | Mapping[str, Any] | Config) -> tuple[dict[str, Any], str]:
    """Return a plain tree that may be changed, and its name in error messages."""
    if isinstance(config, str | Path):
        return read(config), str(config)
    if isinstance(config, Config):
        return config.model_dump(mode="json"), "config"
    if isinstance(config, Mapping):
        tree: dict[str, Any] = _plain(config)
        return tree, "config"
    raise UserError(f"config: {type(config).__name__} is no path of a YAML file, mapping or Config: give one")


def _plain(value: Any) -> Any:
    """Copy a tree from Python as YAML would have it: dictionaries, lists, and paths as text."""
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, Path) else value


def _parse_all(tree: dict[str, Any], kind: str, source: str) -> dict[str, Config]:
    """Return the config of each run in the list `tree[kind]`, merged with the other keys, by name."""
    shared = {key: value for key, value in tree.items() if key != kind}
    listed = tree[kind]
    if not listed or not isinstance(listed, list) or not all(isinstance(own, dict) for own in listed):
        raise UserError(f"{source}: {kind}: expected a list of mappings, each with a name")
    parsed: dict[str, Config] = {}
    for i, own in enumerate(listed):
        name = _name(own)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{source}: {kind}.{i}.name: {name!r} cannot name a directory: begin with a letter, and use "
                "letters, digits, - and _"
            )
        if name in parsed:
            raise UserError(f"{source}: {kind}.{i}.name: {name} is already in use: choose another name")
        where = f"{source}: {kind.removesuffix('s')} {name}"
        if "run_dir" in own:
            raise UserError(f"{where}: run_dir is always the file's run_dir/{name}: remove the key")
        if own.get("mirror") is not None:
            raise UserError(f"{where}: mirror is always the file's mirror/{name}: remove the key")
        merged = merge(shared, {key: value for key, value in own.items() if key != "name"})
        if (
            isinstance(shared.get("run_dir"), str) and shared["run_dir"]
        ):  # an empty one is reported by `parse`
            merged["run_dir"] = str(Path(shared["run_dir"]) / name)
        if isinstance(merged.get("mirror"), str) and merged["mirror"]:
            merged["mirror"] = f"{merged['mirror'].rstrip('/')}/{name}"
        if kind == "stages" and isinstance(merged.get("teacher"), dict):
            merged["teacher"] = _resolve_teacher(merged["teacher"], parsed, where)
        if kind == "stages" and isinstance(merged.get("teachers"), list):
            merged["teachers"] = [
                _resolve_teacher(one, parsed, where) if isinstance(one, dict) else one
                for one in merged["teachers"]
            ]
        parsed[name] = parse(merged, where)
    return parsed


def _check_student(first: Config, settings: Config, groups: str, where: str) -> None:
    """Raise UserError for a student that cannot train concurrently with the first one."""
    of_first = flatten(first, without=())
    own = flatten(settings, without=())
    for key in sorted(of_first.keys() | own.keys()):
        shared = f"{key}.".startswith(tuple(f"{part}." for part in _SHARED))
        if shared and of_first.get(key) != own.get(key):
            raise UserError(
                f"{where}: {key} is {own.get(key)}, and {of_first.get(key)} for the first student: set it "
                "once, for all students"
            )
    _check_teachers(settings, groups, where)
    if settings.engine is not None and settings.engine.name == "deepspeed":
        raise UserError(
            f"{where}: engine: DeepSpeed trains one student per process: train the students one by one, or "
            "use ddp"
        )
    if settings.targets.source != "live":
        raise UserError(
            f"{where}: targets: students share a live teacher: set targets: live, or train the "
            "students one by one"
        )
    one_run = ONE_RUN_TRACKERS.intersection(settings.trackers)
    if groups == "equal" and one_run:
        raise UserError(
            f"{where}: trackers: {min(one_run)} tracks one run at a time in a process: remove it, train the "
            "students one by one, or set student_groups: disjoint"
        )
    if groups == "disjoint":
        _check_known_targets(settings.warmup, where)


def _check_teachers(settings: Config, groups: str, where: str) -> None:
    """Raise UserError for teachers that students cannot share."""
    if not settings.has_teacher or settings.stage != "distill":
        raise UserError(
            f"{where}: students share a teacher: add the section teacher, and remove stage: heads"
        )
    if any(section.shard for section in settings.teacher_sections.values()):
        raise UserError(
            f"{where}: teacher.shard: students need the whole teacher on every process: remove it"
        )
    if groups == "disjoint" and settings.teachers:
        raise UserError(
            f"{where}: teachers: under student_groups: disjoint students share one teacher: set teacher, or "
            "student_groups: equal"
        )


def _check_known_targets(warmup: Warmup | None, where: str) -> None:
    """Raise UserError for a warm-up whose targets the other groups of ranks cannot compute."""
    if warmup is None:
        return
    if warmup.curriculum == "auto":
        key = "warmup.curriculum: auto"
    elif warmup.prune.mode == "paper_bn":
        key = "warmup.prune.mode: paper_bn"
    else:
        return
    raise UserError(
        f"{where}: {key}: under student_groups: disjoint every group must know the targets of the others: "
        "choose another value, or student_groups: equal"
    )


def _name(stage: Any) -> Any:
    return stage.get("name") if isinstance(stage, dict) else None


def _by_position(override: str, tree: dict[str, Any]) -> str:
    """Return the override `stages.NAME.key=value` with the index of the stage instead of its name."""
    dotted, equals, value = override.partition("=")
    kind, *name_and_key = dotted.split(".", 2)
    if kind not in ("stages", "students") or not name_and_key:
        return override
    if not isinstance(tree.get(kind), list):
        raise UserError(f"override {override!r}: the config has no list of {kind}")
    positions = {str(_name(run)): i for i, run in enumerate(tree[kind])}
    name, *key = name_and_key
    return ".".join([kind, str(positions.get(name, name)), *key]) + equals + value


def merge(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return `shared` overridden by `own`: mappings are merged, other values, also null, replaced.

    A mapping with the key `stage`, a reference, replaces the shared one instead of being merged.
    """
    merged = {**shared}
    for key, value in own.items():
        if isinstance(value, dict) and "stage" not in value:
            merged[key] = merge(shared[key] if isinstance(shared.get(key), dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _resolve_teacher(section: dict[str, Any], earlier: dict[str, Config], where: str) -> dict[str, Any]:
    """Return the section teacher with its references to earlier stages replaced by their models and files."""
    section = {**section}
    if isinstance(section.get("heads"), dict):
        name, settings = _find_stage(section["heads"], earlier, f"{where}: teacher.heads")
        if settings.stage != "heads":
            raise UserError(
                f"{where}: teacher.heads: stage {name} trains a student: name a stage with stage: heads"
            )
        section["heads"] = weights_file(settings)
    if "stage" in section:
        name, settings = _find_stage({"stage": section.pop("stage")}, earlier, f"{where}: teacher")
        if settings.student is None:
            raise UserError(f"{where}: teacher: stage {name} trains heads, not a student: name another stage")
        student = settings.student.model_dump(mode="json", exclude_unset=True) | {"pretrained": False}
        section = student | {"checkpoint": weights_file(settings)} | section
    return section


def _find_stage(reference: dict[str, Any], earlier: dict[str, Config], where: str) -> tuple[str, Config]:
    """Return name and config of the earlier stage in `{stage: NAME}`. Raises UserError if there is none."""
    name = reference.get("stage")
    if set(reference) != {"stage"} or not isinstance(name, str) or name not in earlier:
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first stage"
        raise UserError(f"{where}: {reference} does not name an earlier stage ({known})")
    return name, earlier[name]
