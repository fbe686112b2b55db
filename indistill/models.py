"""Teacher and student: timm networks, checked, behind one module that normalises, truncates and adapts.

Importing this module registers the small networks of arXiv 2205.10003 with timm (`cnn32_student`, `cnn32_auxiliary`).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import pickle
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import timm.data
import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    group_parameters,
    load_model_config_from_hf,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from timm.optim import auto_group_layers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from indistill import config, taps
from indistill.augment import EvalView
from indistill.config import UserError
from indistill.outputs import Output, Targets

_MAX_HEAD_WEIGHTS = 10**8
_OTHER_WEIGHTS = {"checkpoint_path", "pretrained_strict"}  # of timm.create_model: what weights it ends up with
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TRAINING_PARTS = ("adapters.", "projectors.")  # of Network: in checkpoints, but not the student's own


class NoWeights(UserError):
    """A model's pretrained weights could not be had; `role` says whose, student or teacher."""

    def __init__(self, message: str, role: str) -> None:
        super().__init__(message)
        self.role = role


class Network(nn.Module):
    """A timm model that takes raw images and can stop at a stage.

    The student is one such module, all that is trained with it included, so that it is wrapped for training exactly
    once; the teacher is another, frozen. `stages` gives the stage of each warm-up pair, shallow to deep, and
    `adapters` maps a pair to the module that lifts its map to the teacher's width. `kd_stages` are the stages whose
    maps KD reads, `reads` what else it reads of the student ("logits", "embedding", "token"), and `projectors` maps a
    KD loss to its trainable part (projectors.py).
    """

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        stages: Sequence[int] = (),
        adapters: dict[int, nn.Module] | None = None,
        reads: Collection[str] = ("logits",),
        kd_stages: Sequence[int] = (),
        projectors: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.stages, self.kd_stages = list(stages), list(kd_stages)
        self.adapters = nn.ModuleDict({str(pair): module for pair, module in (adapters or {}).items()})
        self.projectors = nn.ModuleDict(dict(projectors or {}))
        # With a loss on its distillation token, timm's model gives that token's logits apart while it trains.
        self.with_token = "token" in reads
        if self.with_token:
            net.set_distilled_training(True)
        # Returned without a loss that reads them, they would make DDP wait for gradients that never come.
        self.with_logits = "logits" in reads
        self.with_embedding = self.with_logits or "embedding" in reads
        # Convolutions and pools are faster so: on CPUs twice, and on GPUs in half precision.
        self.to(memory_format=torch.channels_last)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights as they were when it was first asked for, on all ranks if they are sharded by then."""
        return fingerprint(self)

    def forward(
        self,
        images: Tensor,
        upto: int | None = None,
        pairs: Sequence[int] | None = None,
        targets: Targets | None = None,
    ) -> Output:
        """Images [B, 3, H, W], uint8 or float in 0..255.

        With `upto`, only the maps of warm-up pairs up to that one, or of `pairs` among them, and no computation beyond
        its stage; without, all that KD reads, where projectors see the `targets` too.
        """
        x = self.normalise(images)  # [B, 3, H, W]
        if upto is not None:
            pairs = range(upto + 1) if pairs is None else pairs
            features = taps.maps(self.net, x, [self.stages[pair] for pair in pairs])
            return Output(tuple(self._adapt(pair, feature) for pair, feature in zip(pairs, features)))
        if self.training and not self.with_embedding:
            return self._project(Output(tuple(taps.maps(self.net, x, self.kd_stages))), targets)
        final, features = taps.maps_and_final(self.net, x, self.kd_stages)
        embedding = self.net.forward_head(final, pre_logits=True)  # [B, D]
        logits, token_logits = self._classify(final, embedding)
        return self._project(Output(tuple(features), embedding, logits, token_logits), targets)

    def _project(self, output: Output, targets: Targets | None) -> Output:
        if targets is None or not self.projectors:
            return output
        return output._replace(projected={key: part(output, targets) for key, part in self.projectors.items()})

    def normalise(self, images: Tensor) -> Tensor:
        # Said by the images too: weights that are in pieces, or made anew by a layer (NFNet's), do not say it.
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """The maps [B, C, H, W] of any stages (ascending), unadapted; nothing beyond the last of them is computed."""
        return taps.maps(self.net, self.normalise(images), stages)

    def _classify(self, final: Tensor, embedding: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits [B, K] and, with a loss on it, those of the distillation token."""
        if self.training and not self.with_logits:
            return None, None
        if self.with_token and self.training:
            return self.net.forward_head(final)
        if isinstance(self.net.get_classifier(), nn.Module):
            return self.net.get_classifier()(embedding), None
        return self.net.forward_head(final), None  # DeiT: the mean of the class and the distillation token's

    def _adapt(self, pair: int, feature: Tensor) -> Tensor:
        return self.adapters[str(pair)](feature) if str(pair) in self.adapters else feature

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """The layer of a parameter, for timm's layer decay: that of the bare timm model.

        Adapters and projectors count as the last layer: they are as new as a classifier, and train at the full rate.
        """
        if hasattr(self.net, "group_matcher"):
            layers = group_parameters(self.net, self.net.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.net)  # timm's own way with such models
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("net."), last)

    def no_weight_decay(self) -> set[str]:
        """Patterns of the parameters that timm's optimizers exempt from weight decay: positions and class tokens."""
        return {f"net.{name}" for name in getattr(self.net, "no_weight_decay", set)()}


def create(section: config.Model, num_classes: int, image_size: int, role: str) -> nn.Module:
    """The bare timm model that a `student` or `teacher` section describes.

    Raises UserError for an unknown name, weights that cannot be had or do not fit, a head of another size than
    `num_classes`, and a head that does not follow timm's interface. Nothing is ever initialised at random silently.
    """
    if not section.name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(section.name):
        close = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        raise UserError(
            f"{role}.name: timm has no model {section.name!r}" + (f"; near: {', '.join(close)}" * bool(close))
        )
    for key in _OTHER_WEIGHTS & section.kwargs.keys():
        raise UserError(f"{role}.kwargs.{key}: would load other weights, or only some: give {role}.checkpoint instead")
    # Asked for another number of classes, timm would replace a pretrained head by a random one.
    kwargs = {**section.kwargs} if section.pretrained else {"num_classes": num_classes, **section.kwargs}
    try:
        net = timm.create_model(section.name, pretrained=section.pretrained, **kwargs)
    except Exception as error:  # timm, the hub client and the network each raise their own
        instead = f" (for weights in a file: {role}.pretrained: false, {role}.checkpoint: FILE)" * (role != "eval")
        reason = " ".join(str(error).split())[:300]
        message = f"{role}: timm could not create {section.name}: {reason}" + instead * section.pretrained
        raise (NoWeights(message, role) if section.pretrained else UserError(message)) from None
    if net.num_classes != num_classes:
        raise UserError(
            f"{role}: the head of {section.name} has {net.num_classes} classes, data.num_classes is {num_classes}: "
            "use weights trained for this data set"
        )
    if role == "teacher" and section.pretrained and "num_classes" in kwargs:
        raise UserError(
            "teacher.kwargs.num_classes: timm would replace the head of another size by a random one: remove it, and "
            "use weights trained for this data set"
        )
    if section.checkpoint:
        _load_weights(net, section.checkpoint, role)
    _check_interface(net, section.name, image_size, role)
    return net


def _load_weights(net: nn.Module, path: str, role: str) -> None:
    try:
        state = load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{role}.checkpoint: no file {path}") from None
    except Exception as error:  # a damaged file fails in pickle, zip or safetensors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = "damaged, or it holds objects other than tensors, which may run code: save the state dict alone"
        raise UserError(f"{role}.checkpoint: {path} is not a readable checkpoint: {reason}") from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{role}.checkpoint: {path} is not a state dict: save the state dict alone")
    state = {key.removeprefix("net."): value for key, value in state.items() if not key.startswith(_TRAINING_PARTS)}
    wanted = net.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            where = "lacks" if key not in state else "has an unexpected"
            raise UserError(f"{role}.checkpoint: {path} {where} {key}: it belongs to another architecture")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{role}.checkpoint: {key} is {tuple(state[key].shape)} in {path}, {role}.name with data.num_classes "
                f"needs {tuple(wanted[key].shape)}: give the name, kwargs and data.num_classes that it was saved with"
            )
    net.load_state_dict(state)


@torch.no_grad()
def _check_interface(net: nn.Module, name: str, image_size: int, role: str) -> None:
    """One small forward pass: the input size fits, and classifier(embedding) is the model's own output."""
    training, images, same = net.training, torch.zeros(1, 3, image_size, image_size), False
    net.eval()
    try:
        logits = net(images)
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):
            features = net.forward_features(images)
            embedding = net.forward_head(features, pre_logits=True)
            distilled = isinstance(net.get_classifier(), tuple)  # DeiT's: the mean of two classifiers
            same = torch.allclose(net.forward_head(features) if distilled else net.get_classifier()(embedding), logits)
    except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{role}: {name} cannot take {image_size} px images (data.image_size): {reason}") from None
    finally:
        net.train(training)
    if not same:
        raise UserError(f"{role}: the output of {name} is not its classifier on its embedding: use another variant")
    if not hasattr(net, "head_hidden_size"):  # timm's word for the embedding's width
        net.head_hidden_size = embedding.shape[1]


class Heads(nn.Module):
    """A linear classifier on the flattened map of each of a frozen teacher's stages (arXiv 2103.00497, section 3).

    The teacher runs no deeper than the deepest of them; it is no submodule, so no optimizer or checkpoint sees it.
    `pool` averages maps of more than that many pixels a side. Raises UserError for stages that the teacher lacks and
    for heads too large to be meant.
    """

    with_logits = True

    def __init__(self, teacher: Network, stages: Sequence[int], pool: int | None, image_size: int) -> None:
        super().__init__()
        count = len(taps.stages(teacher.net))
        if not stages or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < count:
            raise UserError(f"heads.stages: {list(stages)}: need increasing indices from 0 to {count - 1}")
        self._frozen = [teacher.eval().requires_grad_(False)]
        self.stages, self.pool = list(stages), pool
        with torch.no_grad():
            maps = teacher.maps(torch.zeros(1, 3, image_size, image_size, device=teacher.mean.device), stages)
        self.classifiers = nn.ModuleList()
        for stage, feature in zip(stages, maps):
            inputs = self._flatten(feature).shape[1]
            if inputs * teacher.net.num_classes > _MAX_HEAD_WEIGHTS:
                raise UserError(
                    f"heads: stage {stage} gives {inputs} inputs for {teacher.net.num_classes} classes, more than "
                    f"{_MAX_HEAD_WEIGHTS:.0e} weights: set heads.pool, 7 for instance"
                )
            self.classifiers.append(nn.Linear(inputs, teacher.net.num_classes))

    def forward(self, images: Tensor, upto: None = None, pairs: Sequence[int] = (), targets: None = None) -> Output:
        """Images as Network takes them; `cohort` holds each head's logits [B, K], `logits` the deepest's."""
        with torch.no_grad():
            maps = self._frozen[0].maps(images, self.stages)
        cohort = self.classify(maps)
        return Output((), None, cohort[-1], cohort=cohort)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self)

    def classify(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(classifier(self._flatten(feature)) for classifier, feature in zip(self.classifiers, maps))

    def _flatten(self, feature: Tensor) -> Tensor:
        if self.pool:
            feature = nn.functional.adaptive_avg_pool2d(feature, [min(self.pool, size) for size in feature.shape[2:]])
        return feature.flatten(1)  # [B, C * H * W]

    def save(self, path: Path) -> None:
        metadata = {"stages": json.dumps(self.stages), "pool": json.dumps(self.pool)}
        save_model(self, str(path), metadata)

    @classmethod
    def load(cls, path: str, teacher: Network, image_size: int) -> Heads:
        """Those of `heads.safetensors`. Raises UserError for a file that is none, or of another teacher's."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            heads = cls(teacher, json.loads(metadata["stages"]), json.loads(metadata["pool"]), image_size)
            load_model(heads, path)
        except FileNotFoundError:
            raise UserError(f"teacher.heads: no file {path}") from None
        except UserError:
            raise
        except Exception as error:  # not safetensors, without our metadata, other shapes
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"teacher.heads: {path} holds no heads of this teacher: {reason}") from None
        return heads.eval().requires_grad_(False).to(teacher.mean.device)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights: what its outputs depend on, wherever they came from.

    Call on all ranks, if it is sharded.
    """
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def run_in(network: Network, precision: str) -> None:
    """Have a frozen network run under autocast in `precision` (no: float32), whatever the caller's autocast says."""
    autocast = torch.autocast(network.mean.device.type, DTYPES[precision], enabled=precision != "no")
    network.forward, network.maps = autocast(network.forward), autocast(network.maps)


def hold(network: Network, precision: str) -> None:
    """Keep the weights that autocast would convert at every pass in its precision, in place.

    The outputs are the same, bit for bit: a layer that does more with its weights than multiply (NFNet's, which
    standardises them) keeps them.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(DTYPES[precision])


def shard(network: Network, device: torch.device, input_size: tuple[int, int, int]) -> None:
    """Cut a frozen network's parameters over all ranks (FSDP2), in place; its outputs stay the same, bit for bit.

    The parameters of a block are gathered for its forward pass and freed after it; those outside any block, for as long
    as `forward` or `maps` of the network runs. Those two are what may be called from now on: on all ranks, equally
    often and equally deep, without gradients. The network may come from the CPU: block by block goes to the device.
    Raises UserError for one that runs a block by parts.
    """
    network.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
    scalars = {parameter for parameter in network.parameters() if parameter.dim() == 0}  # FSDP refuses them
    for part in [*_blocks(network.net), network]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    register_fsdp_forward_method(network, "maps")
    network.to(device)  # scalars
    images = torch.zeros(1, *input_size, device=device)
    try:
        with torch.no_grad():
            network.maps(images, [stage.index for stage in taps.stages(network.net)])
            network(images)
    except RuntimeError as error:  # of operators that met what nobody gathered
        if "DTensor" not in str(error):
            raise
        name = type(network.net).__name__
        raise UserError(
            f"teacher.shard: {name} runs some blocks by parts, which cannot be gathered: remove it"
        ) from None


def _blocks(net: nn.Module) -> list[nn.Module]:
    """What a network repeats, inner ones first: the elements of its lists that are neither lists nor single layers."""
    lists = (nn.Sequential, nn.ModuleList)
    # RegNet's stages name their blocks one by one instead.
    listing = [m for m in net.modules() if isinstance(m, lists) or len({type(child) for child in m.children()}) == 1]
    parts = dict.fromkeys(part for module in listing for part in module.children())
    return [part for part in reversed(parts) if not isinstance(part, lists) and [*part.children()]]


def save(network: Network, section: config.Model, path: Path) -> None:
    """The timm model's weights under timm's own names, with what it takes to use them as metadata."""
    metadata = {
        "name": section.name,
        "kwargs": json.dumps(section.kwargs),
        "num_classes": str(network.net.num_classes),
        "mean": json.dumps([round(v, 6) for v in (network.mean.flatten() / 255).tolist()]),
        "std": json.dumps([round(v, 6) for v in (network.std.flatten() / 255).tolist()]),
    }
    save_model(network.net, str(path), metadata)


def evaluation_view(settings: config.Config) -> EvalView:
    """How evaluation shows images to the config's student, by the keys `data.eval_*`.

    Where they say auto, as timm's record says of the student if it begins with weights, else of the teacher, if there
    is one. Raises UserError if that record cannot be had.
    """
    student, teacher = settings.student, settings.teacher
    if teacher is not None and not (student and (student.pretrained or student.checkpoint)):
        return own_view(teacher, settings.data, "teacher")
    return own_view(student, settings.data, "student")


def own_view(section: config.Model, data: config.Data, role: str) -> EvalView:
    """How evaluation shows images to this very network: timm's `resolve_data_config`, where the config says auto."""
    if "auto" not in (data.eval_crop, data.eval_interpolation):
        return EvalView(data.eval_interpolation, data.eval_crop)
    mean = {} if section.mean is None else {"mean": section.mean}
    return view_by_record(_record(section, role) | mean, data)


def view_by_record(record: Mapping[str, Any], data: config.Data) -> EvalView:
    """How evaluation shows images to a network with this record of timm's, where the config says auto."""
    crop, interpolation, size = data.eval_crop, data.eval_interpolation, (data.image_size, data.image_size)
    # Networks may be made for one size, and be at their best, with another crop, at a second one.
    at_second = size == tuple(record.get("test_input_size") or ())[1:] != tuple(record.get("input_size") or ())[1:]
    own = timm.data.resolve_data_config(pretrained_cfg=dict(record), use_test_size=at_second)
    interpolation = own["interpolation"] if interpolation == "auto" else interpolation
    if crop != "auto":
        return EvalView(interpolation, crop)
    return EvalView(interpolation, own["crop_pct"], own["crop_mode"], tuple(own["mean"]))


def _record(section: config.Model, role: str) -> dict[str, Any]:
    """timm's record of a model (`pretrained_cfg`), without building it."""
    kind, _, place = section.name.partition(":")
    given, overlay = section.kwargs.get("pretrained_cfg"), section.kwargs.get("pretrained_cfg_overlay")
    try:
        if kind == "local-dir":
            return json.loads((Path(place) / "config.json").read_text())["pretrained_cfg"]
        if kind == "hf-hub":
            return load_model_config_from_hf(place)[0]
        name, _, tag = section.name.partition(".")
        return resolve_pretrained_cfg(name, given or tag or None, overlay).to_dict()
    except Exception as error:  # timm, the hub's client and the network each raise their own
        raise UserError(
            f"{role}: timm's record of {section.name} cannot be had: {' '.join(str(error).split())[:200]}; without it, "
            "set data.eval_interpolation and data.eval_crop"
        ) from None


def normalisation(net: nn.Module, section: config.Model, role: str) -> tuple[Sequence[float], Sequence[float]]:
    """Input mean and standard deviation per channel, in [0, 1] units; UserError if neither config nor timm has them."""
    if section.mean is not None:
        return section.mean, section.std
    timm_config = net.pretrained_cfg or {}
    if not timm_config.get("mean") or not timm_config.get("std"):
        raise UserError(f"{role}: the normalisation of {section.name} is not known: set {role}.mean and {role}.std")
    return timm_config["mean"], timm_config["std"]


# timm reads its models' input from such a record; means and deviations are those that the authors trained with.
_CNN32_CFG = {
    "input_size": (3, 32, 32),
    "num_classes": 10,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "mean": tuple(v / 255 for v in (125.3, 123.0, 113.9)),
    "std": tuple(v / 255 for v in (63.0, 62.1, 66.7)),
    "first_conv": "conv1",
    "classifier": "fc2",
}
default_cfgs = generate_default_cfgs({"cnn32_student": _CNN32_CFG, "cnn32_auxiliary": _CNN32_CFG})


class CNN32(nn.Module):
    """The small network of arXiv 2205.10003 for 32x32 images, under timm's interface.

    Three times [3x3 convolution without padding, batch norm, ReLU, 2x2 max-pool], then fc1, ReLU (the embedding) and
    fc2. Stage i is the map after the i-th pool. Module names are those of the published state dicts.
    """

    def __init__(self, widths: tuple[int, int, int], hidden: int, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = hidden
        self.feature_info = []
        previous = 3
        for i, width in enumerate(widths, start=1):
            setattr(self, f"conv{i}", nn.Conv2d(previous, width, 3))
            setattr(self, f"conv{i}_bn", nn.BatchNorm2d(width))
            self.feature_info.append({"module": f"conv{i}_bn", "num_chs": width, "reduction": 2**i})
            previous = width
        self.fc1 = nn.Linear(4 * widths[-1], hidden)  # a 32x32 image leaves a 2x2 map
        self.fc2 = nn.Linear(hidden, num_classes)
        self.pretrained_cfg = self.default_cfg = _CNN32_CFG

    def _stage(self, i: int, x: Tensor) -> Tensor:
        x = getattr(self, f"conv{i}_bn")(getattr(self, f"conv{i}")(x))
        return nn.functional.relu(nn.functional.max_pool2d(x, 2))  # the published order, pool last, gives the same bits

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        indices = range(3) if indices is None else indices
        intermediates = []
        for i in range(max(indices) + 1 if stop_early else 3):
            x = self._stage(i + 1, x)
            if i in indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        for i in (1, 2, 3):
            x = self._stage(i, x)
        return x  # [B, widths[-1], 2, 2]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = nn.functional.relu(self.fc1(x.flatten(1)))
        return x if pre_logits else self.fc2(x)

    def get_classifier(self) -> nn.Module:
        return self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cnn32(name: str, pretrained: bool, widths: tuple[int, int, int], hidden: int, **kwargs: Any) -> CNN32:
    if pretrained and not kwargs.get("pretrained_cfg"):  # it says where an exported one's weights are
        raise ValueError("no hub holds its weights")
    shape = {"widths": widths, "hidden": hidden}
    return build_model_with_cfg(CNN32, name, pretrained, kwargs_filter=("in_chans",), **shape, **kwargs)


@register_model
def cnn32_auxiliary(pretrained: bool = False, **kwargs: Any) -> CNN32:
    return _cnn32("cnn32_auxiliary", pretrained, widths=(16, 32, 64), hidden=128, **kwargs)


@register_model
def cnn32_student(pretrained: bool = False, **kwargs: Any) -> CNN32:
    return _cnn32("cnn32_student", pretrained, widths=(8, 16, 32), hidden=64, **kwargs)
