"""Teacher and student: timm networks, checked, behind one module that normalises, truncates and adapts.

Importing this module registers the small networks of arXiv 2205.10003 with timm (`cnn32_student`, `cnn32_auxiliary`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_model
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from indistill import config
from indistill.config import UserError
from indistill.models.outputs import Output, Targets
from indistill.models.stages import stage_maps, stage_maps_and_final

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network(nn.Module):
    """A timm model that takes raw images and can stop at a stage.

    The student is one such module, all that is trained with it included, so that it is wrapped for training exactly
    once; the teacher is another, frozen. `stages` gives the stage of each warm-up pair, shallow to deep, and
    `adapters` maps a pair to the module that lifts its map to the teacher's width. `kd_stages` are the stages whose
    maps KD reads, `reads` what else it reads of the student ("logits", "embedding", "token"), and `projectors` maps a
    KD loss to its trainable part (`Loss.layers`).
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
            features = stage_maps(self.net, x, [self.stages[pair] for pair in pairs])
            return Output(tuple(self._adapt(pair, feature) for pair, feature in zip(pairs, features)))
        if self.training and not self.with_embedding:
            return self._project(Output(tuple(stage_maps(self.net, x, self.kd_stages))), targets)
        final, features = stage_maps_and_final(self.net, x, self.kd_stages)
        embedding = self.net.forward_head(final, pre_logits=True)  # [B, D]
        logits, token_logits = self._classify(final, embedding)
        return self._project(Output(tuple(features), embedding, logits, token_logits), targets)

    def _project(self, output: Output, targets: Targets | None) -> Output:
        if targets is None or not self.projectors:
            return output
        return output._replace(
            projected={key: part(output, targets) for key, part in self.projectors.items()}
        )

    def normalise(self, images: Tensor) -> Tensor:
        # Said by the images too: weights that are in pieces, or made anew by a layer (NFNet's), do not say it.
        return ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def maps(self, images: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """The maps [B, C, H, W] of any stages (ascending), unadapted; nothing beyond the last of them is computed."""
        return stage_maps(self.net, self.normalise(images), stages)

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


def save_network(network: Network, section: config.Model, path: Path) -> None:
    """The timm model's weights under timm's own names, with what it takes to use them as metadata."""
    metadata = {
        "name": section.name,
        "kwargs": json.dumps(section.kwargs),
        "num_classes": str(network.net.num_classes),
        "mean": json.dumps([round(v, 6) for v in (network.mean.flatten() / 255).tolist()]),
        "std": json.dumps([round(v, 6) for v in (network.std.flatten() / 255).tolist()]),
    }
    save_model(network.net, str(path), metadata)


def normalisation(
    net: nn.Module, section: config.Model, role: str
) -> tuple[Sequence[float], Sequence[float]]:
    """Input mean and standard deviation per channel, in [0, 1] units; UserError if neither config nor timm has them."""
    if section.mean is not None:
        return section.mean, section.std
    timm_config = net.pretrained_cfg or {}
    if not timm_config.get("mean") or not timm_config.get("std"):
        raise UserError(
            f"{role}: the normalisation of {section.name} is not known: set {role}.mean and {role}.std"
        )
    return timm_config["mean"], timm_config["std"]
