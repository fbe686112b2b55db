"""The command line: parse, then call. Nothing heavy is imported before it is known what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

from indistill import __version__

if TYPE_CHECKING:
    from indistill.commands.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    try:
        arguments = _parse(argv)
        from indistill.distributed import preemption

        with preemption.listening():
            _run(arguments)
    except KeyboardInterrupt:  # before anybody listened
        print("indistill: interrupted", file=sys.stderr, flush=True)
        os._exit(130)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="indistill", description="Knowledge distillation at cluster scale.")
    parser.add_argument("--version", action="version", version=f"indistill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a student, from the start or from where the run stopped")
    train.add_argument("config", help="YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file"
    )
    train.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="default: auto, the newest checkpoint"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="score a checkpoint, an exported student or any timm model")
    evaluate.add_argument("config", help="YAML file: what to evaluate on")
    evaluate.add_argument(
        "checkpoint",
        help="of the config's student a run, a step-XXXXXXXX directory, a .safetensors or a .pt file; a folder that "
        "export wrote; or the name of a timm model (timm:NAME where there is a file of that name)",
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value")
    evaluate.add_argument("--json", action="store_true", help="all digits, for programs")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="take a run's student home, for timm, ONNX or torch.export")
    export.add_argument(
        "source",
        metavar="run",
        help="a run directory; of a run that is not finished, its newest checkpoint counts",
    )
    export.add_argument("destination", metavar="dest", help="a folder, made if missing; else empty")
    export.add_argument("--format", choices=("timm", "onnx", "torch"), default="timm", help="default: timm")
    export.add_argument(
        "--weights", choices=("ema", "raw"), help="default: the moving average, where the run kept one"
    )
    export.add_argument(
        "--checkpoint", metavar="step-XXXXXXXX", help="default: the end of the run, or the newest"
    )
    export.set_defaults(run=_export)

    plan = commands.add_parser("plan", help="what a run will take: time, memory, bytes; without a GPU")
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key.sub=value")
    plan.add_argument(
        "--world", type=_count, metavar="N", help="processes (default: machine.devices_per_node)"
    )
    plan.add_argument(
        "--samples", type=_count, metavar="N", help="training images, where their shards are not"
    )
    plan.add_argument("--json", action="store_true", help="all numbers, for programs")
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser(
        "doctor", help="whether a run will work here: on this machine, or on these nodes"
    )
    doctor.add_argument("config", nargs="?", help="YAML file; without one only the machine is looked at")
    doctor.add_argument("overrides", nargs="*", metavar="key.sub=value")
    doctor.add_argument("--json", action="store_true", help="all lines, of all processes, for programs")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="one HTML file of a run, or of several side by side")
    report.add_argument(
        "runs",
        nargs="+",
        metavar="run",
        help="a run directory; a chain's or several students' stands for the runs in it",
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="default: RUN/report.html; of several, comparison.html beside the first",
    )
    report.add_argument(
        "--baseline", metavar="RUN", help="a run to compare the results with: the student alone, say"
    )
    report.set_defaults(run=_report)

    targets = commands.add_parser("targets", help="run the teacher once, for a config with targets: cached")
    targets.add_argument("config", help="YAML file; what is there is kept, so a job that stopped goes on")
    targets.add_argument("overrides", nargs="*", metavar="key.sub=value")
    targets.add_argument(
        "--verify", type=int, metavar="N", help="recompute N random records; exit code 1 if any differs"
    )
    targets.set_defaults(run=_targets)

    for command in (train, evaluate, plan, doctor, targets):
        command.add_argument(
            "--plugin",
            action="append",
            default=[],
            metavar="FILE",
            help="a Python file that defines losses of your own, which it runs (docs/losses.md); may be repeated",
        )
    _add_shards(commands.add_parser("shards", help="pack, index and verify WebDataset shards"))

    arguments, rest = parser.parse_known_args(argv)
    if rest and (
        not hasattr(arguments, "overrides") or any(text.startswith("-") or "=" not in text for text in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest  # overrides that stand after an option
    return arguments


def _run(arguments: argparse.Namespace) -> None:
    """Do what is asked, with the exit codes of docs/cluster.md."""
    from indistill.config import UserError, plugins
    from indistill.config.run_dir import in_one_line
    from indistill.distributed import preemption

    try:
        for file in getattr(arguments, "plugin", ()):
            plugins.load_file(file)
        arguments.run(arguments)
    except preemption.Preempted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"indistill: {stopped}: the same command goes on from there", file=sys.stderr)
        _leave(preemption.exit_code())
    except UserError as error:
        message = in_one_line(error)
        rank = os.environ.get("RANK", "0")
        if rank == "0" or error.found_by_one_rank:
            print(f"indistill: error: {message}", file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            _leave(2)
        sys.exit(2)
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    from indistill.distributed import preemption

    sys.stdout.flush()
    sys.stderr.flush()
    preemption.exit_at_once(code)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _add_shards(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)
    pack = actions.add_parser(
        "pack", help="write shards from an image folder, a CSV of path,label, or shards"
    )
    pack.add_argument("source", help="a folder of class folders, a CSV file, or shards (braces expand)")
    pack.add_argument("destination", help="a folder, made if missing; a packing that stopped there goes on")
    pack.add_argument("--prefix", default="shard", help="shards are called PREFIX-000000.tar and so on")
    pack.add_argument("--shard-megabytes", type=float, default=100.0, help="size of a shard (default: 100)")
    pack.add_argument("--resize", type=int, metavar="PIXELS", help="reduce the shorter side to this, as JPEG")
    pack.add_argument("--quality", type=int, default=90, help="JPEG quality with --resize (default: 90)")
    pack.add_argument("--seed", type=int, default=0, help="of the shuffle of images from files")
    pack.add_argument(
        "--classes",
        metavar="FILE|FOLDER",
        help="number the classes as another split does: its folder of class folders or its packed folder, or a file "
        "with one name per line, or JSON (a list, a mapping from name to label, a dataset.json)",
    )
    pack.set_defaults(run=_pack)
    for name, run, purpose in (
        ("index", _index, "build the index of every shard anew"),
        ("verify", _verify, "read and decode everything; exit code 1 if anything is bad"),
    ):
        action = actions.add_parser(name, help=purpose)
        action.add_argument("urls", nargs="+", help="paths or URLs; braces expand")
        action.add_argument("--allow-pipe", action="store_true", help="let pipe: URLs run their commands")
        action.set_defaults(run=run)
    actions.choices["verify"].add_argument(
        "--num-classes",
        type=_count,
        metavar="N",
        help="data.num_classes: images without a label below it are bad, too",
    )
    for action in actions.choices.values():
        action.add_argument(
            "--workers", type=int, default=os.cpu_count(), help="processes (default: one per core)"
        )
        action.add_argument("--cache-dir", help="where indices and remote shards go (data.cache_dir)")


def _pack(arguments: argparse.Namespace) -> None:
    from indistill.data import class_names, packing

    content = packing.pack_source(
        arguments.source,
        arguments.destination,
        prefix=arguments.prefix,
        shard_bytes=int(arguments.shard_megabytes * 1e6),
        resize=arguments.resize,
        quality=arguments.quality,
        seed=arguments.seed,
        workers=arguments.workers,
        cache_dir=arguments.cache_dir,
        progress=True,
        classes=None if arguments.classes is None else class_names.read(arguments.classes),
    )
    if content["classes"] is not None:
        print(f"labels: {class_names.table(content['classes'])}", file=sys.stderr)
    told = ("samples", "shards", "urls", "mean_bytes", "unlabelled", "ignored_files")
    print(json.dumps({key: content[key] for key in told}))


def _index(arguments: argparse.Namespace) -> None:
    from indistill.data import verify

    counts = verify.index(arguments.urls, **_reading(arguments))
    print(f"{sum(counts.values())} samples in {len(counts)} shards")


def _verify(arguments: argparse.Namespace) -> None:
    from indistill.data import verify

    content = verify.verify(arguments.urls, **_reading(arguments), num_classes=arguments.num_classes)
    for member in content.bad:
        print(f"{member.shard}: {member.key}: {member.problem}")
    print(f"{content.summary()}\n{len(content.bad)} bad members")
    sys.exit(1 if content.bad else 0)


def _reading(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("cache_dir", "allow_pipe", "workers")
    return {"progress": True, **{name: getattr(arguments, name) for name in names}}


def _train(arguments: argparse.Namespace) -> None:
    trainer = _trainer(arguments)
    summary = trainer.train(arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        metrics = (
            {name: of_run["metrics"] for name, of_run in summary.items()}
            if trainer.several
            else summary["metrics"]
        )
        print(json.dumps(metrics))


def _evaluate(arguments: argparse.Namespace) -> None:
    metrics = _trainer(arguments).evaluate(arguments.checkpoint)
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.json:
        print(json.dumps(metrics))
        return
    width = max(map(len, metrics), default=0)
    print("\n".join(f"{name:{width}}  {100 * value:6.2f} %" for name, value in metrics.items()))


def _export(arguments: argparse.Namespace) -> None:
    from indistill.commands.export import write

    write.export(
        arguments.source, arguments.destination, arguments.format, arguments.weights, arguments.checkpoint
    )


def _plan(arguments: argparse.Namespace) -> None:
    trainer = _trainer(arguments)
    plan = trainer.plan(arguments.world, arguments.samples)
    from indistill.commands.plan.text import text

    if not trainer.several:
        print(json.dumps(dataclasses.asdict(plan)) if arguments.json else text(plan))
    elif arguments.json:
        print(json.dumps({name: dataclasses.asdict(of_run) for name, of_run in plan.items()}))
    else:
        print("\n\n\n".join(f"stage {name}: {text(of_run)}" for name, of_run in plan.items()))


def _doctor(arguments: argparse.Namespace) -> None:
    from indistill.config import runs

    stages = runs.load(arguments.config, arguments.overrides) if arguments.config else []
    from indistill.commands.doctor.run import run

    code = run(stages, arguments.json)
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)  # at once: an orderly exit would wait for ranks that may be stuck
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


def _trainer(arguments: argparse.Namespace) -> Trainer:
    from indistill.commands.trainer import Trainer

    return Trainer(arguments.config, *arguments.overrides)
