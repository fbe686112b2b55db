"""DeepSpeed's configuration, from the config, the user's own DeepSpeed file, and `accelerate launch`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import yaml

from indistill import config
from indistill.config import Config, UserError, in_one_line
from indistill.config.extras import need
from indistill.config.files import read_json, read_text
from indistill.config.from_yaml import load_yaml
from indistill.config.limits import MAX_CONFIG_BYTES
from indistill.config.ranks import Ranks

# ZeRO flattens the parameters and splits them anywhere: right for optimizers that treat every element by
# itself, wrong for those that use norms or factors of a whole tensor (lamb, lars, adafactor, muon, the
# cautious ones).
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

# DeepSpeed's own default of 5e8 would use 2 GB for each buffer, for small students too.
_BUCKET_ELEMENTS = 50_000_000
_SETTINGS = {  # keys of the config's section `engine`, and the dotted keys of DeepSpeed's configuration
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
_LAUNCHER_VARIABLES = {  # variables in which `accelerate launch` passes the same keys
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
_SET_BY_CONFIG = {  # sections of DeepSpeed's configuration, and the key of the config that takes their place
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "torch_autocast": "mixed_precision",
    "amp": "mixed_precision",
}
_STAGE = _SETTINGS["stage"]
_OFFLOAD_OPTIMIZER = _SETTINGS["offload_optimizer"]
_OFFLOAD_PARAMETERS = _SETTINGS["offload_parameters"]


_Settings = dict[
    str, tuple[Any, str]
]  # dotted key of DeepSpeed's configuration: value, and the source that sets it


def zero_config(settings: Config, ranks: Ranks) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration, or None under DDP.

    It combines the config, the file in its `engine.config_file`, and the settings of `accelerate launch`.
    Raises UserError if two of them differ, if one sets what another key of the config sets, and for what
    cannot work.
    """
    section = _section(settings)
    if section is None:
        return None
    _check_usable(settings, ranks)
    values = _from_config(settings, section, ranks.world_size)
    if section.config_file:
        _merge(values, "engine.config_file", _read(section.config_file), settings.mixed_precision)
    _merge(values, "accelerate launch", dict(_from_launcher()), settings.mixed_precision)
    values.setdefault(_STAGE, (2, "engine"))
    _check_stage(values)
    for key in ("reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size"):
        values.setdefault(_SETTINGS[key], (_BUCKET_ELEMENTS, "engine"))
    # Without these two Accelerate would have DeepSpeed cast the parameters, batch norm included.
    return _nested({key: value for key, (value, _) in values.items()}) | {
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
    }


def _section(settings: Config) -> config.DeepSpeed | None:
    """Return the section `engine`, or defaults if only `accelerate launch` sets DeepSpeed; None under DDP."""
    launched = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    section = settings.engine
    if isinstance(section, config.DeepSpeed):
        return section
    if section is not None and launched:
        raise UserError(
            "engine.name is ddp, but accelerate launch was told to use DeepSpeed: set engine.name: "
            "deepspeed, or use another accelerate config"
        )
    return config.DeepSpeed(name="deepspeed") if launched else None


def _check_usable(settings: Config, ranks: Ranks) -> None:
    # Accelerate asks for the version of transformers whenever it runs DeepSpeed.
    need("deepspeed", "engine: DeepSpeed")
    if not ranks.has_local_rank:
        raise UserError(
            "engine: DeepSpeed needs a launcher, for one process too: torchrun --nproc-per-node 1 -m "
            "indistill ..."
        )
    if settings.optimizer.name.lower() not in ELEMENTWISE:
        raise UserError(
            f"optimizer.name: {settings.optimizer.name} may use norms or factors of whole tensors, which "
            f"ZeRO splits: choose one of {', '.join(sorted(ELEMENTWISE))}, or engine.name: ddp"
        )


def _from_config(settings: Config, section: config.DeepSpeed, world_size: int) -> _Settings:
    """Return the settings that follow from the config, each with the config's key that sets it."""
    batch = settings.data.global_batch
    accumulation = settings.grad_accumulation
    values: _Settings = {
        "train_batch_size": (batch, "data.global_batch"),
        "train_micro_batch_size_per_gpu": (batch // (world_size * accumulation), "data.global_batch"),
        "gradient_accumulation_steps": (accumulation, "grad_accumulation"),
        "gradient_clipping": (settings.clip_grad_norm or 0.0, "clip_grad_norm"),
        # Else Accelerate would replace the optimizer by DeepSpeed's Adam whenever its state is offloaded.
        "zero_force_ds_cpu_optimizer": (False, "optimizer"),
    }
    for name, key in _SETTINGS.items():
        if (value := getattr(section, name)) is not None:
            values[key] = (value, f"engine.{name}")
    return values


def _from_launcher() -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values that `accelerate launch` has set in the environment."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        yield from _read(file).items()
    for variable, key in _LAUNCHER_VARIABLES.items():
        try:
            value = load_yaml(os.environ.get(variable, "none"))
        except yaml.YAMLError as error:
            raise UserError(f"{variable} in the environment: {in_one_line(error)}: unset it") from None
        if value not in ("none", "auto"):
            yield key, value


def _merge(values: _Settings, source: str, added: dict[str, Any], precision: str) -> None:
    """Add the settings of `source` to `values`. Raises UserError for one that is forbidden or differs."""
    _check_precision(source, added, precision)
    for key, value in added.items():
        root = key.partition(".")[0]
        if root in ("bf16", "fp16"):
            continue  # mixed precision is autocast, with the parameters in float32
        if root in _SET_BY_CONFIG:
            raise UserError(
                f"{source}: {root} is set by {_SET_BY_CONFIG[root]} of the config: remove it there"
            )
        if key == "zero_optimization.compute_grad_norm" and value is False:
            raise UserError(
                f"{source}: {key}: the norm decides which steps to skip (max_bad_steps): remove it there"
            )
        if key in values and values[key][0] != value:
            other_value, other_source = values[key]
            raise UserError(
                f"{source}: {key} is {value}, but {other_source} makes it {other_value}: set both to the "
                "same value"
            )
        values.setdefault(key, (value, source))


def _check_stage(values: _Settings) -> None:
    """Raise UserError for an invalid stage, and for offloading that it does not support."""
    stage, source = values[_STAGE]
    if stage not in (1, 2, 3):
        raise UserError(f"{source}: {_STAGE} is {stage}: give 1, 2 or 3, or set engine.name: ddp")
    parameters_device, source = values.get(_OFFLOAD_PARAMETERS, ("none", ""))
    if stage != 3 and parameters_device != "none":
        raise UserError(
            f"{source}: parameters can be offloaded in stage 3 only, but the stage is {stage}: set stage: 3"
        )
    for key in (_OFFLOAD_OPTIMIZER, _OFFLOAD_PARAMETERS):
        device, source = values.get(key, ("none", ""))
        if device not in ("none", "cpu"):
            raise UserError(
                f"{source}: {key} is {device}: offload to cpu (checkpoints read the state from memory)"
            )


def _read(path: str, *, named_in_a_file: bool = False) -> dict[str, Any]:
    """Read a DeepSpeed JSON, or a file of `accelerate config`, as dotted keys; skips values of `auto`."""
    tree = _tree(path)
    if "distributed_type" not in tree:
        try:
            return dict(_flat(tree))
        except RecursionError:
            raise UserError(f"engine.config_file: {path}: too many mappings in each other") from None
    if named_in_a_file:
        raise UserError(
            f"engine.config_file: {path}: is a file of accelerate, as is the one that names it as "
            "deepspeed_config_file: name a DeepSpeed JSON there"
        )
    if tree["distributed_type"] != "DEEPSPEED":
        raise UserError(
            f"engine.config_file: {path}: distributed_type is {tree['distributed_type']}, not DEEPSPEED: "
            "give another file, or set engine.name: ddp"
        )
    section = tree.get("deepspeed_config") or {}
    if not isinstance(section, dict):
        raise UserError(f"engine.config_file: {path}: deepspeed_config: expected a mapping of keys")
    values = {}
    if "deepspeed_config_file" in section:
        values = _read(str(section["deepspeed_config_file"]), named_in_a_file=True)
    values |= {
        key: section[name]
        for name, key in _ACCELERATE_SETTINGS.items()
        if section.get(name, "auto") not in ("auto", None)
    }
    if tree.get("mixed_precision") in ("bf16", "fp16"):
        values[f"{tree['mixed_precision']}.enabled"] = True
    return values


def _tree(path: str) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
    try:
        text = read_text(path, MAX_CONFIG_BYTES)
        try:
            tree = read_json(text)
        except ValueError:
            tree = load_yaml(text)
    except OSError as error:
        raise UserError(f"engine.config_file: {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"engine.config_file: {path}: neither JSON nor YAML: {in_one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"engine.config_file: {path}: expected a mapping of keys at the top level")
    return tree


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
            if not isinstance(node, dict):
                raise UserError(f"engine.config_file: {parent} is {node!r}, instead of a mapping of keys")
        node[last] = value
    return tree


def _check_precision(source: str, values: dict[str, Any], precision: str) -> None:
    for kind in ("bf16", "fp16"):
        enabled = values.get(f"{kind}.enabled")
        if enabled is not None and enabled != (precision == kind):
            raise UserError(
                f"{source}: {kind}.enabled is {str(enabled).lower()}, but mixed_precision is {precision}: "
                "set both to the same precision, or remove one"
            )
