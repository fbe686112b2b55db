"""DeepSpeed's configuration, put together from all who may speak: the config, a file of the user's, the launcher."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from indistill import config
from indistill.config import Config, UserError, in_one_line

# ZeRO flattens the parameters and cuts them anywhere: right for optimizers that treat every number by itself, wrong for
# those that take norms or factors of a tensor (lamb, lars, adafactor, muon, the cautious ones).
ELEMENTWISE = {
    "sgd",
    "momentum",
    "sgdw",
    "adam",
    "adamw",
    "nadam",
    "nadamw",
    "radam",
    "radamw",
    "adamax",
    "lion",
}
ELEMENTWISE |= {"rmsprop", "adadelta"}

_BUCKET_ELEMENTS = (
    50_000_000  # DeepSpeed's own default of 5e8 would take 2 GB for each buffer, also for small students
)
_SETTINGS = {  # keys of the config's section, and the DeepSpeed configuration's
    "stage": "zero_optimization.stage",
    "offload_optimizer": "zero_optimization.offload_optimizer.device",
    "offload_parameters": "zero_optimization.offload_param.device",
    "reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
}
_ACCELERATE_SETTINGS = {  # keys under deepspeed_config in a file of `accelerate config`
    "zero_stage": "zero_optimization.stage",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_param_device": "zero_optimization.offload_param.device",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}
_LAUNCHER_VARIABLES = {  # how `accelerate launch` hands the same keys on
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
_STAGE = _SETTINGS["stage"]
_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAMETERS = _SETTINGS["offload_optimizer"], _SETTINGS["offload_parameters"]


def zero_config(settings: Config, world: int) -> dict[str, Any] | None:
    """DeepSpeed's configuration, of the config, its `engine.config_file` and `accelerate launch`; None under DDP.

    Raises UserError where two of them differ, where one sets what is not DeepSpeed's to set here, and for what cannot
    work.
    """
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    section = settings.engine
    if isinstance(section, config.DDP) and launched:
        raise UserError(
            "engine.name is ddp, but accelerate launch was told to use DeepSpeed: set engine.name: deepspeed, or take "
            "another accelerate config"
        )
    if not launched and not isinstance(section, config.DeepSpeed):
        return None
    section = section or config.DeepSpeed(name="deepspeed")
    _check_usable(settings)

    said = _said_by_config(settings, section, world)
    sources = []
    if section.config_file:
        sources.append(("engine.config_file", _read(section.config_file)))
    sources.append(("accelerate launch", dict(_said_by_launcher())))
    for source, values in sources:
        _check_precision(source, values, settings.mixed_precision)
        for key, value in values.items():
            root = key.partition(".")[0]
            if root in ("bf16", "fp16"):
                continue  # ours is autocast, with the parameters in float32
            if root in ("optimizer", "scheduler", "torch_autocast", "amp"):
                ours = {"optimizer": "optimizer", "scheduler": "schedule"}.get(root, "mixed_precision")
                raise UserError(f"{source}: {root} is what {ours} of this config sets: remove it there")
            if key == "zero_optimization.compute_grad_norm" and value is False:
                raise UserError(
                    f"{source}: {key}: the norm tells which steps to skip (max_bad_steps): remove it there"
                )
            if key in said and said[key][0] != value:
                old, other = said[key]
                raise UserError(f"{source}: {key} is {value}, but {other} makes it {old}: let them agree")
            said.setdefault(key, (value, source))

    stage, source = said.setdefault(_STAGE, (2, "engine"))
    if stage not in (1, 2, 3):
        raise UserError(f"{source}: {_STAGE} is {stage}: give 1, 2 or 3, or set engine.name: ddp")
    if stage != 3 and said.get(_OFFLOAD_PARAMETERS, ("none",))[0] != "none":
        raise UserError(
            f"{said[_OFFLOAD_PARAMETERS][1]}: parameters are offloaded in stage 3, this is {stage}"
        )
    for key in (_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAMETERS):
        if said.get(key, ("none",))[0] not in ("none", "cpu"):
            device, source = said[key]
            raise UserError(
                f"{source}: {key} is {device}: offload to cpu (checkpoints read the state from memory)"
            )
    for key in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
        said.setdefault(_SETTINGS[key], (_BUCKET_ELEMENTS, "engine"))
    # Without these two Accelerate would have DeepSpeed cast the parameters, batch norm included.
    return _nested({key: value for key, (value, _) in said.items()}) | {
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _check_usable(settings: Config) -> None:
    # Accelerate asks for the version of transformers whenever it runs DeepSpeed.
    missing = [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"engine: DeepSpeed needs packages that are not installed: pip install {' '.join(missing)}"
        )
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "engine: DeepSpeed needs a launcher, for one process too: torchrun --nproc-per-node 1 -m indistill ..."
        )
    if settings.optimizer.name.lower() not in ELEMENTWISE:
        raise UserError(
            f"optimizer.name: {settings.optimizer.name} may look at whole tensors, which ZeRO cuts: choose one of "
            f"{', '.join(sorted(ELEMENTWISE))}, or engine.name: ddp"
        )


def _said_by_config(settings: Config, section: config.DeepSpeed, world: int) -> dict[str, tuple[Any, str]]:
    """Key of DeepSpeed's configuration to its value and the key of ours that says so."""
    batch, accumulation = settings.data.global_batch, settings.grad_accumulation
    said = {
        "train_batch_size": (batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": (batch // (world * accumulation), "data.global_batch"),
        "gradient_accumulation_steps": (accumulation, "grad_accumulation"),
        "gradient_clipping": (settings.clip_grad_norm or 0.0, "clip_grad_norm"),
        # Else Accelerate would replace the optimizer by DeepSpeed's Adam whenever its state is offloaded.
        "zero_force_ds_cpu_optimizer": (False, "optimizer"),
    }
    for name, key in _SETTINGS.items():
        if (value := getattr(section, name)) is not None:
            said[key] = (value, f"engine.{name}")
    return said


def _said_by_launcher() -> Iterator[tuple[str, Any]]:
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        yield from _read(file).items()
    for variable, key in _LAUNCHER_VARIABLES.items():
        if (value := yaml.safe_load(os.environ.get(variable, "none"))) not in ("none", "auto"):
            yield key, value


def _read(path: str) -> dict[str, Any]:
    """The dotted keys of a DeepSpeed JSON or of a file of `accelerate config`, but those that say auto."""
    try:
        text = Path(path).read_text()
        try:
            tree = json.loads(text)
        except ValueError:
            tree = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"engine.config_file: {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"engine.config_file: {path}: neither JSON nor YAML: {in_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"engine.config_file: {path}: expected a mapping of keys at the top level")
    if "distributed_type" not in tree:
        return dict(_flat(tree))
    if tree["distributed_type"] != "DEEPSPEED":
        raise UserError(
            f"engine.config_file: {path}: distributed_type is {tree['distributed_type']}, not DEEPSPEED: give another "
            "file, or set engine.name: ddp"
        )
    section = tree.get("deepspeed_config") or {}
    values = _read(section["deepspeed_config_file"]) if "deepspeed_config_file" in section else {}
    values |= {
        key: section[name]
        for name, key in _ACCELERATE_SETTINGS.items()
        if section.get(name, "auto") not in ("auto", None)
    }
    if tree.get("mixed_precision") in ("bf16", "fp16"):
        values[f"{tree['mixed_precision']}.enabled"] = True
    return values


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in ("auto", None):
            yield f"{prefix}{key}", value


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _check_precision(source: str, values: dict[str, Any], precision: str) -> None:
    for kind in ("bf16", "fp16"):
        enabled = values.get(f"{kind}.enabled")
        if enabled is not None and enabled != (precision == kind):
            raise UserError(
                f"{source}: {kind}.enabled is {str(enabled).lower()}, but mixed_precision is {precision}: let them "
                "agree, or remove one"
            )
