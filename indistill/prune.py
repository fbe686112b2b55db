"""Which teacher channels the student is taught: arXiv 2205.10003, section 3.

The published pruned convolution reads the unpruned activation before it, so its output is exactly those
channels of the teacher's own map: a pruned target is an index_select, and pruning never changes the teacher.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill.config import UserError, records
from indistill.config.files import read_json
from indistill.config.records import PlanRecord
from indistill.models import graph
from indistill.models.stages import check_stages, find_stages, stage_maps
from indistill.models.timm_model import TimmModel, timm_model

NEEDS_DATA = ("activation", "taylor")  # the criteria that `calibrate` computes

# Autograd nodes that move elements without computing: they lead from a map in NCHW back to the network's own
# layout.
LAYOUT = (
    "Alias",
    "Clone",
    "Permute",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "UnsafeView",
    "Unsqueeze",
    "View",
)


class PairPlan(NamedTuple):
    """A teacher stage, the student stage that learns from it, and the teacher channels that are kept."""

    teacher_stage: int
    student_stage: int
    teacher_width: int
    student_width: int
    kept: list[int] | None  # teacher channels, ascending; None keeps all


class Plan(NamedTuple):
    """The pruning plan of a run: the kept teacher channels of every pair, and how they were chosen."""

    criterion: str
    mode: str
    pairs: list[PairPlan]
    # For display, not part of the hash: the scores of all teacher channels of each pair, to six digits; None
    # where all are kept. Empty in plans of earlier versions.
    importance: Sequence[list[float] | None] = ()

    @property
    def hash(self) -> str:
        """SHA-256 of everything that the targets depend on: equal on every rank and at every resume."""
        return hashlib.sha256(self._body().encode()).hexdigest()

    def _body(self) -> str:
        pairs = [pair._asdict() for pair in self.pairs]
        return json.dumps({"criterion": self.criterion, "mode": self.mode, "pairs": pairs}, sort_keys=True)

    def to_json(self) -> str:
        """The content of `prune_plan.json`, with the hash."""
        return json.dumps({**json.loads(self._body()), "hash": self.hash, "importance": self.importance})

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read the output of `to_json`. Raises ValueError if it is damaged or was edited."""
        return cls.of_record(PlanRecord.model_validate(read_json(text.encode())))

    @classmethod
    def of_record(cls, record: PlanRecord) -> Plan:
        """The plan in a record. Raises ValueError if it was edited."""
        pairs = [PairPlan(**dict(pair)) for pair in record.pairs]
        plan = cls(record.criterion, record.mode, pairs, tuple(record.importance))
        if record.hash != plan.hash:
            raise ValueError("its hash is of another plan")
        return plan

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read `prune_plan.json`. Raises UserError if the file is damaged or was edited."""
        remedy = "restore it, or start in another run_dir"
        try:
            return cls.of_record(records.load(path, PlanRecord, remedy))
        except ValueError as error:
            raise UserError(f"{path}: damaged or edited by hand ({error}): {remedy}") from None


class Writer(NamedTuple):
    """A layer whose output channels are a stage's, and the batch norm that directly follows it, if any."""

    layer: nn.Conv2d | nn.Linear
    norm: nn.Module | None


def top_channels(importance: Tensor, width: int) -> Tensor:
    """The `width` most important channels of `importance` [C]: int64 indices, ascending. Ties keep the first.

    Raises ValueError for a width that is not from 1 to C.
    """
    if not 0 < width <= len(importance):
        raise ValueError(f"cannot keep {width} of {len(importance)} channels")
    return importance.sort(descending=True, stable=True).indices[:width].sort().values


def l1_importance(model: nn.Module, stage: int, input_size: tuple[int, int, int] | None = None) -> Tensor:
    """L1 norm of the filters behind each output channel of a stage: `filter_importance` with the criterion
    `l1`.
    """
    return filter_importance(model, stage, input_size)


def filter_importance(
    model: nn.Module, stage: int, input_size: tuple[int, int, int] | None = None, criterion: str = "l1"
) -> Tensor:
    """Score each output channel of a stage by the network's weights: float32 [channels of the stage output].

    `l1` (arXiv 1608.08710) and `l2` (1808.06866) are norms of the filter, `bn_scale` (1708.06519) is |gamma|
    of the batch norm behind it. In a residual stage every layer that is added to the output counts: the
    scores of these coupled filters are summed. `input_size` (C, H, W) is needed only by models that take one
    size other than timm's default for them. Raises UserError for a stage that has no such filters or batch
    norms, ValueError for another criterion.
    """
    found = writers(model, stage, input_size)
    if criterion == "bn_scale":
        scales = [writer.norm.weight for writer in found if isinstance(writer.norm, nn.BatchNorm2d)]
        scores = [scale.detach().float().abs() for scale in scales if scale is not None]
        if len(scores) < len(found):
            raise UserError(
                "warmup.prune.criterion: bn_scale needs a batch norm with scales behind every layer that "
                f"writes stage {stage} ({find_stages(model)[stage].name}) of {type(model).__name__}: use l1, "
                "or choose other stages in warmup.pairs"
            )
    elif criterion in ("l1", "l2"):
        order = {"l1": 1, "l2": 2}[criterion]
        filters = [
            writer.layer.weight.detach().float().flatten(1) for writer in found
        ]  # [C, filter's weights]
        scores = [torch.linalg.vector_norm(weight, order, dim=1) for weight in filters]
    else:
        raise ValueError(f"no criterion of the weights: {criterion}")
    return torch.stack(scores).sum(0)  # [C]


def random_importance(seed: int, stage: int, width: int) -> Tensor:
    """Random scores, the control of every criterion: float64 [width] in [0, 1), the same on every machine."""
    return torch.from_numpy(np.random.default_rng((seed, stage)).random(width))


def calibrate(
    net: nn.Module,
    normalise: Callable[[Tensor], Tensor],
    stages: Sequence[int],
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: str,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[int, Tensor]:
    """Score each output channel of the teacher's `stages` (ascending) on data: float64 [C] per stage.

    `activation` is the mean of |map|; `taylor` the first-order change of the teacher's cross-entropy without
    the channel, |mean over positions of activation * gradient| of each sample (arXiv 1611.06440, section
    2.2). Both are means over all samples.

    `net` is the bare timm model; `batches` yields raw images [B, 3, H, W], which `normalise` prepares for it,
    and labels int64 [B], on its device. `total` sums a float64 vector over the ranks; it is called once, with
    sums and the number of samples, so that ranks may have unequal numbers, or none. Raises UserError where
    `taylor` is not defined and for a stage whose channels all score zero, ValueError without any batch.
    """
    model = timm_model(net)
    score = {"activation": _activation, "taylor": _taylor}[criterion]
    widths = [find_stages(net)[stage].channels for stage in stages]
    sums = torch.zeros(sum(widths) + 1, dtype=torch.float64, device=next(net.parameters()).device)
    with _evaluating(net):
        for images, labels in batches:
            scores = score(model, normalise(images), labels, stages)  # a [B, C_s] per stage
            sums[:-1] += torch.cat(scores, dim=1).sum(0)
            sums[-1] += len(images)
    sums = total(sums)
    if sums[-1] == 0:
        raise ValueError("no batches to calibrate on")
    importance = dict(zip(stages, (sums[:-1] / sums[-1]).split(widths)))
    for stage, of_channels in importance.items():
        if not (of_channels > 0).any():
            raise UserError(
                f"warmup.prune.criterion: {criterion} is zero or not a number for every channel of teacher "
                f"stage {stage}: give the teacher trained weights, or use l1"
            )
    return importance


@torch.no_grad()
def _activation(net: TimmModel, x: Tensor, labels: Tensor, stages: Sequence[int]) -> list[Tensor]:
    return [feature.abs().flatten(2).mean(2, dtype=torch.float64) for feature in stage_maps(net, x, stages)]


@torch.enable_grad()
def _taylor(net: TimmModel, x: Tensor, labels: Tensor, stages: Sequence[int]) -> list[Tensor]:
    """Scores [B, C] per stage, of the tensor itself that the later layers read.

    A transformer's map is a copy of that tensor, without the class token. The token counts here as one more
    position: a teacher that classifies by it reads nothing else of the last block.
    """
    maps, logits, output_of_node = _recorded_pass(net, x, stages)
    # In eval mode samples do not mix: the gradient of the sum contains that of each sample's own loss.
    loss = F.cross_entropy(logits, labels, reduction="sum")

    sources = [_layouts(feature, output_of_node) for feature in maps]
    gradients = iter(
        torch.autograd.grad(loss, [tensor for row in sources for tensor in row], allow_unused=True)
    )
    scores = []
    for stage, feature, row in zip(stages, maps, sources):
        read = [(tensor, gradient) for tensor, gradient in zip(row, gradients) if gradient is not None]
        if not read:
            raise UserError(
                f"warmup.prune.criterion: taylor cannot follow stage {stage} "
                f"({find_stages(net)[stage].name}) of {type(net).__name__} to its loss: use activation, or "
                "choose other stages in warmup.pairs"
            )
        tensor, gradient = read[0]
        same = tensor.shape == feature.shape and torch.equal(tensor, feature)
        products = (tensor.detach() * gradient).movedim(1 if same else -1, 1)  # [B, C, ...]
        scores.append(products.flatten(2).mean(2, dtype=torch.float64).abs())
    return scores


def _recorded_pass(
    net: TimmModel, x: Tensor, stages: Sequence[int]
) -> tuple[list[Tensor], Tensor, dict[object, Tensor]]:
    """Maps [B, C, H, W] of the stages, logits [B, K], and all modules' outputs by autograd node."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        outputs.extend(part for part in parts if isinstance(part, Tensor))

    hooks = [module.register_forward_hook(record) for module in net.modules()]
    try:
        x = x.detach().requires_grad_()  # gives a frozen network a graph
        final, maps = net.forward_intermediates(x, indices=list(stages), stop_early=False, output_fmt="NCHW")
        logits = net.forward_head(final)
    finally:
        for hook in hooks:
            hook.remove()
    return maps, logits, {output.grad_fn: output for output in outputs if output.requires_grad}


def _layouts(feature: Tensor, output_of_node: dict[object, Tensor]) -> list[Tensor]:
    """A map and the module outputs that it copies, nearest first; all but NCHW have their channels last."""
    found, node = [feature], feature.grad_fn
    while node is not None and node.name().startswith(LAYOUT):
        node = node.next_functions[0][0]
        if node in output_of_node:
            found.append(output_of_node[node])
    return found


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode, and back in their own modes afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Recorded(NamedTuple):
    """A forward pass to a stage: its output [1, C, H, W], and the modules of the autograd graph's nodes."""

    output: Tensor
    layer_of_node: dict[object, nn.Conv2d | nn.Linear]
    norm_reading_node: dict[object, tuple[nn.Module, object]]  # batch norm, and the node of its output
    maybe_gates: set[object]  # nodes of convolutions with a 1x1 output, as in squeeze-excite


def writers(model: nn.Module, stage: int, input_size: tuple[int, int, int] | None = None) -> list[Writer]:
    """The layers whose output channels are the channels of a stage's output.

    Walks the autograd graph back from the stage's output through all operations that keep channels separate
    (sums, norms, activations, pools) to the convolutions and linear layers that mix them; a depthwise
    convolution counts, and so does the layer that it reads. A squeeze-excite gate, recognised by its 1x1
    output, scales channels rather than writing them and is left out. Raises UserError for a stage that such
    layers do not write as a whole.
    """
    output, layer_of_node, norm_reading_node, maybe_gates = _record(timm_model(model), stage, input_size)

    def mixes(node: object) -> bool:
        layer = layer_of_node.get(node)
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels > 1
        return layer is not None and not depthwise

    nodes = list(graph.walk(output.grad_fn, ends_at=mixes))
    seen = set(nodes)
    no_gates = output.shape[2:].numel() == 1  # too small to tell them apart
    written = [node for node in nodes if node in layer_of_node and (node not in maybe_gates or no_gates)]

    found = []
    for written_node in written:
        norm, normed = norm_reading_node.get(written_node, (None, None))
        on_the_way = normed in seen  # else the norm is on a side branch
        found.append(Writer(layer_of_node[written_node], norm if on_the_way else None))

    width = output.shape[1]
    if not found or any(len(writer.layer.weight) != width for writer in found):
        raise UserError(
            f"stage {stage} ({find_stages(model)[stage].name}) of {type(model).__name__}: its {width} "
            "channels are not written by whole filters, so they have no norms: choose other stages in "
            "warmup.pairs, or set warmup.prune.criterion: activation"
        )
    return found


def _record(net: TimmModel, stage: int, input_size: tuple[int, int, int] | None) -> _Recorded:
    """Run one image of zeros up to the stage, and record the layers and norms on the way."""
    layer_of_node: dict[object, nn.Conv2d | nn.Linear] = {}
    norm_reading_node: dict[object, tuple[nn.Module, object]] = {}
    maybe_gates: set[object] = set()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layer_of_node[output.grad_fn] = module
            if isinstance(module, nn.Conv2d) and output.shape[2:].numel() == 1:
                maybe_gates.add(output.grad_fn)
        else:
            norm_reading_node.setdefault(inputs[0].grad_fn, (module, output.grad_fn))

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    hooks = [module.register_forward_hook(record) for module in net.modules() if isinstance(module, kinds)]
    try:
        size = input_size or net.pretrained_cfg["input_size"]
        images = torch.zeros(1, *size, device=next(net.parameters()).device, requires_grad=True)
        with _evaluating(net), torch.enable_grad():
            (output,) = stage_maps(net, images, [stage])  # [1, C, H, W]
            if output.shape[2:].numel() == 1:  # gates look alike: try a larger image
                with contextlib.suppress(AssertionError, RuntimeError):
                    (output,) = stage_maps(net, images.repeat(1, 1, 4, 4), [stage])
    finally:
        for hook in hooks:
            hook.remove()
    return _Recorded(output, layer_of_node, norm_reading_node, maybe_gates)


def plan(
    teacher: nn.Module,
    student: nn.Module,
    pairs: Sequence[tuple[int, int]],
    input_size: tuple[int, int, int],
    criterion: str = "l1",
    mode: str = "slice",
    adapter: str = "none",
    importance: dict[int, Tensor] | None = None,
    seed: int = 0,
) -> Plan:
    """Choose the teacher channels of every pair (teacher stage, student stage).

    The criteria of NEEDS_DATA take `importance`, the scores [C] of each teacher stage by `calibrate`
    (ValueError if absent); `random` takes `seed`. Raises UserError for a stage that does not exist, pairs out
    of order, a student wider than its teacher where no adapter lifts it, and a criterion that is not defined
    for a stage.
    """
    check_stages(pairs, teacher, student, "warmup.pairs")

    plans: list[PairPlan] = []
    importance_of_pairs: list[list[float] | None] = []
    for pair in unpruned(teacher, student, pairs, adapter):
        teacher_stage = pair.teacher_stage
        rounded = None
        if pair.student_width < pair.teacher_width:
            if criterion in NEEDS_DATA:
                of_channels = _calibrated(importance, teacher_stage, criterion)
            elif criterion == "random":
                of_channels = random_importance(seed, teacher_stage, pair.teacher_width)
            else:
                of_channels = filter_importance(teacher, teacher_stage, input_size, criterion)
            pair = pair._replace(kept=top_channels(of_channels, pair.student_width).tolist())
            rounded = [float(f"{score:.6g}") for score in of_channels.tolist()]
        if mode == "paper_bn":
            published_norm(teacher, teacher_stage, input_size)  # fails here, before any step
        plans.append(pair)
        importance_of_pairs.append(rounded)
    return Plan(criterion, mode, plans, tuple(importance_of_pairs))


def _calibrated(importance: dict[int, Tensor] | None, stage: int, criterion: str) -> Tensor:
    if importance is None or stage not in importance:
        raise ValueError(f"prune.plan: {criterion} needs the importance of teacher stage {stage}")
    return importance[stage]


def unpruned(
    teacher: nn.Module, student: nn.Module, pairs: Iterable[tuple[int, int]], adapter: str
) -> Iterator[PairPlan]:
    """Yield pairs that keep all channels. Raises UserError for a wider student without an adapter."""
    for stages in pairs:
        yield _unpruned(teacher, student, stages=stages, adapter=adapter)


def _unpruned(teacher: nn.Module, student: nn.Module, stages: tuple[int, int], adapter: str) -> PairPlan:
    """A pair that keeps all channels. Raises UserError for a wider student without an adapter."""
    teacher_stage, student_stage = stages
    teacher_width = find_stages(teacher)[teacher_stage].channels
    student_width = find_stages(student)[student_stage].channels
    if student_width > teacher_width and adapter == "none":
        raise UserError(
            f"student stage {student_stage} has {student_width} channels, more than the {teacher_width} of "
            f"teacher stage {teacher_stage}: choose other warmup.pairs, or set warmup.adapter: conv1x1"
        )
    return PairPlan(teacher_stage, student_stage, teacher_width, student_width, None)


def published_norm(model: nn.Module, stage: int, input_size: tuple[int, int, int]) -> nn.BatchNorm2d:
    """The batch norm behind the only convolution that writes a stage, as `prune.mode: paper_bn` needs it.

    Raises UserError for any other stage.
    """
    found = writers(model, stage, input_size)
    norm = found[0].norm
    if len(found) != 1 or type(norm) is not nn.BatchNorm2d:
        raise UserError(
            f"prune.mode: paper_bn needs plain conv-bn stages, stage {stage} of the teacher is not: use slice"
        )
    return norm
