"""The student of a run, taken home: a timm folder, an ONNX or a torch.export file, each with a model card.

What was exported is loaded again and compared with the run's own weights on real images before it gets its name.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from indistill.commands.export.card import card
from indistill.commands.export.load import FILES, load_file, load_folder, need_onnx
from indistill.commands.export.source import Source, find, find_class_names, find_preprocessing
from indistill.config import Config, UserError, in_one_line
from indistill.config.ranks import Ranks
from indistill.data.batch import Request
from indistill.data.dataset import ImageDataset, open_shards
from indistill.models.network import Network
from indistill.models.views import evaluation_view

TOLERANCE = 1e-4  # of the largest logit: float32 in another order of additions
_CHECKED_IMAGES = 16
_MAX_PROTOBUF_BYTES = 1_900_000_000  # one ONNX file holds no more than 2 GB


# --- export ----------------------------------------------------------------------------------------------------------
def export(
    run: str | Path,
    destination: str | Path,
    form: str = "timm",
    weights: str | None = None,
    step: str | None = None,
) -> Source:
    """Write a run's student into the folder `destination`, which is made; returns what was exported.

    form: timm (`model.safetensors` and `config.json`), onnx or torch, each a program from uint8 images [B, 3, S, S] to
        logits [B, K] that normalises itself, for any B.
    weights: ema, the moving average, or raw; None: the average, if the run kept one.
    step: the name of a checkpoint; None: the end of the run, or the newest checkpoint of an unfinished one.

    Raises UserError for a run without a student to export and for a destination that cannot be written or is not empty.
    """
    if form == "onnx":
        need_onnx()
    if Ranks.from_environment().world_size != 1:
        raise UserError("export runs in one process: start it without a launcher")
    destination = Path(destination)
    if destination.resolve() == Path.cwd():
        raise UserError(f"{destination}: is the folder that the command runs in: name another, which is made")
    partial = destination.absolute().with_name(f".partial-{destination.absolute().name}")
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise UserError(f"{destination}: is there and no empty folder: choose another destination")
        source = find(Path(run), weights, step)
        command = [
            "indistill",
            "export",
            str(run),
            str(destination),
            "--format",
            form,
            "--weights",
            source.weights,
        ]
        command += ["--checkpoint", step] if step else []
        network = load_file(source.settings, source.file).eval()
        images, origin = _images(source.settings)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _write(form, network, source, partial)
        difference = _check(
            network, load_folder(partial, source.settings).eval(), images, exact=form == "timm"
        )
        checked = f"On {len(images)} {origin} its logits are within {difference:.1e} of the run's."
        (partial / "README.md").write_text(card(source, network, form, shlex.join(command), checked))
        partial.rename(destination)
    except OSError as error:
        raise UserError(
            f"{destination}: cannot be written ({error.strerror or error}): choose another"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    unfinished = "" if source.finished else f"{run} is not finished; "
    average = "moving average" if source.weights == "ema" else "raw weights"
    print(f"{unfinished}exported the {average} of step {source.step} to {destination}. {checked}", flush=True)
    return source


def _images(settings: Config) -> tuple[Tensor, str]:
    """Images uint8 [B, 3, S, S] to compare on, evenly spaced over data.eval, and what they are."""
    section = settings.data.model_copy(update={"in_memory": False})
    try:
        if section.eval is None:
            raise UserError("data.eval is not set")
        shards, view = open_shards(section, section.eval), evaluation_view(settings)
        dataset = ImageDataset(shards, section, settings.seed, view=view)
        ids = np.linspace(0, len(dataset) - 1, _CHECKED_IMAGES).astype(np.int64)
        return dataset[Request(0, 0, 0, ids)].images, "images of data.eval"
    except (UserError, OSError) as error:
        print(f"indistill: compared on random images, since there are no others: {error}", flush=True)
        random = torch.Generator().manual_seed(0)
        shape = (_CHECKED_IMAGES, 3, section.image_size, section.image_size)
        return torch.randint(256, shape, dtype=torch.uint8, generator=random), "random images"


@torch.no_grad()
def _check(network: Network, exported: nn.Module, images: Tensor, exact: bool) -> float:
    """The largest difference of a logit, on batches of two sizes. Raises UserError if it is too large."""
    largest = 0.0
    for batch in (images[:1], images[1:]):
        ours, theirs = network(batch).logits, exported(batch).logits  # [B, K]
        difference = (ours - theirs).abs().max().item()
        if ours.shape != theirs.shape or not difference <= (
            0 if exact else TOLERANCE * ours.abs().max().item()
        ):
            raise UserError(f"nothing exported: a logit would differ from the run's by {difference:.1e}")
        largest = max(largest, difference)
    return largest


# --- the formats -----------------------------------------------------------------------------------------------------
class _Deployed(nn.Module):
    """From images uint8 [B, 3, S, S] to logits [B, K]: what onnx and torch files hold."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network.net(self.network.normalise(images))

    def arguments(self, size: int) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Example images, and which of their dimensions may change."""
        images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        return (images,), {"images": {0: torch.export.Dim("batch")}}


def _write(form: str, network: Network, source: Source, folder: Path) -> None:
    network.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    try:
        {"timm": _write_timm, "onnx": _write_onnx, "torch": _write_torch}[form](network, source, folder)
    except OSError:
        raise
    except (
        Exception
    ) as error:  # of an operator that a format lacks, or a full disk, by each library in its own words
        reason = in_one_line(error, 300)
        raise UserError(f"{source.settings.student.name} could not be exported as {form}: {reason}") from None
    finally:
        network.to(memory_format=torch.channels_last)


def _write_timm(network: Network, source: Source, folder: Path) -> None:
    net, settings = network.net, source.settings
    # What timm knows of the architecture stays. The rest of its record is about weights of its own: their origin,
    # licence, classes and sizes.
    kept = ("architecture", "first_conv", "classifier", "fixed_input_size", "pool_size", "min_input_size")
    preprocessing = find_preprocessing(network, settings)
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
        model_args=dict(settings.student.kwargs),
        safe_serialization=True,
    )
    # safetensors lets nobody but its owner read a file; who may read the other one may read this.
    (folder / FILES["timm"]).chmod((folder / "config.json").stat().st_mode)


def _write_onnx(network: Network, source: Source, folder: Path) -> None:
    deployed = _Deployed(network).eval()
    arguments, dynamic = deployed.arguments(source.settings.data.image_size)
    with contextlib.redirect_stdout(None):  # it tells its progress
        program = torch.onnx.export(
            deployed,
            arguments,
            dynamo=True,
            dynamic_shapes=dynamic,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    program.model.metadata_props.update({k: json.dumps(v) for k, v in _metadata(network, source).items()})
    weights = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    program.save(str(folder / FILES["onnx"]), external_data=weights > _MAX_PROTOBUF_BYTES)


def _write_torch(network: Network, source: Source, folder: Path) -> None:
    deployed = _Deployed(network).eval()
    arguments, dynamic = deployed.arguments(source.settings.data.image_size)
    program = torch.export.export(deployed, arguments, dynamic_shapes=dynamic)
    metadata = json.dumps(_metadata(network, source))
    torch.export.save(program, str(folder / FILES["torch"]), extra_files={"metadata.json": metadata})


def _metadata(network: Network, source: Source) -> dict[str, Any]:
    return {
        "input": "images: uint8 RGB [batch, 3, image_size, image_size], resized and cropped; normalised inside",
        "output": "logits: float32 [batch, num_classes]",
        "num_classes": network.net.num_classes,
        "classes": find_class_names(source),
        **find_preprocessing(network, source.settings),
        "student": source.settings.student.name,
        "weights": source.weights,
        "step": source.step,
    }
