"""Teacher and student: a timm model in a module that normalises images, stops at a stage and adapts maps.

Importing this module registers the small networks of arXiv 2205.10003 with timm (`cnn32_student`,
`cnn32_auxiliary`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from indistill import config
from indistill.config import UserError
from indistill.config.files import give_usual_mode, sort_metadata
from indistill.models.outputs import Output, Targets
from indistill.models.stages import patch_tokens, stage_maps, stage_maps_and_final
from indistill.models.timm_model import TimmModel
from indistill.models.trainable import Trainable

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LARGEST = 1e6  # of a mean or deviation
Normalisation = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of the input per channel, in [0, 1] units."""


class Network(Trainable):
    """A timm model that takes raw images and can stop at a stage.

    The student is one such module and contains everything that is trained with it, so that it is wrapped for
    training exactly once; the teacher is another, frozen. `stages` gives the stage of each warm-up pair,
    shallow to deep, and `adapters` maps a pair to the module that lifts its map to the teacher's width.
    `kd_stages` are the stages whose maps KD reads, `reads` the student's other outputs that it reads
    ("logits", "embedding", "tokens", "token"), and `projectors` maps a KD loss to its trainable layers
    (`Loss.layers`). Images of another size than `image_size`, if it is given, are resized.
    """

    mean: Tensor  # [1, 3, 1, 1], in 0..255
    std: Tensor  # [1, 3, 1, 1], in 0..255

    def __init__(
        self,
        net: TimmModel,
        normalisation: Normalisation,
        *,
        stages: Sequence[int] = (),
        adapters: dict[int, nn.Module] | None = None,
        reads: Collection[str] = ("logits",),
        kd_stages: Sequence[int] = (),
        projectors: Mapping[str, nn.Module] | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.image_size = image_size
        self.kept_norms: set[nn.Module] = set()  # that frozen.fold leaves
        self.stages = list(stages)
        self.kd_stages = list(kd_stages)
        self.adapters = nn.ModuleDict({str(pair): module for pair, module in (adapters or {}).items()})
        self.projectors = nn.ModuleDict(dict(projectors or {}))
        # In training, timm's model then returns the logits of its distillation token separately.
        self.with_token = "token" in reads
        if self.with_token:
            net.set_distilled_training(True)
        # DDP would wait for the gradients of outputs that no loss reads, so these are not returned.
        self.with_embedding = "logits" in reads or "embedding" in reads
        self.with_logits = "logits" in reads and net.num_classes > 0
        self.with_tokens = "tokens" in reads
        # Convolutions and pools are faster in this format: twice on CPUs, and on GPUs in half precision.
        self.to(memory_format=torch.channels_last)
        mean, std = normalisation
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the weights when this is first read: by all ranks, if the weights are sharded."""
        return fingerprint(self)

    def forward(
        self,
        images: Tensor,
        upto: int | None = None,
        pairs: Sequence[int] | None = None,
        targets: Targets | None = None,
    ) -> Output:
        """Run on images [B, 3, H, W], uint8 or float in 0..255.

        With `upto`, return only the maps of the warm-up pairs up to that one, or of `pairs` among them, and
        compute nothing beyond its stage. Otherwise return everything that KD reads; projectors read the
        `targets` too.
        """
        x = self.normalise(images)  # [B, 3, H, W]
        if upto is not None:
            pairs = range(upto + 1) if pairs is None else pairs
            features = stage_maps(self.net, x, [self.stages[pair] for pair in pairs])
            return Output(tuple(self._adapt(pair, feature) for pair, feature in zip(pairs, features)))
        with_embedding = self.with_embedding or not self.training
        if not (with_embedding or self.with_tokens):
            return self._project(Output(tuple(stage_maps(self.net, x, self.kd_stages))), targets)
        final, features = stage_maps_and_final(self.net, x, self.kd_stages)
        output = Output(tuple(features), tokens=patch_tokens(self.net, final) if self.with_tokens else None)
        if with_embedding:
            embedding = self.net.forward_head(final, pre_logits=True)  # [B, D]
            logits, token_logits = self._classify(final, embedding)
            output = output._replace(embedding=embedding, logits=logits, token_logits=token_logits)
        return self._project(output, targets)

    def _project(self, output: Output, targets: Targets | None) -> Output:
        if targets is None or not self.projectors:
            return output
        projected = {key: part(output, targets) for key, part in self.projectors.items()}
        return output._replace(projected=projected)

    def save(self, path: Path, section: config.Model | None) -> None:
        assert section is not None  # a run that trains a network has the section student
        save_network(self, section, path)

    def normalise(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] as the network reads them: float32, of its own size, mean and deviation."""
        images = images.float()
        if self.image_size not in (None, images.shape[-1]):
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True).clamp(0, 255)
        # Set the memory format here too: sharded weights, and weights a layer recomputes (NFNet), lack it.
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def input_size(self, image_size: int) -> tuple[int, int, int]:
        """The shape [C, H, W] of what the timm model reads, of images with `image_size` pixels a side."""
        side = self.image_size or image_size
        return (3, side, side)

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """The unadapted maps [B, C, H, W] of any stages (ascending); computes nothing beyond the last."""
        return stage_maps(self.net, self.normalise(images), stages)

    def _classify(self, final: Tensor, embedding: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits [B, K] and, if a loss reads them, the logits [B, K] of the distillation token.

        None without a classifier.
        """
        if not self.net.num_classes or (self.training and not self.with_logits):
            return None, None
        if self.with_token and self.training:
            return self.net.forward_head(final)
        classifier = self.net.get_classifier()
        if getattr(self.net, "plain_head", isinstance(classifier, nn.Linear)):
            return classifier(embedding), None
        return self.net.forward_head(final), None

    def _adapt(self, pair: int, feature: Tensor) -> Tensor:
        return self.adapters[str(pair)](feature) if str(pair) in self.adapters else feature

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return a function from a parameter's name to its layer in the timm model, for timm's layer decay.

        Adapters and projectors count as the last layer: they are as new as a classifier, and train at the
        full rate.
        """
        if hasattr(self.net, "group_matcher"):
            layers = group_parameters(self.net, self.net.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.net)  # timm's own fallback
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix("net."), last)

    def no_weight_decay(self) -> set[str]:
        """The parameters that timm exempts from weight decay: position embeddings and class tokens."""
        if not hasattr(self.net, "no_weight_decay"):
            return set()
        return {f"net.{name}" for name in self.net.no_weight_decay()}


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of a module's weights, whichever file they came from. Collective if the module is sharded."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_network(network: Network, section: config.Model, path: Path) -> None:
    """Write the timm model's weights under timm's own names, with name, arguments and input as metadata."""
    metadata = {
        "name": section.name,
        "kwargs": json.dumps(section.kwargs),
        "num_classes": str(network.net.num_classes),
        "mean": json.dumps([round(v, 6) for v in (network.mean.flatten() / 255).tolist()]),
        "std": json.dumps([round(v, 6) for v in (network.std.flatten() / 255).tolist()]),
    }
    save_file(separate_tensors(network.net), str(path), metadata)
    sort_metadata(path)
    give_usual_mode(path)


def separate_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict as safetensors takes it: tensors that layers share are there under each
    name.
    """
    return {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in net.state_dict().items()
    }


def normalisation(net: TimmModel, section: config.Model, role: str) -> Normalisation:
    """The input normalisation of the config, else timm's. Raises UserError if neither has one."""
    if section.mean is not None and section.std is not None:
        return section.mean, section.std
    timm_config = net.pretrained_cfg or {}
    if not timm_config.get("mean") or not timm_config.get("std"):
        raise UserError(
            f"{role}: the normalisation of {section.name} is not known: set {role}.mean and {role}.std"
        )
    mean, std = timm_config["mean"], timm_config["std"]
    for values, smallest in ((mean, -_LARGEST), (std, 0.0)):
        if (
            not isinstance(values, (list, tuple))
            or len(values) != 3
            or not all(isinstance(value, (int, float)) and smallest < value < _LARGEST for value in values)
        ):
            what = "three numbers" if values is mean else "three positive numbers"
            raise UserError(
                f"{role}: the normalisation of {section.name} is {str(values)[:100]}, not {what}: set "
                f"{role}.mean and {role}.std"
            )
    return mean, std
