"""DeepSpeed's ZeRO, and how the parts of its optimizer's state move to another number of ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.optim import Optimizer

from indistill.config import UserError
from indistill.curriculum import Phase
from indistill.distributed.engine import Engine, OutputOf, Prepared, Student, load_student, missing
from indistill.distributed.saved_state import Kinds, check_scaler, check_state, state_kinds

_PERSISTENCE = "stage3_param_persistence_threshold"  # elements


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
