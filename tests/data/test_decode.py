"""Decoding: Pillow's pixels of the upright image, whichever path takes them and however few are asked for."""

import contextlib
import io
import os
import re
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps

from indistill.config import Augment, limits
from indistill.data import augment, decode
from indistill.data.decode import BadImage
from indistill.data.shards import ShardSet
from indistill.models.views import EvalView


def picture(height, width):
    """Smooth colours with some noise: what JPEG is for, and no two rows or columns alike."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, 127 + 127 * np.sin(x * y / 500)], axis=2)
    return Image.fromarray(
        (smooth * 0.9 + np.random.RandomState(0).randint(0, 25, smooth.shape)).astype(np.uint8)
    )


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    return block.tobytes()


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def crop(content, *box):
    return np.asarray(decode.decode_crop(content, "here", lambda shape: box))


@pytest.fixture
def without_pillow(monkeypatch):
    """What is left to Pillow fails."""
    monkeypatch.setattr(decode, "_decode_with_pillow", None)


@pytest.fixture
def without_simplejpeg(monkeypatch):
    """What is not left to Pillow fails."""
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", None)


# --- ordinary JPEGs: the fast path --------------------------------------------------------------------------

ORDINARY = {
    **{f"4:{s[0]}:{s[1]}": {"subsampling": f"4:{s[0]}:{s[1]}"} for s in ("44", "22", "20")},
    "quality 100": {"quality": 100, "subsampling": 0},
    "own Huffman tables": {"optimize": True},
    "restart markers": {"restart_marker_rows": 1},
    "progressive": {"progressive": True},
    "a comment that looks like a JPEG": {"comment": encoded(picture(8, 8))},
    "upright by EXIF": {"exif": exif(1)},
}


@pytest.mark.parametrize("options", ORDINARY.values(), ids=ORDINARY)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_crops_of_ordinary_jpegs_are_pillows_pixels(without_pillow, options, mode):
    content = encoded(picture(83, 101).convert(mode), **options)
    whole = by_pillow(content)
    assert np.array_equal(decode.decode(content, "here"), whole)
    for top, left, height, width in [
        (0, 0, 83, 101),
        (0, 0, 1, 1),
        (5, 50, 40, 51),
        (40, 3, 23, 30),
        (82, 100, 1, 1),
    ]:
        found = crop(content, top, left, height, width)
        assert np.array_equal(found, whole[top : top + height, left : left + width])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from(["444", "422", "420", "440", "411"]),
    st.integers(20, 100),
    st.data(),
)  # fmt: skip
def test_any_crop_of_any_subsampling_is_pillows(height, width, subsampling, quality, data):
    pixels = np.ascontiguousarray(picture(height, width))
    content = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=subsampling)
    top = data.draw(st.integers(0, height - 1))
    rows = data.draw(st.integers(1, height - top))
    assert decode._ordinary_jpeg(content) is not None
    assert np.array_equal(crop(content, top, 0, rows, width), by_pillow(content)[top : top + rows])


def test_rows_far_below_the_crop_are_not_decoded(monkeypatch):
    heights = []
    full = simplejpeg.decode_jpeg
    monkeypatch.setattr(
        decode.simplejpeg,
        "decode_jpeg",
        lambda *a, **k: (heights.append(len(full(*a, **k))), full(*a, **k))[1],
    )
    for top, rows in [(0, 10), (300, 50), (390, 10)]:
        crop(encoded(picture(400, 30)), top, 0, rows, 30)
    crop(encoded(picture(400, 30), progressive=True), 0, 0, 10, 30)  # its scans each go over the whole image
    assert heights == [12, 352, 400, 400]


@pytest.mark.parametrize(
    "read", [decode.decode, lambda *a: decode.decode_crop(*a, lambda shape: (0, 0, 1, 1))]
)
def test_a_jpeg_that_was_cut_off_is_refused_wherever_it_was_cut(read):
    content = encoded(picture(64, 48), exif=exif(1))
    for end in range(0, len(content) - 1):
        with pytest.raises(BadImage, match=r"^shard 1: sample n01: not a readable image: .+$"):
            read(content[:end], "shard 1: sample n01")


def test_bytes_after_the_end_do_no_harm():
    content = encoded(picture(30, 40))
    for tail in (b"\0", b"\n", b"\0" * 100, content):
        assert np.array_equal(decode.decode(content + tail, "here"), by_pillow(content))


def test_damaged_jpegs_are_what_pillow_makes_of_them():
    whole = np.frombuffer(encoded(picture(64, 64)), np.uint8)
    random, refused, read = np.random.RandomState(0), 0, 0
    for i in range(400):
        damaged = whole.copy()
        damaged[random.randint(2, len(whole) if i % 2 else 700, 3)] = random.randint(0, 256, 3)
        try:
            expected = by_pillow(damaged.tobytes())
        except Exception:
            refused += 1
            with pytest.raises(BadImage):
                decode.decode(damaged.tobytes(), "here")
        else:
            read += 1
            assert np.array_equal(decode.decode(damaged.tobytes(), "here"), expected)
            if len(expected) > 20:
                assert np.array_equal(crop(damaged.tobytes(), 0, 0, 20, 30), expected[:20, :30])
    assert min(refused, read) > 20


def test_a_jpeg_that_claims_to_be_huge_is_refused(without_simplejpeg):
    content = encoded(picture(30, 40))
    huge = content.replace(bytes([0, 30, 0, 40]), b"\xff\xff\xff\xff")
    assert huge != content
    with pytest.raises(BadImage, match=r"more than data\.max_image_pixels"):
        crop(huge, 0, 0, 10, 10)


# --- all other images: Pillow -------------------------------------------------------------------------------


def grey16():
    return Image.fromarray(np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16))


def with_transparency():
    palette = picture(32, 32).quantize(50)
    return encoded(palette, "PNG", transparency=3)


OTHERS = {
    "PNG": encoded(picture(40, 30), "PNG"),
    "interlaced grey PNG": encoded(picture(40, 30).convert("L"), "PNG"),
    "palette": encoded(picture(40, 30).quantize(64), "PNG"),
    "palette with transparency": with_transparency(),
    "alpha": encoded(picture(40, 30).convert("RGBA"), "PNG"),
    "grey with alpha": encoded(picture(40, 30).convert("LA"), "PNG"),
    "one bit": encoded(picture(40, 30).convert("1"), "PNG"),
    "WebP": encoded(picture(40, 30), "WEBP"),
    "GIF": encoded(picture(40, 30), "GIF"),
    "CMYK": encoded(picture(40, 30).convert("CMYK")),
    "YCCK": simplejpeg.encode_jpeg(np.asarray(picture(40, 30).convert("CMYK")).copy(), colorspace="CMYK"),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_other_images_are_left_to_pillow(without_simplejpeg, content):
    whole = by_pillow(content)
    assert np.array_equal(decode.decode(content, "here"), whole)
    assert np.array_equal(crop(content, 3, 4, 20, 10), whole[3:23, 4:14])


def test_ycck_is_that(without_simplejpeg):
    content = OTHERS["YCCK"]
    adobe = content.index(b"Adobe")
    assert content[adobe + 11] == 2  # the transform that stands for YCCK
    assert Image.open(io.BytesIO(content)).mode == "CMYK"


def test_16_bit_grey_keeps_its_range(without_simplejpeg):
    for kind in ("PNG", "TIFF"):
        expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
        assert np.array_equal(decode.decode(encoded(grey16(), kind), "here"), expected)


@pytest.mark.parametrize("kind", ["int32", "float32"])
def test_grey_of_32_bits_is_read_only_if_it_fits_16(kind):
    grey = np.array([[0, 255 << 8], [65535, 256]], kind)
    content = encoded(Image.fromarray(grey), "TIFF")
    if kind == "int32":
        assert decode.decode(content, "here")[..., 0].tolist() == [[0, 255], [255, 1]]
        for value in (-1, 65536):
            bad = encoded(Image.fromarray(np.where(grey == 256, value, grey).astype(kind)), "TIFF")
            with pytest.raises(decode.BadImage, match=f"here: .*integers from .*{value}"):
                decode.decode(bad, "here")
    else:
        with pytest.raises(decode.BadImage, match=r"here: .*floating-point numbers"):
            decode.decode(content, "here")


# --- orientation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright(kind, orientation):
    content = encoded(picture(40, 60), kind, exif=exif(orientation))
    whole = by_pillow(content)
    assert whole.shape == ((60, 40, 3) if orientation > 4 else (40, 60, 3))
    assert np.array_equal(decode.decode(content, "here"), whole)
    assert np.array_equal(crop(content, 1, 2, 30, 20), whole[1:31, 2:22])


@pytest.mark.parametrize("orientation", [1, 6])
def test_orientation_by_xmp_counts_too(orientation):
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
    content = encoded(picture(40, 60), xmp=xmp)
    whole = by_pillow(content)
    assert whole.shape[0] == {1: 40, 6: 60}[orientation]
    assert np.array_equal(decode.decode(content, "here"), whole)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"", b"nonsense", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x05"])
def test_a_damaged_exif_block_costs_no_image(block):
    content = encoded(picture(40, 60), exif=b"Exif\0\0" + block)
    assert np.array_equal(decode.decode(content, "here"), by_pillow(encoded(picture(40, 60))))


# --- in use -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_a_view_of_a_file_is_the_view_of_its_pixels(recipe):
    section, content = Augment(recipe=recipe), encoded(picture(90, 120))
    for row in augment.uniforms(0, 0, np.arange(30)):
        expected = augment.train_view(by_pillow(content), row, recipe=section, size=32)
        assert np.array_equal(augment.train_view(content, row, recipe=section, size=32), expected)
    view = EvalView("bilinear", 0.875)
    assert np.array_equal(
        augment.eval_view(content, 32, view=view), augment.eval_view(by_pillow(content), 32, view=view)
    )


@pytest.mark.parametrize("recipe", ["none", "pad_crop", "random_resized_crop"])
def test_a_view_of_a_damaged_file_names_it(recipe):
    content, draws = encoded(picture(90, 120))[:-40], augment.uniforms(0, 0, np.array([0]))[0]
    with pytest.raises(BadImage, match=re.escape("a.tar: sample k7: not a readable image: ")):
        augment.train_view(content, draws, recipe=Augment(recipe=recipe), size=32, where="a.tar: sample k7")
    with pytest.raises(BadImage, match=re.escape("a.tar: sample k7: not a readable image: ")):
        augment.eval_view(content, 32, view=EvalView("bilinear", 0.875), where="a.tar: sample k7")


def test_crops_of_photographs_are_pillows_pixels(photographs, tmp_path):
    images = ShardSet(f"{photographs}/*.tar", cache_dir=str(tmp_path))
    draws = augment.uniforms(0, 0, np.arange(len(images)))
    for sample_id in range(0, len(images), 3):
        content = images.read(sample_id).image
        whole = by_pillow(content)
        top, left, height, width = augment._resized_crop_box(whole.shape[:2], draws[sample_id, 3:], Augment())
        assert np.array_equal(
            crop(content, top, left, height, width), whole[top : top + height, left : left + width]
        )


def postscript():
    """An image whose decoding starts Ghostscript in Pillow."""
    return encoded(picture(8, 8), "EPS")


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow looks for `gs` on the PATH; here it is a program that leaves a file behind."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(decode.BadImage, match="not a readable image: none of JPEG, "):
        decode.decode(postscript(), "here")
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(OSError), Image.open(io.BytesIO(postscript())) as opened:
        opened.load()
    assert (tmp_path / "ran").exists()  # without the limit it would


@pytest.mark.parametrize("kind", ["MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_formats_of_photographs_are_decoded(kind):
    content = encoded(picture(8, 8), kind)
    assert np.array_equal(decode.decode(content, "here"), by_pillow(content))


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "JPEG2000", "SGI", "PCX", "DDS", "PDF"])
def test_other_formats_are_refused(kind):
    with pytest.raises(decode.BadImage, match="not a readable image"):
        decode.decode(encoded(picture(16, 16), kind), "here")


# --- what asks for too much ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(kind):
    content = encoded(Image.new("RGB", (40, 30)), kind)
    assert decode.decode(content, "here", max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(
        decode.BadImage, match=r"here: 40 x 30 pixels are more than data.max_image_pixels \(1199\)"
    ):
        decode.decode(content, "here", max_pixels=1199)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_000, 60_000])
def test_the_limit_is_ours_and_not_pillows(side):
    """Pillow would warn above 89 million pixels and refuse above 179 million."""
    content = encoded(Image.new("L", (1, 1)), "PNG")
    size = side.to_bytes(4, "big") * 2
    header = b"IHDR" + size + content[24:29]
    content = content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    with pytest.raises(decode.BadImage, match=f"here: {side} x {side} pixels .* data.max_image_pixels"):
        decode.decode(content, "here", side**2 - 1)


@pytest.mark.parametrize(
    ("scans", "most", "name"),
    [
        (500, 2**32, None),
        (501, 2**32, "MAX_JPEG_SCANS"),
        (100, 25_600, None),
        (100, 25_599, "MAX_SCANNED_PIXELS"),
    ],
)
def test_a_jpeg_of_many_scans(scans, most, name, monkeypatch):
    monkeypatch.setattr(limits, "MAX_SCANNED_PIXELS", most)
    image = Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8))
    content = encoded(image, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    more = scans - content.count(b"\xff\xda")
    many = content[:last] + content[last:-2] * (more + 1) + content[-2:]
    for file in (many, many + b"left over"):  # Pillow's way
        if name is None:
            assert decode.decode(file, "here").shape == (16, 16, 3)
        else:
            with pytest.raises(BadImage, match=rf"here: .* a JPEG of {scans} scans of 16 x 16 .* \({name}\)"):
                decode.decode(file, "here")
