"""Load a checkpoint or an exported model for evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from indistill import config
from indistill.config import Config, UserError, in_one_line, records
from indistill.config.extras import need
from indistill.config.files import read_json
from indistill.config.run_dir import CheckpointDir, RunDir
from indistill.data import class_names
from indistill.models import timm_model
from indistill.models.network import Network, normalisation
from indistill.models.outputs import Output
from indistill.models.views import EvalView, PretrainedConfig, evaluation_view, own_view, view_by_record

FILES = {"timm": "model.safetensors", "onnx": "model.onnx", "torch": "model.pt2"}
_MOST_SHOWN = 5  # names in a message


# --- loading ------------------------------------------------------------------------------------------------
class Program(nn.Module):
    """An exported program with the interface that evaluation needs.

    It runs on the CPU and in float32, whatever the run's precision.
    """

    def __init__(
        self, run: Callable[[Tensor], Tensor], classes: list[str] | None = None, *, with_logits: bool = True
    ) -> None:
        super().__init__()
        self.run, self.classes, self.with_logits = run, classes, with_logits

    def forward(self, images: Tensor) -> Output:
        """Compute the logits [B, K], or without a classifier the embeddings, of uint8 images [B, 3, S, S]."""
        with torch.autocast(images.device.type, enabled=False):
            output = self.run(images.cpu()).to(images.device)
        return Output((), None, output) if self.with_logits else Output((), output)


def load_for_eval(settings: Config, what: str) -> tuple[Network | Program, EvalView]:
    """Load the network that `indistill eval` scores, and the preprocessing of its images.

    `what` is a weights file, checkpoint or run of the config's student, an exported folder, or a timm name
    (timm:NAME if a file has the same name). A timm model has its own pretrained weights, normalisation and,
    where the config says auto, interpolation and crop. Raises UserError if it is none of these, or does not
    fit the config.
    """
    path = Path(what)
    if path.is_dir() and any(
        (path / file).is_file() for file in ("config.json", FILES["onnx"], FILES["torch"])
    ):
        if not any((path / file).is_file() for file in ("config.json", FILES["onnx"])):
            raise UserError(
                f"{path / FILES['torch']}: is a program, and loading one can run arbitrary code: evaluate "
                "the run, or an export in another --format"
            )
        exported = load_folder(path, settings)
        _check_classes(exported, what, settings)
        return exported, _view_of_folder(path, settings)
    name = what.removeprefix("timm:")
    known = timm.is_model(name) or name.startswith(("hf-hub:", "local-dir:"))
    if name != what or (known and not path.exists()):
        network = _pretrained(name, settings)
        _check_classes(network, name, settings)
        return network, own_view(_named(name), settings.data, "eval")
    if settings.stage == "heads":
        raise UserError("eval scores a student, and stage: heads trains none: see its scores in summary.json")
    if path.is_dir():
        candidates = (RunDir(path).student, CheckpointDir(path).ema, CheckpointDir(path).model)
        weights = next((file for file in candidates if file.is_file()), None)
        if weights is None:
            raise UserError(_what_there_is(path))
        path = weights
    names = class_names.of_weights(path)
    class_names.check_weights(names, settings.data, "eval")
    # Without names of their own the weights have those of data.train, with which retrieval compares.
    if names is None or settings.evaluate.on_bank:
        class_names.check(settings.data)
    return load_file(settings, path), evaluation_view(settings)


def _what_there_is(folder: Path) -> str:
    """Describe a folder without a student: the checkpoints of an unfinished run, or else its content."""
    files = RunDir(folder)
    if saved := files.saved_checkpoints():
        word, reason = records.status(files.status)
        state = f"{word} ({reason})" if reason else word or "unknown"
        names = ", ".join(path.name for path in saved)
        return (
            f"{folder}: has no {files.student.name}, as its training has not finished (status: {state}); it "
            f"has the checkpoints {names}: evaluate one, such as {saved[-1]}, or go on training"
        )
    runs = sorted(path.parent.name for path in folder.glob(f"*/{files.config.name}"))
    if runs:
        return f"{folder}: is no run itself, and contains the runs {', '.join(runs)}: name one of them"
    if files.config.is_file():
        return f"{folder}: has no {files.student.name} and no checkpoint yet: train it first"
    content = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(content[:_MOST_SHOWN]) + (", ..." if len(content) > _MOST_SHOWN else "")
    return f"{folder}: is neither a run nor an export (it contains {shown or 'nothing'}): name another folder"


def _check_classes(network: Network | Program, what: str, settings: Config) -> None:
    """Raise UserError if an export, or a timm model with class names, has other classes than the data."""
    if settings.evaluate.on_bank:
        class_names.check(settings.data)
    if isinstance(network, Program):
        names = class_names.Names(what, network.classes) if network.classes else None
    else:
        net: Any = network.net  # nn.Module does not declare timm's attributes
        names = class_names.of_pretrained(net.pretrained_cfg, what)
    class_names.check_weights(names, settings.data, "eval")


def load_file(settings: Config, path: Path) -> Network:
    """Load the config's student with the weights of a file."""
    assert settings.student is not None  # the callers refuse runs that train none
    section = settings.student.model_copy(update={"checkpoint": str(path), "pretrained": False})
    net = timm_model.create(section, settings.data.num_classes, settings.data.full_size, "student")
    return Network(net, normalisation(net, section, "student"))


def load_folder(folder: Path, settings: Config) -> Network | Program:
    """Load what `export` wrote.

    Loading a torch.export file can run arbitrary code: call this only on a file that this process has just
    written.
    """
    if (folder / "config.json").is_file():
        return _pretrained(f"local-dir:{folder}", settings)
    onnx = (folder / FILES["onnx"]).is_file()
    if onnx:
        need_onnx()
    try:
        run, record = (_run_onnx if onnx else _run_torch)(folder)
    except Exception as error:  # each library raises its own types
        reason = in_one_line(error, 200)
        raise UserError(
            f"{folder}: has no readable {'onnx' if onnx else 'torch'} export ({reason}): export the run again"
        ) from None
    size = settings.data.full_size
    try:
        outputs = run(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    except Exception:
        raise UserError(
            f"{folder}: was exported for images of another size than data.image_size ({size}): set it to "
            "that size"
        ) from None
    with_logits = record.num_classes != 0
    if with_logits and outputs != settings.data.num_classes:
        raise UserError(
            f"{folder}: has {outputs} classes, data.num_classes is {settings.data.num_classes}: "
            "evaluate it on data with its classes"
        )
    return Program(run, record.classes, with_logits=with_logits)


def _run_onnx(folder: Path) -> tuple[Callable[[Tensor], Tensor], PretrainedConfig]:
    """Load an ONNX export; returns a function from images to its output, and its metadata."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / FILES["onnx"], options, providers=["CPUExecutionProvider"]
    )
    record = _onnx_record(session)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), record


def _run_torch(folder: Path) -> tuple[Callable[[Tensor], Tensor], PretrainedConfig]:
    """Load a torch.export file; returns a function from images to its output, and its metadata."""
    metadata = {"metadata.json": ""}
    program = torch.export.load(folder / FILES["torch"], extra_files=metadata).module()
    record = PretrainedConfig.model_validate(json.loads(metadata["metadata.json"]))
    # A function: Program would register a module as its child, and this one refuses eval().
    return lambda images: program(images), record


def _named(name: str) -> config.Model:
    return config.Model(name=name, pretrained=True)


def _view_of_folder(folder: Path, settings: Config) -> EvalView:
    """The preprocessing of an exported folder: its own, where the config says auto."""
    if (folder / "config.json").is_file():
        return own_view(_named(f"local-dir:{folder}"), settings.data, "eval")
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILES["onnx"], providers=["CPUExecutionProvider"])
    return view_by_record(_onnx_record(session).model_dump(exclude_unset=True), settings.data)


def _onnx_record(session: Any) -> PretrainedConfig:
    """The metadata of an ONNX export, whose values are JSON. Raises ValueError if they are damaged."""
    metadata = session.get_modelmeta().custom_metadata_map
    return PretrainedConfig.model_validate(
        {key: read_json(value.encode()) for key, value in metadata.items()}
    )


def _pretrained(name: str, settings: Config) -> Network:
    """Load a timm model with its own weights."""
    section = _named(name)
    net = timm_model.create(section, settings.data.num_classes, settings.data.full_size, "eval")
    return Network(net, normalisation(net, section, "eval"))


def need_onnx() -> None:
    """Raise UserError if a package for ONNX is missing."""
    need("export", "onnx")
