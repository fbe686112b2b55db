"""Which teacher channels the student is taught: arXiv 2205.10003, section 3.

The published pruned convolution reads the unpruned activation before it, so its output is exactly those channels of the
teacher's own map: a pruned target is an index_select, and pruning never changes the teacher.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from indistill import taps
from indistill.config import UserError


class PairPlan(NamedTuple):
    teacher_stage: int
    student_stage: int
    teacher_width: int
    student_width: int
    kept: list[int] | None  # teacher channels, ascending; None keeps all


class Plan(NamedTuple):
    criterion: str
    mode: str
    pairs: list[PairPlan]

    @property
    def hash(self) -> str:
        """SHA-256 of everything the targets depend on: equal on every rank and at every resume of a run."""
        return hashlib.sha256(self._body().encode()).hexdigest()

    def _body(self) -> str:
        return json.dumps({**self._asdict(), "pairs": [pair._asdict() for pair in self.pairs]}, sort_keys=True)

    def to_json(self) -> str:
        return json.dumps({**json.loads(self._body()), "hash": self.hash})

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises UserError if the file is damaged or was edited."""
        try:
            tree = json.loads(path.read_text())
            plan = cls(tree["criterion"], tree["mode"], [PairPlan(**pair) for pair in tree["pairs"]])
            intact = tree["hash"] == plan.hash
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise UserError(f"{path}: damaged or edited by hand: restore it, or start in another run_dir")
        return plan


class Writer(NamedTuple):
    """A layer that writes into a stage's output, and the batch norm that directly reads it, if any."""

    layer: nn.Conv2d | nn.Linear
    norm: nn.Module | None


def top_channels(importance: Tensor, width: int) -> Tensor:
    """The `width` most important channels of `importance` [C]: int64 indices, ascending. Of equals, the first stay."""
    if not 0 < width <= len(importance):
        raise ValueError(f"cannot keep {width} of {len(importance)} channels")
    return importance.sort(descending=True, stable=True).indices[:width].sort().values


def l1_importance(model: nn.Module, stage: int, input_size: tuple[int, int, int] | None = None) -> Tensor:
    """L1 norm of the filters behind each output channel of a stage: float32 [channels of the stage output].

    In a residual stage every layer that writes into the output counts: its norms are summed (coupled filters).
    `input_size` (C, H, W) is needed only by models that take one size other than timm's default for them.
    """
    norms = [
        writer.layer.weight.detach().float().abs().flatten(1).sum(1) for writer in writers(model, stage, input_size)
    ]
    return torch.stack(norms).sum(0)  # [C]


def writers(model: nn.Module, stage: int, input_size: tuple[int, int, int] | None = None) -> list[Writer]:
    """The layers whose output channels are the channels of a stage's output.

    Walks the autograd graph back from the stage's output through whatever keeps channels apart (sums, norms,
    activations, pools) to the convolutions and linear layers that mix them; a depthwise convolution counts, and so does
    what it reads. A squeeze-excite gate, told by its 1x1 output, scales channels rather than writing them and is left
    out.
    """
    layer_of_node: dict[object, nn.Module] = {}
    norm_reading_node: dict[object, nn.Module] = {}
    maybe_gates: set[object] = set()

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer_of_node[output.grad_fn] = module
            if isinstance(module, nn.Conv2d) and output.shape[2:].numel() == 1:
                maybe_gates.add(output.grad_fn)
        else:
            norm_reading_node.setdefault(inputs[0].grad_fn, module)

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, kinds)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next(model.parameters()).device
        images = torch.zeros(1, *(input_size or model.pretrained_cfg["input_size"]), device=device, requires_grad=True)
        with torch.enable_grad():
            (output,) = taps.maps(model, images, [stage])  # [1, C, H, W]
            if output.shape[2:].numel() == 1:  # too small to tell gates, unless the model takes larger images
                with contextlib.suppress(AssertionError, RuntimeError):
                    (output,) = taps.maps(model, images.repeat(1, 1, 4, 4), [stage])
    finally:
        for module, training in modes:
            module.training = training
        for hook in hooks:
            hook.remove()

    found: list[Writer] = []
    queue, seen = [output.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        layer = layer_of_node.get(node)
        if layer is not None:
            if node not in maybe_gates or output.shape[2:].numel() == 1:
                found.append(Writer(layer, norm_reading_node.get(node)))
            if not (isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1):
                continue
        queue.extend(parent for parent, _ in node.next_functions)

    name, width = taps.stages(model)[stage].name, output.shape[1]
    if not found or any(len(writer.layer.weight) != width for writer in found):
        raise UserError(
            f"stage {stage} ({name}) of {type(model).__name__}: its {width} channels are not written by whole filters, "
            "so their L1 norm is not defined: choose other stages in warmup.pairs"
        )
    return found


def plan(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[tuple[int, int]],
    input_size: tuple[int, int, int],
    criterion: str = "l1",
    mode: str = "slice",
    adapter: str = "none",
) -> Plan:
    """Choose the teacher channels of every pair (teacher stage, student stage).

    Raises UserError for a stage that does not exist, pairs out of order, and a student wider than its teacher where no
    adapter lifts it.
    """
    sides = [("teacher", taps.stages(teacher)), ("student", taps.stages(student))]
    for side, (role, stages) in enumerate(sides):
        chosen = [pair[side] for pair in pairs]
        if any(not 0 <= index < len(stages) for index in chosen) or sorted(set(chosen)) != chosen:
            raise UserError(
                f"warmup.pairs: {role} stages {chosen}: need increasing indices from 0 to {len(stages) - 1}"
            )
    plans = []
    for teacher_stage, student_stage in pairs:
        teacher_width, student_width = sides[0][1][teacher_stage].channels, sides[1][1][student_stage].channels
        kept = None
        if student_width > teacher_width and adapter == "none":
            raise UserError(
                f"student stage {student_stage} has {student_width} channels, more than the {teacher_width} of teacher "
                f"stage {teacher_stage}: choose other warmup.pairs, or set warmup.adapter: conv1x1"
            )
        if student_width < teacher_width:
            kept = top_channels(l1_importance(teacher, teacher_stage, input_size), student_width).tolist()
        if mode == "paper_bn":
            published_norm(teacher, teacher_stage, input_size)  # refuses what it cannot do, before any step
        plans.append(PairPlan(teacher_stage, student_stage, teacher_width, student_width, kept))
    return Plan(criterion, mode, plans)


def published_norm(model: nn.Module, stage: int, input_size: tuple[int, int, int]) -> nn.BatchNorm2d:
    """The batch norm behind the one convolution that writes a stage, where `prune.mode: paper_bn` applies."""
    found = writers(model, stage, input_size)
    if len(found) != 1 or type(found[0].norm) is not nn.BatchNorm2d:
        raise UserError(
            f"prune.mode: paper_bn needs plain conv-bn stages, stage {stage} of the teacher is not: use slice"
        )
    return found[0].norm
