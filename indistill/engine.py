"""How the processes share the training: DDP, or DeepSpeed's ZeRO, both through Accelerate.

Under ZeRO the student computes what it computes under DDP: parameters, gradients and the optimizer's state are float32,
mixed precision is the same autocast, and a parameter that a phase does not use stays as it is.
"""

from __future__ import annotations

import copy
import importlib.util
import ipaddress
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs, KwargsHandler, convert_outputs_to_fp32
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from indistill import config
from indistill.config import Config, UserError
from indistill.curriculum import Phase
from indistill.optim import PhaseOptim

# ZeRO flattens the parameters and cuts them anywhere: right for optimizers that treat every number by itself, wrong for
# those that take norms or factors of a tensor (lamb, lars, adafactor, muon, the cautious ones).
ELEMENTWISE = {"sgd", "momentum", "sgdw", "adam", "adamw", "nadam", "nadamw", "radam", "radamw", "adamax", "lion"}
ELEMENTWISE |= {"rmsprop", "adadelta"}

_BUCKET_ELEMENTS = 50_000_000  # DeepSpeed's own default of 5e8 would take 2 GB for each buffer, also for small students
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
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
}
_LAUNCHER_VARIABLES = {  # how `accelerate launch` hands the same keys on
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "zero_optimization.offload_optimizer.nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "zero_optimization.offload_param.nvme_path",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
_PERSISTENCE = "stage3_param_persistence_threshold"  # elements
_STAGE, _OFFLOAD_PARAMETERS = _SETTINGS["stage"], _SETTINGS["offload_parameters"]


# --- what the user asked for -----------------------------------------------------------------------------------------


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
    if launched:
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
            if key in said and said[key][0] != value:
                old, other = said[key]
                raise UserError(f"{source}: {key} is {value}, but {other} makes it {old}: let them agree")
            said.setdefault(key, (value, source))

    stage, source = said.setdefault(_STAGE, (2, "engine"))
    if stage not in (1, 2, 3):
        raise UserError(f"{source}: {_STAGE} is {stage}: give 1, 2 or 3, or set engine.name: ddp")
    if stage != 3 and said.get(_OFFLOAD_PARAMETERS, ("none",))[0] != "none":
        raise UserError(f"{said[_OFFLOAD_PARAMETERS][1]}: parameters are offloaded in stage 3, this is {stage}")
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
        raise UserError(f"engine: DeepSpeed needs packages that are not installed: pip install {' '.join(missing)}")
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
        raise UserError(f"engine.config_file: {path}: neither JSON nor YAML: {' '.join(str(error).split())}") from None
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
        if section.get(name, "auto") not in ("auto", None) and not (name.endswith("_path") and section[name] == "none")
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


# --- how it runs -----------------------------------------------------------------------------------------------------


def start(
    zero: dict[str, Any] | None,
    precision: str,
    world: int,
    timeout_minutes: float,
    handlers: list[KwargsHandler],
    **arguments: Any,
) -> Accelerator:
    """Accelerate under DDP or, with a configuration, under ZeRO; `arguments` are those of Accelerator.

    A collective fails after `timeout_minutes`; it is the first call's in a process, whose process group stays.
    """
    # Of an earlier run of this process, which may have had another engine or precision. The process group stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    asked = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    on_cpu = not torch.cuda.is_available()
    # The microsecond, because Accelerate drops what equals its default, and gloo's default is another.
    timeout = timedelta(minutes=timeout_minutes, microseconds=1)
    if on_cpu and world > int(os.environ.get("LOCAL_WORLD_SIZE", world)) and (interface := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if zero is None:
        if on_cpu and world > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # else torchrun on CPUs is taken for single processes
        handlers = [*handlers, InitProcessGroupKwargs(timeout=timeout)]
        return Accelerator(mixed_precision=precision, kwargs_handlers=handlers, **arguments)
    os.environ["ACCELERATE_USE_CPU"] = "false"  # Accelerate takes it for a word against DeepSpeed
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm  # noqa: F401

        # For gloo alone; else DeepSpeed compiles collectives of its own for minutes. (As an attribute of the package,
        # the name deepspeed.comm.torch is torch itself.)
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # checked by zero_config; Accelerate would refuse any
    handlers = [*handlers, InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)]
    plugin = DeepSpeedPlugin(hf_ds_config=zero, zero3_init_flag=False)
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=handlers, deepspeed_plugin=plugin, **arguments)
    # A later run of this process asks anew: it may be another engine's.
    if asked is None:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = asked
    if precision != "no":  # where DeepSpeed runs, Accelerate leaves autocast to it
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, dtype)
    return accelerator


def _interface() -> str | None:
    """The network interface that leads to the first node; gloo takes that of the host's name, often the loopback."""
    try:
        family, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # chooses a way, and sends nothing
            ours = probe.getsockname()[0]
    except OSError:
        return None  # for the rendezvous to tell
    names = [name for name, own in psutil.net_if_addrs().items() if any(a.address == ours for a in own)]
    return names[0] if names and not ipaddress.ip_address(ours).is_loopback else None


def stage(accelerator: Accelerator) -> int:
    """Of ZeRO; 0 under DDP."""
    plugin = accelerator.deepspeed_plugin
    return plugin.deepspeed_config["zero_optimization"]["stage"] if plugin else 0


def describe(accelerator: Accelerator) -> str:
    """What a checkpoint's optimizer state is bound to."""
    return f"ZeRO stage {stage(accelerator)}" if stage(accelerator) else "ddp"


def prepare(
    accelerator: Accelerator, precision: str, student: nn.Module, optimizer: Optimizer, phase_optim: PhaseOptim
) -> tuple[nn.Module, Optimizer]:
    """The student wrapped for training, and its optimizer."""
    if not stage(accelerator):
        return accelerator.prepare(student, optimizer)
    student.to(memory_format=torch.contiguous_format)  # DeepSpeed flattens parameters, and refuses channels_last
    if precision != "no":
        student.forward = convert_outputs_to_fp32(accelerator.autocast()(student.forward))  # as Accelerate does for DDP
    if stage(accelerator) == 3:
        # A parameter is gathered for the forward pass of the module that holds it. The outermost modules are run by
        # parts, never as such: what they hold themselves (positions, class tokens) has to stay whole.
        outermost = [p.numel() for m in student.modules() if any(m.children()) for p in m.parameters(recurse=False)]
        section, key = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"], _PERSISTENCE
        section[key] = max([section.get(key, 100_000), *outermost])
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    if precision == "fp16":
        _scale_losses(optimizer.optimizer)
    # Stage 3 keeps the gradients of parameters that a phase no longer uses, and would count them when it clips.
    phase_optim.stale_gradients = getattr(optimizer.optimizer, "grad_partitions_flat_buffer", None)
    return wrapped, optimizer


def unused(
    accelerator: Accelerator, student: nn.Module, phases: Sequence[Phase], loss_of: Callable[[Phase], Tensor]
) -> dict[tuple[int, ...], set[Tensor]]:
    """What PhaseOptim must leave alone under ZeRO: for the pairs of each phase, parameters without a gradient.

    These are missing from the graph of the phase's loss, which `loss_of` gives on any images.
    """
    if not stage(accelerator):
        return {}
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    missing = {}
    for phase in phases:
        nodes, seen = [loss_of(phase).grad_fn], set()
        used = set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            used.add(getattr(node, "variable", None))  # a leaf's
            nodes += [following for following, _ in node.next_functions]
        missing[phase.pairs] = set(student.parameters()) - used
    for buffer, before in buffers:
        buffer.copy_(before)  # batch norm has seen the images
    return missing


def _scale_losses(optimizer: Any) -> None:
    """Give a ZeRO optimizer the dynamic loss scale that DeepSpeed has for parameters in fp16 only.

    It then scales the loss, unscales before clipping, skips steps that overflow on any rank, and is in checkpoints.
    Numbers of torch.amp.GradScaler.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    optimizer.loss_scaler = DynamicLossScaler(
        init_scale=2.0**16, scale_window=2000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False
    )
    optimizer.dynamic_loss_scale = True


def whole(accelerator: Accelerator, student: nn.Module) -> Callable[[], nn.Module]:
    """What gives the student with all its weights, to be called on all ranks. Call this before `prepare`.

    Under ZeRO that is a copy, with the weights as of the latest call: in training they lie in pieces (stage 3), or in
    larger buffers, which cannot be saved.
    """
    if not stage(accelerator):
        return lambda: student
    spare = copy.deepcopy(student)

    def gathered() -> nn.Module:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(student.parameters())):
            spare.load_state_dict(student.state_dict())
        return spare

    return gathered


# --- checkpoints -----------------------------------------------------------------------------------------------------


def load_state(accelerator: Accelerator, path: Path) -> None:
    """Load what `save_state` and `model.safetensors` hold, in place; under ZeRO from any number of processes."""
    files = sorted(path.glob("pytorch_model/zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not stage(accelerator) or len(files) == accelerator.num_processes:
        accelerator.load_state(str(path))
        return
    from deepspeed.runtime.zero import GatheredParameters

    wrapped, zero = accelerator._models[0], accelerator._optimizers[0].optimizer
    parameters = list(wrapped.module.parameters())
    with GatheredParameters(parameters, modifier_rank=0):
        wrapped.module.load_state_dict(load_file(path / "model.safetensors"))
    zero.refresh_fp32_params()  # where they are copies, of what was loaded
    saved = [torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"] for file in files]
    zero.loss_scaler, zero.overflow = saved[0]["loss_scaler"], saved[0]["overflow"]
    partitioned = stage(accelerator) == 3
    states = [part["optimizer_state_dict" if partitioned else "base_optimizer_state"]["state"] for part in saved]
    groups = zero.fp16_groups if partitioned else zero.bit16_groups
    flats = zero.fp32_partitioned_groups_flat if partitioned else zero.single_partition_of_fp32_groups
    for i, (group, flat) in enumerate(zip(groups, flats)):
        sizes = [parameter.ds_numel if partitioned else parameter.numel() for parameter in group]
        for name, value in states[0].get(i, {}).items():
            if torch.is_tensor(value) and value.dim():
                parts = [state[i][name] for state in states]
                value = repartition(parts, sizes, partitioned, accelerator.process_index, accelerator.num_processes)
                value = value.to(flat.device)
            zero.optimizer.state[flat][name] = value


def _rank_of(file: Path) -> int:
    return int(file.name.removeprefix("zero_pp_rank_").partition("_")[0])


def repartition(parts: Sequence[Tensor], sizes: Sequence[int], each: bool, rank: int, world: int) -> Tensor:
    """A rank's part [n] of what lies in `parts` for another number of ranks, in the order of the ranks.

    ZeRO lays parameters of these `sizes` end to end. In stages 1 and 2 it pads the whole to a multiple of 2 * world and
    cuts it into `world` parts; in stage 3 it does so with `each` parameter, padded to a multiple of world.
    """
    if not each:
        total = sum(sizes)
        flat = torch.cat(list(parts))[:total]
        return torch.nn.functional.pad(flat, (0, -total % (2 * world))).chunk(world)[rank]
    cut = [part.split([math.ceil(size / len(parts)) for size in sizes]) for part in parts]
    wholes = [torch.cat(pieces)[:size] for pieces, size in zip(zip(*cut), sizes)]
    padded = [torch.nn.functional.pad(whole, (0, -size % world)) for whole, size in zip(wholes, sizes)]
    return torch.cat([whole.chunk(world)[rank] for whole in padded])
