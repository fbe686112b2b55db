"""Mixup and CutMix against timm's, with the draws given and in distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from timm.data import mixup as timms

from indistill.config import Mix
from indistill.data.mixing import coefficients, mixed, symmetric_beta

MANY = 100_000
# Kolmogorov's limit for the largest distance of two empirical distributions: exceeded once in 10^6 tests.
LIMIT = math.sqrt(math.log(2e6) / MANY)


def how(section: Mix, count: int = MANY, view: int = 0, size: int = 32) -> np.ndarray:
    return coefficients(section, 0, view=view, ids=np.arange(count), size=size).numpy()


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest distance between the empirical distributions of two samples."""
    values = np.concatenate([ours, theirs])
    return np.abs(
        np.searchsorted(np.sort(ours), values, "right") / len(ours)
        - np.searchsorted(np.sort(theirs), values, "right") / len(theirs)
    ).max()


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 0.8, 1.0, 2.0, 30.0])
def test_the_weights_have_the_beta_distribution(alpha):
    u, v = np.random.RandomState(1).rand(2, MANY)
    weights = symmetric_beta(alpha, u, v)
    assert ((weights >= 0) & (weights <= 1)).all()
    assert distance(weights, np.random.RandomState(2).beta(alpha, alpha, MANY)) < LIMIT
    assert np.var(weights) == pytest.approx(1 / (8 * alpha + 4), rel=0.03)


def test_a_tiny_alpha_gives_0_and_1():
    u, v = np.random.RandomState(1).rand(2, 1000)
    weights = symmetric_beta(1e-5, np.append(u, 0.0), np.append(v, 0.0))
    assert np.isfinite(weights).all()
    assert np.isin(weights, [0, 1]).mean() > 0.98


@pytest.mark.parametrize("section", [Mix(mixup=0.8), Mix(cutmix=1.0, prob=0.7), Mix(mixup=0.2, cutmix=0.5)])
def test_mixed_images_and_labels_are_timms(section, monkeypatch):
    """Each pair is a batch of timm's mode `elem`, which gets our weights and centres."""
    size, classes, count = 12, 5, 40
    generator = torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    ours, probabilities = mixed(images, labels, torch.from_numpy(how(section, count, size=size)), classes)

    weight, _, top, bottom, left, right = how(section, count, size=size).T
    boxes = iter(np.stack([top, bottom, left, right], axis=1)[bottom > top].astype(int).tolist())
    cut = (section.cutmix > 0) & (bottom > top)
    monkeypatch.setattr(timms, "rand_bbox", lambda *_, **__: tuple(next(boxes)))
    mixup = timms.Mixup(1.0, 1.0, mode="elem", label_smoothing=0.0, num_classes=classes)
    for i in range(0, count, 2):
        pair = slice(i, i + 2)
        lam = np.where(cut[pair], np.float32(0.5), weight[pair]).astype(np.float32)  # a box has its own
        monkeypatch.setattr(mixup, "_params_per_elem", lambda _, lam=lam, pair=pair: (lam, cut[pair]))
        theirs, targets = mixup(images[pair].float(), labels[pair])
        assert torch.equal(ours[pair], theirs)
        assert torch.equal(probabilities[pair], targets)
    assert next(boxes, None) is None
    assert not torch.equal(ours, images.float())


@pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"), reason="an older timm draws boxes otherwise"
)
@pytest.mark.parametrize(
    "section",
    [Mix(mixup=0.8, prob=0.6), Mix(cutmix=1.0), Mix(mixup=0.8, cutmix=1.0, prob=0.9, switch_prob=0.3)],
)
def test_the_coefficients_have_timms_distribution(section):
    weight, label, top, bottom, left, right = how(section).T
    mixup = timms.Mixup(
        section.mixup, section.cutmix, prob=section.prob, switch_prob=section.switch_prob, mode="elem"
    )
    np.random.seed(3)
    lam, cut = mixup._params_per_elem(MANY)
    boxes = np.zeros((MANY, 4))
    for i in np.flatnonzero(cut & (lam < 1)):
        boxes[i], lam[i] = timms.cutmix_bbox_and_lam((3, 32, 32), lam[i])
    assert distance(label, lam) < LIMIT
    for ours, theirs in zip((top, bottom, left, right), boxes.T):
        assert distance(ours, theirs) < LIMIT
    assert distance(weight, np.where(cut, 1, lam)) < LIMIT


def test_coefficients_depend_on_seed_view_and_sample_alone():
    section = Mix(mixup=0.8, cutmix=1.0)
    whole = how(section, 1000)
    ids = np.random.RandomState(0).permutation(1000)[:37]
    assert np.array_equal(coefficients(section, 0, view=0, ids=ids, size=32), whole[ids])
    views = np.arange(37) % 3
    each = coefficients(section, 0, view=views, ids=ids, size=32)
    for view in range(3):
        assert np.array_equal(each[views == view], how(section, 1000, view)[ids[views == view]])
    for other in (how(section, 1000, 1), coefficients(section, 1, view=0, ids=np.arange(1000), size=32)):
        assert abs(np.corrcoef(whole[:, 1], np.asarray(other)[:, 1])[0, 1]) < 0.15
