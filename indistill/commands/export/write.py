"""Export the student of a run as a timm folder, an ONNX file or a torch.export file, each with a model card.

The export is loaded again and compared with the run's own weights on real images before it gets its final
name.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from indistill.commands.export.card import card
from indistill.commands.export.load import FILES, load_file, load_folder, need_onnx
from indistill.commands.export.source import Source, find, find_class_names, find_preprocessing
from indistill.config import Config, UserError, in_one_line, printable
from indistill.config.ranks import Ranks
from indistill.data.batch import Request
from indistill.data.training import open_eval_set
from indistill.models.network import Network, separate_tensors

TOLERANCE = 1e-4  # relative to the largest logit: float32 sums in another order
_CHECKED_IMAGES = 16
_MAX_PROTOBUF_BYTES = 1_900_000_000  # an ONNX file can have at most 2 GB


# --- export -------------------------------------------------------------------------------------------------
def export(
    run: str | Path,
    destination: str | Path,
    *,
    form: str = "timm",
    weights: str | None = None,
    step: str | None = None,
) -> Source:
    """Write a run's student to the folder `destination`, which is created; returns what was exported.

    form: timm (`model.safetensors` and `config.json`), onnx or torch; the last two are programs from uint8
        images [B, 3, S, S] to logits [B, K], or without a classifier to embeddings [B, D], that normalise
        their input, for any B.
    weights: ema, the moving average, or raw; None: the average if the run has one.
    step: the name of a checkpoint; None: the end of the run, or the newest checkpoint of an unfinished one.

    Raises UserError if the run has no student to export, or the destination cannot be written or has files.
    """
    if form == "onnx":
        need_onnx()
    if Ranks.from_environment().world_size != 1:
        raise UserError("export runs in one process: start it without a launcher")
    destination = Path(destination)
    try:
        _check_destination(destination)
        source = find(Path(run), weights, step)
        options = ["--format", form, "--weights", source.weights, *(["--checkpoint", step] if step else [])]
        command = shlex.join(["indistill", "export", str(run), str(destination), *options])
        with _partial_folder(destination) as partial:
            checked = _write_checked(partial, source, form, command)
            partial.rename(destination)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{destination}: cannot be written ({reason}): choose another") from None
    unfinished = "" if source.finished else f"{run} is not finished; "
    kind = "moving average" if source.weights == "ema" else "raw weights"
    print(f"{unfinished}exported the {kind} of step {source.step} to {destination}. {checked}", flush=True)
    return source


def _check_destination(destination: Path) -> None:
    if destination.resolve() == Path.cwd():
        raise UserError(f"{destination}: is the current directory: choose another destination")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UserError(f"{destination}: exists and is not an empty folder: choose another destination")


@contextlib.contextmanager
def _partial_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside the destination, deleted at the end unless it was renamed.

    Deletes those that killed exports to the same destination left.
    """
    beside = destination.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    name = f".partial-{destination.absolute().name}"
    for folder in beside.glob(f"{glob.escape(name)}.*"):
        match = re.fullmatch(r"\.(\d+)\.[0-9a-f]{8}", folder.name.removeprefix(name))
        if match and not psutil.pid_exists(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
    partial = beside / f"{name}.{os.getpid()}.{os.urandom(4).hex()}"
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checked(folder: Path, source: Source, form: str, command: str) -> str:
    """Write an export to `folder` and compare it with the run; returns a sentence on the difference."""
    network = load_file(source.settings, source.file).eval()
    images, origin = _images(source.settings)
    _write(form, network, source, folder)
    exported = load_folder(folder, source.settings).eval()
    difference = _check(network, exported, images, exact=form == "timm")
    checked = f"On {len(images)} {origin} its {_output(network)} are within {difference:.1e} of the run's."
    text = printable(card(source, network, form=form, command=command, checked=checked), lines=True)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return checked


def _images(settings: Config) -> tuple[Tensor, str]:
    """Images uint8 [B, 3, S, S] for the comparison, evenly spaced over the first set of data.eval, and what
    they are.
    """
    section = settings.data
    try:
        if section.eval is None:
            raise UserError("data.eval is not set")
        dataset = open_eval_set(settings)
        ids = np.linspace(0, len(dataset) - 1, _CHECKED_IMAGES).astype(np.int64)
        return dataset[Request(0, 0, 0, ids)].images, "images of data.eval"
    except (UserError, OSError) as error:
        print(
            f"indistill: compared on random images, because data.eval cannot be read: {in_one_line(error)}",
            flush=True,
        )
        random = torch.Generator().manual_seed(0)
        shape = (_CHECKED_IMAGES, 3, section.full_size, section.full_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=random), "random images"


@torch.no_grad()
def _check(network: Network, exported: nn.Module, images: Tensor, exact: bool) -> float:
    """The largest difference of an output, on batches of two sizes. Raises UserError if it is too large."""
    largest = 0.0
    for batch in (images[:1], images[1:]):
        ours, theirs = (  # logits [B, K], or embeddings [B, D]
            output.embedding if output.logits is None else output.logits
            for output in (network(batch), exported(batch))
        )
        difference = (ours - theirs).abs().max().item()
        limit = 0.0 if exact else TOLERANCE * ours.abs().max().item()
        if ours.shape != theirs.shape or not difference <= limit:
            raise UserError(
                f"nothing exported: its {_output(network)} would differ from the run's by {difference:.1e}"
            )
        largest = max(largest, difference)
    return largest


def _output(network: Network) -> str:
    """What the exported network gives, by its name in programs."""
    return "logits" if network.net.num_classes else "embeddings"


# --- the formats --------------------------------------------------------------------------------------------
class _Deployed(nn.Module):
    """The program in onnx and torch files, from uint8 images [B, 3, S, S] to logits [B, K] or embeddings."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.net(self.network.normalise(images))

    def arguments(self, size: int) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Return example images, and the dimensions of them that may vary."""
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        return (images,), {"images": {0: torch.export.Dim("batch")}}


def _write(form: str, network: Network, source: Source, folder: Path) -> None:
    write = {"timm": _write_timm, "onnx": _write_onnx, "torch": _write_torch}[form]
    network.to(memory_format=torch.contiguous_format)  # the only one that safetensors accepts
    try:
        write(network, source, folder)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # each library raises its own types, for an operator that a format lacks or a full disk
        reason = in_one_line(error, 300)
        raise UserError(f"{source.student.name} could not be exported as {form}: {reason}") from None
    finally:
        network.to(memory_format=torch.channels_last)


def _write_timm(network: Network, source: Source, folder: Path) -> None:
    net: Any = network.net  # nn.Module does not declare timm's attributes
    # Keep timm's facts about the architecture. The rest of its record describes timm's own weights: their
    # origin, licence, classes and sizes.
    kept = ("architecture", "first_conv", "classifier", "fixed_input_size", "pool_size", "min_input_size")
    preprocessing = find_preprocessing(network, source)
    record = {key: net.pretrained_cfg[key] for key in kept if key in net.pretrained_cfg} | {
        "input_size": (3, preprocessing["image_size"], preprocessing["image_size"]),
        **{key: preprocessing[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
        "num_classes": net.num_classes,
    }
    net.pretrained_cfg = record
    names = find_class_names(source)
    save_for_hf(
        net,
        str(folder),
        model_config={"label_names": names} if names else {},
        model_args=dict(source.student.kwargs),
        safe_serialization=cast(bool, None),  # config.json alone: timm refuses tensors that layers share
    )
    save_file(separate_tensors(net), folder / FILES["timm"])
    # safetensors makes its file readable by the owner alone: give it the mode of the other file.
    (folder / FILES["timm"]).chmod((folder / "config.json").stat().st_mode)


def _write_onnx(network: Network, source: Source, folder: Path) -> None:
    deployed = _Deployed(network).eval()
    arguments, dynamic = deployed.arguments(source.settings.data.full_size)
    with contextlib.redirect_stdout(None):  # torch prints its progress
        program = torch.onnx.export(
            deployed,
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["images"],
            output_names=[_output(network)],
            verbose=False,
        )
    assert program is not None  # as documented for dynamo=True
    metadata = {key: json.dumps(value) for key, value in _metadata(network, source).items()}
    program.model.metadata_props.update(metadata)
    weights = sum(value.nbytes for value in network.state_dict().values())
    program.save(str(folder / FILES["onnx"]), external_data=weights > _MAX_PROTOBUF_BYTES)


def _write_torch(network: Network, source: Source, folder: Path) -> None:
    deployed = _Deployed(network).eval()
    arguments, dynamic = deployed.arguments(source.settings.data.full_size)
    program = torch.export.export(deployed, arguments, dynamic_shapes=dynamic)
    metadata = json.dumps(_metadata(network, source))
    torch.export.save(program, str(folder / FILES["torch"]), extra_files={"metadata.json": metadata})


def _metadata(network: Network, source: Source) -> dict[str, Any]:
    """Facts about an onnx or torch program, written into its file."""
    net: Any = network.net  # nn.Module does not declare timm's attributes
    return {
        "input": "images: uint8 RGB [batch, 3, image_size, image_size], resized and cropped; "
        "normalised inside",
        "output": f"{_output(network)}: float32 [batch, {'num_classes' if net.num_classes else 'width'}]",
        "num_classes": net.num_classes,
        "classes": find_class_names(source),
        **find_preprocessing(network, source),
        "student": source.student.name,
        "weights": source.weights,
        "step": source.step,
    }
