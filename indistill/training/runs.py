"""Train the runs of a config file: one run, a chain of stages, or several students at once."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from indistill.config import Config, UserError, records
from indistill.config.files import replace_text, sha256
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir, has_begun, refuse_foreign
from indistill.config.runs import Students
from indistill.data.loader import check_accumulation
from indistill.data.training import bank_shards, eval_shards
from indistill.distributed import elastic, environment, preemption, watchdog
from indistill.distributed.preemption import Preempted
from indistill.evaluate.bank import check_bank
from indistill.training import lessons
from indistill.training.callbacks import Callback, check_callbacks
from indistill.training.groups import train_groups
from indistill.training.loop import train
from indistill.training.mirror import uploads
from indistill.training.mirror.fetch import fetch_run
from indistill.training.students import train_students


def run(
    stages: list[tuple[str, Config]], resume: str = "auto", callbacks: Sequence[Callback] = ()
) -> dict[str, dict[str, Any]]:
    """Train the runs that `config.runs.load` returned; return the content of each one's `summary.json`, by
    name.

    Stages of a chain run one after the other, and finished stages are kept. Raises UserError if a run
    directory contains another run, or if a stage began with other weights than the earlier stage has now.
    Raises Preempted if a run was asked to stop; no stage begins after that.
    """
    check_callbacks(callbacks)  # before anything is written
    run_dir = RunDir.of(stages[0][1]).path
    run_dir = run_dir.parent if _is_chain(stages) else run_dir
    refuse_foreign(run_dir, runs=[name for name, _ in stages])
    for _, settings in stages:
        refuse_foreign(RunDir.of(settings).path)
    divides, timeout_minutes = partial(_divide_among, stages), stages[0][1].collective_timeout_minutes
    with (
        elastic.training_ranks(divides, run_dir, timeout_minutes),
        contextlib.ExitStack() as last,
        preemption.status_in(run_dir),
        watchdog.explaining(run_dir),
    ):
        last.callback(uploads.close_all)  # when the status is in the history
        for _, settings in stages:
            fetch_run(settings)
        if isinstance(stages, Students):
            return _run_students(stages, resume, callbacks)
        return _run_stages(stages, resume, callbacks)


def _divide_among(stages: list[tuple[str, Config]], world: int) -> bool:
    """Whether `world` ranks can train all runs."""
    if isinstance(stages, Students) and stages.groups == "disjoint":
        world, rest = divmod(world, len(stages))
        if rest:
            return False
    for _, settings in stages:
        if settings.data.streams % world:
            return False
        try:
            check_accumulation(settings.data, world, settings.grad_accumulation, settings.kd.mixing)
        except UserError:
            return False
    return True


def _run_students(
    students: Students, resume: str, callbacks: Sequence[Callback]
) -> dict[str, dict[str, Any]]:
    if resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: several students go on from where they stopped, with auto: to go back with "
            "one, train the config.yaml in its run directory"
        )
    for _, settings in students:  # refuse any run before the first begins
        environment.check(settings)
        has_begun(settings)
    train_all = train_groups if students.groups == "disjoint" else train_students
    return train_all(students, resume, callbacks)


def _run_stages(
    stages: list[tuple[str, Config]], resume: str, callbacks: Sequence[Callback]
) -> dict[str, dict[str, Any]]:
    chain = _is_chain(stages)
    if chain and resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: a chain goes on from where it stopped, with auto: to go back in one stage, "
            "train the config.yaml in its run directory"
        )
    # All ranks look before any of them can write.
    begun = {name for name, settings in stages if chain and has_begun(settings)}
    if begun and resume == "never":
        raise UserError(
            f"--resume never: stage {min(begun)} has begun already: choose another run_dir, or auto"
        )
    finished = {name for name, settings in stages if name in begun and RunDir.of(settings).summary.exists()}
    _check_stages(stages, begun, finished)
    summaries = {}
    for i, (name, settings) in enumerate(stages):
        if chain:
            label = f"indistill: stage {name} ({i + 1} of {len(stages)})"
            _check_inputs(name, settings, begun=name in begun)
            if name in finished:
                _say(f"{label}: finished before, kept in {settings.run_dir}")
                remedy = "restore it, or delete it to end the stage again from its last checkpoint"
                summary = records.load(RunDir.of(settings).summary, records.Summary, remedy)
                summaries[name] = summary.model_dump(exclude_unset=True)
                continue
            if preemption.asked():
                raise Preempted(f"stopped before stage {name}")
            _say(f"{label}: {'goes on' if name in begun else 'begins'} in {settings.run_dir}")
        summaries[name] = train(settings, resume, callbacks=callbacks)
        if chain:
            fetch_run(settings)  # the next stage may read its weights on a node that has not written them
    return summaries


def _check_stages(stages: list[tuple[str, Config]], begun: set[str], finished: set[str]) -> None:
    """Raise UserError for any stage that cannot work, before days of work on another."""
    for name, settings in stages:
        if name not in finished:
            environment.check(settings)
    for name, settings in stages[1:]:
        if name not in begun:
            try:
                lessons.check_fit(settings)
                _check_bank(settings)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None


def _check_bank(settings: Config) -> None:
    """Raise UserError if a score could not be computed from these images."""
    if settings.evaluate.on_bank:
        bank = settings.evaluate.bank
        sets = {name: eval_shards(settings.data, name, bank) for name in settings.data.eval_sets}
        check_bank(settings, bank_shards(settings), sets)


def _is_chain(stages: list[tuple[str, Config]]) -> bool:
    return [name for name, _ in stages] != [""]


def _check_inputs(name: str, settings: Config, begun: bool) -> None:
    """Record the hashes of the weights with which a stage begins; check them if it has begun already.

    Raises UserError if the weights have changed since, or if the record cannot be written.
    """
    run_dir = RunDir.of(settings)
    files = {"student.checkpoint": settings.student.checkpoint if settings.student else None}
    for called, one in settings.by_teacher.items():
        key = f"teachers.{called}" if called else "teacher"
        files[f"{key}.checkpoint"] = one.teacher.checkpoint if one.teacher else None
        files[f"{key}.heads"] = one.teacher.heads if one.teacher else None
    # A missing file is reported by `train`.
    present = {key: Path(file) for key, file in files.items() if file and Path(file).is_file()}
    hashes = {key: sha256(path, ignore_metadata_order=True) for key, path in present.items()}
    record = run_dir.inputs
    if begun:
        remedy = f"restore it, or delete {run_dir.path} to train the stage again"
        kept = records.load(record, records.Inputs, remedy).root if record.exists() else {}
        for key, value in hashes.items():
            if kept.get(key) != value:
                raise UserError(
                    f"stage {name} began with other weights than are now in {files[key]} ({key}): delete "
                    f"{run_dir.path} to train the stage again, or choose another run_dir"
                )
    elif hashes and Ranks.from_environment().is_main_process:
        try:
            run_dir.path.mkdir(parents=True, exist_ok=True)
            replace_text(record, json.dumps(hashes, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"run_dir {run_dir.path}: cannot be written ({error.strerror}): choose another"
            ) from None


def _say(line: str) -> None:
    if Ranks.from_environment().is_main_process:
        print(line, flush=True)
