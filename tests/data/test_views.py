"""Interpolation and crop: real images as timm's own transforms show them, and whose record `auto` takes."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import transforms as timm_transforms

from indistill import config
from indistill.commands.export import load
from indistill.commands.export.load import load_for_eval
from indistill.config import Augment, UserError
from indistill.data import augment, loader, training
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.loader import IndexedTraining
from indistill.models.views import EvalView, evaluation_view, own_view
from indistill.training.students import Shared, _Share

SIZE = 224


@pytest.fixture(scope="module")
def section(photographs, tmp_path_factory):
    return config.Data(
        train="*-0001.tar", eval="*-0000.tar", root=str(photographs),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        num_classes=1000, image_size=SIZE, global_batch=8, streams=8, workers=0,
    )  # fmt: skip


def pictures(shards):
    """Each image of a set, decoded by Pillow alone."""
    return [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in shards.iterate()]


# --- the pixels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "size"),
    [
        (EvalView("bicubic", 0.875), 224),
        (EvalView("bilinear", 0.875), 224),
        (EvalView("bicubic", 0.95), 160),
        (EvalView("bilinear", 1.0), 64),
        (EvalView("bicubic", 1.0, "squash"), 128),
        (EvalView("bicubic", 0.9, "border", (0.5, 0.25, 1.0)), 128),
    ],
)
def test_evaluation_shows_what_timms_transform_shows(section, view, size):
    section = section.model_copy(update={"image_size": size})
    dataset = ImageDataset(open_shards(section, section.eval), section, seed=0, view=view)
    (batch,) = loader.eval_loader(dataset, len(dataset), rank=0, world=1, device=torch.device("cpu"))
    transform = timm.data.create_transform(
        (3, size, size), interpolation=view.interpolation, crop_pct=view.crop_pct, crop_mode=view.crop_mode,
        mean=view.mean, normalize=False,
    )  # fmt: skip
    expected = torch.stack([transform(picture) for picture in pictures(dataset.shards)])
    assert len(expected) == 40
    assert torch.equal(batch.images, expected)


class Draws:
    """Replaces `random` in timm's transforms by a view's own draws, in the order in which timm uses them."""

    def __init__(self, draws):
        self.places, self.shape = iter(draws[augment._CROP][:2]), iter(draws[augment._CROP][2:])
        self.which = draws[augment._RESAMPLE][0]

    def uniform(self, low, high):
        return low + next(self.shape) * (high - low)

    def randint(self, low, high):
        return low + int(next(self.places) * (high - low + 1))

    def choice(self, choices):
        return choices[int(self.which * len(choices))]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_training_shows_what_timms_transform_shows(section, interpolation, monkeypatch):
    section = section.model_copy(update={"interpolation": interpolation})
    training = IndexedTraining(section, seed=3, rank=0, world=1, accumulation=1)
    originals = pictures(training.dataset.shards)
    transform = timm.data.create_transform(
        (3, SIZE, SIZE), is_training=True, interpolation=interpolation, color_jitter=None, normalize=False
    )
    seen = set()
    for batch in training.loader(0, training.steps_per_epoch, torch.device("cpu")):
        for image, sample, row in zip(batch.images, batch.ids, augment.uniforms(3, 0, batch.ids.numpy())):
            monkeypatch.setattr(timm_transforms, "random", Draws(row))
            monkeypatch.setattr(torch, "rand", lambda *_, row=row: torch.tensor([row[augment._FLIP]]))
            assert torch.equal(image, transform(originals[sample]))
            seen.add(int(sample))
    assert len(seen) == 40


@pytest.mark.parametrize(
    ("interpolation", "theirs"), [("bilinear",) * 2, ("bicubic",) * 2, ("random", "bilinear")]
)
def test_training_without_augmentation_is_timms_too(section, interpolation, theirs):
    recipe = Augment(recipe="none", flip=False)
    section = section.model_copy(update={"interpolation": interpolation, "augment": recipe})
    training = IndexedTraining(section, seed=3, rank=0, world=1, accumulation=1)
    originals = pictures(training.dataset.shards)
    # Not random, to which timm's resize is blind there, as it says in its own comment.
    transform = timm.data.create_transform(SIZE, True, no_aug=True, interpolation=theirs, normalize=False)
    for batch in training.loader(0, 2, torch.device("cpu")):
        for image, sample in zip(batch.images, batch.ids):
            assert torch.equal(image, transform(originals[sample]))


def test_random_draws_either_as_often():
    rows = augment.uniforms(0, 0, np.arange(4000))[:, augment._RESAMPLE]
    drawn = np.array([[int(one) for one in augment._resamples(row, "random")] for row in rows])
    assert set(drawn.flat) == {Image.Resampling.BILINEAR, Image.Resampling.BICUBIC}
    assert np.abs((drawn == Image.Resampling.BICUBIC).mean(axis=0) - 0.5).max() < 0.04
    assert np.abs(np.corrcoef(drawn.T) - np.eye(drawn.shape[1])).max() < 0.08


# --- whose record -------------------------------------------------------------------------------------------

LITE = EvalView("bicubic", 0.875, "center", (0.5, 0.5, 0.5))  # tf_efficientnet_lite0
TORCHVISION = EvalView("bilinear", 0.875, "center", (0.485, 0.456, 0.406))  # resnet34.tv_in1k
LITE0, R34 = "{name: tf_efficientnet_lite0, pretrained: true}", "{name: resnet34.tv_in1k, pretrained: true}"


@pytest.fixture
def parsed(tree, tmp_path):
    """The config with other networks, whose evaluation is auto."""
    tree["data"] |= {"image_size": 224, "eval_crop": "auto"}
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree))
    return lambda *overrides: config.load(path, overrides)


def test_auto_is_the_default():
    section = config.Data(train="a.tar", num_classes=2, global_batch=2)
    assert (section.interpolation, section.eval_interpolation, section.eval_crop) == (
        "bilinear",
        "auto",
        "auto",
    )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (LITE0, R34, LITE),
        ("{name: tf_efficientnet_lite0, checkpoint: a.pt}", R34, LITE),
        ("{name: tf_efficientnet_lite0}", R34, TORCHVISION),
        ("{name: resnet34.tv_in1k}", LITE0, LITE),
        ("{name: resnet34.tv_in1k}", "null", TORCHVISION),
        ("null", LITE0, LITE),  # stage: heads
    ],
)
def test_auto_follows_the_weights(parsed, student, teacher, expected):
    plain = ["warmup=null", "kd.losses=[{name: ce}]"] + ["stage=heads"] * (student == "null")
    settings = parsed(f"student={student}", f"teacher={teacher}", *plain)
    assert evaluation_view(settings) == expected


def test_what_is_said_wins(parsed):
    settings = parsed(f"student={LITE0}", "data.eval_interpolation=bilinear")
    assert evaluation_view(settings) == LITE._replace(interpolation="bilinear")
    settings = parsed(f"student={LITE0}", "data.eval_crop=0.9")
    assert evaluation_view(settings)[:3] == ("bicubic", 0.9, "center")
    settings = parsed("student={name: no-such}", "data.eval_crop=0.9", "data.eval_interpolation=bicubic")
    assert evaluation_view(settings)[:3] == ("bicubic", 0.9, "center")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("convnext_base.fb_in22k_ft_in1k_384", 384),  # squash
        ("resnet50.a1_in1k", 224),
        ("resnet50.a1_in1k", 288),  # at which it is tested
        ("resnet50.a1_in1k", 256),
        ("cnn32_student", 32),
    ],
)
def test_a_networks_own_view_is_timms(parsed, name, size):
    section, settings = config.Model(name=name), parsed(f"data.image_size={size}")
    record = timm.get_pretrained_cfg(name).to_dict()
    expected = timm.data.resolve_data_config(pretrained_cfg=record, use_test_size=size == 288)
    found = own_view(section, settings.data, "student")
    assert found._asdict() == {key: expected[key] for key in found._fields}
    assert (name, size) != ("resnet50.a1_in1k", 288) or found.crop_pct == record["test_crop_pct"] != record[
        "crop_pct"
    ]


def test_a_record_of_ones_own(parsed, tmp_path):
    record = {"interpolation": "bilinear", "crop_pct": 0.6}
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": record}))
    view = own_view(config.Model(name=f"local-dir:{tmp_path}"), parsed().data, "student")
    assert view[:3] == ("bilinear", 0.6, "center")
    with pytest.raises(
        UserError, match=r"^student: timm's pretrained_cfg of resnet18.no_such cannot be loaded .*eval_crop$"
    ):
        own_view(config.Model(name="resnet18.no_such"), parsed().data, "student")


def test_eval_shows_a_named_network_its_own_view(parsed, monkeypatch):
    settings = parsed(f"student={R34}", "teacher=null", "warmup=null", "kd.losses=[{name: ce}]")
    network = SimpleNamespace(net=SimpleNamespace(pretrained_cfg={}))
    monkeypatch.setattr(load, "_pretrained", lambda *_: network)
    assert load_for_eval(settings, "tf_efficientnet_lite0") == (network, LITE)
    assert evaluation_view(settings) == TORCHVISION


def test_students_at_once_are_each_evaluated_by_their_own(parsed):
    settings = parsed()
    whole = ImageDataset(open_shards(settings.data, settings.data.eval), settings.data, seed=0, view=LITE)
    shared = Shared(settings, 2)
    shared.opened = ("training", {"": whole})
    views = []
    for student in (LITE0, R34):
        _, eval_sets = _Share(shared, 0, "a").data(None, parsed(f"student={student}"))
        views.append(eval_sets[""].view)
    assert views == [LITE, TORCHVISION]
    assert training.open_eval_set(parsed(f"student={R34}")).view == TORCHVISION


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.interpolation=auto", "data.interpolation: Input should be 'bilinear', 'bicubic' or 'random'"),
        (
            "data.eval_interpolation=random",
            "data.eval_interpolation: Input should be 'auto', 'bilinear' or 'bicubic'",
        ),
        ("data.eval_crop=1.5", "data.eval_crop: Input should be less than or equal to 1"),
        ("data.eval_crop=all", "data.eval_crop: "),
    ],
)
def test_what_is_none_is_refused(parsed, override, message):
    with pytest.raises(UserError) as caught:
        parsed(override)
    assert f": {message}" in str(caught.value)
