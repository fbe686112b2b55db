"""The Python API; the command line is a thin layer over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indistill.config import Config, UserError, runs
from indistill.config.ranks import Ranks
from indistill.training.callbacks import Callback

if TYPE_CHECKING:
    from indistill.commands.export.load import Program
    from indistill.commands.export.source import Source
    from indistill.commands.plan.result import Estimate
    from indistill.models.network import Network


class Trainer:
    """Plan, train, evaluate, report and export the run, or the runs, of a config.

    config: a YAML file, its content as a mapping, or a `Config`. overrides: `"a.b=c"` strings that replace
    its values, as on the command line.

    A config may define several runs, a chain of `stages` or `students` of one teacher: then `train` and
    `plan` return a mapping from their names, `report` covers all of them, and the other methods raise
    UserError.

    Raises UserError, here and in every method, for a mistake in the config, the data or the weights: one line
    that names the mistake and the remedy. Importing the class does not import torch; creating a Trainer does,
    for the losses of the config.
    """

    def __init__(self, config: str | Path | Mapping[str, Any] | Config, *overrides: str) -> None:
        self.config = config
        self.runs: list[tuple[str, Config]] = runs.load(config, overrides)

    @property
    def several(self) -> bool:
        """Whether the config defines several runs."""
        return [name for name, _ in self.runs] != [""]

    @property
    def settings(self) -> Config:
        """The validated, frozen config of the only run."""
        if self.several:
            kind = "students" if isinstance(self.runs, runs.Students) else "stages"
            file = self.config if isinstance(self.config, str | Path) else "config"
            raise UserError(
                f"{file} has several {kind}: give the config.yaml in the run directory of one instead"
            )
        return self.runs[0][1]

    def plan(self, world: int | None = None, samples: int | None = None) -> Estimate | dict[str, Estimate]:
        """Estimate the time, memory and bytes of `train`, without a GPU; `print(plan)` shows the estimate.

        world: number of processes; None: the config's `machine.devices_per_node`. samples: number of training
        images, needed only if their shards are not on this machine.
        """
        from indistill.commands.plan import estimate

        estimates = estimate.of_chain(self.runs, world, samples)
        return estimates if self.several else estimates[""]

    def train(self, resume: str = "auto", callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
        """Train to the end and return the content of `summary.json`.

        resume: auto, from the newest checkpoint in `run_dir` if there is one; never, from the start; or the
        path of a checkpoint. callbacks: called after each step, evaluation and checkpoint, and at the end;
        see `indistill.Callback`.
        """
        from indistill.distributed import preemption

        run_dir = Path(self.runs[0][1].run_dir)
        with preemption.failure_in(run_dir.parent if self.several else run_dir):
            from indistill.commands.report.page import ReportAtEnd
            from indistill.training.runs import run

        summaries = run(self.runs, resume, [ReportAtEnd(), *callbacks])
        return summaries if self.several else summaries[""]

    def evaluate(self, what: str | Path | None = None) -> dict[str, float]:
        """Score a network on `data.eval`; returns top1, top5 and what `evaluate` adds, in [0, 1], by name.

        With `evaluate.knn`, knn_top1 and knn_top5, with `evaluate.linear_probe`, probe_top1, probe_top5 and
        probe_l2, with `evaluate.retrieval`, mAP; of several named sets, val/top1 and so on.

        what: a run, checkpoint or weights file of the config's student, an exported folder, or the name of a
        timm model; None: this run's student.
        """
        settings = self.settings  # raises UserError before the imports, which take seconds
        from indistill.commands.evaluate import evaluate_checkpoint

        return evaluate_checkpoint(settings, str(settings.run_dir if what is None else what))

    def student(self, what: str | Path | None = None) -> Network | Program:
        """Load the network that `evaluate(what)` scores, in eval mode on the CPU.

        It is a Program for an ONNX export.

        It normalises its input: `student(images).logits` of uint8 images [B, 3, S, S] is [B, K].
        """
        from indistill.commands.export.load import load_for_eval

        network, _ = load_for_eval(self.settings, str(self.settings.run_dir if what is None else what))
        return network.eval()

    def export(
        self,
        destination: str | Path,
        form: str = "timm",
        weights: str | None = None,
        checkpoint: str | None = None,
    ) -> Source:
        """Export this run's student to a folder; see `indistill.commands.export.write.export`."""
        from indistill.commands.export.write import export

        return export(self.settings.run_dir, destination, form=form, weights=weights, step=checkpoint)

    def report(self, output: str | Path | None = None, baseline: str | Path | None = None) -> Path:
        """Write one HTML file about the run or runs; see `indistill.commands.report.page.write`."""
        from indistill.commands.report import page

        run_dir = Path(self.runs[0][1].run_dir)
        return page.write([run_dir.parent if self.several else run_dir], output, baseline)

    def write_targets(self) -> None:
        """Compute and store the targets of each teacher, for `targets.source: cached` or `auto`."""
        from indistill.commands.targets.write import write
        from indistill.training.lessons import naming_teacher

        for called, one in self.settings.by_teacher.items():
            _print_teacher(called)
            with naming_teacher(called):
                write(one)

    def verify_targets(self, records: int) -> bool:
        """Recompute the stored targets of `records` random samples; prints those that differ.

        Returns whether all agree. Raises ValueError for `records` below 1.
        """
        from indistill.commands.targets.verify import verify

        if records < 1:
            raise ValueError(f"verify_targets: records={records} would check nothing: give at least 1")
        results = []
        for called, one in self.settings.by_teacher.items():
            _print_teacher(called)
            results.append(verify(one, records))
        return all(results)


def _print_teacher(called: str) -> None:
    """Head the output about one of several teachers."""
    if called and Ranks.from_environment().is_main_process:
        print(f"teacher {called}:", flush=True)
