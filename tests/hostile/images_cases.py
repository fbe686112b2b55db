"""Images that ask for much more memory or time than their size suggests."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

import numpy as np
from hostile import Case, Inputs
from PIL import Image, PngImagePlugin
from tars import write_tar


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def noise(size: int = 48) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(256, size=(size, size, 3), dtype=np.uint8))


def line(kind: str) -> bytes:
    """An image of one row: resized as a whole for evaluation, it would take gigabytes."""
    return encoded(Image.new("L", (1_000_000 if kind == "PNG" else 65_500, 1)), kind)


@cache
def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated: each takes as long as decoding an image."""
    content = encoded(noise(), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * count + b"\xff\xd9"


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_png(side: int = 60_000) -> bytes:
    """The header of a square image, and the beginning of its rows."""
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_with(kind: bytes, name: bytes) -> bytes:
    """A small PNG with a chunk that grows to 192 MiB when it is inflated."""
    compressor = zlib.compressobj(9)
    bomb = b"".join(compressor.compress(bytes(2**24)) for _ in range(12)) + compressor.flush()
    content = encoded(noise(), "PNG")
    header_end = 8 + 25
    return content[:header_end] + chunk(kind, name + b"\0\0" + bomb) + content[header_end:]


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (300, 300), (i, i, i)) for i in range(20)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@cache
def text_chunks(count: int = 80) -> bytes:
    """A PNG with many texts that each grow to 1 MB, the most that Pillow takes of one."""
    info = PngImagePlugin.PngInfo()
    for i in range(count):
        info.add_text(f"text {i}", "a" * 1_000_000, zip=True)
    return encoded(noise(), "PNG", pnginfo=info)


@cache
def accepted() -> list[tuple[str, bytes]]:
    return [("png", line("PNG")), ("jpg", line("JPEG")), ("png", animated("PNG")), ("webp", animated("WEBP"))]


@cache
def refused() -> list[tuple[str, bytes]]:
    bombs = [png_with(b"zTXt", b"Comment"), png_with(b"iCCP", b"profile"), text_chunks()]
    return [("jpg", scans(5000)), ("png", huge_png()), *[("png", bomb) for bomb in bombs]]


def _shard(inputs: Inputs, images: list[tuple[str, bytes]], name: str = "images") -> str:
    members = []
    for number, (extension, image) in enumerate(images):
        members += [(f"{number:04d}.{extension}", image), (f"{number:04d}.cls", b"1")]
    return write_tar(inputs.folder / f"{name}.tar", members)


def _train(inputs: Inputs, evaluated: list[tuple[str, bytes]], **data) -> list[str]:
    """Train on all of the images, between ordinary ones, and evaluate on some."""
    ordinary = [("jpg", encoded(noise(), "JPEG"))] * 60
    train = _shard(inputs, [*accepted(), *refused(), *ordinary])
    data |= {"train": train, "eval": _shard(inputs, evaluated, "evaluated"), "eval_crop": 0.875}
    return inputs.train(**data, root=None, streams=1, max_bad_fraction=1)


def _stream(inputs: Inputs) -> list[str]:
    recipe = {"recipe": "random_resized_crop"}
    return _train(inputs, accepted(), access="stream", epoch_samples=64, augment=recipe)


def _pack(inputs: Inputs, images: list[tuple[str, bytes]]) -> list[str]:
    destination = str(inputs.folder / "packed")
    return ["shards", "pack", _shard(inputs, images), destination, "--resize", "8", "--workers", "1"]


def _verify(inputs: Inputs) -> list[str]:
    return ["shards", "verify", _shard(inputs, accepted()), "--workers", "1"]


SCANS = "more than 500 .MAX_JPEG_SCANS"
CASES = [
    Case("images, train and evaluate", lambda inputs: _train(inputs, accepted())),
    Case("images, stream", _stream),
    Case("images, verify", _verify),
    Case("images, pack", lambda inputs: _pack(inputs, accepted())),
    Case("images, pack scans", lambda inputs: _pack(inputs, [("jpg", scans(5000))]), error=SCANS),
    Case(
        "images, pack pixels", lambda inputs: _pack(inputs, [("png", huge_png())]), error="max_image_pixels"
    ),
    Case("images, pack text", lambda inputs: _pack(inputs, [("png", text_chunks())]), error="not a readable"),
]
