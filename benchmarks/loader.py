"""Measure how fast one core reads, decodes and augments images, compared with common loaders.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--data ../shared/data/imagenet-sample]

See benchmarks/README.md for the method. Prints its tables and writes them to benchmarks/results/loader.md.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import timm.data
import torch
import webdataset
from PIL import Image
from report import RESULTS, heading, table
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as v2

from indistill import config
from indistill.data import augment, decode, shards
from indistill.data.index import _save_index, make_index
from indistill.data.loader import IndexedTraining

SIZE = 224  # pixels
BATCH = 64
SEED = 0
LIBRARIES = ("torch", "torchvision", "timm", "webdataset", "pillow", "simplejpeg", "numpy")
IMAGENET_SAMPLES, IMAGENET_SHARDS = 1_281_167, 1024

Turn = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="../shared/data/imagenet-sample", help="folder of .tar shards of JPEGs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    command = f"python benchmarks/loader.py --data {arguments.data} --rounds {arguments.rounds}"
    torch.set_num_threads(1)
    random.seed(SEED)
    urls = sorted(str(path) for path in Path(arguments.data).glob("*.tar"))
    if not urls:
        parser.error(f"no .tar in {arguments.data}")
    with tempfile.TemporaryDirectory() as scratch:
        files = [sample.image for sample in shards.ShardSet(urls, cache_dir=scratch).iterate()]
        parts = [
            heading("Loader", command, LIBRARIES) + about(files),
            loaders(urls, files, Path(scratch), arguments.rounds),
            decoders(files, arguments.rounds),
            cold_start(files, Path(scratch)),
        ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loader.md").write_text("\n".join(parts))
    print("\n".join(parts))


def about(files: list[bytes]) -> str:
    kilobytes = np.mean([len(file) for file in files]) / 1e3
    megapixels = np.mean([np.prod(Image.open(io.BytesIO(file)).size) for file in files]) / 1e6
    return f"{len(files)} JPEGs, on average {kilobytes:.0f} kB and {megapixels:.2f} Mpixel.\n"


# --- whole loaders ------------------------------------------------------------------------------------------


def loaders(urls: list[str], files: list[bytes], scratch: Path, rounds: int) -> str:
    """Time random resized crops with flips, in batches, without loader workers: the speed of one core."""
    turns = {
        "**indistill**": indistill_loader(urls, len(files), scratch),
        "webdataset, Pillow, torchvision v1": webdataset_loader(urls, normalised=True),
        "the same up to uint8, not normalised": webdataset_loader(urls, normalised=False),
        "timm: `ImageDataset`, `create_transform`, `fast_collate`, to uint8": timm_loader(files, scratch),
        "decoding alone, whole images, Pillow": lambda: [pillow(file) for file in files],
        "decoding alone, whole images, simplejpeg": lambda: [simplejpeg.decode_jpeg(file) for file in files],
    }
    seconds = play(turns, rounds)
    ours = seconds["**indistill**"]
    rows = []
    for name, theirs in seconds.items():
        ratios = [statistics.median(map(lambda a, b: a / b, theirs, ours)), min(theirs) / min(ours)]
        rates = [len(files) / statistics.median(theirs), len(files) / min(theirs)]
        rows.append([name, *(f"{rate:.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios)])
    columns = ["one core", "images/s, median", "best", "time relative to indistill, median", "best"]
    return f"## Loaders\n\n{table(columns, rows)}"


def indistill_loader(urls: list[str], samples: int, scratch: Path) -> Turn:
    streams = 8
    section = config.Data(
        train=urls, num_classes=1000, image_size=SIZE, global_batch=BATCH, streams=streams, workers=0,
        cache_dir=str(scratch),
    )  # fmt: skip
    training = IndexedTraining(section, SEED, rank=0, world=1, accumulation=1)
    steps = samples // BATCH
    assert steps * BATCH == samples, "the batch must divide the number of images, for a fair count"
    epochs = iter(range(10**6))

    def turn() -> None:
        first = next(epochs) * steps
        check(batch.images for batch in training.loader(first, first + steps, torch.device("cpu")))

    return turn


def webdataset_loader(urls: list[str], normalised: bool) -> Turn:
    tensor = [v1.ToTensor(), v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augmentation = v1.Compose(
        [
            v1.RandomResizedCrop(SIZE),
            v1.RandomHorizontalFlip(),
            *(tensor if normalised else [v1.PILToTensor()]),
        ]
    )
    pipeline = (
        webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
    )
    pipeline = pipeline.map_tuple(augmentation, int).batched(BATCH)
    return lambda: check(images for images, _ in DataLoader(pipeline, batch_size=None))


def timm_loader(files: list[bytes], scratch: Path) -> Turn:
    folder = scratch / "timm" / "class"
    folder.mkdir(parents=True)
    for number, file in enumerate(files):
        (folder / f"{number}.jpg").write_bytes(file)
    augmentation = timm.data.create_transform(
        SIZE, is_training=True, color_jitter=None, interpolation="bilinear", use_prefetcher=True
    )
    dataset = timm.data.ImageDataset(str(folder.parent), transform=augmentation)
    loader = DataLoader(dataset, BATCH, shuffle=True, collate_fn=timm.data.loader.fast_collate)
    return lambda: check(images for images, _ in loader)


def check(batches: Iterator[torch.Tensor]) -> None:
    """Consume the batches, and check their shapes."""
    for images in batches:
        assert images.shape == (BATCH, 3, SIZE, SIZE)


# --- decoding -----------------------------------------------------------------------------------------------


def decoders(files: list[bytes], rounds: int) -> str:
    """Time each way from a file to a uint8 view, with the same crops for all."""
    draws = augment.uniforms(SEED, 0, np.arange(len(files)))
    shapes = [decode.decode(file, "").shape[:2] for file in files]
    recipe = config.Augment(flip=False)
    boxes = [augment._resized_crop_box(shape, row[3:], recipe) for shape, row in zip(shapes, draws)]
    paths: dict[str, Callable[[bytes, decode.Box], np.ndarray]] = {
        "Pillow, crop, Pillow's resize (torchvision v1)": lambda file, box: pillow_view(pillow(file), box),
        "Pillow with `draft` (scaled DCT), the same": draft_view,
        "`torchvision.io.decode_jpeg`, crop, v2 resize on uint8": torchvision_view,
        "simplejpeg, crop, v2 resize on uint8": v2_view,
        "simplejpeg, crop, Pillow's resize": lambda file, box: resized(simplejpeg.decode_jpeg(file), box),
        "simplejpeg with scaled DCT, the same": scaled_view,
        "**simplejpeg down to the end of the crop, the same**": lambda file, box: resized(
            decode.decode_crop(file, "", lambda shape: box), (0, 0, *box[2:])
        ),
    }
    turns = {
        name: functools.partial(lambda path: [path(file, box) for file, box in zip(files, boxes)], path)
        for name, path in paths.items()
    }
    seconds = play(turns, rounds)
    reference = [path(file, box) for path in list(paths.values())[:1] for file, box in zip(files, boxes)]
    rows = []
    for name, path in paths.items():
        errors = [
            np.abs(path(f, box) - view.astype(int)).mean() for f, box, view in zip(files, boxes, reference)
        ]
        milliseconds = [1e3 / len(files) * take(seconds[name]) for take in (statistics.median, min)]
        rows.append(
            [name, *(f"{ms:.2f}" for ms in milliseconds), f"{np.mean(errors):.2f}", f"{max(errors):.1f}"]
        )
    columns = [
        "file to uint8 view",
        "ms an image, median",
        "best",
        "mean difference to the first",
        "worst image",
    ]
    return f"## Decoding\n\n{table(columns, rows)}"


def pillow(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def pillow_view(image: Image.Image, box: decode.Box) -> np.ndarray:
    top, left, height, width = box
    return np.asarray(v1.functional.resized_crop(image, top, left, height, width, [SIZE, SIZE]))


def resized(image: np.ndarray, box: decode.Box) -> np.ndarray:
    return augment._resize(decode.cut(image, box), SIZE, Image.Resampling.BILINEAR)


def v2_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1)
    return v2.resized_crop(image, *box, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()


def scale_of(box: decode.Box) -> int:
    """Return the largest DCT scale (1, 2, 4 or 8) that leaves at least as many pixels as the view has."""
    return next((scale for scale in (8, 4, 2) if min(box[2:]) >= SIZE * scale), 1)


def draft_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    scale = scale_of(box)
    image.draft("RGB", (image.width // scale, image.height // scale))
    top, left, height, width = (side / scale for side in box)
    image = image.convert("RGB")
    return np.asarray(
        image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    )


def torchvision_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)
    return v2.resized_crop(image, *box, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()


def scaled_view(file: bytes, box: decode.Box) -> np.ndarray:
    height, width, _, _ = simplejpeg.decode_jpeg_header(file)
    scale = scale_of(box)
    image = simplejpeg.decode_jpeg(
        file, min_height=height // scale, min_width=width // scale, min_factor=scale
    )
    top, left, bottom, right = (round(edge / scale) for edge in (*box[:2], box[0] + box[2], box[1] + box[3]))
    return resized(image, (top, left, bottom - top, right - left))


# --- opening at any step ------------------------------------------------------------------------------------


def cold_start(files: list[bytes], scratch: Path, repeats: int = 3) -> str:
    """Time the first batch from an index of ImageNet's size, whose samples are all the same few images."""
    section = simulated_imagenet(scratch / "simulated")
    rows = []
    for step in (0, 1_000, 10_000_000):
        opening, first_batch = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            training = IndexedTraining(section, SEED, rank=0, world=8, accumulation=1)
            opened = time.perf_counter()
            training.dataset.shards.read = lambda i: shards.Sample("", files[i % len(files)], i % 1000)
            images = next(iter(training.loader(step, step + 100, torch.device("cpu")))).images
            first_batch.append(time.perf_counter() - opened)
            opening.append(opened - start)
            assert images.shape == (128, 3, SIZE, SIZE)
        medians = [statistics.median(opening), statistics.median(first_batch)]
        rows.append([f"{step:,}", *(f"{seconds:.2f}" for seconds in (*medians, sum(medians)))])
    columns = [
        "first step",
        "opening 1,024 indices, s",
        "loader to first batch of 128 (no workers), s",
        "sum, s",
    ]
    return (
        f"## Cold start at a step\n\n{IMAGENET_SAMPLES:,} samples in {IMAGENET_SHARDS:,} shards, "
        f"global batch 1,024, rank 0 of 8, medians of {repeats}.\n\n{table(columns, rows)}"
    )


def simulated_imagenet(folder: Path) -> config.Data:
    """Write 1,024 indices, with sparse files as shards; return the config section that reads them."""
    folder.mkdir()
    bounds = np.linspace(0, IMAGENET_SAMPLES, IMAGENET_SHARDS + 1).astype(int)
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        path = folder / f"{number:04d}.tar"
        size = 112_000 * int(end - begin)  # bytes
        with open(path, "wb") as stream:
            stream.truncate(size)
        rows = np.arange(end - begin)
        keys = [f"n{begin + row:08d}_{row:05d}" for row in rows]
        _save_index(
            f"{path}.index.json",
            make_index(
                size, keys, offsets=512 + 112_000 * rows, sizes=110_000 + rows % 999, labels=rows % 1000
            ),
        )
    return config.Data(
        train=f"{folder}/*.tar", num_classes=1000, image_size=SIZE, global_batch=1024, workers=0
    )


# --- measuring ----------------------------------------------------------------------------------------------


def play(turns: dict[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each turn in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}", file=sys.stderr)
        for name in random.sample(list(turns), len(turns)):  # nosec B311  # the order of measurements is no secret
            begin = time.process_time()
            turns[name]()
            if number:
                seconds[name].append(time.process_time() - begin)
    return seconds


if __name__ == "__main__":
    main()
