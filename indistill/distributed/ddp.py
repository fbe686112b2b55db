"""DistributedDataParallel, wrapped anew where a phase trains other parameters than the one before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from indistill.config import UserError
from indistill.curriculum import Phase
from indistill.distributed.engine import Engine, OutputOf, Prepared, Student, load_student, missing
from indistill.distributed.saved_state import check_optimizer, check_scaler


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


@contextlib.contextmanager
def _requiring_no_gradient(parameters: Set[nn.Parameter]) -> Iterator[None]:
    """Have trainable parameters require no gradient in the meantime."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    yield
    for parameter in parameters:
        parameter.requires_grad_(True)
