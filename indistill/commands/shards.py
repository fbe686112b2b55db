"""`indistill shards`: pack, index and verify WebDataset shards. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from indistill.commands import usage

if TYPE_CHECKING:
    from indistill.config import Label

_PACKING = (
    "indistill shards pack train/ shards/train/ --prefix mine-train --resize 256",
    "indistill shards verify 'shards/train/*.tar' --num-classes 1000",
)


def add(parser: usage.Parser) -> None:
    """Add the subcommands and their options."""
    parser.examples(*_PACKING, page="data.md")
    actions = parser.add_subparsers(dest="action", required=True)
    _add_pack(
        actions.add_parser("pack", help="write shards from an image folder, a CSV of path,label, or shards")
    )
    for name, run, purpose in (
        ("index", _index, "rebuild the index of every shard"),
        ("verify", _verify, "read and decode every image; exit code 1 if any is bad"),
    ):
        action = actions.add_parser(name, help=purpose)
        action.add_argument("urls", nargs="+", help="paths or URLs; braces expand")
        action.set_defaults(run=run)
    actions.choices["index"].add_argument(
        "--hash",
        action="store_true",
        help="record the SHA-256 of every shard, which is checked whenever the shard is fetched",
    )
    actions.choices["verify"].add_argument(
        "--num-classes",
        type=usage.count,
        metavar="N",
        help="number of classes (data.num_classes): an image whose label is missing or not below it is bad",
    )
    for action in actions.choices.values():
        action.set_defaults(parser=action)
        action.examples(*_PACKING, page="data.md")
        usage.add_allow_pipe(action)
        action.add_argument(
            "--workers",
            type=usage.processes,
            metavar="N",
            default=os.cpu_count(),
            help="number of processes (default: one per core)",
        )
        action.add_argument("--cache-dir", help="directory for indices and remote shards (data.cache_dir)")


def _add_pack(parser: usage.Parser) -> None:
    parser.add_argument(
        "source",
        help="a folder of class folders or of images, a list of path,label or of paths (CSV) or of "
        "ImageNet's validation labels, Parquet files or hf://datasets/OWNER/NAME, or shards (braces expand)",
    )
    parser.add_argument(
        "destination", help="folder to write; if a packing was interrupted there, it continues"
    )
    parser.add_argument("--prefix", default="shard", help="shards are named PREFIX-000000.tar and so on")
    parser.add_argument(
        "--shard-megabytes",
        type=usage.megabytes,
        metavar="MB",
        default=100.0,
        help="size of a shard (default: 100)",
    )
    _add_resizing(parser)
    parser.add_argument(
        "--seed",
        type=usage.integer(0, 2**32 - 1),
        metavar="N",
        default=0,
        help="seed of the shuffle of image files (default: 0)",
    )
    parser.add_argument(
        "--classes",
        metavar="FILE|FOLDER",
        help="number the classes like another split: its folder of class folders, its packed folder, a text "
        "file with one name per line, or a JSON file (a list, a mapping from name to label, a dataset.json)",
    )
    _add_reading(parser)
    parser.set_defaults(run=_pack)


def _add_resizing(parser: usage.Parser) -> None:
    parser.add_argument(
        "--resize",
        type=usage.integer(1, 65_535),  # JPEG's largest
        metavar="PIXELS",
        help="reduce the shorter side to this length and write JPEG",
    )
    parser.add_argument(
        "--quality",
        type=usage.integer(1, 100),
        metavar="Q",
        default=90,
        help="JPEG quality with --resize, from 1 to 100 (default: 90)",
    )


def _add_reading(parser: usage.Parser) -> None:
    """Add the options that say how a source is read (`packing.Reading`)."""
    parser.add_argument(
        "--images", metavar="FOLDER", help="folder with the images of a list (default: that of the list)"
    )
    parser.add_argument(
        "--encoding",
        metavar="NAME",
        help="encoding of a list, also of classes, such as cp1252 or utf-16 (default: UTF-8)",
    )
    parser.add_argument(
        "--take",
        choices=("folders", "tars"),
        help="which of the two to pack of a folder that has both class folders and tars",
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="also pack what links in a folder name outside of it"
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="pack all images below a folder, whose folders are no classes, or of Parquet files, without "
        "labels; with --label, also images of shards that have none",
    )
    parser.add_argument(
        "--label",
        metavar="json:FIELD|txt|cls",
        help="where the labels of shards of others are, as data.label; names of classes need --classes FILE "
        "(default: numbers in KEY.cls)",
    )
    for what in ("image", "label"):
        parser.add_argument(
            f"--{what}-column",
            metavar="NAME",
            help=f"column of the {what}s of Parquet files (default: the one that looks like it)",
        )


def _pack(arguments: argparse.Namespace) -> None:
    from indistill.data import class_names, lists, packing

    encoding = arguments.encoding
    classes = None
    if arguments.classes is not None:
        classes = class_names.read(arguments.classes, encoding)
        if os.path.isfile(arguments.classes) and not lists.is_list(arguments.source):
            encoding = None  # it is that of the classes alone
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
        classes=classes,
        follow_links=arguments.follow_links,
        reading=packing.Reading(
            images=arguments.images,
            encoding=encoding,
            take=arguments.take,
            unlabelled=arguments.unlabelled,
            image_column=arguments.image_column,
            label_column=arguments.label_column,
            label=_label(arguments),
        ),
    )
    if content["classes"] is not None:
        print(f"labels: {class_names.table(content['classes'])}", file=sys.stderr)
    printed = ("samples", "shards", "urls", "mean_bytes", "unlabelled", "ignored_files")
    print(json.dumps({key: content[key] for key in printed}))


def _label(arguments: argparse.Namespace) -> Label | None:
    from pydantic import ValidationError

    from indistill.config import Label, UserError

    if arguments.label is None:
        return None
    key, _, field = arguments.label.partition(":")
    try:
        return Label(key=key, field=field or None, map=arguments.classes)
    except ValidationError:
        raise UserError(f"--label {arguments.label}: write json:FIELD, txt or cls") from None


def _index(arguments: argparse.Namespace) -> None:
    from indistill.data import verify

    counts = verify.index(arguments.urls, **_read_options(arguments), hashed=arguments.hash)
    print(f"{sum(counts.values())} samples in {len(counts)} shards")


def _verify(arguments: argparse.Namespace) -> None:
    from indistill.config import printable
    from indistill.data import verify

    content = verify.verify(arguments.urls, **_read_options(arguments), num_classes=arguments.num_classes)
    for member in content.bad:
        where = f"{member.shard}: {member.key}" if member.key else member.shard
        print(printable(f"{where}: {member.problem.removeprefix(f'{member.shard}: ')}"))
    print(f"{content.summary()}\n{len(content.bad)} bad members")
    sys.exit(1 if content.bad else 0)


def _read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "cache_dir": arguments.cache_dir,
        "workers": arguments.workers,
        "progress": True,
    }
