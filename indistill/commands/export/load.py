"""Load a checkpoint or an exported model for evaluation."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from indistill import config
from indistill.config import Config, UserError, in_one_line
from indistill.config.run_dir import CheckpointDir, RunDir
from indistill.data import class_names
from indistill.models import timm_model
from indistill.models.network import Network, normalisation
from indistill.models.outputs import Output
from indistill.models.views import EvalView, evaluation_view, own_view, view_by_record

FILES = {"timm": "model.safetensors", "onnx": "model.onnx", "torch": "model.pt2"}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


# --- loading ---------------------------------------------------------------------------------------------------------
class Program(nn.Module):
    """An exported program as evaluation takes it. It runs on the CPU and in float32, whatever the run's precision."""

    with_logits = True

    def __init__(self, run: Callable[[Tensor], Tensor], classes: list[str] | None = None) -> None:
        super().__init__()
        self.run, self.classes = run, classes

    def forward(self, images: Tensor) -> Output:
        """Images uint8 [B, 3, S, S]."""
        with torch.autocast(images.device.type, enabled=False):
            return Output((), None, self.run(images.cpu()).to(images.device))


def load_for_eval(settings: Config, what: str) -> tuple[Network | Program, EvalView]:
    """What `indistill eval` scores, and how images are shown to it.

    A weights file, checkpoint or run of the config's student, an exported folder, or a model: a timm name (timm:NAME
    for one that is also a path), with its own pretrained weights, normalisation and, where the config says auto,
    interpolation and crop. Raises UserError for what is none of these or does not fit the config.
    """
    path = Path(what)
    if path.is_dir() and any(
        (path / file).is_file() for file in ("config.json", FILES["onnx"], FILES["torch"])
    ):
        if not any((path / file).is_file() for file in ("config.json", FILES["onnx"])):
            raise UserError(
                f"{path / FILES['torch']}: is a program, and to load one may run anything: evaluate the run, or an "
                "export of another --format"
            )
        network = load_folder(path, settings)
        _check_classes(network, what, settings)
        return network, _view_of_folder(path, settings)
    name = what.removeprefix("timm:")
    if name != what or (
        not path.exists() and (timm.is_model(name) or name.startswith(("hf-hub:", "local-dir:")))
    ):
        network = _pretrained(name, settings)
        _check_classes(network, name, settings)
        return network, own_view(_named(name), settings.data, "eval")
    if settings.stage == "heads":
        raise UserError("eval scores a student, and stage: heads trains none: its scores are in summary.json")
    if path.is_dir():
        candidates = (RunDir(path).student, CheckpointDir(path).ema, CheckpointDir(path).model)
        path = next((file for file in candidates if file.is_file()), path)
    names = class_names.of_weights(path)
    class_names.check_weights(names, settings.data, "eval")
    if names is None or settings.evaluate.retrieval:  # the weights are of data.train, retrieval is from it
        class_names.check(settings.data)
    return load_file(settings, path), evaluation_view(settings)


def _check_classes(network: Network | Program, what: str, settings: Config) -> None:
    """Raise UserError if an export, or a timm model that names its classes, was made for others than the data has."""
    if settings.evaluate.retrieval:
        class_names.check(settings.data)
    if isinstance(network, Program):
        names = network.classes and class_names.Names(what, network.classes)
    else:
        names = class_names.of_pretrained(network.net.pretrained_cfg, what)
    class_names.check_weights(names, settings.data, "eval")


def load_file(settings: Config, path: Path) -> Network:
    """The config's student with the weights of a file."""
    section = settings.student.model_copy(update={"checkpoint": str(path), "pretrained": False})
    net = timm_model.create(section, settings.data.num_classes, settings.data.image_size, "student")
    return Network(net, normalisation(net, section, "student"))


def load_folder(folder: Path, settings: Config) -> Network | Program:
    """What `export` wrote; a torch.export file only just now, since that may run anything as it is loaded."""
    if (folder / "config.json").is_file():
        return _pretrained(f"local-dir:{folder}", settings)
    onnx = (folder / FILES["onnx"]).is_file()
    if onnx:
        need_onnx()
    try:
        run, classes = (_run_onnx if onnx else _run_torch)(folder)
    except Exception as error:  # each library raises its own
        reason = in_one_line(error, 200)
        raise UserError(
            f"{folder}: holds no readable {'onnx' if onnx else 'torch'} export: {reason}"
        ) from None
    size = settings.data.image_size
    try:
        found = run(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    except Exception:
        raise UserError(
            f"{folder}: was exported for images of another size than data.image_size, {size}"
        ) from None
    if found != settings.data.num_classes:
        raise UserError(f"{folder}: has {found} classes, data.num_classes is {settings.data.num_classes}")
    return Program(run, classes)


def _run_onnx(folder: Path) -> tuple[Callable[[Tensor], Tensor], list[str] | None]:
    """The program and its class names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        folder / FILES["onnx"], options, providers=["CPUExecutionProvider"]
    )
    classes = json.loads(session.get_modelmeta().custom_metadata_map.get("classes", "null"))
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), classes


def _run_torch(folder: Path) -> tuple[Callable[[Tensor], Tensor], list[str] | None]:
    metadata = {"metadata.json": ""}
    program = torch.export.load(folder / FILES["torch"], extra_files=metadata).module()
    classes = json.loads(metadata["metadata.json"])["classes"]
    return lambda images: program(
        images
    ), classes  # of a module Program would make a part, which refuses eval()


def _named(name: str) -> config.Model:
    return config.Model(name=name, pretrained=True)


def _view_of_folder(folder: Path, settings: Config) -> EvalView:
    """How images are shown to what was exported there: as it says, where the config says auto."""
    if (folder / "config.json").is_file():
        return own_view(_named(f"local-dir:{folder}"), settings.data, "eval")
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / FILES["onnx"], providers=["CPUExecutionProvider"])
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    return view_by_record(told, settings.data)


def _pretrained(name: str, settings: Config) -> Network:
    section = _named(name)
    net = timm_model.create(section, settings.data.num_classes, settings.data.image_size, "eval")
    return Network(net, normalisation(net, section, "eval"))


def need_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"onnx needs {', '.join(missing)}: pip install 'indistill[export]', or {' '.join(missing)}"
        )
