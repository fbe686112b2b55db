"""`indistill demo`: distil a teacher into a student of a sixteenth of its size, on real images, in minutes.

The images are the 1,797 handwritten digits that ship with scikit-learn, 8x8 greyscale, enlarged to 32x32 RGB.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from indistill.commands.init import recipe_file
from indistill.config import UserError
from indistill.config.extras import need

if TYPE_CHECKING:
    from indistill.config import Config, Model

RECIPE = "digits_demo"
ROOT = Path("runs/demo")
PARTS = ("data", "teacher", "alone", "indistill")  # folders that each demo makes anew
TEST_SAMPLES = 360
# The config without its teacher: plain supervised training.
SUPERVISED = ["teacher=null", "warmup=null", "kd.losses=[{name: ce}]"]

Result = TypeVar("Result")


class Stopwatch:
    """Runs the parts of the demo and records the seconds that each takes."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def run(self, part: str, function: Callable[..., Result], *arguments: Any) -> Result:
        print(f"\n--- {part}", flush=True)
        start = time.perf_counter()
        result = function(*arguments)
        self.seconds[part] = time.perf_counter() - start
        return result


def main() -> None:
    stopwatch = Stopwatch()
    need("demo", "the demo")
    clear()
    print("indistill demo: importing torch, timm and accelerate ...", flush=True)
    from indistill import config
    from indistill.config.run_dir import RunDir
    from indistill.training import loop  # noqa: F401  the slow import, timed on its own

    recipe = recipe_file(RECIPE)
    settings = config.load(recipe)
    assert settings.teacher is not None  # the demo's config has one
    stopwatch.seconds["import"] = stopwatch.elapsed()

    stopwatch.run("pack", pack_digits, ROOT / "data")
    overrides = [
        f"run_dir={ROOT}/teacher",
        f"student.kwargs={settings.teacher.kwargs}",
        "duration=8 epochs",
    ]
    runs = {
        "teacher": config.load(recipe, [*SUPERVISED, *overrides]),
        "student alone": config.load(recipe, [*SUPERVISED, f"run_dir={ROOT}/alone"]),
        "student with InDistill + KD": settings,
    }
    summaries = {name: stopwatch.run(name, train_and_report, run) for name, run in runs.items()}
    print_table(runs, summaries, stopwatch.seconds)
    others = ", ".join(f"{part} {stopwatch.seconds[part]:.0f} s" for part in ("import", "pack"))
    print(f"\nOther parts: {others}; {stopwatch.elapsed():.0f} s in all.")
    report = RunDir.of(settings).report
    print(f"Next, see {report} and `tensorboard --logdir {ROOT}`.")
    print(f"`indistill init {RECIPE}` writes the config of the last run.")


def clear() -> None:
    """Delete what an earlier demo made in ROOT; anything else there stays.

    Raises UserError for runs that no demo made.
    """
    mark = ROOT / "made-by-demo"
    there = [str(ROOT / name) for name in PARTS if (ROOT / name).exists()]
    if there and not mark.exists() and not (ROOT / "data" / "digits-train-000000.tar").exists():
        raise UserError(
            f"{', '.join(there)}: the demo would replace it, but did not make it: move it away, or run the "
            "demo in another folder"
        )
    try:
        ROOT.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise UserError(
            f"{ROOT}: cannot be written: {error.strerror}: run the demo in another folder"
        ) from None
    for name in PARTS:
        shutil.rmtree(ROOT / name, ignore_errors=True)


def train_and_report(settings: Config) -> dict[str, Any]:
    """Train one run, write its report and return its summary."""
    from indistill.commands.report.page import ReportAtEnd
    from indistill.training import loop

    return loop.train(settings, callbacks=[ReportAtEnd()])


def print_table(
    runs: dict[str, Config], summaries: dict[str, dict[str, Any]], seconds: dict[str, float]
) -> None:
    print(f"\n{'':29}{'parameters':>12}{'steps':>8}{'top-1 %':>9}{'mAP % (cosine)':>16}{'seconds':>9}")
    for name, summary in summaries.items():
        student = runs[name].student
        assert student is not None  # each of the demo's runs trains one
        metrics = summary["metrics"]
        print(
            f"{name:29}{parameters(student):12,}{summary['step']:8}{100 * metrics['top1']:9.1f}"
            f"{100 * metrics['map_cosine']:16.1f}{seconds[name]:9.0f}"
        )


def parameters(section: Model) -> int:
    """The number of parameters of a config section's network."""
    from indistill.models import timm_model

    return sum(parameter.numel() for parameter in timm_model.create(section, 10, 32, "student").parameters())


def pack_digits(folder: Path) -> None:
    """Write the digits as WebDataset shards of PNG images: four for training, one for testing."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from indistill.data import packing

    digits = load_digits()
    samples = []
    for i, (grey, label) in enumerate(zip(digits.images, digits.target)):  # [8, 8], 0..16
        small = Image.fromarray((grey * 255 / 16).astype(np.uint8))
        image = small.resize((32, 32), Image.Resampling.BICUBIC).convert("RGB")
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        samples.append((f"{i:04d}", buffer.getvalue(), "png", int(label)))
    # The data set is ordered by writer: split it by a fixed shuffle.
    shuffled = [samples[i] for i in np.random.RandomState(0).permutation(len(samples))]
    train = shuffled[TEST_SAMPLES:]
    test = shuffled[:TEST_SAMPLES]
    packing.pack(train, folder, "digits-train", samples_per_shard=-(-len(train) // 4))
    packing.pack(test, folder, "digits-test", samples_per_shard=TEST_SAMPLES)
    shards = len(list(folder.glob("*.tar")))
    print(f"{len(train)} training and {len(test)} test images in {shards} shards: {folder}")
