"""Write the model card of an exported student."""

from __future__ import annotations

from pathlib import Path

import timm
import yaml

from indistill import config
from indistill.commands.export.source import Source, find_preprocessing
from indistill.config import Config
from indistill.config.run_dir import RunDir
from indistill.models import cnn32
from indistill.models.network import Network
from indistill.models.views import evaluation_view
from indistill.prune import Plan

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
_RESIZED = {
    "center": "The shorter side is",
    "squash": "Each side is",
    "border": "The longer side is",
}  # by crop_mode
_LIBRARY = {"timm": "timm", "onnx": "onnx", "torch": "pytorch"}
# Where a run and its data lie is nobody's business but its owner's.
_LOCAL_KEYS = {"run_dir": True, "data": {"root", "cache_dir"}, "targets": {"dir"}}


def card(source: Source, network: Network, form: str, command: str, checked: str) -> str:
    """The README.md of an export, in the form of the Hugging Face Hub."""
    settings, section = source.settings, source.settings.data
    architecture = network.net.pretrained_cfg["architecture"]
    ours = timm.model_entrypoint(architecture).__module__ == cnn32.__name__
    register = "import indistill.models    # registers the network with timm\n" * ours
    if form == "timm":
        taken = "Normalised float images, as timm's own transform makes them"
    else:
        taken = "uint8 RGB images, resized and cropped; it normalises them itself"
    preprocessing, view = find_preprocessing(network, settings), evaluation_view(settings)
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
    return (
        f"with the weights of {Path(section.checkpoint).name}"
        if section.checkpoint
        else "with random weights"
    )


def _method(source: Source) -> str:
    settings, parts = source.settings, []
    plan = RunDir(source.run).pruning_plan
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
