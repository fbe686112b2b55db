"""Shards and images for tests."""

import io
import tarfile

import numpy as np
from PIL import Image

from indistill.data.samples import IMAGE_EXTENSIONS
from indistill.data.shards import Sample


def samples(count, seed=0, first=0):
    """Return samples of varied sizes. The content need not be an image, because shards never decode it."""
    random = np.random.RandomState(seed)
    return [
        (f"{first + i:05d}", random.bytes(random.randint(1, 3000)), IMAGE_EXTENSIONS[i % 4], int(i * 7 % 10))
        for i in range(count)
    ]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def expected(packed):
    return [Sample(key, image, label) for key, image, _, label in packed]


def webdataset_samples(paths):
    """Read the same shards with the webdataset package."""
    import webdataset

    for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False):
        extension = next(name for name in sample if name in IMAGE_EXTENSIONS)
        yield Sample(sample["__key__"], sample[extension], int(sample.get("cls", b"-1")))


def picture(seed, extension="jpg", size=(24, 16)):
    content = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return content.getvalue()


def folder(path, classes=("cat", "ant", "bee"), each=7):
    """Write an image folder; return {file content: label}."""
    content = {}
    for label, name in enumerate(sorted(classes)):
        (path / name / "more").mkdir(parents=True)
        for i in range(each):
            extension = ("jpg", "png", "webp")[i % 3]
            image = picture(100 * label + i, extension)
            (path / name / ("more" if i % 2 else "") / f"im.{i}.{extension.upper()}").write_bytes(image)
            content[image] = label
    (path / "cat" / "notes.txt").write_text("no image")
    return content


def tree(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}
