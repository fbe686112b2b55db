"""Read a config file that describes one run or several: a chain of `stages`, or `students` that train at once.

A stage or student is what the whole config shares, merged with its own keys. A stage's teacher may be the student of an
earlier stage, `teacher: {stage: NAME}`, and its `teacher.heads` what an earlier stage of `stage: heads` trained.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from indistill.config.base import UserError
from indistill.config.read import parse, read
from indistill.config.run_dir import weights_file
from indistill.config.sections import ONE_RUN_TRACKERS
from indistill.config.tree import Config, flatten

_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # a directory, and a part of an override's dotted key
# What decides the images and what the teacher makes of them.
_SHARED = (
    "seed",
    "duration",
    "data",
    "teacher",
    "stage",
    "mixed_precision",
    "grad_accumulation",
    "compile",
    "kd.mix",
)
_SHARED += ("engine", "collective_timeout_minutes", "max_hours")


class Students(list):
    """Name and config of students that train at once, on the same images and one teacher.

    On `groups`: equal, all of them on all ranks (students.py), or disjoint, each on ranks of its own (groups.py).
    """

    groups: str = "equal"


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> list[tuple[str, Config]]:
    """The name and config of every stage of a chain, or of `Students`; a plain config is one with an empty name.

    Overrides reach what they share (`data.root=X`, unless one sets it itself) and single ones, by number or name
    (`stages.0.duration=X`, `stages.NAME.duration=X`). Raises UserError for a mistake in any of them.
    """
    in_file = read(path)
    kind = "students" if "students" in in_file else "stages"
    listed = in_file[kind] if isinstance(in_file.get(kind), list) else []
    positions = {str(_name(stage)): i for i, stage in enumerate(listed)}
    tree = read(path, [_by_position(override, kind, positions) for override in overrides])
    source = " ".join([str(path), *overrides])
    if kind not in tree:
        return [("", parse(tree, source))]
    if kind == "students" and "stages" in tree:
        raise UserError(f"{source}: students and stages exclude each other: keep one")

    groups = tree.pop("student_groups", "equal") if kind == "students" else "equal"
    if groups not in ("equal", "disjoint"):
        raise UserError(f"{source}: student_groups: {groups!r} is neither equal nor disjoint")
    shared, own = {key: value for key, value in tree.items() if key != kind}, tree[kind]
    if not own or not isinstance(own, list) or not all(isinstance(stage, dict) for stage in own):
        raise UserError(f"{source}: {kind}: expected a list of mappings, each with a name")
    stages: dict[str, Config] = {}
    for i, stage in enumerate(own):
        name = _name(stage)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise UserError(
                f"{source}: {kind}.{i}.name: {name!r} cannot name a directory: a letter, then letters, digits, - and _"
            )
        if name in stages:
            raise UserError(f"{source}: {kind}.{i}.name: {name} names an earlier one too: choose another")
        if "run_dir" in stage:
            raise UserError(
                f"{source}: {kind[:-1]} {name}: run_dir: it runs in run_dir/{name} of the file: remove it"
            )
        merged = merge(shared, {key: value for key, value in stage.items() if key != "name"})
        if isinstance(shared.get("run_dir"), str):
            merged["run_dir"] = str(Path(shared["run_dir"]) / name)
        where = f"{source}: {kind[:-1]} {name}"
        if kind == "stages" and isinstance(merged.get("teacher"), dict):
            merged["teacher"] = _teacher(merged["teacher"], stages, where)
        stages[name] = parse(merged, where)
        if kind == "students":
            _check_student(next(iter(stages.values())), stages[name], groups, where)
    if kind == "stages":
        return list(stages.items())
    students = Students(stages.items())
    students.groups = groups
    return students


def _check_student(first: Config, settings: Config, groups: str, where: str) -> None:
    """Raise UserError for a student that cannot train beside the first one."""
    theirs, mine = (flatten(one, without=()) for one in (first, settings))
    for key in sorted(theirs.keys() | mine.keys()):
        if f"{key}.".startswith(tuple(f"{part}." for part in _SHARED)) and theirs.get(key) != mine.get(key):
            raise UserError(
                f"{where}: {key}: {mine.get(key)} here, {theirs.get(key)} for the first: set it once, for all students"
            )
    if settings.teacher is None or settings.stage != "distill":
        raise UserError(f"{where}: students share a teacher: add the section teacher, and no stage: heads")
    if settings.engine is not None and settings.engine.name == "deepspeed":
        raise UserError(
            f"{where}: engine: DeepSpeed takes one student a process: train them one by one, or use ddp"
        )
    if settings.teacher.shard:
        raise UserError(
            f"{where}: teacher.shard: students need the whole teacher on every process: remove it"
        )
    if settings.targets.source != "live":
        raise UserError(
            f"{where}: targets: stored ones leave no teacher to share: train the students one by one"
        )
    alone = ONE_RUN_TRACKERS.intersection(settings.trackers)
    if groups == "equal" and alone:
        raise UserError(
            f"{where}: trackers: {min(alone)} takes one run at a time in a process: remove it, train the students one "
            "by one, or set student_groups: disjoint"
        )
    warmup = settings.warmup
    if groups == "disjoint" and warmup and (warmup.curriculum == "auto" or warmup.prune.mode == "paper_bn"):
        what = "warmup.curriculum: auto" if warmup.curriculum == "auto" else "warmup.prune.mode: paper_bn"
        raise UserError(
            f"{where}: student_groups: disjoint: every group has to know the others' targets: no {what}"
        )


def _name(stage: Any) -> Any:
    return stage.get("name") if isinstance(stage, dict) else None


def _by_position(override: str, kind: str, positions: dict[str, int]) -> str:
    """`stages.NAME.key=value` with the number of the stage in place of its name."""
    dotted, equals, value = override.partition("=")
    match dotted.split(".", 2):
        case [first, name, key] if first == kind and name in positions:
            return f"{kind}.{positions[name]}.{key}{equals}{value}"
    return override


def merge(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, anything else replaces, null removes. An own `{stage: NAME}` replaces, too."""
    merged = {**shared}
    for key, value in own.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and "stage" not in value:
            merged[key] = merge(shared[key] if isinstance(shared.get(key), dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _teacher(section: dict[str, Any], earlier: dict[str, Config], where: str) -> dict[str, Any]:
    """The section with files and models in place of its references to stages; its other keys stand."""
    section = {**section}
    if isinstance(section.get("heads"), dict):
        name, settings = _referred(section["heads"], earlier, f"{where}: teacher.heads")
        if settings.stage != "heads":
            raise UserError(
                f"{where}: teacher.heads: stage {name} trains a student: name one with stage: heads"
            )
        section["heads"] = weights_file(settings)
    if "stage" in section:
        name, settings = _referred({"stage": section.pop("stage")}, earlier, f"{where}: teacher")
        if settings.student is None:
            raise UserError(f"{where}: teacher: stage {name} trains heads, not a student: name another stage")
        student = settings.student.model_dump(mode="json", exclude_unset=True) | {"pretrained": False}
        section = student | {"checkpoint": weights_file(settings)} | section
    return section


def _referred(reference: dict[str, Any], earlier: dict[str, Config], where: str) -> tuple[str, Config]:
    name = reference.get("stage")
    if set(reference) != {"stage"} or not isinstance(name, str) or name not in earlier:
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first stage"
        raise UserError(f"{where}: {reference} is no earlier stage ({known})")
    return name, earlier[name]
