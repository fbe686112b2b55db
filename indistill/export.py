"""The student of a run, taken home: a timm folder, an ONNX or a torch.export file, each with a model card.

What was exported is loaded again and compared with the run's own weights on real images before it gets its name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import yaml
from timm.models import save_for_hf
from torch import Tensor, nn

from indistill import config
from indistill.config import Config, UserError
from indistill.data import class_names
from indistill.data.batch import Request
from indistill.data.dataset import ImageDataset, open_shards
from indistill.models import network as models_network
from indistill.models import timm_model
from indistill.models.network import Network, normalisation
from indistill.models.outputs import Output
from indistill.models.views import EvalView, evaluation_view, own_view, view_by_record
from indistill.prune import Plan
from indistill.training import checkpoint

FILES = {"timm": "model.safetensors", "onnx": "model.onnx", "torch": "model.pt2"}
TOLERANCE = 1e-4  # of the largest logit: float32 in another order of additions
_CHECKED_IMAGES = 16
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_MAX_PROTOBUF_BYTES = 1_900_000_000  # one ONNX file holds no more than 2 GB


class Source(NamedTuple):
    """What of a run is exported."""

    run: Path
    settings: Config
    file: Path
    step: int
    weights: str  # ema or raw
    scores: dict[str, float]  # of these very weights; empty if they were not evaluated
    finished: bool


# --- export ----------------------------------------------------------------------------------------------------------


def export(
    run: str | Path, destination: str | Path, form: str = "timm", weights: str | None = None, step: str | None = None
) -> Source:
    """Write a run's student into the folder `destination`, which is made; returns what was exported.

    form: timm (`model.safetensors` and `config.json`), onnx or torch, each a program from uint8 images [B, 3, S, S] to
        logits [B, K] that normalises itself, for any B.
    weights: ema, the moving average, or raw; None: the average, if the run kept one.
    step: the name of a checkpoint; None: the end of the run, or the newest checkpoint of an unfinished one.

    Raises UserError for a run without a student to export and for a destination that cannot be written or is not empty.
    """
    if form == "onnx":
        _need_onnx()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("export runs in one process: start it without a launcher")
    destination = Path(destination)
    if destination.resolve() == Path.cwd():
        raise UserError(f"{destination}: is the folder that the command runs in: name another, which is made")
    partial = destination.absolute().with_name(f".partial-{destination.absolute().name}")
    try:
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise UserError(f"{destination}: is there and no empty folder: choose another destination")
        source = find(Path(run), weights, step)
        command = ["indistill", "export", str(run), str(destination), "--format", form, "--weights", source.weights]
        command += ["--checkpoint", step] if step else []
        network = load_file(source.settings, source.file).eval()
        images, origin = _images(source.settings)
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _write(form, network, source, partial)
        difference = _check(network, load_folder(partial, source.settings).eval(), images, exact=form == "timm")
        checked = f"On {len(images)} {origin} its logits are within {difference:.1e} of the run's."
        (partial / "README.md").write_text(card(source, network, form, shlex.join(command), checked))
        partial.rename(destination)
    except OSError as error:
        raise UserError(f"{destination}: cannot be written ({error.strerror or error}): choose another") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    unfinished = "" if source.finished else f"{run} is not finished; "
    average = "moving average" if source.weights == "ema" else "raw weights"
    print(f"{unfinished}exported the {average} of step {source.step} to {destination}. {checked}", flush=True)
    return source


def find(run: Path, weights: str | None = None, step: str | None = None) -> Source:
    """Raises UserError, with the remedy, if the run has not what is asked for."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run}: holds no config.yaml: give the run_dir of a run, or, of a chain or several students, one's folder "
            "in it"
        )
    settings = config.load(run / "config.yaml")
    if settings.stage == "heads":
        raise UserError(f"{run}: stage: heads trains no student: export the run of one that learns from them")
    if weights == "ema" and settings.ema is None:
        raise UserError(f"{run}: kept no moving average (ema): export --weights raw")
    evaluated = "raw" if settings.ema is None else "ema"
    weights = weights or evaluated
    summary, student = run / "summary.json", run / "student.safetensors"
    finished = summary.is_file() and student.is_file()
    if finished and step is None and weights == evaluated:
        content = _read_json(summary)
        return Source(run, settings, student, content["step"], weights, content["metrics"], finished)

    saved = checkpoint.saved(run / "checkpoints")
    names = ", ".join(path.name for path in saved)
    if step is None and not saved:
        raise UserError(f"{run}: holds no {'raw weights: no' if finished else 'student.safetensors and no'} checkpoint")
    path = saved[-1] if step is None else run / "checkpoints" / step
    if path not in saved:
        raise UserError(f"--checkpoint {step}: no checkpoint of {run}, which has {names or 'none'}")
    if damage := checkpoint.damaged(path):
        raise UserError(f"{path}: damaged ({damage}): choose another with --checkpoint: {names}")
    state = _read_json(path / "state.json")
    scores = (state["scores"] or {}) if weights == evaluated else {}
    file = path / ("ema.safetensors" if weights == "ema" else "model.safetensors")
    return Source(run, settings, file, state["step"], weights, scores, finished)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None


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
        if ours.shape != theirs.shape or not difference <= (0 if exact else TOLERANCE * ours.abs().max().item()):
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
    except Exception as error:  # of an operator that a format lacks, or a full disk, by each library in its own words
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source.settings.student.name} could not be exported as {form}: {reason}") from None
    finally:
        network.to(memory_format=torch.channels_last)


def _write_timm(network: Network, source: Source, folder: Path) -> None:
    net, settings = network.net, source.settings
    # What timm knows of the architecture stays. The rest of its record is about weights of its own: their origin,
    # licence, classes and sizes.
    kept = ("architecture", "first_conv", "classifier", "fixed_input_size", "pool_size", "min_input_size")
    preprocessing = _preprocessing(network, settings)
    record = {key: net.pretrained_cfg[key] for key in kept if key in net.pretrained_cfg} | {
        "input_size": (3, preprocessing["image_size"], preprocessing["image_size"]),
        **{key: preprocessing[key] for key in ("mean", "std", "crop_pct", "crop_mode", "interpolation")},
        "num_classes": net.num_classes,
    }
    net.pretrained_cfg = record
    names = _class_names(source)
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


def _preprocessing(network: Network, settings: Config) -> dict[str, Any]:
    """What evaluation did with an image (augment.eval_view), in timm's words."""
    view = evaluation_view(settings)
    return {
        "image_size": settings.data.image_size,
        "crop_pct": view.crop_pct,
        "crop_mode": view.crop_mode,
        "interpolation": view.interpolation,
        # As they were given: float32 of them would be other numbers.
        **dict(zip(("mean", "std"), normalisation(network.net, settings.student, "student"))),
    }


def _metadata(network: Network, source: Source) -> dict[str, Any]:
    return {
        "input": "images: uint8 RGB [batch, 3, image_size, image_size], resized and cropped; normalised inside",
        "output": "logits: float32 [batch, num_classes]",
        "num_classes": network.net.num_classes,
        "classes": _class_names(source),
        **_preprocessing(network, source.settings),
        "student": source.settings.student.name,
        "weights": source.weights,
        "step": source.step,
    }


def _class_names(source: Source) -> list[str] | None:
    """The class of each output, from the run or else from beside its training shards; None if that is not known."""
    section = source.settings.data
    found = class_names.of_weights(source.file) or class_names.of_training(section)
    return found.names if found and len(found.names) == section.num_classes else None


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
    if path.is_dir() and any((path / file).is_file() for file in ("config.json", FILES["onnx"], FILES["torch"])):
        if not any((path / file).is_file() for file in ("config.json", FILES["onnx"])):
            raise UserError(
                f"{path / FILES['torch']}: is a program, and to load one may run anything: evaluate the run, or an "
                "export of another --format"
            )
        network = load_folder(path, settings)
        _check_classes(network, what, settings)
        return network, _view_of_folder(path, settings)
    name = what.removeprefix("timm:")
    if name != what or (not path.exists() and (timm.is_model(name) or name.startswith(("hf-hub:", "local-dir:")))):
        network = _pretrained(name, settings)
        _check_classes(network, name, settings)
        return network, own_view(_named(name), settings.data, "eval")
    if settings.stage == "heads":
        raise UserError("eval scores a student, and stage: heads trains none: its scores are in summary.json")
    if path.is_dir():
        names = ("student.safetensors", "ema.safetensors", "model.safetensors")  # of a run, else of a checkpoint
        path = next((path / name for name in names if (path / name).is_file()), path)
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
    return Network(net, *normalisation(net, section, "student"))


def load_folder(folder: Path, settings: Config) -> Network | Program:
    """What `export` wrote; a torch.export file only just now, since that may run anything as it is loaded."""
    if (folder / "config.json").is_file():
        return _pretrained(f"local-dir:{folder}", settings)
    onnx = (folder / FILES["onnx"]).is_file()
    if onnx:
        _need_onnx()
    try:
        run, classes = (_run_onnx if onnx else _run_torch)(folder)
    except Exception as error:  # each library raises its own
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: holds no readable {'onnx' if onnx else 'torch'} export: {reason}") from None
    size = settings.data.image_size
    try:
        found = run(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1]
    except Exception:
        raise UserError(f"{folder}: was exported for images of another size than data.image_size, {size}") from None
    if found != settings.data.num_classes:
        raise UserError(f"{folder}: has {found} classes, data.num_classes is {settings.data.num_classes}")
    return Program(run, classes)


def _run_onnx(folder: Path) -> tuple[Callable[[Tensor], Tensor], list[str] | None]:
    """The program and its class names."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / FILES["onnx"], options, providers=["CPUExecutionProvider"])
    classes = json.loads(session.get_modelmeta().custom_metadata_map.get("classes", "null"))
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]), classes


def _run_torch(folder: Path) -> tuple[Callable[[Tensor], Tensor], list[str] | None]:
    metadata = {"metadata.json": ""}
    program = torch.export.load(folder / FILES["torch"], extra_files=metadata).module()
    classes = json.loads(metadata["metadata.json"])["classes"]
    return lambda images: program(images), classes  # of a module Program would make a part, which refuses eval()


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
    return Network(net, *normalisation(net, section, "eval"))


def _need_onnx() -> None:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"onnx needs {', '.join(missing)}: pip install 'indistill[export]', or {' '.join(missing)}")


# --- the model card --------------------------------------------------------------------------------------------------

_USE = {
    "timm": """import timm
{register}
net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()    # or "hf-hub:YOU/NAME", once it is pushed
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
logits = net(transform(image).unsqueeze(0))    # image: PIL, RGB""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
logits = session.run(["logits"], {{"images": images}})[0]    # images: uint8 [batch, 3, {size}, {size}]""",
    "torch": """import torch

program = torch.export.load("FOLDER/model.pt2").module()    # a program: load none that you do not trust
logits = program(images)    # images: uint8 [batch, 3, {size}, {size}]""",
}
_RESIZED = {"center": "The shorter side is", "squash": "Each side is", "border": "The longer side is"}  # by crop_mode
_LIBRARY = {"timm": "timm", "onnx": "onnx", "torch": "pytorch"}
# Where a run and its data lie is nobody's business but its owner's.
_LOCAL_KEYS = {"run_dir": True, "data": {"root", "cache_dir"}, "targets": {"dir"}}


def card(source: Source, network: Network, form: str, command: str, checked: str) -> str:
    """The README.md of an export, in the form of the Hugging Face Hub."""
    settings, section = source.settings, source.settings.data
    architecture = network.net.pretrained_cfg["architecture"]
    ours = timm.model_entrypoint(architecture).__module__ == models_network.__name__
    register = "import indistill.models    # registers the network with timm\n" * ours
    if form == "timm":
        taken = "Normalised float images, as timm's own transform makes them"
    else:
        taken = "uint8 RGB images, resized and cropped; it normalises them itself"
    preprocessing, view = _preprocessing(network, settings), evaluation_view(settings)
    front = {
        "library_name": _LIBRARY[form],
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "indistill"] + ["timm"] * (form == "timm"),
    }
    parameters = sum(parameter.numel() for parameter in network.net.parameters())
    teacher = "None: trained on the labels alone."
    if settings.teacher is not None:
        teacher = f"{settings.teacher.name}, {_weights(settings.teacher)}."
    student = settings.student
    began = f" It began {_weights(student)}." if student.pretrained or student.checkpoint else ""
    kept = f"moving average (decay {settings.ema.decay})" if source.weights == "ema" else "as trained"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {architecture}, a distilled student",
        f"{parameters:,} parameters, {network.net.num_classes} classes. Weights: {kept}, after {source.step:,} steps"
        + (" of training." if source.finished else " of a run that had not finished.")
        + began,
        f"```python\n{_USE[form].format(register=register, size=section.image_size)}\n```",
        f"**Input.** {taken}. {_RESIZED[view.crop_mode]} resized to {int(section.image_size / view.crop_pct)} pixels "
        f"({view.interpolation}), the centre of {section.image_size} x {section.image_size} cut out; mean "
        f"{list(preprocessing['mean'])}, standard deviation {list(preprocessing['std'])} of values in [0, 1].",
        f"**Teacher.** {teacher}",
        f"**Method.** {_method(source)}",
        f"**Data.** Trained on `{section.train}`, evaluated on `{section.eval}`.",
        f"**Metrics.** {_metrics(source)}",
        f"**Exported by** `{command}`. {checked} Trained by `indistill train config.yaml run_dir=RUN "
        "data.root=SHARDS`, config.yaml being",
        f"```yaml\n{recipe(settings)}```",
    ]
    return "\n\n".join(lines) + "\n"


def _weights(section: config.Model) -> str:
    if section.pretrained:
        return "with timm's pretrained weights"
    return f"with the weights of {Path(section.checkpoint).name}" if section.checkpoint else "with random weights"


def _method(source: Source) -> str:
    settings, parts = source.settings, []
    plan = source.run / "prune_plan.json"
    if settings.warmup and plan.is_file():
        pairs = ", ".join(
            f"{pair.teacher_stage} to {pair.student_stage} ("
            + (f"{len(pair.kept)} of {pair.teacher_width}" if pair.kept else f"all {pair.teacher_width}")
            + " channels)"
            for pair in Plan.read(plan).pairs
        )
        parts.append(
            f"InDistill ({settings.warmup.curriculum} warm-up on the teacher's maps, pruned by "
            f"{settings.warmup.prune.criterion}): teacher stage to student stage {pairs}. Then"
        )
    losses = ", ".join(f"{loss.name} (weight {loss.weight:g})" for loss in settings.kd.losses)
    duration = settings.duration if isinstance(settings.duration, str) else f"{settings.duration} epochs"
    return " ".join([*parts, f"losses: {losses}; {duration} in all."])


def _metrics(source: Source) -> str:
    if not source.scores:
        return "These weights were not evaluated: `indistill eval CONFIG FOLDER` does."
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in source.scores.items())
    precision = source.settings.mixed_precision
    under = f" (computed under {precision} autocast)" if precision != "no" else ""
    return f"At step {source.step:,}, of these weights{under}:\n\n| | |\n|---|---|\n{rows}"


def recipe(settings: Config) -> str:
    """What of the config is no default, as YAML, without the places on the machine that trained."""
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude=_LOCAL_KEYS)
    for section in ("student", "teacher"):
        for key in {"checkpoint", "heads"} & tree.get(section, {}).keys():
            tree[section][key] = Path(tree[section][key]).name
    return yaml.safe_dump(tree, sort_keys=False)
