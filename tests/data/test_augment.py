"""Augmentation: views depend only on seed, view and sample, and have the distributions of the recipes."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from indistill.config import Augment, UserError
from indistill.data import augment
from indistill.data.augment import DRAWS, eval_view, train_view, train_views, uniforms
from indistill.data.decode import decode
from indistill.models.views import EvalView

RECIPES = ("none", "pad_crop", "random_resized_crop")


def noise(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def draws(u=0.5, v=0.5, flip=0.9):
    return np.array([u, v, flip] + [0.5] * (DRAWS - 3))


# --- the random numbers -------------------------------------------------------------------------------------


def split_mix(x):
    """SplitMix64 as published (Steele, Lea, Flood 2014), in Python's unbounded integers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_split_mix_has_its_published_first_number():
    assert split_mix(0) == 0xE220A8397B1DCDAF


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=5)
)  # seed, epoch, sample ids
def test_uniforms_are_split_mix_over_the_counters(seed, epoch, ids):
    found = uniforms(seed, epoch, np.array(ids))
    for row, sample in zip(found, ids):
        state = split_mix(split_mix(split_mix(seed) ^ epoch) ^ sample)
        assert row.tolist() == [(split_mix(state ^ position) >> 11) / 2**53 for position in range(DRAWS)]


def test_uniforms_do_not_depend_on_the_batch():
    ids = np.random.RandomState(0).permutation(1000)
    together = uniforms(3, 7, ids)
    pieces = np.concatenate([uniforms(3, 7, piece) for piece in np.split(ids, [1, 33, 500])])
    assert np.array_equal(pieces, together)
    assert np.array_equal(uniforms(3, 7, np.arange(1000))[ids], together)
    for other in (uniforms(4, 7, ids), uniforms(3, 8, ids), uniforms(3, 7, ids + 1000)):
        assert not np.isin(other, together).any()


def test_uniforms_look_uniform():
    sample = uniforms(0, 0, np.arange(50_000))
    assert sample.min() >= 0
    assert sample.max() < 1
    for position in range(DRAWS):
        counts = np.bincount((sample[:, position] * 100).astype(int), minlength=100)
        chi_square = ((counts - 500) ** 2 / 500).sum()  # 99 degrees of freedom
        assert 50 < chi_square < 160


def test_uniforms_are_uncorrelated():
    n = 20_000
    here = uniforms(0, 0, np.arange(n))
    others = {
        "next sample": uniforms(0, 0, np.arange(n) + 1),
        "sample of the next shard": uniforms(0, 0, np.arange(n) + 1024),
        "next epoch": uniforms(0, 1, np.arange(n)),
        "next seed": uniforms(1, 0, np.arange(n)),
    }
    limit = 5 / np.sqrt(n)
    among_positions = np.corrcoef(here.T) - np.eye(DRAWS)
    assert np.abs(among_positions).max() < limit
    for name, other in others.items():
        correlations = np.corrcoef(here.T, other.T)[:DRAWS, DRAWS:]
        assert np.abs(correlations).max() < limit, name


# --- training views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (200, 40), (7, 3)])
def test_a_view_depends_on_image_and_draws_alone(recipe, shape):
    section, image = Augment(recipe=recipe), noise(*shape)
    for row in uniforms(0, 0, np.arange(20)):
        view = train_view(image, row, recipe=section, size=24)
        assert view.shape == (24, 24, 3)
        assert view.dtype == np.uint8
        assert np.array_equal(view, train_view(image.copy(), row.copy(), recipe=section, size=24))
    assert np.array_equal(image, noise(*shape))


@pytest.mark.parametrize("recipe", RECIPES)
def test_flip_mirrors_every_second_view(recipe):
    image, with_flip, without = noise(40, 40), Augment(recipe=recipe), Augment(recipe=recipe, flip=False)
    flipped = 0
    for row in uniforms(0, 0, np.arange(400)):
        plain, view = (
            train_view(image, row, recipe=without, size=32),
            train_view(image, row, recipe=with_flip, size=32),
        )
        flipped += np.array_equal(view, np.flip(plain, axis=1))
        assert np.array_equal(view, plain) or np.array_equal(view, np.flip(plain, axis=1))
    assert 160 < flipped < 240


@pytest.mark.parametrize(("side", "padding", "size"), [(32, 4, 32), (40, 2, 32), (32, 1, 33), (28, 2, 32)])
def test_pad_crop_cuts_windows_of_the_padded_image(side, padding, size):
    image = noise(side, side)
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    places = side + 2 * padding - size + 1
    section = Augment(recipe="pad_crop", padding=padding)
    for top in range(places):
        for left in (0, places // 2, places - 1):
            for part in (0.0, 0.999):  # every place has an equal share of [0, 1)
                view = train_view(
                    image, draws((top + part) / places, (left + part) / places), recipe=section, size=size
                )
                assert np.array_equal(view, padded[top : top + size, left : left + size])


def test_an_image_smaller_than_the_window_is_kept_whole():
    image = noise(10, 10)
    for row in uniforms(0, 0, np.arange(50)):
        view = train_view(image, row, recipe=Augment(recipe="pad_crop", padding=2, flip=False), size=32)
        rows, columns = np.nonzero(view.any(axis=(1, 2)))[0], np.nonzero(view.any(axis=(0, 2)))[0]
        assert np.array_equal(view[rows[0] : rows[0] + 10, columns[0] : columns[0] + 10], image)
        assert view.astype(int).sum() == image.astype(int).sum()


def boxes(height, width, section, count=4000):
    rows = uniforms(0, 0, np.arange(count))[:, 3:]
    return np.array([augment._resized_crop_box((height, width), row, section) for row in rows]).T


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (500, 100)])
def test_resized_crops_are_distributed_as_torchvisions(height, width):
    section = Augment()
    top, left, h, w = boxes(height, width, section)
    assert min(top.min(), left.min()) >= 0
    assert min(h.min(), w.min()) > 0
    assert (top + h).max() <= height
    assert (left + w).max() <= width

    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    get_params = transforms.RandomResizedCrop.get_params
    reference = np.array([get_params(image, section.scale, section.ratio) for _ in range(4000)]).T
    for name, quantity in {
        "area": lambda top, left, h, w: h * w,
        "ratio": lambda top, left, h, w: w / h,
        "top": lambda top, left, h, w: top,
        "left": lambda top, left, h, w: left,
    }.items():
        ours, theirs = np.sort(quantity(top, left, h, w)), np.sort(quantity(*reference))
        grid = np.concatenate([ours, theirs])
        ranks = [np.searchsorted(sample, grid, side="right") / 4000 for sample in (ours, theirs)]
        # Kolmogorov-Smirnov: 0.036 holds in 99 % of equal distributions.
        assert np.abs(ranks[0] - ranks[1]).max() < 0.036, name


def test_resized_crops_keep_to_scale_and_ratio():
    _, _, h, w = boxes(400, 400, Augment(scale=(0.2, 0.5), ratio=(0.5, 2)))
    area, ratio = h * w / 400**2, w / h
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() == pytest.approx(0.5, abs=0.01)
    assert ratio.min() == pytest.approx(0.5, abs=0.02)
    assert ratio.max() == pytest.approx(2, abs=0.05)


def test_where_no_crop_fits_the_centre_is_taken():
    strip = np.zeros((10, 300, 3), dtype=np.uint8)
    strip[:, 143:156] = 255  # what a 4:3 crop of full height sees
    section = Augment(scale=(1, 1), flip=False)
    for row in uniforms(0, 0, np.arange(20)):
        assert train_view(strip, row, recipe=section, size=8).min() == 255


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("options", [{}, {"color_jitter": {}}, {"random_erasing": {"probability": 0.5}}])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [24, 32])
def test_views_of_a_batch_are_those_of_its_images(recipe, size, options, flip):
    section = Augment(recipe=recipe, flip=flip, **options)
    images, rows = np.stack([noise(32, 28, seed) for seed in range(30)]), uniforms(0, 0, np.arange(30))
    views = train_views(images, rows, recipe=section, size=size)
    assert views.flags.c_contiguous
    for image, row, view in zip(images, rows, views):
        assert np.array_equal(view, train_view(image, row, recipe=section, size=size).transpose(2, 0, 1))


# --- evaluation views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [1.0, 0.875, 0.9, 0.95])
@pytest.mark.parametrize(
    "shape", [(375, 500), (500, 375), (333, 501), (32, 32), (64, 47), (40, 200), (37, 36)]
)
@pytest.mark.parametrize("size", [32, 56])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_eval_view_is_torchvisions_resize_and_centre_crop(size, shape, crop, interpolation):
    image = noise(*shape)
    mode = transforms.InterpolationMode(interpolation)
    reference = transforms.Compose([transforms.Resize(int(size / crop), mode), transforms.CenterCrop(size)])
    expected = np.asarray(reference(Image.fromarray(image)))
    assert np.array_equal(eval_view(image, size, view=EvalView(interpolation, crop)), expected)


def test_eval_view_leaves_images_of_the_right_size_alone():
    assert np.array_equal(eval_view(noise(32, 32), 32, view=EvalView("bicubic", 1.0)), noise(32, 32))


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("crop_mode", ["center", "border", "squash"])
def test_a_line_is_resized_without_being_enlarged_as_a_whole(crop_mode, upright, monkeypatch):
    """It would have 44 thousand million pixels; what a centre crop sees of it is its middle."""
    line = np.zeros((1, 1_000_000, 3), dtype=np.uint8)
    line[:, 500_000:] = 255
    sizes = []
    whole = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *a, **k: sizes.append(whole(*a, **k).size) or whole(*a, **k)
    )
    image = line.transpose(1, 0, 2) if upright else line
    view = eval_view(image, 224, view=EvalView("bilinear", 0.875, crop_mode))
    view = view.transpose(1, 0, 2) if upright else view
    assert view.shape == (224, 224, 3)
    row = view[112].mean(1)
    assert row[0] < row[-1]
    if crop_mode == "squash":
        assert row[:100].max() == 0
        assert row[-100:].min() == 255
    assert max(width * height for width, height in sizes) <= 256 * 256 * 64


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (3, 190)])
def test_up_to_the_limit_a_long_image_is_resized_as_a_whole(shape):
    image = noise(*shape)
    expected = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64)])(Image.fromarray(image))
    assert np.array_equal(eval_view(image, 64, view=EvalView("bilinear", 1.0)), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1), (40, 50)])
def test_large_images_are_padded_one_by_one_with_the_same_result(shape, monkeypatch):
    images, rows = np.stack([noise(*shape, seed) for seed in range(4)]), uniforms(0, 0, np.arange(4))
    together = train_views(images, rows, recipe=Augment(recipe="pad_crop"), size=48)
    monkeypatch.setattr(augment, "_LARGE", 0)
    assert np.array_equal(train_views(images, rows, recipe=Augment(recipe="pad_crop"), size=48), together)
    assert together.any()


# --- decoding -----------------------------------------------------------------------------------------------


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode_keeps_rgb_as_it_is():
    for kind in ("PNG", "BMP", "TIFF"):
        assert np.array_equal(decode(encoded(Image.fromarray(noise(5, 7)), kind), "here"), noise(5, 7))
    lossless = encoded(Image.fromarray(noise(5, 7)), "WEBP", lossless=True)
    assert np.array_equal(decode(lossless, "here"), noise(5, 7))


def test_decode_of_grey_repeats_the_channel():
    grey = noise(6, 9)[..., 0]
    for image in (Image.fromarray(grey), Image.merge("LA", [Image.fromarray(grey)] * 2)):
        assert np.array_equal(decode(encoded(image), "here"), np.stack([grey] * 3, axis=2))
    bits = Image.fromarray(grey > 127)
    assert np.array_equal(decode(encoded(bits), "here")[..., 1], np.where(grey > 127, 255, 0))


def test_decode_scales_16_bits_to_8():
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every byte twice
    decoded = decode(encoded(Image.fromarray(grey)), "here")
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, np.stack([np.arange(256).reshape(16, 16)] * 3, axis=2))


def test_decode_of_a_palette_looks_the_colours_up():
    colours = noise(1, 256)[0]
    places = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(places)
    image.putpalette(colours.tobytes())
    for options in ({}, {"transparency": 3}):
        assert np.array_equal(decode(encoded(image, **options), "here"), colours[places])


def test_decode_of_cmyk_and_alpha():
    rgb = np.full((16, 16, 3), (200, 100, 50), dtype=np.uint8)
    cmyk = decode(encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=100), "here")
    assert cmyk.shape == (16, 16, 3)
    assert np.abs(cmyk.astype(int) - rgb).max() <= 3
    with_alpha = np.dstack([rgb, np.full((16, 16), 7, dtype=np.uint8)])
    assert np.array_equal(decode(encoded(Image.fromarray(with_alpha)), "here"), rgb)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        encoded(Image.fromarray(noise(50, 50)), "JPEG")[:500],
        encoded(Image.fromarray(noise(50, 50)), "PNG")[:500],
        encoded(Image.fromarray(noise(50, 50)), "PNG").replace(b"IDAT", b"XDAT"),
    ],
)
def test_what_cannot_be_decoded_is_named(content):
    with pytest.raises(UserError, match=r"^sample n01: not a readable image: .+$") as caught:
        decode(content, "sample n01")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_damaged_bytes_decode_or_are_refused(kind):
    random, whole = (
        np.random.RandomState(0),
        np.frombuffer(encoded(Image.fromarray(noise(40, 50)), kind), np.uint8),
    )
    refused = 0
    for i in range(300):
        damaged = whole.copy()
        # Headers are where readers go astray.
        damaged[random.randint(0, min(len(whole), 200 if i % 2 else len(whole)), 6)] = random.randint(
            0, 256, 6
        )
        try:
            image = decode(damaged.tobytes(), "here")
        except UserError:
            refused += 1
        else:
            assert image.dtype == np.uint8
            assert image.shape[2:] == (3,)
    assert refused > 0
