"""What the engines have in common: DDP (`ddp.py`) and DeepSpeed's ZeRO (`zero.py`), through Accelerate.

Under ZeRO the student computes what it computes under DDP: parameters, gradients and the optimizer's state
are float32, mixed precision is the same autocast, and a parameter that a phase does not use stays as it is.
"""

from __future__ import annotations

import contextlib
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from indistill.config import UserError, in_one_line
from indistill.curriculum import Phase
from indistill.models.graph import walk
from indistill.models.outputs import Output
from indistill.models.weights import misfit

Student = TypeVar("Student", bound=nn.Module)

# The student wrapped for training, its optimizer, and a function that returns whether the last step was
# skipped, as a bool [] on the device.
Prepared = tuple[nn.Module, Optimizer, Callable[[], Tensor]]
OutputOf = Callable[[nn.Module, Phase], Output]
"""What the student, bare or wrapped, computes in a phase, of any images."""


class Engine(ABC):
    """Trains one student on all ranks; `accelerator.create_engine` creates it.

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


def device_name(device: torch.device) -> str:
    """Return the product name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        if model := re.search(r"model name\s*: *(.+)", Path("/proc/cpuinfo").read_text()):
            return f"CPU: {model[1]}"
    return f"CPU: {platform.processor() or platform.machine()}"
