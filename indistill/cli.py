"""The command line: parse, then call. Nothing heavy is imported before it is known what to do."""

from __future__ import annotations

import argparse
import json
import os
import sys

from indistill import __version__


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="indistill", description="Knowledge distillation at cluster scale.")
    parser.add_argument("--version", action="version", version=f"indistill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser("train", help="train a student, from the start or from where the run stopped")
    train.add_argument("config", help="YAML file")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    train.add_argument(
        "--resume", default="auto", metavar="auto|never|PATH", help="default: auto, the newest checkpoint"
    )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="evaluate a checkpoint or a weights file of the config's student")
    evaluate.add_argument("config", help="YAML file")
    evaluate.add_argument("checkpoint", help="a step-XXXXXXXX directory, a .safetensors or a .pt file")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value")
    evaluate.set_defaults(run=_evaluate)

    arguments, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") or "=" not in text for text in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides += rest  # overrides that stand after an option
    from indistill.config import UserError

    try:
        arguments.run(arguments)
    except UserError as error:
        # A loader worker's error arrives wrapped in its traceback, whose last line is the message.
        message = str(error).strip().splitlines()[-1].removeprefix("indistill.config.UserError: ")
        if os.environ.get("RANK", "0") == "0":
            print(f"indistill: error: {message}", file=sys.stderr, flush=True)
        if "RANK" in os.environ:
            os._exit(2)  # at once: an orderly exit would wait for ranks that wait for this one
        sys.exit(2)


def _train(arguments: argparse.Namespace) -> None:
    from indistill import config

    settings = config.load(arguments.config, arguments.overrides)
    from indistill.train import train

    summary = train(settings, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(summary["metrics"]))


def _evaluate(arguments: argparse.Namespace) -> None:
    from indistill import config

    settings = config.load(arguments.config, arguments.overrides)
    from indistill.train import evaluate_checkpoint

    metrics = evaluate_checkpoint(settings, arguments.checkpoint)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(metrics))
