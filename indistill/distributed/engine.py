"""How the processes share the training: DDP, or DeepSpeed's ZeRO, both through Accelerate.

Under ZeRO the student computes what it computes under DDP: parameters, gradients and the optimizer's state
are float32, mixed precision is the same autocast, and a parameter that a phase does not use stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
import ipaddress
import math
import os
import platform
import re
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    KwargsHandler,
    broadcast_object_list,
    convert_outputs_to_fp32,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from indistill.config import UserError, in_one_line
from indistill.config.ranks import Ranks
from indistill.curriculum import Phase
from indistill.distributed.saved_state import (
    Kinds,
    check_optimizer,
    check_scaler,
    check_state,
    state_kinds,
)
from indistill.models.graph import walk
from indistill.models.outputs import Output
from indistill.models.weights import misfit

Student = TypeVar("Student", bound=nn.Module)
_PERSISTENCE = "stage3_param_persistence_threshold"  # elements

# The student wrapped for training, its optimizer, and a function that returns whether the last step was
# skipped, as a bool [] on the device.
Prepared = tuple[nn.Module, Optimizer, Callable[[], Tensor]]
OutputOf = Callable[[nn.Module, Phase], Output]
"""What the student, bare or wrapped, computes in a phase, of any images."""


# --- the engines --------------------------------------------------------------------------------------------
class Engine(ABC):
    """Trains one student on all ranks; `start` creates it.

    Call `whole` and `unused` before `prepare`, and the methods for checkpoints and gradients after it.
    """

    fused: bool  # whether torch's fused optimizers can be used

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        self.accelerator = accelerator
        self.precision = precision
        self.student: nn.Module  # set by `prepare`, as are the wrapped one and the optimizer of Accelerate
        self.wrapped: nn.Module
        self.optimizer: Any

    @abstractmethod
    def describe(self) -> str:
        """Name of the engine; optimizer state in a checkpoint loads only into the same one."""

    @abstractmethod
    def whole(self, student: Student) -> Callable[[], Student]:
        """Return a function that gathers the student's full weights (collective). Call before `prepare`."""

    @abstractmethod
    def unused(
        self, student: nn.Module, phases: Sequence[Phase], output_of: OutputOf
    ) -> dict[tuple[int, ...], set[nn.Parameter]]:
        """Return, by the pairs of each phase, the parameters that PhaseOptim itself must leave alone.

        Call before `prepare`.
        """

    @abstractmethod
    def prepare(self, student: nn.Module, optimizer: Optimizer) -> Prepared:
        """Wrap the student for training on all ranks."""

    @abstractmethod
    def in_phase(self, phase: Phase) -> nn.Module:
        """Return the wrapped student, ready for steps of a phase. Call on all ranks, before each step."""

    @abstractmethod
    def stale_gradients(self) -> Tensor | None:
        """Return gradients to clear when another phase uses other parameters, or None if there are none."""

    @abstractmethod
    def optimizer_part(self) -> dict[str, Any]:
        """Return this rank's part of the optimizer's state, not copied; empty where rank 0 has all of it.

        The values are tensors and plain values.
        """

    @abstractmethod
    def restore(self, weights: Mapping[str, Tensor], parts: Sequence[dict[str, Any]]) -> None:
        """Load the student's weights and the optimizer's state in place, saved on any number of ranks.

        `parts` are the optimizer's parts of all ranks that saved them, in the order of the ranks. Raises
        UserError if they do not fit.
        """


class DDP(Engine):
    """DistributedDataParallel: every rank has all weights and the whole state of the optimizer."""

    fused = True

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        super().__init__(accelerator, precision)
        self.missing: dict[tuple[int, ...], set[nn.Parameter]] = {}  # `missing` of each phase, by its pairs
        self.pairs: tuple[int, ...] | None = None  # of the phase of the last step
        self.left_out: set[nn.Parameter] = set()  # of the gradients that `wrapped` reduces
        self.output_of: OutputOf

    def describe(self) -> str:
        return "ddp"

    def whole(self, student: Student) -> Callable[[], Student]:
        return lambda: student

    def unused(
        self, student: nn.Module, phases: Sequence[Phase], output_of: OutputOf
    ) -> dict[tuple[int, ...], set[nn.Parameter]]:
        """Return {}: a parameter that a phase does not use has no gradient, and the optimizer skips it."""
        self.output_of = output_of
        # A launcher's only process is wrapped by DDP, too.
        if self.accelerator.distributed_type != DistributedType.NO:
            self.missing = missing(student, phases, output_of)
        return {}

    def prepare(self, student: nn.Module, optimizer: Optimizer) -> Prepared:
        self.student = student
        self.wrapped, self.optimizer = self.accelerator.prepare(student, optimizer)
        return self.wrapped, self.optimizer, self._was_skipped(optimizer)

    def in_phase(self, phase: Phase) -> nn.Module:
        """As `Engine.in_phase`; wraps the student anew where a phase trains other parameters than the last.

        DDP reduces the gradients of the parameters that require one when it is created, and waits for all of
        them in every backward pass.
        """
        if phase.pairs == self.pairs:
            return self.wrapped
        self.pairs = phase.pairs
        left_out = self.missing.get(phase.pairs, set())
        if left_out != self.left_out:
            self.left_out = left_out
            vars(self.student).pop("forward", None)  # with autocast, which Accelerate adds again
            with _requiring_no_gradient(left_out):
                # Placed again, a CPU's buffers would be others than those that `Buffers` restores.
                self.wrapped = self.accelerator.prepare_model(self.student, device_placement=False)
        if self.accelerator.num_processes > 1:
            self._settle(phase)
        return self.wrapped

    def _settle(self, phase: Phase) -> None:
        """Make a backward pass with gradients of zero.

        After its first one DDP arranges the gradients anew, and the last bits of a sum over more than two
        ranks depend on the arrangement. A run that resumes has that of the run that never stopped.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.student.buffers()]
        output = self.output_of(self.wrapped, phase)
        tensors = [
            value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad
        ]
        torch.stack([0 * tensor.float().sum() for tensor in tensors]).sum().backward()
        self.student.zero_grad()
        for buffer, before in buffers:
            buffer.copy_(before)  # batch norm has seen the images

    def _was_skipped(self, optimizer: Optimizer) -> Callable[[], Tensor]:
        """Return the function that tells whether `optimizer` skipped its last step.

        The scaler passes its inf check to a fused optimizer, which skips the step by itself, so that the host
        does not wait for the device. For other optimizers the scaler waits, and Accelerate knows.
        """
        device = self.accelerator.device
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            return lambda: torch.tensor(self.optimizer.step_was_skipped, device=device)
        skipped = torch.zeros((), dtype=torch.bool, device=device)

        def keep(optimizer: Any, *_: Any) -> None:
            skipped.copy_(optimizer.found_inf)  # which the scaler sets for the duration of the step

        optimizer.register_step_pre_hook(keep)
        return lambda: skipped

    def stale_gradients(self) -> Tensor | None:
        return None

    def optimizer_part(self) -> dict[str, Any]:
        if not self.accelerator.is_main_process:
            return {}
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else {}
        return {"optimizer": self.optimizer.state_dict(), "scaler": scaler}

    def restore(self, weights: Mapping[str, Tensor], parts: Sequence[dict[str, Any]]) -> None:
        if not parts:
            raise UserError("has no state of the optimizer")
        saved, scaler = parts[0].get("optimizer"), self.accelerator.scaler
        check_optimizer(saved, self.optimizer.optimizer)
        if scaler:
            check_scaler(parts[0].get("scaler"), scaler.state_dict())
        load_student(self.student, weights)
        self.optimizer.load_state_dict(saved)
        if scaler:
            scaler.load_state_dict(parts[0]["scaler"])


class ZeRO(Engine):
    """DeepSpeed's ZeRO: ranks partition optimizer state, from stage 2 on gradients, in stage 3 weights."""

    fused = False

    def __init__(self, accelerator: Accelerator, precision: str) -> None:
        super().__init__(accelerator, precision)
        self.stage: int = self._section()["stage"]

    def describe(self) -> str:
        return f"ZeRO stage {self.stage}"

    def whole(self, student: Student) -> Callable[[], Student]:
        """As `Engine.whole`; the function returns a copy, with the weights as of its latest call.

        During training the student's own weights are partitioned (stage 3) or views of larger buffers, which
        cannot be saved.
        """
        spare = copy.deepcopy(student)

        def gathered() -> Student:
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters(list(student.parameters())):
                spare.load_state_dict(student.state_dict())
            return spare

        return gathered

    def unused(
        self, student: nn.Module, phases: Sequence[Phase], output_of: OutputOf
    ) -> dict[tuple[int, ...], set[nn.Parameter]]:
        """Return what is `missing` in each phase.

        ZeRO gives these parameters gradients of zero, with which an optimizer would let them decay.
        """
        return missing(student, phases, output_of)

    def prepare(self, student: nn.Module, optimizer: Optimizer) -> Prepared:
        self.student = student
        # DeepSpeed flattens parameters, and refuses channels_last.
        student.to(memory_format=torch.contiguous_format)
        if self.precision != "no":
            # As Accelerate does for DDP.
            student.forward = convert_outputs_to_fp32(self.accelerator.autocast()(student.forward))
        if self.stage == 3:
            self._keep_outermost_parameters_whole(student)
        self.wrapped, self.optimizer = self.accelerator.prepare(student, optimizer)
        if self.precision == "fp16":
            use_dynamic_loss_scale(self._zero)
        wrapped, device = self.wrapped, self.accelerator.device
        return wrapped, self.optimizer, lambda: torch.tensor(self.optimizer.step_was_skipped, device=device)

    def in_phase(self, phase: Phase) -> nn.Module:
        return self.wrapped

    def _keep_outermost_parameters_whole(self, student: nn.Module) -> None:
        """Raise the size up to which stage 3 keeps parameters whole, to that of the outermost modules' own.

        A parameter is gathered for the forward pass of the module that holds it. The forward pass of the
        outermost modules is never called, only that of their parts: their own parameters (positions, class
        tokens) must be whole.
        """
        outermost = [
            parameter.numel()
            for module in student.modules()
            if any(module.children())
            for parameter in module.parameters(recurse=False)
        ]
        section = self._section()
        section[_PERSISTENCE] = max([section.get(_PERSISTENCE, 100_000), *outermost])

    def _section(self) -> dict[str, Any]:
        """Return the section of DeepSpeed's configuration that Accelerate passes on."""
        return self.accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]

    def stale_gradients(self) -> Tensor | None:
        """Return the gradients that stage 3 keeps of parameters that a phase no longer uses, or None.

        Stage 3 would count them when it clips.
        """
        return getattr(self._zero, "grad_partitions_flat_buffer", None)

    def optimizer_part(self) -> dict[str, Any]:
        """As `Engine.optimizer_part`; `repartition` describes how the parts of all ranks join."""
        zero, partitions = self._zero, self._partitions()
        states = [dict(zero.optimizer.state.get(flat, {})) for _, flat in partitions]
        return {"optimizer": states, "scaler": self._scaler(), "sizes": [sizes for sizes, _ in partitions]}

    def restore(self, weights: Mapping[str, Tensor], parts: Sequence[dict[str, Any]]) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        self._check(parts)
        with GatheredParameters(list(self.student.parameters()), modifier_rank=0):
            load_student(self.student, weights)
        self._zero.refresh_fp32_params()  # in stages with copies of the parameters
        scaler = {name: parts[0]["scaler"][name] for name in self._scaler()}
        vars(self._zero.loss_scaler).update(scaler)
        self._restore_optimizer([part["optimizer"] for part in parts])

    def _check(self, parts: Sequence[dict[str, Any]]) -> None:
        """Raise UserError unless the parts of all ranks that saved them fit this run."""
        groups = [sizes for sizes, _ in self._partitions()]
        if not parts or any(part.get("sizes") != groups for part in parts):
            raise UserError(
                "DeepSpeed partitions the parameters differently from the checkpoint: use the same "
                "sub_group_size"
            )
        example = torch.zeros(1, device=self._partitions()[0][1].device)
        (kinds,) = state_kinds(self._zero.optimizer, [[example]]).values()
        for rank, part in enumerate(parts):
            check_scaler(part.get("scaler"), self._scaler())
            what, states = f"rank {rank}'s state of the optimizer", part.get("optimizer")
            if not isinstance(states, list) or len(states) != len(groups):
                raise UserError(f"{what} has not the {len(groups)} groups of this run")
            for i, sizes in enumerate(groups):
                length = (partition_length(sizes, each=self.stage == 3, world=len(parts)),)
                wanted: Kinds = {
                    name: (length, kind[1]) if isinstance(kind, tuple) else kind
                    for name, kind in kinds.items()
                }
                check_state(f"{what}, group {i}", states[i], wanted, length)
                if states[i].keys() != parts[0]["optimizer"][i].keys():
                    raise UserError(f"{what}, group {i}, has other names than that of rank 0")

    def _restore_optimizer(self, states: Sequence[list[dict[str, Any]]]) -> None:
        """Load this rank's part; `states` has, by saved rank and group of parameters, name to value."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        for i, (sizes, flat) in enumerate(self._partitions()):
            for name, value in states[0][i].items():
                if torch.is_tensor(value) and value.dim():
                    saved = [state[i][name] for state in states]
                    value = repartition(saved, sizes, each=self.stage == 3, rank=rank, world=world)
                    value = value.to(flat.device)
                self._zero.optimizer.state[flat][name] = value

    def _scaler(self) -> dict[str, int | float]:
        """The numbers of DeepSpeed's loss scaler."""
        values = vars(self._zero.loss_scaler).items()
        return {name: value for name, value in values if isinstance(value, int | float)}

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, which holds torch's as `optimizer`."""
        return self.optimizer.optimizer

    def _partitions(self) -> list[tuple[list[int], Tensor]]:
        """Return, for each group of parameters that ZeRO concatenates, the sizes and this rank's part."""
        zero = self._zero
        if self.stage == 3:
            sizes = [[parameter.ds_numel for parameter in group] for group in zero.fp16_groups]
            return list(zip(sizes, zero.fp32_partitioned_groups_flat))
        sizes = [[parameter.numel() for parameter in group] for group in zero.bit16_groups]
        return list(zip(sizes, zero.single_partition_of_fp32_groups))


def missing(
    student: nn.Module, phases: Sequence[Phase], output_of: OutputOf
) -> dict[tuple[int, ...], set[nn.Parameter]]:
    """Return, by the pairs of each phase, the trainable parameters that its output does not depend on."""
    trained = {parameter for parameter in student.parameters() if parameter.requires_grad}
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
    found = {}
    for phase in phases:
        # Only a leaf's node has its variable.
        tensors = [value for value in tree_leaves(output_of(student, phase)) if isinstance(value, Tensor)]
        used = {getattr(node, "variable", None) for x in tensors for node in walk(x.grad_fn)}
        found[phase.pairs] = trained - used
    for buffer, before in buffers:
        buffer.copy_(before)  # batch norm has seen the images
    return found


@contextlib.contextmanager
def _requiring_no_gradient(parameters: Set[nn.Parameter]) -> Iterator[None]:
    """Have trainable parameters require no gradient in the meantime."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)


def use_dynamic_loss_scale(zero_optimizer: Any) -> None:
    """Give a ZeRO optimizer the dynamic loss scale that DeepSpeed reserves for parameters in fp16.

    It then scales the loss, unscales before clipping, skips steps that overflow on any rank, and is in
    checkpoints. The numbers are those of torch.amp.GradScaler.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    zero_optimizer.loss_scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=2000,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,  # max_bad_steps decides when to stop
    )
    zero_optimizer.dynamic_loss_scale = True


def partition_length(sizes: Sequence[int], *, each: bool, world: int) -> int:
    """Return the length of every rank's part, by the rules of `repartition`."""
    if each:
        return sum(math.ceil(size / world) for size in sizes)
    return math.ceil(sum(sizes) / (2 * world)) * 2


def repartition(
    parts: Sequence[Tensor], sizes: Sequence[int], *, each: bool, rank: int, world: int
) -> Tensor:
    """Return the part [n] of `rank` of `world` ranks, from `parts` of any number of ranks, in rank order.

    ZeRO concatenates parameters of these `sizes`. In stages 1 and 2 it pads the whole to a multiple of 2 *
    world and cuts it into `world` parts; in stage 3 (`each`) it does so with each parameter, padded to a
    multiple of world.
    """
    pad = torch.nn.functional.pad
    if not each:
        total = sum(sizes)
        flat = torch.cat(list(parts))[:total]
        return pad(flat, (0, -total % (2 * world))).chunk(world)[rank]
    cut = [part.split([math.ceil(size / len(parts)) for size in sizes]) for part in parts]
    parameters = [torch.cat(pieces)[:size] for pieces, size in zip(zip(*cut), sizes)]
    padded = [pad(parameter, (0, -size % world)) for parameter, size in zip(parameters, sizes)]
    return torch.cat([parameter.chunk(world)[rank] for parameter in padded])


# --- starting -----------------------------------------------------------------------------------------------
def start(
    zero: dict[str, Any] | None,
    precision: str,
    *,
    ranks: Ranks,
    timeout_minutes: float,
    handlers: Sequence[KwargsHandler] = (),
    **arguments: Any,
) -> Engine:
    """Start Accelerate under DDP, or under ZeRO with the DeepSpeed configuration `zero`.

    `handlers` and `arguments` are passed to Accelerator. A collective fails after `timeout_minutes`; those of
    the first call in a process count, because its process group stays.
    """
    # Forget an earlier run of this process, which may have had another engine or precision. The process group
    # stays.
    AcceleratorState._reset_state(reset_partial_state=True)
    use_deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # The microsecond, because Accelerate drops what equals its default, and gloo's default is another.
    timeout = timedelta(minutes=timeout_minutes, microseconds=1)
    find_interface(ranks)
    if zero is None:
        if not torch.cuda.is_available() and ranks.world_size > 1:
            # Else Accelerate takes torchrun on CPUs for single processes.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        groups = InitProcessGroupKwargs(timeout=timeout)
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[*handlers, groups], **arguments)
        if accelerator.scaler is None:
            accelerator.scaler = _constant_scaler(accelerator.device)
        return DDP(accelerator, precision)
    accelerator = _deepspeed_accelerator(zero, timeout, handlers, arguments)
    if use_deepspeed is not None:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = use_deepspeed
    if precision != "no":  # where DeepSpeed runs, Accelerate leaves autocast to it
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        accelerator.autocast = partial(torch.autocast, accelerator.device.type, dtype)
    return ZeRO(accelerator, precision)


def _constant_scaler(device: torch.device) -> torch.amp.GradScaler:
    """Return a scaler that skips steps whose gradients are not finite, as in fp16, at a scale of 1.

    Its factors must not be 1: these leave the scale at 1 in float32. ZeRO skips such steps itself.
    """
    growth = math.nextafter(1.0, 2.0)
    backoff = math.nextafter(1.0, 0.0)
    return torch.amp.GradScaler(device.type, 1.0, growth, backoff)


def _deepspeed_accelerator(
    zero: dict[str, Any], timeout: timedelta, handlers: Sequence[KwargsHandler], arguments: dict[str, Any]
) -> Accelerator:
    """Start Accelerate under ZeRO, and remove its variable again: a later run may have another engine."""
    on_cpu = not torch.cuda.is_available()
    os.environ["ACCELERATE_USE_CPU"] = "false"  # if true, Accelerate would not use DeepSpeed
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.comm  # noqa: F401

        # With gloo alone; else DeepSpeed compiles its own collectives for minutes. (As an attribute of the
        # package, the name deepspeed.comm.torch is torch itself.)
        backend: Any = sys.modules["deepspeed.comm.torch"]
        backend.build_shm_op = lambda: None
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)  # checked by zero_config; Accelerate would refuse any
    groups = InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[*handlers, groups],
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero, zero3_init_flag=False),
        **arguments,
    )
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return accelerator


def find_interface(ranks: Ranks) -> None:
    """Make gloo use the network between the nodes, if there are several."""
    if ranks.world_size > ranks.local_world_size and (interface := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _interface() -> str | None:
    """Return the network interface that leads to the first node.

    By default gloo uses the one of the host name, often the loopback.
    """
    try:
        family, *_, address = socket.getaddrinfo(os.environ["MASTER_ADDR"], 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # chooses a route, and sends nothing
            own_address = probe.getsockname()[0]
    except OSError:
        return None  # the rendezvous reports it
    if ipaddress.ip_address(own_address).is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == own_address for entry in addresses):
            return name
    return None


# --- helpers that both engines and commands use -------------------------------------------------------------
def device_name(device: torch.device) -> str:
    """Return the product name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if model := re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text()):
            return f"CPU: {model[1]}"
    return f"CPU: {platform.processor() or platform.machine()}"


def load_student(student: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the student's weights in a checkpoint. Raises UserError, before it changes any, if one does not
    fit.
    """
    if problem := misfit(weights, student.state_dict()):
        raise UserError(f"model.safetensors {problem}")
    student.load_state_dict(weights)


def on_main(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """Call `function` on rank 0; return its result, or raise its UserError, on every rank (collective).

    No rank waits for a rank 0 that has failed: its unexpected error is a UserError on the others, who are
    silent about it.
    """
    result: Any = None
    message: str | None = None
    unexpected: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = function()
        except UserError as error:
            message = str(error)
        except Exception as error:
            message = f"rank 0: {in_one_line(error, with_type=True)}"
            unexpected = error
    result, message = broadcast_object_list([result, message])
    if unexpected is not None:
        raise unexpected
    if message is not None:
        raise UserError.of_all_ranks(message)
    return result
