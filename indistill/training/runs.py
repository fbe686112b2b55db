"""Train the runs of a config file: one, a chain of stages one after the other, or several students at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from indistill.config import Config, UserError
from indistill.config.files import sha256
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir, has_begun
from indistill.config.runs import Students
from indistill.distributed import environment, preemption, watchdog
from indistill.distributed.preemption import Preempted
from indistill.training import groups, parts
from indistill.training import students as training_students
from indistill.training.callbacks import Callback
from indistill.training.loop import train


def run(
    stages: list[tuple[str, Config]], resume: str = "auto", callbacks: Sequence[Callback] = ()
) -> dict[str, dict[str, Any]]:
    """Train what `runs.load` returned, stage by stage; finished stages are kept. Returns each stage's `summary.json`.

    Raises UserError for a run directory that holds another stage, and for a stage that began with other weights than
    an earlier stage has now, and Preempted, after which no stage begins.
    """
    run_dir = Path(stages[0][1].run_dir)
    run_dir = run_dir.parent if _is_chain(stages) else run_dir
    with preemption.status_in(run_dir), watchdog.explaining(run_dir):
        return (_run_together if isinstance(stages, Students) else _run_stages)(stages, resume, callbacks)


def _run_together(
    students: Students, resume: str, callbacks: Sequence[Callback]
) -> dict[str, dict[str, Any]]:
    if resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: several students go on from where they stopped, with auto: to go back with one, train "
            "the config.yaml in its run directory"
        )
    for _, settings in students:  # a run that has to be refused is so before another begins
        environment.check(settings)
        has_begun(settings)
    summaries = (groups if students.groups == "disjoint" else training_students).train(
        students, resume, callbacks
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return summaries


def _run_stages(
    stages: list[tuple[str, Config]], resume: str, callbacks: Sequence[Callback]
) -> dict[str, dict[str, Any]]:
    chain = _is_chain(stages)
    if chain and resume not in ("auto", "never"):
        raise UserError(
            f"--resume {resume}: a chain goes on from where it stopped, with auto: to go back in one stage, train the "
            "config.yaml in its run directory"
        )
    # All ranks look before any can write. A stage that has to be refused is so before days of work on the others.
    begun = {name for name, settings in stages if chain and has_begun(settings)}
    if begun and resume == "never":
        raise UserError(
            f"--resume never: stage {min(begun)} has begun already: choose another run_dir, or auto"
        )
    finished = {name for name, settings in stages if name in begun and RunDir.of(settings).summary.exists()}
    for name, settings in stages:
        if name not in finished:
            environment.check(settings)
    for name, settings in stages[1:]:
        if name not in begun:
            try:
                parts.check_fit(settings)
            except UserError as error:
                raise UserError(f"stage {name}: {error}") from None

    summaries = {}
    for i, (name, settings) in enumerate(stages):
        if chain:
            said = f"indistill: stage {name} ({i + 1} of {len(stages)}): "
            _check_inputs(name, settings, begun=name in begun)
            if name in finished:
                _say(f"{said}finished before, kept in {settings.run_dir}")
                summaries[name] = json.loads(RunDir.of(settings).summary.read_text())
                continue
            if preemption.asked():
                raise Preempted(f"stopped before stage {name}")
            _say(f"{said}{'goes on' if name in begun else 'begins'} in {settings.run_dir}")
        summaries[name] = train(settings, resume, callbacks=callbacks)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # that of all stages: under torchrun it cannot be made twice
    return summaries


def _is_chain(stages: list[tuple[str, Config]]) -> bool:
    return [name for name, _ in stages] != [""]


def _check_inputs(name: str, settings: Config, begun: bool) -> None:
    """Keep the hashes of the weights that a stage begins with, in `inputs.json`; later they must still be the same."""
    run_dir, teacher = Path(settings.run_dir), settings.teacher
    files = {"teacher.checkpoint": teacher and teacher.checkpoint, "teacher.heads": teacher and teacher.heads}
    files["student.checkpoint"] = settings.student and settings.student.checkpoint
    # A file that is missing is for train to tell.
    hashes = {
        key: sha256(Path(file), ignore_metadata_order=True)
        for key, file in files.items()
        if file and Path(file).is_file()
    }
    record = RunDir(run_dir).inputs
    if begun:
        kept = json.loads(record.read_text()) if record.exists() else {}
        for key, value in hashes.items():
            if kept.get(key) != value:
                raise UserError(
                    f"stage {name} began with other weights than are now in {files[key]} ({key}): delete {run_dir} to "
                    "train the stage again, or choose another run_dir"
                )
    elif hashes and Ranks.from_environment().is_main_process:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(hashes, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"run_dir {run_dir}: cannot be written ({error.strerror}): choose another"
            ) from None


def _say(line: str) -> None:
    if Ranks.from_environment().is_main_process:
        print(line, flush=True)
