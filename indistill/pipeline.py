"""Configs of several runs, each in `run_dir/NAME`: a chain of `stages`, one after the other, or `students` at once.

A stage or student is what the whole config shares, merged with its own keys. A stage's teacher may be the student of an
earlier stage, `teacher: {stage: NAME}`, and its `teacher.heads` what an earlier stage of `stage: heads` trained.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from indistill import config, history, preemption, watchdog
from indistill.config import Config, UserError
from indistill.preemption import Preempted

_NAME = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # a directory, and a part of an override's dotted key
_MAX_HEADER_BYTES = 100_000_000  # of safetensors, by its specification


# What decides the images and what the teacher makes of them.
_SHARED = ("seed", "duration", "data", "teacher", "stage", "mixed_precision", "grad_accumulation", "compile", "kd.mix")
_SHARED += ("engine", "collective_timeout_minutes", "max_hours")


class Students(list):
    """Name and config of students that train at once, on the same images and one teacher.

    On `groups`: equal, all of them on all ranks (together.py), or disjoint, each on ranks of its own (apart.py).
    """

    groups: str = "equal"


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> list[tuple[str, Config]]:
    """The name and config of every stage of a chain, or of `Students`; a plain config is one with an empty name.

    Overrides reach what they share (`data.root=X`, unless one sets it itself) and single ones, by number or name
    (`stages.0.duration=X`, `stages.NAME.duration=X`). Raises UserError for a mistake in any of them.
    """
    in_file = config.read(path)
    kind = "students" if "students" in in_file else "stages"
    listed = in_file[kind] if isinstance(in_file.get(kind), list) else []
    positions = {str(_name(stage)): i for i, stage in enumerate(listed)}
    tree = config.read(path, [_by_position(override, kind, positions) for override in overrides])
    source = " ".join([str(path), *overrides])
    if kind not in tree:
        return [("", config.parse(tree, source))]
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
            raise UserError(f"{source}: {kind[:-1]} {name}: run_dir: it runs in run_dir/{name} of the file: remove it")
        merged = _merge(shared, {key: value for key, value in stage.items() if key != "name"})
        if isinstance(shared.get("run_dir"), str):
            merged["run_dir"] = str(Path(shared["run_dir"]) / name)
        where = f"{source}: {kind[:-1]} {name}"
        if kind == "stages" and isinstance(merged.get("teacher"), dict):
            merged["teacher"] = _teacher(merged["teacher"], stages, where)
        stages[name] = config.parse(merged, where)
        if kind == "students":
            _check_student(next(iter(stages.values())), stages[name], groups, where)
    if kind == "stages":
        return list(stages.items())
    students = Students(stages.items())
    students.groups = groups
    return students


def _check_student(first: Config, settings: Config, groups: str, where: str) -> None:
    """Raise UserError for a student that cannot train beside the first one."""
    theirs, mine = (config.flatten(one, without=()) for one in (first, settings))
    for key in sorted(theirs.keys() | mine.keys()):
        if f"{key}.".startswith(tuple(f"{part}." for part in _SHARED)) and theirs.get(key) != mine.get(key):
            raise UserError(
                f"{where}: {key}: {mine.get(key)} here, {theirs.get(key)} for the first: set it once, for all students"
            )
    if settings.teacher is None or settings.stage != "distill":
        raise UserError(f"{where}: students share a teacher: add the section teacher, and no stage: heads")
    if settings.engine is not None and settings.engine.name == "deepspeed":
        raise UserError(f"{where}: engine: DeepSpeed takes one student a process: train them one by one, or use ddp")
    if settings.teacher.shard:
        raise UserError(f"{where}: teacher.shard: students need the whole teacher on every process: remove it")
    if settings.targets.source != "live":
        raise UserError(f"{where}: targets: stored ones leave no teacher to share: train the students one by one")
    alone = config.ONE_RUN_TRACKERS.intersection(settings.trackers)
    if groups == "equal" and alone:
        raise UserError(
            f"{where}: trackers: {min(alone)} takes one run at a time in a process: remove it, train the students one "
            "by one, or set student_groups: disjoint"
        )
    warmup = settings.warmup
    if groups == "disjoint" and warmup and (warmup.curriculum == "auto" or warmup.prune.mode == "paper_bn"):
        what = "warmup.curriculum: auto" if warmup.curriculum == "auto" else "warmup.prune.mode: paper_bn"
        raise UserError(f"{where}: student_groups: disjoint: every group has to know the others' targets: no {what}")


def run(stages: list[tuple[str, Config]], resume: str = "auto") -> dict[str, dict[str, Any]]:
    """Train what `load` returned, stage by stage; finished stages are kept. Returns each stage's `summary.json`.

    Raises UserError for a run directory that holds another stage, and for a stage that began with other weights than
    an earlier stage has now, and Preempted, after which no stage begins.
    """
    chain = [name for name, _ in stages] != [""]
    run_dir = Path(stages[0][1].run_dir)
    run_dir = run_dir.parent if chain else run_dir
    with preemption.status_in(run_dir), watchdog.explaining(run_dir):
        return _run_together(stages, resume) if isinstance(stages, Students) else _run(stages, resume, chain)


def _run_together(students: Students, resume: str) -> dict[str, dict[str, Any]]:
    if resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: several students go on from where they stopped, with auto: to go back with one, train "
            "the config.yaml in its run directory"
        )
    for _, settings in students:  # a run that has to be refused is so before another begins
        history.has_begun(settings)
    import torch

    from indistill import apart, together

    summaries = (apart if students.groups == "disjoint" else together).train(students, resume)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return summaries


def _run(stages: list[tuple[str, Config]], resume: str, chain: bool) -> dict[str, dict[str, Any]]:
    if chain and resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: a chain goes on from where it stopped, with auto: to go back in one stage, train the "
            "config.yaml in its run directory"
        )
    # All ranks look before any can write. A stage that has to be refused is so before days of work on the others.
    begun = {name for name, settings in stages if chain and history.has_begun(settings)}
    if begun and resume == "never":
        raise UserError(f"--resume never: stage {min(begun)} has begun already: choose another run_dir, or auto")
    finished = {name for name, settings in stages if name in begun and _summary(settings).exists()}
    import torch

    from indistill import build
    from indistill.train import train

    for name, settings in stages[1:]:
        if name not in begun:
            try:
                build.check_fit(settings)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None

    summaries = {}
    for i, (name, settings) in enumerate(stages):
        if chain:
            said = f"indistill: stage {name} ({i + 1} of {len(stages)}): "
            _check_inputs(name, settings, begun=name in begun)
            if name in finished:
                _say(f"{said}finished before, kept in {settings.run_dir}")
                summaries[name] = json.loads(_summary(settings).read_text())
                continue
            if preemption.asked():
                raise Preempted(f"stopped before stage {name}")
            _say(f"{said}{'goes on' if name in begun else 'begins'} in {settings.run_dir}")
        summaries[name] = train(settings, resume)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # that of all stages: under torchrun it cannot be made twice
    return summaries


def _name(stage: Any) -> Any:
    return stage.get("name") if isinstance(stage, dict) else None


def _by_position(override: str, kind: str, positions: dict[str, int]) -> str:
    """`stages.NAME.key=value` with the number of the stage in place of its name."""
    dotted, equals, value = override.partition("=")
    match dotted.split(".", 2):
        case [first, name, key] if first == kind and name in positions:
            return f"{kind}.{positions[name]}.{key}{equals}{value}"
    return override


def _merge(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Mappings merge key by key, anything else replaces, null removes. An own `{stage: NAME}` replaces, too."""
    merged = {**shared}
    for key, value in own.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and "stage" not in value:
            merged[key] = _merge(shared[key] if isinstance(shared.get(key), dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _teacher(section: dict[str, Any], earlier: dict[str, Config], where: str) -> dict[str, Any]:
    """The section with files and models in place of its references to stages; its other keys stand."""
    section = {**section}
    if isinstance(section.get("heads"), dict):
        name, settings = _referred(section["heads"], earlier, f"{where}: teacher.heads")
        if settings.stage != "heads":
            raise UserError(f"{where}: teacher.heads: stage {name} trains a student: name one with stage: heads")
        section["heads"] = f"{settings.run_dir}/heads.safetensors"
    if "stage" in section:
        name, settings = _referred({"stage": section.pop("stage")}, earlier, f"{where}: teacher")
        if settings.student is None:
            raise UserError(f"{where}: teacher: stage {name} trains heads, not a student: name another stage")
        student = settings.student.model_dump(mode="json", exclude_unset=True) | {"pretrained": False}
        section = student | {"checkpoint": f"{settings.run_dir}/student.safetensors"} | section
    return section


def _referred(reference: dict[str, Any], earlier: dict[str, Config], where: str) -> tuple[str, Config]:
    name = reference.get("stage")
    if set(reference) != {"stage"} or not isinstance(name, str) or name not in earlier:
        known = f"earlier stages: {', '.join(earlier)}" if earlier else "this is the first stage"
        raise UserError(f"{where}: {reference} is no earlier stage ({known})")
    return name, earlier[name]


def _summary(settings: Config) -> Path:
    return Path(settings.run_dir) / "summary.json"


def _check_inputs(name: str, settings: Config, begun: bool) -> None:
    """Keep the hashes of the weights that a stage begins with, in `inputs.json`; later they must still be the same."""
    run_dir, teacher = Path(settings.run_dir), settings.teacher
    files = {"teacher.checkpoint": teacher and teacher.checkpoint, "teacher.heads": teacher and teacher.heads}
    files["student.checkpoint"] = settings.student and settings.student.checkpoint
    # A file that is missing is for train to tell.
    hashes = {key: sha256(Path(file)) for key, file in files.items() if file and Path(file).is_file()}
    record = run_dir / "inputs.json"
    if begun:
        kept = json.loads(record.read_text()) if record.exists() else {}
        for key, value in hashes.items():
            if kept.get(key) != value:
                raise UserError(
                    f"stage {name} began with other weights than are now in {files[key]} ({key}): delete {run_dir} to "
                    "train the stage again, or choose another run_dir"
                )
    elif hashes and os.environ.get("RANK", "0") == "0":
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(hashes, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"run_dir {run_dir}: cannot be written ({error.strerror}): choose another") from None


def sha256(path: Path) -> str:
    """Of a file's content. A safetensors header is sorted first: the library writes metadata in random order."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            header = file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
            with contextlib.suppress(ValueError):  # damaged: for train to tell
                header = json.dumps(json.loads(header), sort_keys=True).encode()
            digest.update(header)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _say(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
