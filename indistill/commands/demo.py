"""`make demo`: a teacher's knowledge moves into a student a fiftieth its size, on real images, in minutes.

The images are the 1,797 handwritten digits that ship with scikit-learn, 8x8 grey, enlarged to 32x32 RGB.
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from pathlib import Path

CONFIG = "configs/digits_demo.yaml"
ROOT = Path("runs/demo")
TEST_SAMPLES = 360
# The config without its teacher: plain supervised training.
SUPERVISED = ["teacher=null", "warmup=null", "kd.losses=[{name: ce}]"]


def main() -> None:
    start = time.perf_counter()
    print("indistill demo: importing torch, timm and accelerate ...", flush=True)
    from indistill import config
    from indistill.commands.report.page import ReportAtEnd
    from indistill.config.run_dir import RunDir
    from indistill.models import timm_model
    from indistill.training import loop

    shutil.rmtree(ROOT, ignore_errors=True)
    settings = config.load(CONFIG)
    seconds = {"import": time.perf_counter() - start}

    def timed(part: str, call, *arguments):
        print(f"\n--- {part}", flush=True)
        begin = time.perf_counter()
        result = call(*arguments)
        seconds[part] = time.perf_counter() - begin
        return result

    def train_and_report(settings: config.Config) -> dict:
        return loop.train(settings, callbacks=[ReportAtEnd()])

    timed("pack", pack_digits, ROOT / "data")
    teacher = config.load(
        CONFIG,
        [
            *SUPERVISED,
            f"run_dir={ROOT}/teacher",
            f"student.kwargs={settings.teacher.kwargs}",
            "duration=8 epochs",
        ],
    )
    alone = config.load(CONFIG, [*SUPERVISED, f"run_dir={ROOT}/alone"])
    runs = {
        "teacher": timed("teacher", train_and_report, teacher),
        "student alone": timed("student alone", train_and_report, alone),
        "student with InDistill + KD": timed("student with InDistill + KD", train_and_report, settings),
    }

    parameters = {
        name: sum(p.numel() for p in timm_model.create(section, 10, 32, "student").parameters())
        for name, section in (("teacher", teacher.student), ("student", alone.student))
    }
    print(f"\n{'':29}{'parameters':>12}{'steps':>8}{'top-1 %':>9}{'mAP % (cosine)':>16}{'seconds':>9}")
    for name, summary in runs.items():
        count, metrics = parameters["teacher" if name == "teacher" else "student"], summary["metrics"]
        print(
            f"{name:29}{count:12,}{summary['step']:8}{100 * metrics['top1']:9.1f}{100 * metrics['map_cosine']:16.1f}"
            f"{seconds[name]:9.0f}"
        )
    other = ", ".join(f"{part} {seconds[part]:.0f} s" for part in ("import", "pack"))
    print(f"\nOther parts: {other}; {time.perf_counter() - start:.0f} s in all.")
    print(
        f"Look next at {RunDir.of(settings).report}, `tensorboard --logdir {ROOT}`, {CONFIG} and README.md."
    )


def pack_digits(folder: Path) -> None:
    """Write the digits as WebDataset shards of PNG images: four for training, one for testing."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    from indistill.data import packing

    digits = load_digits()
    samples = []
    for i, (grey, label) in enumerate(zip(digits.images, digits.target)):  # [8, 8], 0..16
        image = (
            Image.fromarray((grey * 255 / 16).astype(np.uint8)).resize((32, 32), Image.BICUBIC).convert("RGB")
        )
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        samples.append((f"{i:04d}", buffer.getvalue(), "png", int(label)))
    # The set comes writer by writer: split it by a fixed shuffle.
    shuffled = [samples[i] for i in np.random.RandomState(0).permutation(len(samples))]
    train, test = shuffled[TEST_SAMPLES:], shuffled[:TEST_SAMPLES]
    packing.pack(train, folder, "digits-train", samples_per_shard=-(-len(train) // 4))
    packing.pack(test, folder, "digits-test", samples_per_shard=TEST_SAMPLES)
    print(
        f"{len(train)} training and {len(test)} test images in {len(list(folder.glob('*.tar')))} shards: {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
