"""Measure how fast one core reads, decodes and augments images, compared with common loaders.

    OMP_NUM_THREADS=1 python benchmarks/loader.py [--data FOLDER] [--rounds N] [--lite0 FOLDER]

Measures the shards of FOLDER as they are and packed again with `indistill shards pack --resize`; with
--lite0, the folder where the package of imagenette_teacher.py was installed, also the top-1 of that network.
See benchmarks/README.md for the method. Prints its tables and writes them to benchmarks/results/loader.md.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import random
import statistics
import subprocess  # nosec B404  # runs the product's own command
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import simplejpeg
import timm.data
import torch
import webdataset
from imagenette_teacher import WEIGHTS, renamed
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
from indistill.models.views import EvalView

SIZE = 224  # pixels
SMALL_SIZES = (96, 128)  # of progressive resolution
SHORT_SIDES = (320, 256)  # pixels of resized shards
BATCH = 64
SEED = 0
LIBRARIES = ("torch", "torchvision", "timm", "webdataset", "pillow", "simplejpeg", "numpy")
IMAGENET_SAMPLES, IMAGENET_SHARDS = 1_281_167, 1024

Turn = Callable[[], object]
Name = TypeVar("Name")


class Images(NamedTuple):
    """The images of some shards."""

    name: str
    urls: list[str]
    files: list[bytes]
    labels: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="../shared/data/imagenet-sample", help="folder of .tar shards of JPEGs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lite0", type=Path, metavar="FOLDER", help="where EfficientNet-Lite0 was installed")
    arguments = parser.parse_args()
    command = f"python benchmarks/loader.py --data {arguments.data} --rounds {arguments.rounds}"
    command += " --lite0 FOLDER" if arguments.lite0 else ""
    torch.set_num_threads(1)
    random.seed(SEED)
    urls = sorted(str(path) for path in Path(arguments.data).glob("*.tar"))
    if not urls:
        parser.error(f"no .tar in {arguments.data}")
    with tempfile.TemporaryDirectory() as scratch:
        originals = read("originals", urls, Path(scratch))
        resized_sets = [packed(arguments.data, side, Path(scratch)) for side in SHORT_SIDES]
        sets = [originals, *resized_sets]
        parts = [heading("Loader", command, LIBRARIES) + about(sets)]
        for measure in (
            lambda: loaders(sets, Path(scratch), arguments.rounds),
            lambda: fidelity(originals, resized_sets, arguments.lite0),
            lambda: decoders(originals.files, arguments.rounds),
            *(functools.partial(small_views, sets, size, arguments.rounds) for size in SMALL_SIZES),
            lambda: cold_start(originals.files, Path(scratch)),
        ):
            parts.append(measure())
            print(parts[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "loader.md").write_text("\n".join(parts))


def read(name: str, urls: list[str], scratch: Path) -> Images:
    samples = list(shards.ShardSet(urls, cache_dir=str(scratch)).iterate())
    return Images(name, urls, [sample.image for sample in samples], [sample.label for sample in samples])


def packed(source: str, side: int, scratch: Path) -> Images:
    """Pack the images as a user would, with the default quality."""
    folder = scratch / f"resized-{side}"
    command = [sys.executable, "-m", "indistill", "shards", "pack", source, str(folder)]
    subprocess.run(  # nosec B603  # without a shell
        [*command, "--resize", str(side), "--workers", "1"], check=True, stdout=subprocess.DEVNULL
    )
    return read(f"`--resize {side}`", sorted(str(path) for path in folder.glob("*.tar")), scratch)


def about(sets: Sequence[Images]) -> str:
    lines = [f"{len(sets[0].files)} JPEGs, on average:\n"]
    for images in sets:
        kilobytes = np.mean([len(file) for file in images.files]) / 1e3
        megapixels = np.mean([np.prod(Image.open(io.BytesIO(file)).size) for file in images.files]) / 1e6
        lines.append(f"- {images.name}: {kilobytes:.0f} kB and {megapixels:.3f} Mpixel")
    return "\n".join(lines) + "\n"


# --- whole loaders ------------------------------------------------------------------------------------------


def loaders(sets: Sequence[Images], scratch: Path, rounds: int) -> str:
    """Time random resized crops with flips, in batches, without loader workers: the speed of one core."""
    turns: dict[tuple[str, str], Turn] = {}
    for images in sets:
        boxes = random_boxes(images.files)
        crops = [Image.fromarray(exact_crop(file, box)) for file, box in zip(images.files, boxes)]
        of_set: dict[str, Turn] = {
            "**indistill**": indistill_loader(images, scratch),
            "webdataset, Pillow, torchvision v1": webdataset_loader(images.urls, normalised=True),
            "the same up to uint8, not normalised": webdataset_loader(images.urls, normalised=False),
            "timm: `ImageDataset`, `create_transform`, `fast_collate`, to uint8": timm_loader(
                images, scratch
            ),
            "decoding alone, whole images, Pillow": functools.partial(each, pillow, images.files),
            "decoding alone, whole images, simplejpeg": functools.partial(
                each, simplejpeg.decode_jpeg, images.files
            ),
            "resizing alone, Pillow": functools.partial(each, functools.partial(resized, size=SIZE), crops),
        }
        turns |= {(images.name, name): turn for name, turn in of_set.items()}
    seconds = play(turns, rounds)
    parts = ["## Loaders\n"]
    for images in sets:
        ours = seconds[images.name, "**indistill**"]
        rows = []
        for (set_name, name), theirs in seconds.items():
            if set_name == images.name:
                ratios = [statistics.median(map(lambda a, b: a / b, theirs, ours)), min(theirs) / min(ours)]
                rates = [len(images.files) / take(theirs) for take in (statistics.median, min)]
                rows.append([name, *(f"{rate:.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios)])
        columns = ["one core", "images/s, median", "best", "time relative to indistill, median", "best"]
        parts.append(f"### {images.name.capitalize()}\n\n{table(columns, rows)}")
    plain = seconds[sets[0].name, "webdataset, Pillow, torchvision v1"]
    for images in sets:
        ratios = map(lambda a, b: a / b, plain, seconds[images.name, "**indistill**"])
        parts.append(
            f"- indistill on {images.name}: {statistics.median(ratios):.2f} times the speed of the plain "
            "webdataset pipeline on the originals"
        )
    return "\n".join(parts) + "\n"


def each(function: Callable, inputs: Sequence) -> None:
    for one in inputs:
        function(one)


def indistill_loader(images: Images, scratch: Path) -> Turn:
    streams = 8
    section = config.Data(
        train=images.urls, num_classes=1000, image_size=SIZE, global_batch=BATCH, streams=streams, workers=0,
        cache_dir=str(scratch),
    )  # fmt: skip
    training = IndexedTraining(section, SEED, rank=0, world=1, accumulation=1)
    steps = len(images.files) // BATCH
    assert steps * BATCH == len(images.files), "the batch must divide the number of images, for a fair count"
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


def timm_loader(images: Images, scratch: Path) -> Turn:
    folder = scratch / "timm" / images.urls[0].split("/")[-2] / "class"
    folder.mkdir(parents=True)
    for number, file in enumerate(images.files):
        (folder / f"{number}.jpg").write_bytes(file)
    augmentation = timm.data.create_transform(
        SIZE, is_training=True, color_jitter=None, interpolation="bilinear", use_prefetcher=True
    )
    dataset = timm.data.ImageDataset(str(folder.parent), transform=augmentation)
    loader = DataLoader(dataset, BATCH, shuffle=True, collate_fn=timm.data.loader.fast_collate)
    return lambda: check(batch for batch, _ in loader)


def check(batches: Iterator[torch.Tensor]) -> None:
    """Consume the batches, and check their shapes."""
    for images in batches:
        assert images.shape == (BATCH, 3, SIZE, SIZE)


# --- what resizing costs ------------------------------------------------------------------------------------


def fidelity(originals: Images, resized_sets: Sequence[Images], lite0: Path | None) -> str:
    """Compare the views of resized files with those of the originals, and a network's scores on both.

    The ratios are of the images that packing changed; the others are not larger.
    """
    draws = augment.uniforms(SEED, 0, np.arange(len(originals.files)))
    expected = views_of(originals, draws)
    network = load_lite0(lite0) if lite0 else None
    predictions = classify(network, expected[0]) if network else None
    labels = np.array(originals.labels)
    rows = []
    for images in (originals, *resized_sets):
        found = views_of(images, draws)
        changed = [i for i, (a, b) in enumerate(zip(images.files, originals.files)) if a != b]
        row = [images.name, f"{len(changed)}"]
        for ours, theirs in zip(found, expected):
            ratios = [psnr(ours[i], theirs[i]) for i in changed]
            row += [f"{np.mean(ratios):.1f}", f"{min(ratios):.1f}"] if ratios else ["-", "-"]
        if network is not None and predictions is not None:
            chosen = classify(network, found[0])
            row += [f"{100 * (chosen == labels).mean():.2f}", f"{(chosen != predictions).sum()}"]
        rows.append(row)
    columns = [
        "",
        "images changed",
        "PSNR of evaluation views, dB",
        "worst",
        "PSNR of training views, dB",
        "worst",
    ]
    columns += ["top-1 of EfficientNet-Lite0, %", "predictions that change"] if network else []
    return f"## Fidelity\n\n{table(columns, rows)}"


def views_of(images: Images, draws: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The evaluation views of the images, and training views with the same random numbers."""
    view = EvalView("bicubic", 0.875)
    evaluation = [augment.eval_view(file, SIZE, view=view) for file in images.files]
    recipe = config.Augment()
    training = [augment.train_view(f, row, recipe=recipe, size=SIZE) for f, row in zip(images.files, draws)]
    return evaluation, training


def psnr(view: np.ndarray, reference: np.ndarray) -> float:
    """The peak signal-to-noise ratio of uint8 pixels, in dB."""
    return float(10 * np.log10(255**2 / np.mean((view.astype(float) - reference) ** 2)))


def load_lite0(folder: Path) -> torch.nn.Module:
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(renamed(torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)))
    return network.eval()


@torch.inference_mode()
def classify(network: torch.nn.Module, views: list[np.ndarray]) -> np.ndarray:
    """The classes that the network predicts; its mean and standard deviation are 0.5."""
    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    return torch.cat([network(part / 127.5 - 1).argmax(1) for part in images.split(BATCH)]).numpy()


# --- decoding -----------------------------------------------------------------------------------------------


def decoders(files: list[bytes], rounds: int) -> str:
    """Time each way from a file to a uint8 view, with the same crops for all."""
    paths: dict[str, Callable[[bytes, decode.Box], np.ndarray]] = {
        "Pillow, crop, Pillow's resize (torchvision v1)": lambda file, box: pillow_view(pillow(file), box),
        "Pillow with `draft` (scaled DCT), the same": draft_view,
        "`torchvision.io.decode_jpeg`, crop, v2 resize on uint8": torchvision_view,
        "simplejpeg, crop, v2 resize on uint8": v2_view,
        "simplejpeg, crop, Pillow's resize": lambda file, box: cut_and_resized(
            simplejpeg.decode_jpeg(file), box, SIZE
        ),
        "simplejpeg with scaled DCT, the same": functools.partial(scaled_view, size=SIZE),
        "**simplejpeg down to the end of the crop, the same**": functools.partial(exact_view, size=SIZE),
    }
    return f"## Decoding\n\n{compare_paths(paths, files, rounds)}"


def small_views(sets: Sequence[Images], size: int, rounds: int) -> str:
    """Time decoding with a scaled DCT where most crops are twice as large as the view."""
    paths: dict[str, Callable[[bytes, decode.Box], np.ndarray]] = {
        "exact": functools.partial(exact_view, size=size),
        "scaled DCT": functools.partial(scaled_view, size=size),
    }
    parts = [f"## Views of {size} pixels\n"]
    for images in sets:
        share = np.mean([scale_of(box, size) > 1 for box in random_boxes(images.files)])
        parts.append(
            f"{images.name}: {100 * share:.0f} % of the crops are at least twice the view\n\n"
            + compare_paths(paths, images.files, rounds)
        )
    return "\n".join(parts)


def compare_paths(
    paths: dict[str, Callable[[bytes, decode.Box], np.ndarray]], files: list[bytes], rounds: int
) -> str:
    """Time ways from a file and a box to a view, and compare their pixels with those of the first."""
    boxes = random_boxes(files)
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
    return table(columns, rows)


def random_boxes(files: Sequence[bytes]) -> list[decode.Box]:
    """Random resized crops, the same in every call."""
    torch.manual_seed(SEED)
    images = [Image.open(io.BytesIO(file)) for file in files]
    crop = v1.RandomResizedCrop(SIZE)
    return [tuple(crop.get_params(image, crop.scale, crop.ratio)) for image in images]


def pillow(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def pillow_view(image: Image.Image, box: decode.Box) -> np.ndarray:
    top, left, height, width = box
    return np.asarray(v1.functional.resized_crop(image, top, left, height, width, [SIZE, SIZE]))


def exact_crop(file: bytes, box: decode.Box) -> np.ndarray:
    return np.asarray(decode.decode_crop(file, "", lambda shape: box))


def exact_view(file: bytes, box: decode.Box, size: int) -> np.ndarray:
    return np.asarray(resized(decode.decode_crop(file, "", lambda shape: box), size))


def resized(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BILINEAR)


def cut_and_resized(image: np.ndarray, box: decode.Box, size: int) -> np.ndarray:
    return np.asarray(resized(Image.fromarray(np.ascontiguousarray(decode.cut(image, box))), size))


def v2_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = torch.from_numpy(simplejpeg.decode_jpeg(file)).permute(2, 0, 1)
    return v2.resized_crop(image, *box, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()


def scale_of(box: decode.Box, size: int) -> int:
    """Return the largest DCT scale (1, 2, 4 or 8) that leaves at least as many pixels as the view has."""
    return next((scale for scale in (8, 4, 2) if min(box[2:]) >= size * scale), 1)


def draft_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = Image.open(io.BytesIO(file))
    scale = scale_of(box, SIZE)
    image.draft("RGB", (image.width // scale, image.height // scale))
    top, left, height, width = (side / scale for side in box)
    image = image.convert("RGB")
    return np.asarray(
        image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    )


def torchvision_view(file: bytes, box: decode.Box) -> np.ndarray:
    image = decode_jpeg(torch.frombuffer(bytearray(file), dtype=torch.uint8), ImageReadMode.RGB)
    return v2.resized_crop(image, *box, [SIZE, SIZE], antialias=True).permute(1, 2, 0).numpy()


def scaled_view(file: bytes, box: decode.Box, size: int) -> np.ndarray:
    """Decode at a fraction of the size if the crop has the pixels; else as `exact_view`."""
    scale = scale_of(box, size)
    if scale == 1:
        return exact_view(file, box, size)
    height, width, _, _ = simplejpeg.decode_jpeg_header(file)
    image = simplejpeg.decode_jpeg(
        file, min_height=height // scale, min_width=width // scale, min_factor=scale
    )
    top, left, bottom, right = (round(edge / scale) for edge in (*box[:2], box[0] + box[2], box[1] + box[3]))
    return cut_and_resized(image, (top, left, bottom - top, right - left), size)


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


def play(turns: dict[Name, Turn], rounds: int) -> dict[Name, list[float]]:
    """Return the CPU seconds of each turn in each round, after one round to warm up."""
    seconds: dict[Name, list[float]] = {name: [] for name in turns}
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
