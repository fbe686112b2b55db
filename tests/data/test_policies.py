"""AutoAugment, AugMix, vertical flips, grayscale and blur: timm's and DeiT III's, with our draws."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment, create_transform
from torchvision import transforms

from indistill import config
from indistill.config import Augment, AugMix, UserError
from indistill.data import augment
from indistill.data.augment import ALL_DRAWS, DRAWS, draws_of, train_view, train_views, uniforms

MODES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
BARE = {"recipe": "none", "flip": False}
MANY = 6_000


def picture(height=48, width=48):
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 200 / width + 30, y * 200 / height + 20, 127 + 90 * np.sin(x * y / 50)], axis=2)
    return smooth.astype(np.uint8)


def rows(count=MANY, part=slice(None)):
    return uniforms(0, 0, np.arange(count), range(ALL_DRAWS))[:, part]


def timms(kind, name, interpolation="bilinear", **options):
    """The transform of a kind that timm's users get for a name, among those of `create_transform`."""
    whole = create_transform(48, is_training=True, auto_augment=name, interpolation=interpolation, **options)
    (found,) = [part for part in whole.transforms if isinstance(part, kind)]
    return found


class Script:
    """Stands for the module `random` in timm's operations: returns given numbers."""

    def __init__(self, numbers, which):
        self.numbers = list(numbers)
        self.which = which  # of the interpolations

    def random(self):
        return self.numbers.pop(0)

    def uniform(self, low, high):
        return low + (high - low) * self.random()

    def choice(self, options):
        return options[int(self.which * len(options))]


# --- AutoAugment --------------------------------------------------------------------------------------------


def expected_of_policy(monkeypatch, name, row, interpolation):
    """timm's AutoAugment of the picture with our draws."""
    policy = timms(auto_augment.AutoAugment, name, interpolation).policy
    choice, *pairs = row[augment._AUTO_AUGMENT]
    image = Image.fromarray(picture())
    resamples = row[augment._RESAMPLE][1:]
    used = 0
    for operation, (chance, value) in zip(policy[int(choice * len(policy))], np.reshape(pairs, (-1, 2))):
        numbers = [chance, value] if operation.prob < 1 else [value]
        monkeypatch.setattr(auto_augment, "random", Script(map(float, numbers), resamples[used]))
        used += chance < operation.prob
        image = operation(image)
    return np.asarray(image)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("name", ["original", "3a"])
def test_a_policy_does_what_timms_does_with_the_same_draws(monkeypatch, name, interpolation):
    section = Augment(**BARE, auto_augment=name)
    parts = set()
    for row in rows(300):
        view = train_view(picture(), row, recipe=section, size=48, interpolation=interpolation)
        assert np.array_equal(view, expected_of_policy(monkeypatch, name, row, interpolation))
        parts.add(int(row[augment._AUTO_AUGMENT][0] * len(augment._policy(name))))
    assert parts == set(range({"original": 25, "3a": 3}[name]))


@pytest.mark.parametrize("name", ["original", "3a"])
def test_the_operations_of_a_policy_are_drawn_as_timms(name):
    policy = timms(auto_augment.AutoAugment, name).policy
    expected = {}  # probability of each sequence of operations
    for part in policy:
        for used in itertools.product((True, False), repeat=len(part)):
            sequence = tuple(one.name for one, is_used in zip(part, used) if is_used)
            chances = [one.prob if is_used else 1 - one.prob for one, is_used in zip(part, used)]
            expected[sequence] = expected.get(sequence, 0) + np.prod(chances) / len(policy)
    counts = {}
    for row in rows(part=augment._AUTO_AUGMENT):
        names = tuple(
            "GaussianBlurRand" if one == "GaussianBlur" else one
            for one, _ in augment._policy_operations(row, name)
        )
        counts[names] = counts.get(names, 0) + 1
    assert counts.keys() <= {names for names, chance in expected.items() if chance > 0}
    for names, chance in expected.items():
        deviation = np.sqrt(MANY * chance * (1 - chance))
        assert abs(counts.get(names, 0) - MANY * chance) <= 4.5 * deviation, names


def test_three_augment_is_that_of_deit_iii():
    """As in facebookresearch/deit, augment.py: one of three, then colour jitter, after a horizontal flip."""
    jitter = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3}
    section = Augment(recipe="none", auto_augment="3a", color_jitter=jitter)
    seen = set()
    for row in rows(60):
        image = Image.fromarray(picture())
        if row[augment._FLIP] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        choice, _, radius, *_ = row[augment._AUTO_AUGMENT]
        which = int(3 * choice)
        if which == 0:
            image = ImageOps.solarize(image)
        elif which == 1:
            image = transforms.Grayscale(3)(image)
        else:
            image = image.filter(ImageFilter.GaussianBlur(radius=float(0.1 + 1.9 * radius)))
        reference = transforms.ColorJitter(0.3, 0.3, 0.3)
        factors = [0.7 + 0.6 * u for u in row[augment._JITTER][:3]]
        order = torch.from_numpy(np.argsort(row[augment._JITTER][4:]))
        reference.get_params = lambda *_, o=order, f=factors: (o, *f, None)
        view = train_view(picture(), row, recipe=section, size=48).astype(int)
        assert np.abs(view - np.asarray(reference(image))).max() <= 1  # two roundings of one factor
        seen.add(which)
    assert seen == {0, 1, 2}


def test_the_radius_of_a_blur_is_uniform_from_a_tenth_to_two():
    radii = [augment._blur_radius(u) for u in rows(part=augment._BLUR)[:, 1]]
    low, high = np.quantile(radii, [0.1, 0.9])
    assert 0.1 <= min(radii) < 0.11
    assert 1.99 < max(radii) <= 2
    assert (low, high) == pytest.approx((0.29, 1.81), abs=0.05)


# --- AugMix -------------------------------------------------------------------------------------------------


def script_augmix(monkeypatch, row, width, depth):
    """Make timm's AugMix draw what the row has for it."""
    mixture, *chains = row[augment._AUGMIX]
    chains = np.reshape(chains, (config.MAX_AUGMIX, -1))[:width]
    weights = -np.log(1 - chains[:, 0])
    queue, depths, choices = [], [], []
    signed = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
    names = auto_augment._AUGMIX_TRANSFORMS
    for chain in chains:
        depths.append(depth or 1 + int(3 * chain[1]))
        drawn = chain[2:].reshape(-1, 4)[: depths[-1]]
        choices.append([int(len(names) * which) for which in drawn[:, 0]])
        for which, (_, level, sign, resample) in zip(choices[-1], drawn):
            turns = names[which] in signed
            enhances = names[which].endswith("Increasing") and names[which][0] in "CB"
            enhances |= names[which] == "SharpnessIncreasing"
            queue += [("level", level)] + [("sign", sign)] * (turns or enhances) + [("resample", resample)]

    class Numbers:
        @staticmethod
        def take(kind):
            while queue[0][0] != kind:  # what an operation does not use
                assert queue.pop(0)[0] == "resample"
            return queue.pop(0)[1]

        def random(self):
            return self.take("sign")

        def uniform(self, low, high):
            return low + (high - low) * self.take("level")

        def choice(self, options):
            return options[int(len(options) * self.take("resample"))]

    monkeypatch.setattr(auto_augment, "random", Numbers())
    monkeypatch.setattr(np.random, "dirichlet", lambda alphas: weights / weights.sum())
    monkeypatch.setattr(np.random, "beta", lambda a, b: mixture)
    monkeypatch.setattr(np.random, "randint", lambda low, high: depths.pop(0))
    monkeypatch.setattr(np.random, "choice", lambda ops, n, replace: [ops[i] for i in choices.pop(0)])


@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("augmix", {}),
        ("augmix-m7-w2-d4", {"magnitude": 7, "width": 2, "depth": 4}),
        ("augmix-m9-w8-d8", {"magnitude": 9, "width": 8, "depth": 8}),
    ],
)
def test_augmix_does_what_timms_does_with_the_same_draws(monkeypatch, name, options, interpolation):
    theirs = timms(auto_augment.AugMixAugment, name, interpolation)
    section = AugMix(**options)
    for row in rows(60):
        view = train_view(
            picture(), row, recipe=Augment(**BARE, augmix=section), size=48, interpolation=interpolation
        )
        with monkeypatch.context() as patch:
            script_augmix(patch, row, section.width, section.depth)
            expected = np.asarray(theirs(Image.fromarray(picture())))
        assert np.array_equal(view, expected)


def test_the_operations_of_augmix_are_timms():
    assert augment._AUGMIX_OPERATIONS == auto_augment._AUGMIX_TRANSFORMS


def test_the_weights_of_chains_have_the_distribution_of_dirichlet():
    """Dirichlet(1, 1, 1): each weight is Beta(1, 2), of mean 1/3 and variance 1/18; two correlate by -1/2."""
    chains = rows(part=augment._AUGMIX)[:, 1:].reshape(MANY, config.MAX_AUGMIX, -1)
    weights = -np.log1p(-chains[:, :3, 0])
    weights /= weights.sum(axis=1, keepdims=True)
    assert weights.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.015)
    assert weights.var(axis=0) == pytest.approx([1 / 18] * 3, rel=0.1)
    assert np.corrcoef(weights[:, 0], weights[:, 1])[0, 1] == pytest.approx(-0.5, abs=0.05)
    depths = 1 + (3 * chains[:, 0, 1]).astype(int)
    assert np.bincount(depths)[1:] / MANY == pytest.approx([1 / 3] * 3, abs=0.03)


# --- vertical flip, grayscale, blur -------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_vertical_flip_turns_as_many_views_as_asked_upside_down(recipe):
    image = picture(40, 44)
    plain, flipping = Augment(recipe=recipe), Augment(recipe=recipe, vertical_flip=0.3)
    flipped = 0
    for row in rows(500):
        before = train_view(image, row, recipe=plain, size=32)
        view = train_view(image, row, recipe=flipping, size=32)
        flipped += np.array_equal(view, before[::-1])
        assert np.array_equal(view, before) or np.array_equal(view, before[::-1])
    assert 110 < flipped < 190


def test_grayscale_is_torchvisions():
    expected = np.asarray(transforms.RandomGrayscale(p=1.0)(Image.fromarray(picture())))
    views = [train_view(picture(), row, recipe=Augment(**BARE, grayscale=0.4), size=48) for row in rows(500)]
    grey = [np.array_equal(view, expected) for view in views]
    assert all(one or np.array_equal(view, picture()) for one, view in zip(grey, views))
    assert 160 < sum(grey) < 240


def test_blur_is_a_gaussian_of_the_drawn_deviation():
    section = Augment(**BARE, blur=0.5)
    blurred = 0
    for row in rows(200):
        view = train_view(picture(), row, recipe=section, size=48)
        chance, u = row[augment._BLUR]
        if chance >= 0.5:
            assert np.array_equal(view, picture())
            continue
        blurred += 1
        assert np.array_equal(
            view, np.asarray(auto_augment.gaussian_blur(Image.fromarray(picture()), float(0.1 + 1.9 * u)))
        )
        # The formula, in float64, as timm's `gaussian_blur_prob` computes it; Pillow approximates it.
        x = np.arange(-11, 12)
        kernel = np.exp(-0.5 * (x / (0.1 + 1.9 * u)) ** 2)
        expected = picture().astype(float)
        for axis in (0, 1):
            padded = np.pad(expected, [(11, 11) if a == axis else (0, 0) for a in range(3)], mode="reflect")
            expected = np.apply_along_axis(np.convolve, axis, padded, kernel / kernel.sum(), "valid")
        inner = np.s_[12:-12, 12:-12]  # Pillow extends the border otherwise
        assert np.abs(view[inner] - expected[inner]).mean() < 1
    assert 75 < blurred < 125


# --- together -----------------------------------------------------------------------------------------------

PARTS = {
    "vertical_flip": 0.5,
    "color_jitter": {"hue": 0.1},
    "grayscale": 0.5,
    "blur": 0.5,
    "random_erasing": {"probability": 1.0},
}


def test_the_order_is_timms():
    whole = create_transform(
        48,
        is_training=True,
        vflip=0.5,
        auto_augment="3a",
        color_jitter=0.4,
        grayscale_prob=1.0,
        gaussian_blur_prob=1.0,
    )
    names = [type(part).__name__ for part in whole.transforms]
    assert names[1:7] == [
        "RandomHorizontalFlip", "RandomVerticalFlip", "AutoAugment", "ColorJitter", "RandomGrayscale",
        "RandomApply",
    ]  # fmt: skip
    section = Augment(recipe="none", **PARTS | {"grayscale": 1.0, "blur": 1.0}, auto_augment="original")
    for row in rows(20):
        image = Image.fromarray(picture())
        for part in ({"flip": True}, {"vertical_flip": 0.5}, {"auto_augment": "original"},
                     {"color_jitter": {"hue": 0.1}}, {"grayscale": 1.0}, {"blur": 1.0},
                     {"random_erasing": {"probability": 1.0}}):  # fmt: skip
            view = train_view(np.asarray(image), row, recipe=Augment(**BARE | part), size=48)
            image = Image.fromarray(view)
        assert np.array_equal(train_view(picture(), row, recipe=section, size=48), np.asarray(image))


@pytest.mark.parametrize("policy", [{"auto_augment": "original"}, {"auto_augment": "3a"}, {"augmix": {}}])
@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_a_view_depends_on_image_and_draws_alone(recipe, policy):
    section, image = Augment(recipe=recipe, **PARTS, **policy), picture(60, 50)
    some = uniforms(1, 2, np.arange(30), draws_of(section))
    views = [train_view(image, row, recipe=section, size=48) for row in some]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for row, view in reversed(list(zip(some, views))):
        assert view.shape == (48, 48, 3)
        assert view.dtype == np.uint8
        assert np.array_equal(train_view(image.copy(), row.copy(), recipe=section, size=48), view)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len({view.tobytes() for view in views}) == 30
    assert np.array_equal(image, picture(60, 50))


@pytest.mark.parametrize("options", [{"vertical_flip": 0.5}, {"augmix": {}}, {"grayscale": 0.5, "blur": 0.5}])
def test_views_of_a_batch_are_those_of_its_images(options):
    section = Augment(recipe="pad_crop", **options)
    images = np.stack([picture(32, 28) + i for i in range(20)])
    some = uniforms(0, 0, np.arange(20), draws_of(section))
    for image, row, view in zip(images, some, train_views(images, some, recipe=section, size=32)):
        assert np.array_equal(view, train_view(image, row, recipe=section, size=32).transpose(2, 0, 1))


def test_no_two_parts_share_a_draw_and_earlier_draws_stay():
    parts = [augment._VERTICAL_FLIP, augment._GRAYSCALE, *(
        place for part in (augment._BLUR, augment._AUTO_AUGMENT, augment._AUGMIX)
        for place in range(part.start, part.stop)
    )]  # fmt: skip
    assert parts == list(range(DRAWS, ALL_DRAWS))
    assert np.array_equal(rows(50)[:, :DRAWS], uniforms(0, 0, np.arange(50)))


def test_recipes_without_these_parts_cost_no_draw():
    assert draws_of(Augment(rand_augment={}, color_jitter={}, random_erasing={})) == range(DRAWS)
    for part in (
        {"vertical_flip": 0.1},
        {"grayscale": 0.1},
        {"blur": 0.1},
        {"auto_augment": "3a"},
        {"augmix": {}},
    ):
        assert draws_of(Augment(**part)) == range(ALL_DRAWS)


def test_runs_and_targets_of_versions_without_these_keys_are_the_same(tree):
    before = config.flatten(config.parse(tree, "test"))
    added = {"vertical_flip", "auto_augment", "augmix", "grayscale", "blur"}
    assert not added & {key.removeprefix("data.augment.") for key in before}
    tree["data"]["augment"] = {"vertical_flip": 0.5, "augmix": {}}
    after = config.flatten(config.parse(tree, "test"))
    assert after["data.augment.vertical_flip"] == 0.5
    assert after["data.augment.augmix.width"] == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"vertical_flip": 1.5}, "data.augment.vertical_flip: "),
        ({"auto_augment": "v0"}, "data.augment.auto_augment: "),
        ({"augmix": {"width": 9}}, "data.augment.augmix.width: "),
        ({"augmix": {"alpha": 1}}, "data.augment.augmix: unknown key 'alpha'"),
        (
            {"augmix": {}, "rand_augment": {}},
            "data.augment: rand_augment and augmix exclude each other: keep one of them",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tree, section, message):
    tree["data"]["augment"] = section
    with pytest.raises(UserError) as caught:
        config.parse(tree, "test")
    assert message in str(caught.value)
