"""Write the model card of an exported student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import yaml

from indistill.commands.export.source import Source, find_preprocessing
from indistill.config import Config, Model
from indistill.config.run_dir import RunDir
from indistill.models import cnn32
from indistill.models.network import Network
from indistill.models.views import evaluation_view
from indistill.prune import PairPlan, Plan

_USE = {
    "timm": """import timm
{register}
net = timm.create_model("local-dir:FOLDER", pretrained=True{bare}).eval()    # or hf-hub:YOU/NAME once pushed
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
{output} = net(transform(image).unsqueeze(0))    # image: PIL, RGB""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
{output} = session.run(["{output}"], {{"images": images}})[0]  # images: uint8 [batch, 3, {size}, {size}]""",
    "torch": """import torch

program = torch.export.load("FOLDER/model.pt2").module()    # a program: load only files that you trust
{output} = program(images)  # images: uint8 [batch, 3, {size}, {size}]""",
}
# By crop_mode.
_RESIZED = {"center": "The shorter side is", "squash": "Each side is", "border": "The longer side is"}
_LIBRARY = {"timm": "timm", "onnx": "onnx", "torch": "pytorch"}
# A card does not reveal the paths on the machine that trained.
_LOCAL_KEYS: dict[str, bool | set[str]] = {"run_dir": True, "data": {"root", "cache_dir"}, "targets": {"dir"}}


def card(source: Source, network: Network, *, form: str, command: str, checked: str) -> str:
    """Write the README.md of an export, in the format of the Hugging Face Hub.

    command: the shell command of the export. checked: a sentence on how the export was compared with the run.
    """
    settings = source.settings
    net: Any = network.net  # nn.Module does not declare timm's attributes
    architecture: str = net.pretrained_cfg["architecture"]
    task = "image-classification" if net.num_classes else "image-feature-extraction"
    tags = [task, "knowledge-distillation", "indistill"]
    if form == "timm":
        tags.append("timm")
    front = {"library_name": _LIBRARY[form], "pipeline_tag": task, "tags": tags}
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {architecture}, a distilled student",
        _weights(source, net),
        f"```python\n{_usage(form, net, settings.data.full_size)}\n```",
        f"**Input.** {_input(source, network, form)}",
        f"**Teacher.** {_teacher(settings)}",
        f"**Method.** {_method(source)}",
        f"**Data.** Trained on `{settings.data.train}`, evaluated on {_evaluated_on(settings)}.",
        f"**Metrics.** {_metrics(source)}",
        f"**Exported by** `{command}`. {checked} Trained by `indistill train config.yaml run_dir=RUN "
        "data.root=SHARDS`, where config.yaml is",
        f"```yaml\n{recipe(settings)}```",
    ]
    return "\n\n".join(lines) + "\n"


def _evaluated_on(settings: Config) -> str:
    """The evaluation sets, in the order of their scores."""
    data = settings.data
    if not isinstance(data.eval, dict):
        return f"`{data.eval}`"
    return ", ".join(f"{name}: `{one.shards}`" for name, one in data.eval.items())


def _weights(source: Source, net: Any) -> str:
    parameters = sum(parameter.numel() for parameter in net.parameters())
    weights = "as trained"
    if source.weights == "ema" and source.settings.ema is not None:
        weights = f"moving average (decay {source.settings.ema.decay})"
    training = "of training." if source.finished else "of a run that had not finished."
    classes = f"{net.num_classes} classes" if net.num_classes else "without a classifier"
    text = f"{parameters:,} parameters, {classes}. "
    text += f"Weights: {weights}, after {source.step:,} steps {training}"
    if source.student.pretrained or source.student.checkpoint:
        text += f" Training started {_initial_weights(source.student)}."
    return text


def _initial_weights(section: Model) -> str:
    if section.pretrained and section.name.startswith("local-dir:"):
        return f"with the weights of {Path(section.name).name}"
    if section.pretrained:
        return "with timm's pretrained weights"
    if section.checkpoint:
        return f"with the weights of {Path(section.checkpoint).name}"
    return "with random weights"


def _usage(form: str, net: Any, image_size: int) -> str:
    """Python code that loads and runs the export."""
    architecture, register = net.pretrained_cfg["architecture"], ""
    if timm.model_entrypoint(architecture).__module__ == cnn32.__name__:
        register = "import indistill.models    # registers the network with timm\n"
    bare, output = ("", "logits") if net.num_classes else (", num_classes=0", "embeddings")
    return _USE[form].format(register=register, size=image_size, bare=bare, output=output)


def _input(source: Source, network: Network, form: str) -> str:
    if form == "timm":
        images = "Normalised float images, as timm's own transform makes them"
    else:
        images = "uint8 RGB images, resized and cropped; it normalises them itself"
    preprocessing = find_preprocessing(network, source)
    view = evaluation_view(source.settings)
    size = source.settings.data.full_size
    return (
        f"{images}. {_RESIZED[view.crop_mode]} resized to {int(size / view.crop_pct)} pixels "
        f"({view.interpolation}), the centre of {size} x {size} cut out; mean {list(preprocessing['mean'])}, "
        f"standard deviation {list(preprocessing['std'])} of values in [0, 1]."
    )


def _teacher(settings: Config) -> str:
    if not settings.has_teacher:
        return "None: trained on the labels alone."
    teachers = settings.teacher_sections.values()
    return f"{'; '.join(f'{_public_name(one.name)}, {_initial_weights(one)}' for one in teachers)}."


def _public_name(name: str) -> str:
    """A model's name without the folders above that of an export."""
    kind, _, source = name.partition(":")
    return f"local-dir:{Path(source).name}" if kind == "local-dir" else name


def _method(source: Source) -> str:
    settings = source.settings
    parts = []
    plan = RunDir(source.run).pruning_plan
    if settings.warmup and plan.is_file():
        pairs = ", ".join(map(_pair, Plan.read(plan).pairs))
        parts.append(
            f"InDistill ({settings.warmup.curriculum} warm-up on the teacher's maps, pruned by "
            f"{settings.warmup.prune.criterion}): teacher stage to student stage {pairs}. Then"
        )
    losses = ", ".join(f"{loss.name} (weight {loss.weight:g})" for loss in settings.losses)
    duration = settings.duration if isinstance(settings.duration, str) else f"{settings.duration} epochs"
    return " ".join([*parts, f"losses: {losses}; {duration} in all."])


def _pair(pair: PairPlan) -> str:
    width = f"{len(pair.kept)} of {pair.teacher_width}" if pair.kept else f"all {pair.teacher_width}"
    return f"{pair.teacher_stage} to {pair.student_stage} ({width} channels)"


def _metrics(source: Source) -> str:
    if not source.scores:
        return "These weights were not evaluated: `indistill eval CONFIG FOLDER` evaluates them."
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in source.scores.items())
    precision = source.settings.mixed_precision
    autocast = f" (computed under {precision} autocast)" if precision != "no" else ""
    return f"At step {source.step:,}, of these weights{autocast}:\n\n| | |\n|---|---|\n{rows}"


def recipe(settings: Config) -> str:
    """The config values that differ from their defaults, as YAML, without paths of the training machine."""
    tree = settings.model_dump(mode="json", exclude_defaults=True, exclude=_LOCAL_KEYS)
    for section in ("student", "teacher"):
        for key in {"checkpoint", "heads"} & tree.get(section, {}).keys():
            tree[section][key] = Path(tree[section][key]).name
        if section in tree:
            tree[section]["name"] = _public_name(tree[section]["name"])
    for one in settings.data.eval_sets:
        if one and (path := tree["data"]["eval"][one].get("label_map")):
            tree["data"]["eval"][one]["label_map"] = Path(path).name
    return yaml.safe_dump(tree, sort_keys=False)
