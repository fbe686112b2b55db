"""The loss bce: timm's BinaryCrossEntropy, on labels and on mixed labels."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup
from timm.loss import BinaryCrossEntropy

from indistill import config
from indistill.config import UserError
from indistill.losses import bce
from indistill.training.loop import train

LOGITS = torch.from_numpy(np.random.RandomState(0).standard_normal((6, 5)) * 3)
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"target_threshold": 0.2},
    {"label_smoothing": 0.3, "target_threshold": 0.05},
    {"sum_classes": True},
    {"label_smoothing": 0.1, "sum_classes": True},
]


def timms(smoothing=0.0, **options):
    return BinaryCrossEntropy(smoothing=smoothing, **options)


def renamed(options):
    return {("smoothing" if key == "label_smoothing" else key): value for key, value in options.items()}


@pytest.mark.parametrize("options", OPTIONS)
def test_bce_of_labels_is_timms(options):
    ours, theirs = (LOGITS.clone().requires_grad_() for _ in range(2))
    value = bce(ours, LABELS, **options)
    expected = timms(**renamed(options))(theirs, LABELS)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, ours)
    (expected_gradient,) = torch.autograd.grad(expected, theirs)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_bce_of_mixed_labels_is_timms(options, kind):
    """timm smooths the labels while it mixes them; here the loss does, on the labels that `ce` gets."""
    images = torch.rand(6, 3, 8, 8)
    mixed = []
    for smoothing in (0.0, options.get("label_smoothing", 0.0)):
        np.random.seed(3)
        alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0} | {kind: 1.0}
        mix = Mixup(**alphas, label_smoothing=smoothing, num_classes=5)
        mixed.append(mix(images.clone(), LABELS)[1])
    rest = {key: value for key, value in options.items() if key != "label_smoothing"}
    expected = timms(**rest)(LOGITS, mixed[1].double()).item()
    assert bce(LOGITS, mixed[0], **options).item() == pytest.approx(expected, rel=1e-6)


def test_bce_by_hand():
    logits = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)  # probabilities 3/4 and 1/2
    label = torch.tensor([0])
    terms = [-math.log(3 / 4), -math.log(1 / 2)]
    assert bce(logits, label).item() == pytest.approx(sum(terms) / 2)
    assert bce(logits, label, sum_classes=True).item() == pytest.approx(sum(terms))
    soft = torch.tensor([[0.7, 0.3]], dtype=torch.float64)
    expected = -(0.7 * math.log(3 / 4) + 0.3 * math.log(1 / 4) + math.log(1 / 2)) / 2
    assert bce(logits, soft).item() == pytest.approx(expected)
    assert bce(logits, soft, target_threshold=0.2).item() == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 2)) / 2
    )


def test_bce_is_computed_in_single_precision():
    logits = LOGITS.to(torch.bfloat16)
    assert bce(logits, LABELS).dtype == torch.float32
    assert bce(logits, LABELS).item() == pytest.approx(bce(logits.float(), LABELS).item())


def test_bce_trains_with_mixed_labels_and_resumes(tree):
    del tree["warmup"]
    losses = [{"name": "bce", "label_smoothing": 0.1, "target_threshold": 0.2, "sum_classes": True}]
    tree |= {"teacher": None, "kd": {"losses": losses, "mix": {"mixup": 0.2, "cutmix": 1.0}}}
    tree |= {"duration": "20 steps", "checkpoint": {"every_steps": 10, "keep_last": 9}}
    tree["optimizer"] = {"name": "adamw", "lr": 3e-3}
    run_dir = Path(tree["run_dir"])

    def told():
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [line["bce"] for line in lines if "loss" in line]

    train(config.parse(tree, "test"))
    first = told()
    assert len(first) == 20
    assert sum(first[-5:]) < sum(first[:5])
    train(config.parse(copy.deepcopy(tree), "test"), str(run_dir / "checkpoints" / "step-00000010"))
    assert told() == first


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"smoothing": 0.1}, "unknown key 'smoothing'; the nearest valid key is 'label_smoothing'"),
        ({"target_threshold": 2}, "kd.losses.0.target_threshold: "),
        ({"label_smoothing": 1}, "kd.losses.0.label_smoothing: "),
    ],
)
def test_keys_that_make_no_sense_are_refused_by_name(tree, keys, message):
    tree["kd"] = {"losses": [{"name": "bce", **keys}]}
    with pytest.raises(UserError) as caught:
        config.parse(tree, "test")
    assert message in str(caught.value)
