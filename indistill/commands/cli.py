"""The command line. It imports nothing heavy before it has parsed its arguments."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import select
import shlex
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

from indistill.commands import shards, usage

if TYPE_CHECKING:
    from indistill.commands.trainer import Trainer
    from indistill.config.ranks import Ranks


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv` (default: `sys.argv`) and exit with the codes of docs/cluster.md."""
    try:
        try:
            _main(argv)
        finally:
            sys.stdout.flush()  # an exit would do it, where nothing could handle an error
    except KeyboardInterrupt:  # before preemption.listening handles it
        print("indistill: interrupted", file=sys.stderr, flush=True)
        os._exit(130)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        from indistill.distributed import preemption

        # As of a program that the signal ends: `indistill plan ... | head`.
        preemption.exit_at_once(128 + signal.SIGPIPE)


def _main(argv: list[str] | None) -> None:
    arguments = _parse(argv)
    from indistill.config.output import printable_output
    from indistill.distributed import preemption

    with printable_output():
        ranks = _ranks()
        with preemption.listening():
            _run(arguments, ranks)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line; `run` of the result is the function that executes the command."""
    parser = usage.Parser(prog="indistill", description=usage.DESCRIPTION)
    parser.examples(
        "indistill train configs/imagenet_r34_r18.yaml", "indistill export runs/demo/indistill student/"
    )
    usage.add_version_and_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, add, purpose in (
        ("train", _add_train, "train a student by knowledge distillation, or resume its run"),
        ("eval", _add_eval, "evaluate a checkpoint, an exported student or a timm model"),
        ("export", _add_export, "export a run's student for timm, ONNX or torch.export"),
        ("plan", _add_plan, "estimate a run's time, memory and bytes, without a GPU"),
        ("doctor", _add_doctor, "check whether a run will work on this machine or these nodes"),
        ("report", _add_report, "write one HTML file about a run, or about several side by side"),
        ("targets", _add_targets, "compute and store the teacher's targets, for targets: cached"),
        ("shards", shards.add, "pack, index and verify WebDataset shards of images"),
        ("init", _add_init, "list the recipes, or write one with the files of a cluster"),
        ("schema", _add_schema, "print the JSON Schema of a config, for editors"),
        ("demo", _add_demo, "distil on scikit-learn's digits, here, in two minutes"),
    ):
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        command.set_defaults(parser=command)
        add(command)

    arguments, rest = parser.parse_known_args(argv)
    overridable = hasattr(arguments, "overrides")
    if rest and not (overridable and all("=" in text and not text.startswith("-") for text in rest)):
        _refuse_rest(arguments.parser, rest, overridable)
    if overridable:
        arguments.overrides += rest  # argparse leaves overrides that follow an option
    return arguments


def _refuse_rest(parser: usage.Parser, rest: list[str], overridable: bool) -> NoReturn:
    """Exit for arguments that the command does not know."""
    from indistill.config import Config

    parser.refuse(rest, keys=Config.model_fields if overridable else ())


def _add_config(parser: usage.Parser, *, config_help: str = "YAML file", optional: bool = False) -> None:
    parser.add_argument("config", nargs="?" if optional else None, help=config_help)
    _add_overrides(parser)


def _add_overrides(parser: usage.Parser) -> None:
    # Without a default, argparse names them among the arguments that are required.
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.sub=value", help="replace values of the file"
    )
    _add_plugin(parser)
    usage.add_allow_pipe(parser)


def _add_plugin(parser: usage.Parser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="run a Python file that defines losses of your own (docs/losses.md); may be repeated",
    )


def _add_train(parser: usage.Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto (default): from the newest checkpoint, if any; never: from the start; or a checkpoint",
    )
    parser.examples(
        "indistill train configs/imagenet_r34_r18.yaml data.workers=8",
        "torchrun --nproc-per-node 8 -m indistill train configs/imagenet_r34_r18.yaml",
        page="runs.md",
    )
    parser.set_defaults(run=_train)


def _add_eval(parser: usage.Parser) -> None:
    parser.add_argument("config", help="YAML file that says what to evaluate on")
    parser.add_argument(
        "checkpoint",
        help="a run, a step-XXXXXXXX directory, or a .safetensors or .pt file, each of the config's student; "
        "a folder written by export; or the name of a timm model (timm:NAME if a file has that name)",
    )
    _add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print JSON with all digits")
    parser.examples(
        "indistill eval configs/digits_demo.yaml runs/demo/indistill",
        "indistill eval configs/digits_demo.yaml runs/digits-student --json",
        page="runs.md",
    )
    parser.set_defaults(run=_evaluate)


def _add_export(parser: usage.Parser) -> None:
    parser.add_argument(
        "source", metavar="run", help="run directory; of an unfinished run, the newest checkpoint is exported"
    )
    parser.add_argument("destination", metavar="dest", help="folder to write: a new or an empty one")
    parser.add_argument("--format", choices=("timm", "onnx", "torch"), default="timm", help="default: timm")
    parser.add_argument(
        "--weights", choices=("ema", "raw"), help="default: ema, the moving average, if the run has one"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="step-XXXXXXXX",
        help="default: the end of the run, or the newest checkpoint of an unfinished one",
    )
    _add_plugin(parser)
    parser.examples(
        "indistill export runs/demo/indistill runs/digits-student",
        "indistill export runs/demo/indistill runs/digits-onnx --format onnx",
        page="runs.md",
    )
    parser.set_defaults(run=_export)


def _add_plan(parser: usage.Parser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--world",
        type=usage.count,
        metavar="N",
        help="number of processes (default: machine.devices_per_node)",
    )
    parser.add_argument(
        "--samples",
        type=usage.count,
        metavar="N",
        help="number of training images, if their shards are elsewhere",
    )
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.examples(
        "indistill plan configs/imagenet_r34_r18.yaml --samples 1281167",
        "indistill plan configs/imagenet_r34_r18.yaml --world 32 --json",
        page="runs.md",
    )
    parser.set_defaults(run=_plan)


def _add_doctor(parser: usage.Parser) -> None:
    _add_config(parser, config_help="YAML file; without one, check the machine alone", optional=True)
    parser.add_argument("--json", action="store_true", help="print the lines of all processes as JSON")
    parser.examples(
        "indistill doctor",
        "indistill doctor configs/digits_demo.yaml run_dir=runs/new",
        page="runs.md",
    )
    parser.set_defaults(run=_doctor)


def _add_report(parser: usage.Parser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="run directory; that of a chain or of several students stands for all runs in it",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: RUN/report.html; for several runs, comparison.html next to the first",
    )
    parser.add_argument(
        "--baseline", metavar="RUN", help="run to compare the results with, such as the student alone"
    )
    _add_plugin(parser)
    parser.examples(
        "indistill report runs/demo/indistill",
        "indistill report runs/demo/indistill --baseline runs/demo/alone",
        page="runs.md",
    )
    parser.set_defaults(run=_report)


def _add_targets(parser: usage.Parser) -> None:
    _add_config(
        parser, config_help="YAML file; targets that are stored already are kept, so a stopped job resumes"
    )
    parser.add_argument(
        "--verify",
        type=usage.count,
        metavar="N",
        help="recompute the targets of N random samples instead; exit code 1 if any differs",
    )
    parser.examples(
        "indistill targets configs/digits_demo.yaml data.augment.views=4",
        "indistill targets configs/digits_demo.yaml data.augment.views=4 --verify 100",
        page="targets.md",
    )
    parser.set_defaults(run=_targets)


def _add_init(parser: usage.Parser) -> None:
    parser.examples("indistill init", "indistill init imagenet_r34_r18 . --slurm --nodes 4")
    parser.add_argument("recipe", nargs="?", help="name of a recipe; without one, list all of them")
    parser.add_argument("folder", nargs="?", default=".", help="folder to write into (default: this one)")
    parser.add_argument("--slurm", action="store_true", help="also write the batch script of a SLURM job")
    parser.add_argument(
        "--kubernetes", action="store_true", help="also write a Kubernetes Job, and the same as a TrainJob"
    )
    parser.add_argument("--nodes", type=usage.count, metavar="N", help="number of nodes of the job")
    parser.add_argument("--partition", metavar="NAME", help="partition of the SLURM job")
    parser.add_argument("--account", metavar="NAME", help="account of the SLURM job")
    parser.add_argument("--data", metavar="URL", help="folder of the shards, a path or URL (data.root)")
    parser.set_defaults(run=_init)


def _add_demo(parser: usage.Parser) -> None:
    parser.examples("indistill demo", "indistill report runs/demo/indistill")
    parser.set_defaults(run=_demo)


def _add_schema(parser: usage.Parser) -> None:
    parser.examples(
        "indistill schema > configs/schema.json",
        "indistill schema | python -m json.tool --compact > schema.json",
        page="configuration.md",
    )
    parser.set_defaults(run=_schema)


def _ranks() -> Ranks:
    """Read rank and world size; exits with code 2 if they are malformed."""
    from indistill.config import UserError
    from indistill.config.ranks import Ranks

    try:
        return Ranks.from_environment()
    except UserError as error:
        print(f"indistill: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    """Execute the command; any exit has one of the codes of docs/cluster.md."""
    from indistill.config import UserError, in_one_line, plugins, printable
    from indistill.data.urls import ALLOW_PIPE
    from indistill.distributed import preemption

    if getattr(arguments, "allow_pipe", False):
        os.environ[ALLOW_PIPE] = "1"  # for this process, and those that it starts
    try:
        for file in getattr(arguments, "plugin", ()):
            plugins.load_file(file)
        arguments.run(arguments)
        _end_process_group()
    except preemption.Preempted as stopped:
        if ranks.is_main_process:
            print(f"indistill: {stopped}: run the same command again to continue from there", file=sys.stderr)
        _leave(preemption.exit_code())
    except UserError as error:
        node_may_be_alone = ranks.leads_node and not error.on_all_ranks
        _refuse(ranks, in_one_line(error), everywhere=error.found_by_one_rank or node_may_be_alone)
    except PermissionError as error:  # wherever a file is opened: the program is not at fault
        what = printable(str(error.filename or error))
        message = f"{what}: permission denied: change its permissions, or name another"
        _refuse(ranks, message, everywhere=True)
    except Exception as error:
        # A path from a config that no file can have; elsewhere "no such file" would have said it.
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            _refuse(ranks, f"{in_one_line(error)}: correct the path", everywhere=True)
        if not ranks.launched or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        traceback.print_exc()
        _leave(1)


def _end_process_group() -> None:
    """End the process group of the ranks in order: NCCL warns of one that a process leaves behind.

    A program that uses `Trainer` keeps it for its next call: under torchrun it cannot be made twice.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _refuse(ranks: Ranks, message: str, *, everywhere: bool) -> NoReturn:
    """Exit for a user's mistake; `everywhere`: print the message on this rank, whichever it is."""
    if ranks.is_main_process or everywhere:
        print(f"indistill: error: {message}", file=sys.stderr, flush=True)
    if ranks.launched:
        _leave(2)
    sys.exit(2)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for other ranks or threads."""
    from indistill.distributed import preemption

    sys.stdout.flush()
    sys.stderr.flush()
    preemption.exit_at_once(code)


def _train(arguments: argparse.Namespace) -> None:
    from indistill.config.ranks import Ranks

    trainer = _trainer(arguments)
    summary = trainer.train(arguments.resume)
    if not Ranks.from_environment().is_main_process:
        return
    if trainer.several:
        print(json.dumps({name: of_run["metrics"] for name, of_run in summary.items()}))
    else:
        print(json.dumps(summary["metrics"]))


def _evaluate(arguments: argparse.Namespace) -> None:
    from indistill.config.ranks import Ranks

    metrics = _trainer(arguments).evaluate(arguments.checkpoint)
    if not Ranks.from_environment().is_main_process:
        return
    if arguments.json:
        print(json.dumps(metrics))
        return
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        text = f"{value:6g}" if name.endswith("probe_l2") else f"{100 * value:6.2f} %"
        print(f"{name:{width}}  {text}")


def _export(arguments: argparse.Namespace) -> None:
    from indistill.commands.export import write

    write.export(
        arguments.source,
        arguments.destination,
        form=arguments.format,
        weights=arguments.weights,
        step=arguments.checkpoint,
    )


def _plan(arguments: argparse.Namespace) -> None:
    plan = _trainer(arguments).plan(arguments.world, arguments.samples)
    if not isinstance(plan, dict):
        print(json.dumps(dataclasses.asdict(plan)) if arguments.json else plan)
    elif arguments.json:
        print(json.dumps({name: dataclasses.asdict(of_run) for name, of_run in plan.items()}))
    else:
        print("\n\n\n".join(f"stage {name}: {of_run}" for name, of_run in plan.items()))


def _doctor(arguments: argparse.Namespace) -> None:
    from indistill.config import runs
    from indistill.config.ranks import Ranks

    stages = runs.load(arguments.config, arguments.overrides) if arguments.config else []
    from indistill.commands.doctor.run import run

    code = run(stages, arguments.json)
    sys.stdout.flush()
    if Ranks.from_environment().launched:
        os._exit(code)  # a normal exit would wait for ranks that may hang
    sys.exit(code)


def _report(arguments: argparse.Namespace) -> None:
    from indistill.commands.report import page

    print(page.write(arguments.runs, arguments.output, arguments.baseline))


def _targets(arguments: argparse.Namespace) -> None:
    trainer = _trainer(arguments)
    if arguments.verify is None:
        trainer.write_targets()
    elif not trainer.verify_targets(arguments.verify):
        sys.exit(1)


def _init(arguments: argparse.Namespace) -> None:
    from indistill.commands import init
    from indistill.config import UserError, printable

    options = ("slurm", "kubernetes", "nodes", "partition", "account", "data")
    values = {name: getattr(arguments, name) for name in options}
    if arguments.recipe is None:
        if given := next((name for name, value in values.items() if value), None):
            raise UserError(f"--{given} is for a recipe: name one (`indistill init` lists them)")
        found = init.recipes()
        width = max(map(len, found))
        print("\n".join(f"{name:{width}}  {title}" for name, title in found.items()))
        return
    commands = init.write(arguments.recipe, arguments.folder, **values)
    print(f"Next, in {printable(shlex.quote(arguments.folder))}:", *commands, sep="\n    ")


def _demo(arguments: argparse.Namespace) -> None:
    from indistill.commands import demo
    from indistill.distributed import preemption

    try:
        demo.main()
    except preemption.Preempted:  # a new demo begins at the start
        raise KeyboardInterrupt from None


def _schema(arguments: argparse.Namespace) -> None:
    from indistill.commands import schema

    print(json.dumps(schema.of_file(), indent=1))


def _trainer(arguments: argparse.Namespace) -> Trainer:
    from indistill.commands.trainer import Trainer

    return Trainer(arguments.config, *arguments.overrides)
