"""The small networks of the demo and the paper's CIFAR-10 experiments, registered with timm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

# timm's record of a model's input; mean and standard deviation are those that the authors trained with.
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

    Three times [3x3 convolution without padding, batch norm, ReLU, 2x2 max-pool], then fc1, ReLU (the
    embedding) and fc2. Stage i is the map after the i-th pool. Module names are those of the published state
    dicts.
    """

    def __init__(self, widths: tuple[int, int, int], hidden: int, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = hidden
        self.feature_info: list[dict[str, Any]] = []
        previous = 3
        for i, width in enumerate(widths, start=1):
            setattr(self, f"conv{i}", nn.Conv2d(previous, width, 3))
            setattr(self, f"conv{i}_bn", nn.BatchNorm2d(width))
            self.feature_info.append({"module": f"conv{i}_bn", "num_chs": width, "reduction": 2**i})
            previous = width
        self.fc1 = nn.Linear(4 * widths[-1], hidden)  # a 32x32 image leaves a 2x2 map
        self.fc2 = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()
        self.pretrained_cfg = self.default_cfg = _CNN32_CFG

    def _stage(self, i: int, x: Tensor) -> Tensor:
        x = getattr(self, f"conv{i}_bn")(getattr(self, f"conv{i}")(x))
        # The published order, ReLU before the pool, gives the same bits.
        return nn.functional.relu(nn.functional.max_pool2d(x, 2))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Sequence[int] | None = None,
        *,
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
    if pretrained and not kwargs.get("pretrained_cfg"):  # which names the weights of an exported one
        raise ValueError("no hub holds its weights")
    kwargs |= {"widths": widths, "hidden": hidden}
    return build_model_with_cfg(CNN32, name, pretrained, kwargs_filter=("in_chans",), **kwargs)


@register_model
def cnn32_auxiliary(pretrained: bool = False, **kwargs: Any) -> CNN32:
    return _cnn32("cnn32_auxiliary", pretrained, widths=(16, 32, 64), hidden=128, **kwargs)


@register_model
def cnn32_student(pretrained: bool = False, **kwargs: Any) -> CNN32:
    return _cnn32("cnn32_student", pretrained, widths=(8, 16, 32), hidden=64, **kwargs)
