"""timm's recipes with our draws: the same operations, and parameters of the same distributions."""

import random

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing as TimmErasing
from torchvision import transforms

from indistill import config
from indistill.config import Augment, ColorJitter, RandAugment, RandomErasing, UserError
from indistill.data import augment
from indistill.data.augment import train_view, uniforms

MANY = 8_000
KOLMOGOROV_SMIRNOV = 1.63 * np.sqrt(2 / 4000)  # holds in 99 % of equal distributions, 4,000 drawn of each


def picture(height=48, width=48):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 200 / width + 30, y * 200 / height + 20, 127 + 90 * np.sin(x * y / 50)], axis=2)
    return smooth.astype(np.uint8)


def operation_draws(name, argument_sign=1, deviation=0.5):
    """The draws that choose one operation for sure."""
    place = (augment._OPERATIONS.index(name) + 0.5) / len(augment._OPERATIONS)
    return np.array([place, 0.0, deviation, 0.25 if argument_sign > 0 else 0.75])


def apply(name, magnitude, sign=1, image=None):
    image = Image.fromarray(picture() if image is None else image)
    recipe = RandAugment(magnitude=magnitude, num_ops=1)
    return np.asarray(
        augment._rand_augment(image, operation_draws(name, sign), recipe, [Image.Resampling.BILINEAR])
    ).astype(int)


def distance(ours, theirs):
    grid = np.sort(np.concatenate([ours, theirs]))
    ranks = [np.searchsorted(np.sort(sample), grid, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(ranks[0] - ranks[1]).max()


# --- RandAugment: operations --------------------------------------------------------------------------------


def test_the_operations_are_timms_increasing_ones():
    assert augment._OPERATIONS == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("name", auto_augment._RAND_INCREASING_TRANSFORMS)
@pytest.mark.parametrize("magnitude", [0, 1, 2.5, 5, 9, 9.7, 10])
@pytest.mark.parametrize("sign", [1, -1])
def test_operations_do_what_timms_do(monkeypatch, name, magnitude, sign):
    monkeypatch.setattr(
        auto_augment.random, "random", lambda: 0.2 if sign > 0 else 0.8
    )  # above a half it negates
    found = apply(name, magnitude, sign)
    if (name, magnitude) == ("PosterizeIncreasing", 10):
        magnitude = 9.9  # at 10 timm asks for 0 bits, which Pillow refuses
    hparams = {"img_mean": (124, 116, 104), "interpolation": Image.Resampling.BILINEAR}
    theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    expected = np.asarray(theirs(Image.fromarray(picture())))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_operations_read_between_pixels_as_timms_do(monkeypatch, interpolation):
    """timm's operations take the interpolation of its `create_transform`, or draw one."""
    modes = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    hparams = {"img_mean": (124, 116, 104)} | (
        {"interpolation": modes.get(interpolation)} if interpolation in modes else {}
    )
    recipe, drawn = Augment(recipe="pad_crop", flip=False, rand_augment={"probability": 1.0}), set()
    for row in uniforms(0, 0, np.arange(60)):
        plain = train_view(picture(), row, recipe=Augment(recipe="pad_crop", flip=False), size=48)
        expected = Image.fromarray(plain)
        chosen = zip(
            augment._operations(row[augment._RAND_AUGMENT], recipe.rand_augment), row[augment._RESAMPLE][1:]
        )
        for (name, arguments), which in chosen:
            theirs = auto_augment.AugmentOp(name, prob=1.0, magnitude=9, hparams=hparams)
            theirs.level_fn = lambda *_, a=arguments: a
            monkeypatch.setattr(auto_augment.random, "choice", lambda both, u=which: both[int(2 * u)])
            expected = theirs(expected)
            drawn.add((name, which < 0.5))
        assert np.array_equal(
            train_view(picture(), row, recipe=recipe, size=48, interpolation=interpolation),
            np.asarray(expected),
        )
    assert {("Rotate", True), ("Rotate", False)} < drawn


def test_operations_on_values():
    image = picture().astype(int)
    assert np.array_equal(apply("Invert", 3), 255 - image)
    assert np.array_equal(apply("PosterizeIncreasing", 5), image & 0b11000000)
    assert np.array_equal(apply("SolarizeIncreasing", 5), np.where(image < 128, image, 255 - image))
    assert np.array_equal(apply("SolarizeAdd", 10), np.where(image < 128, image + 110, image))
    assert np.abs(apply("BrightnessIncreasing", 5, -1) - image * 0.55).max() <= 1
    assert np.abs(apply("BrightnessIncreasing", 5, +1) - np.minimum(image * 1.45, 255)).max() <= 1
    grey = np.asarray(Image.fromarray(picture()).convert("L")).astype(int)[..., None]
    assert np.abs(apply("ColorIncreasing", 10, -1) - (grey + 0.1 * (image - grey))).max() <= 1
    assert np.abs(apply("ContrastIncreasing", 10, -1) - (grey.mean() + 0.1 * (image - grey.mean()))).max() < 2
    stretched = apply("AutoContrast", 0)
    assert stretched.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert stretched.max(axis=(0, 1)).min() >= 254
    for channel in range(3):
        counts = np.histogram(apply("Equalize", 0)[..., channel], 8, (0, 256))[0]
        assert counts.max() < 2 * counts.mean()


def test_operations_on_places():
    image = picture(40, 40).astype(int)
    fill = np.broadcast_to([124, 116, 104], (40, 18, 3))  # 45 % of 40
    kept = {1: np.hstack([image[:, 18:], fill]), -1: np.hstack([fill, image[:, :-18]])}
    for sign, expected in kept.items():
        assert np.array_equal(apply("TranslateXRel", 10, sign, picture(40, 40)), expected)
        turned = apply("TranslateYRel", 10, sign, np.ascontiguousarray(picture(40, 40).swapaxes(0, 1)))
        assert np.array_equal(turned.swapaxes(0, 1), expected)
    assert np.array_equal(apply("Rotate", 0), picture())
    spot = np.zeros((41, 41, 3), np.uint8)
    spot[20, 34:37] = 255  # 15 pixels right of the centre
    y, x = np.argwhere(apply("Rotate", 10, 1, spot)[..., 0] > np.array([150])).mean(axis=0)
    assert (20 - y, x - 20) == pytest.approx((7.5, 13), abs=1)  # 30 degrees against the clock
    column = np.zeros((41, 41, 3), np.uint8)
    column[:, 20] = 255
    sheared = apply("ShearX", 10, 1, column)[..., 0]
    assert 20 - sheared[35].argmax() == pytest.approx(0.3 * 35, abs=1)


# --- RandAugment: what is drawn -----------------------------------------------------------------------------


def drawn(**options):
    recipe = RandAugment(**options)
    rows = uniforms(0, 0, np.arange(MANY))[:, augment._RAND_AUGMENT]
    return [augment._operations(row, recipe) for row in rows]


def test_operations_are_drawn_evenly_and_independently():
    names = augment._OPERATIONS
    pairs = np.zeros((len(names), len(names)))
    for (first, _), (second, _) in drawn(probability=1.0):
        pairs[names.index(first), names.index(second)] += 1
    expected = MANY / len(names) ** 2
    chi_square = ((pairs - expected) ** 2 / expected).sum()  # 224 degrees of freedom
    assert 160 < chi_square < 300


@pytest.mark.parametrize("num_ops", [1, 2, 4])
@pytest.mark.parametrize("probability", [0.0, 0.3, 0.5, 1.0])
def test_each_operation_is_applied_with_its_probability(num_ops, probability):
    counts = np.bincount([len(operations) for operations in drawn(num_ops=num_ops, probability=probability)])
    successes = np.random.RandomState(0).binomial(num_ops, probability, 10**6)
    expected = np.bincount(successes, minlength=len(counts)) / 10**6
    assert len(counts) <= num_ops + 1
    assert np.abs(counts / MANY - expected[: len(counts)]).max() < 0.02


def test_signs_are_drawn_evenly():
    turns = [a[0] for operations in drawn(probability=1.0) for name, a in operations if name == "Rotate"]
    assert set(turns) == {27, -27}
    assert 0.46 < np.mean(np.array(turns) > 0) < 0.54


def test_the_magnitude_varies_as_asked_and_stays_in_range():
    def degrees(**options):
        return np.array(
            [
                abs(a[0])
                for ops in drawn(probability=1.0, num_ops=4, **options)
                for name, a in ops
                if name == "Rotate"
            ]
        )

    normal = degrees(magnitude=5, mstd=1) / 3
    assert normal.mean() == pytest.approx(5, abs=0.06)
    assert normal.std() == pytest.approx(1, abs=0.05)
    assert set(degrees(magnitude=7)) == {21}
    clipped = degrees(magnitude=9, mstd=2)
    assert clipped.max() == 30
    assert np.mean(clipped == 30) == pytest.approx(0.309, abs=0.03)  # above half a standard deviation
    operations = augment._operations(np.zeros(4), RandAugment(num_ops=1, mstd=1))  # every draw at its least
    assert operations == [("AutoContrast", ())]


# --- colour jitter ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe", [ColorJitter(), ColorJitter(brightness=0.2, contrast=1.5, saturation=0, hue=0.3)]
)
def test_colour_jitter_is_torchvisions_with_our_draws(monkeypatch, recipe):
    widths = (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    reference, image = transforms.ColorJitter(*widths), Image.fromarray(picture())
    changed = 0
    for draws in uniforms(0, 0, np.arange(30))[:, augment._JITTER]:
        factors = [
            max(0, 1 - w) + u * (1 + w - max(0, 1 - w)) if w else None for u, w in zip(draws, widths[:3])
        ]
        hue = (2 * draws[3] - 1) * recipe.hue if recipe.hue else None
        order = torch.from_numpy(np.argsort(draws[4:]))
        monkeypatch.setattr(reference, "get_params", lambda *_, o=order, f=factors, h=hue: (o, *f, h))
        expected = np.asarray(reference(image)).astype(int)
        found = np.asarray(augment._color_jitter(image, draws, recipe)).astype(int)
        assert np.abs(found - expected).max() <= 1  # two roundings of one factor
        changed += not np.array_equal(found, picture())
    assert changed == 30


def test_all_orders_of_colour_jitter_are_equally_likely():
    orders = np.argsort(uniforms(0, 0, np.arange(MANY))[:, augment._JITTER][:, 4:], axis=1)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert ((counts - MANY / 24) ** 2 / (MANY / 24)).sum() < 42  # chi square of 23 degrees of freedom


def test_no_jitter_is_no_change():
    still = ColorJitter(brightness=0, contrast=0, saturation=0)
    image = Image.fromarray(picture())
    assert augment._color_jitter(image, np.full(8, 0.9), still) is image


# --- random erasing -----------------------------------------------------------------------------------------


def erase(image, draws, **options):
    return augment._erase(image, draws, RandomErasing(**options))


def test_rectangles_are_distributed_as_timms():
    recipe, side = RandomErasing(), 64
    rows = uniforms(0, 0, np.arange(4000))[:, augment._ERASING]
    ours = np.array([augment._erased_box((side, side), row[2:], recipe) for row in rows]).T
    random.seed(0)
    timms, theirs = TimmErasing(probability=1.0, mode="const", device="cpu"), []
    for _ in range(4000):
        rows, columns = np.nonzero(timms(torch.ones(1, side, side))[0].numpy() == 0)
        theirs.append((rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1))
    theirs = np.array(theirs).T
    for name, of in {
        "top": lambda top, left, h, w: top,
        "left": lambda top, left, h, w: left,
        "area": lambda top, left, h, w: h * w,
        "ratio": lambda top, left, h, w: h / w,
    }.items():
        assert distance(of(*ours), of(*theirs)) < KOLMOGOROV_SMIRNOV, name
    top, left, height, width = ours
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= side


@pytest.mark.parametrize("fill", ["random", "mean"])
def test_only_a_rectangle_is_erased(fill):
    image = np.full((40, 50, 3), 7, dtype=np.uint8)
    for draws in uniforms(0, 0, np.arange(50))[:, augment._ERASING]:
        erased = erase(image, draws, probability=1.0, fill=fill)
        rows, columns = np.nonzero((erased != 7).any(axis=2))
        inside = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (inside.shape[0] * inside.shape[1]) / 2000 == pytest.approx(0.17, abs=0.18)
        if fill == "mean":
            assert (inside == (124, 116, 104)).all()
    assert (image == 7).all()


def test_erasing_happens_with_its_probability():
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    rows = uniforms(0, 0, np.arange(4000))[:, augment._ERASING]
    share = np.mean([erase(image, row, probability=0.25, fill="mean").any() for row in rows])
    assert share == pytest.approx(0.25, abs=0.03)


def test_an_image_that_no_rectangle_fits_into_is_kept():
    image = picture()
    assert (
        erase(image, uniforms(0, 0, np.arange(1))[0, augment._ERASING], probability=1.0, scale=(1, 1))
        is image
    )


def test_noise_is_normal_once_normalised():
    mean, std = np.array(timm.data.IMAGENET_DEFAULT_MEAN), np.array(timm.data.IMAGENET_DEFAULT_STD)
    noise = augment._noise(0.3, 200, 201)
    normal = np.random.RandomState(0).standard_normal((200, 201, 3))
    expected = np.clip(normal, -mean / std, (1 - mean) / std)  # a pixel is within 0 and 255
    found = (noise / 255 - mean) / std
    for channel in range(3):
        assert found[..., channel].mean() == pytest.approx(expected[..., channel].mean(), abs=0.02)
        assert found[..., channel].std() == pytest.approx(expected[..., channel].std(), abs=0.02)
    flat = found.reshape(-1, 3)
    correlations = np.corrcoef(np.hstack([flat[:-1], flat[1:]]).T) - np.eye(6)  # channels, and neighbours
    assert np.abs(correlations).max() < 0.025
    assert np.abs(np.corrcoef(found[:-1, :, 0].ravel(), found[1:, :, 0].ravel())[0, 1]) < 0.025


def test_noise_depends_on_its_key_alone():
    assert np.array_equal(augment._noise(0.3, 5, 6), augment._noise(0.3, 5, 6))
    assert (augment._noise(0.3, 50, 60) == augment._noise(0.3 + 2.0**-53, 50, 60)).mean() < 0.02


# --- together -----------------------------------------------------------------------------------------------

ALL = {
    "rand_augment": {"mstd": 0.5, "probability": 1.0},
    "color_jitter": {"hue": 0.1},
    "random_erasing": {"probability": 1.0},
}


@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_a_view_depends_on_image_and_draws_alone(recipe):
    section, image = Augment(recipe=recipe, **ALL), picture(60, 50)
    rows = uniforms(1, 2, np.arange(40))
    views = [train_view(image, row, recipe=section, size=48) for row in rows]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    for row, view in reversed(list(zip(rows, views))):
        assert view.shape == (48, 48, 3)
        assert view.dtype == np.uint8
        assert np.array_equal(train_view(image.copy(), row.copy(), recipe=section, size=48), view)
    assert len({view.tobytes() for view in views}) == 40
    assert np.array_equal(image, picture(60, 50))


def test_the_global_generators_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    train_view(picture(), uniforms(1, 2, np.arange(1))[0], recipe=Augment(**ALL), size=32)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_switching_a_part_on_leaves_the_others_as_they_are():
    row, image = uniforms(1, 2, np.arange(1))[0], picture(60, 50)
    plain = train_view(image, row, recipe=Augment(), size=48)
    erased = train_view(image, row, recipe=Augment(random_erasing={"probability": 1.0}), size=48)
    top, left, height, width = augment._erased_box((48, 48), row[augment._ERASING][2:], RandomErasing())
    outside = np.ones((48, 48), bool)
    outside[top : top + height, left : left + width] = False
    assert np.array_equal(erased[outside], plain[outside])
    assert not np.array_equal(erased, plain)
    augmented = augment._rand_augment(
        Image.fromarray(plain), row[augment._RAND_AUGMENT], RandAugment(), [Image.Resampling.BILINEAR] * 4
    )
    assert np.array_equal(
        train_view(image, row, recipe=Augment(rand_augment={}), size=48), np.asarray(augmented)
    )


def test_no_two_parts_share_a_draw():
    parts = [
        augment._PAD_CROP,
        slice(2, 3),
        augment._CROP,
        augment._JITTER,
        augment._RAND_AUGMENT,
        augment._ERASING,
    ]
    parts.append(augment._RESAMPLE)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == augment.DRAWS


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rand_augment": {"magnitude": 11}}, "data.augment.rand_augment.magnitude: "),
        ({"rand_augment": {"num_ops": 5}}, "data.augment.rand_augment.num_ops: "),
        ({"rand_augment": {"m": 9}}, "data.augment.rand_augment: unknown key 'm'"),
        ({"color_jitter": {"hue": 0.6}}, "data.augment.color_jitter.hue: "),
        (
            {"random_erasing": {"scale": [0.5, 0.1]}},
            "data.augment.random_erasing: scale and ratio are ranges",
        ),
        (
            {"random_erasing": {"scale": [0.5, 1.1]}},
            "data.augment.random_erasing: scale and ratio are ranges",
        ),
        ({"random_erasing": {"fill": "zero"}}, "data.augment.random_erasing.fill: "),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tree, section, message):
    tree["data"]["augment"] = section
    with pytest.raises(UserError) as caught:
        config.parse(tree, "test")
    assert message in str(caught.value)
