"""Small data, small runs, and processes that start quickly."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from chains import chain_of
from packaging.version import Version
from PIL import Image

from indistill import config
from indistill.config import runs
from indistill.config.files import read_lines
from indistill.data import packing

if (
    "OMP_NUM_THREADS" not in os.environ
):  # networks are small, and the processes of a test often outnumber the cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of those that are started
    torch.set_num_threads(1)

# Real data beside the repository, if it is there, as for benchmarks/study.py; see `skip_without`.
SHARED = Path(os.environ.get("DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
CLASSES = 10
EPS = torch.finfo(torch.float32).eps  # one operation in float32 is off by at most half of this, relatively
BF16 = torch.finfo(torch.bfloat16).eps
# Losses are logged in float32: rounded on each rank at each micro-batch, summed over these, then their mean
# is taken.
LOGGED = 8 * EPS
# Of timm's resnet10t: ReLU and max-pooling may turn the last bit of a number into another gradient.
SMOOTH = {"act_layer": "silu", "replace_stem_pool": True, "stem_width": 8}


def pack_images(folder: Path, prefix: str, samples: int, per_shard: int, seed: int, size: int = 32) -> None:
    """Images whose label shows: a bright square on noise, at a place that the class decides."""
    random = np.random.RandomState(seed)
    packed = []
    for i in range(samples):
        label = i % CLASSES
        image = random.randint(0, 100, (size, size, 3), dtype=np.uint8)
        y, x = divmod(label, 4)
        image[y * size // 4 : (y + 1) * size // 4, x * size // 4 : (x + 1) * size // 4] += 150
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        packed.append((f"{prefix}{i:04d}", buffer.getvalue(), "png", label))
    packing.pack(packed, folder, prefix, samples_per_shard=per_shard)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 training images in 3 shards, 51 for evaluation: a number that no world size divides."""
    folder = tmp_path_factory.mktemp("data")
    pack_images(folder, "train", samples=192, per_shard=64, seed=1)
    pack_images(folder, "eval", samples=51, per_shard=51, seed=2)
    return folder


def skip_without(path: str, source: str) -> Path:
    """Return a path of the real data; skip the test without it, with a reason that says how to get it."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path} in the folder of the variable DATA (default: ../shared/data): {source}")
    return SHARED / path


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, *-0000.tar and *-0001.tar, of 40 JPEGs each in many sizes; a few are greyscale.

    They are images of ImageNet if these are there, and else have their sizes and kinds of compression.
    """
    real = SHARED / "imagenet-sample"
    if real.is_dir():
        return real
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.RandomState(0)
    for shard in range(2):
        packed = []
        for i in range(40):
            width, height = (int(side) for side in random.randint(70, 520, 2))
            coarse = random.randint(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            grain = random.randint(0, 30, (height, width, 3), dtype=np.uint8)
            pixels = Image.fromarray(np.asarray(smooth) // 2 + grain)
            picture = pixels.convert("L") if i % 13 == 0 else pixels
            buffer = io.BytesIO()
            options = {} if picture.mode == "L" else {"subsampling": ("4:4:4", "4:2:0", "4:2:2")[i % 3]}
            picture.save(buffer, "JPEG", quality=75 + i % 20, progressive=i % 5 == 0, **options)
            packed.append((f"{shard}-{i:04d}", buffer.getvalue(), "jpg", i))
        # The name of a shard ends with its number in this packing.
        packing.pack(packed, folder / str(shard), "photographs", samples_per_shard=40)
        (folder / str(shard) / "photographs-000000.tar").rename(folder / f"photographs-{shard:04d}.tar")
    return folder


newer_timm = pytest.mark.skipif(
    Version(timm.__version__) < Version("1.0.31"),
    reason="needs timm 1.0.31, which describes stages of VGG and DenseNet, and refuses useless layer decay",
)


def data_section(folder: Path) -> dict[str, Any]:
    """Of a config: the images of `data_dir`, 6 steps an epoch."""
    return {
        "root": str(folder),
        "train": "train-*.tar",
        "eval": "eval-*.tar",
        "num_classes": CLASSES,
        "image_size": 32,
        "global_batch": 32,
        "streams": 8,
        "in_memory": True,
        "eval_crop": 1.0,
        "augment": {"recipe": "pad_crop"},
    }


@pytest.fixture
def tree(data_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """A config as a plain tree: three pairs of the small networks, 24 steps, 13 of them warm-up."""
    return {
        "run_dir": str(tmp_path / "run"),
        "duration": "24 steps",
        "data": data_section(data_dir),
        "student": {"name": "cnn32_student"},
        "teacher": {"name": "cnn32_auxiliary", "pretrained": False, "random": True},
        "warmup": {"durations": ["4 steps", "4 steps", "5 steps"], "curriculum": "sequential"},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01},
        "log": {"every_steps": 1},
        "trackers": [],
    }


def use_vits(tree: dict[str, Any]) -> None:
    """Have networks without batch norm, so that a loss does not depend on how the batch is divided."""
    for role, width in (("student", 32), ("teacher", 64)):
        kwargs = {"img_size": 32, "embed_dim": width, "num_heads": 2, "depth": 3}
        tree[role] |= {"name": "test_vit", "kwargs": kwargs}


@pytest.fixture
def settings(tree: dict[str, Any]) -> config.Config:
    return config.parse(tree, "test")


@pytest.fixture
def chain(tree: dict[str, Any]) -> dict[str, Any]:
    """A chain of three stages as a plain tree."""
    return chain_of(tree)


@pytest.fixture
def found(settings: config.Config) -> Any:
    """The estimate of `settings` on two ranks."""
    from indistill.commands.plan import estimate

    return estimate.of_run(settings, world=2)


@pytest.fixture
def config_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    """The tree as a YAML file."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refused(capsys, *arguments: str) -> str:
    """Run a command that has to fail with one line on stderr; return that line."""
    from indistill.commands.cli import main

    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def losses(run_dir: str | Path) -> list[float]:
    """The loss of each logged step of a run."""
    return [line["loss"] for line in read_lines(Path(run_dir) / "metrics.jsonl") if "loss" in line]


def run_each_alone(path: Path, folder: Path) -> None:
    """Train each run of a config file by itself, in `folder`/NAME."""
    from indistill.training.loop import train

    for name, settings in runs.load(path):
        train(config.parse({**settings.model_dump(mode="json"), "run_dir": str(folder / name)}, "test"))


_context = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Have fresh processes start with `modules` imported. Call it at a test module's top level."""
    # torch, timm and accelerate are imported once
    _context.set_forkserver_preload(["indistill.training.loop", *modules])


preload()


def start(function: Callable, *arguments: Any, rank: int | None = None, world: int = 1, port: int = 0):
    """Run `function(*arguments)` in a fresh process; with `rank`, it has a launcher's variables."""
    process = _context.Process(target=_main, args=(function, arguments, rank, world, port, _stacks().name))
    process.start()
    return process


@functools.cache
def _stacks():
    """The file to which a process writes what its threads do when it crashes or SIGABRT ends it."""
    return tempfile.NamedTemporaryFile("r")


def _main(function: Callable, arguments: tuple, rank: int | None, world: int, port: int, stacks: str) -> None:
    faulthandler.enable(open(stacks, "a"))  # noqa: SIM115  (open as long as the process lives)
    # Start loader workers as in a process that a user starts, instead of importing torch anew for each.
    multiprocessing.set_start_method(None, force=True)
    if rank is not None:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
        )  # fmt: skip
    function(*arguments)


def unused_port() -> int:
    """A port for a launcher to bind, a few seconds later.

    It is below those that the kernel gives to connections, of which other tests open hundreds meanwhile.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(function: Callable, world: int | None, *arguments: Any) -> list:
    """A fresh process for each of `world` ranks, or for None a single one that no launcher started."""
    if world is None:
        return [start(function, *arguments)]
    port = unused_port()
    return [start(function, *arguments, rank=rank, world=world, port=port) for rank in range(world)]


def run_ranks(function: Callable, world: int | None, *arguments: Any, exit_code: int = 0) -> None:
    """Run `function(*arguments)` on `world` ranks and require that all of them end with `exit_code`."""
    processes = start_ranks(function, world, *arguments)
    for process in processes:
        process.join(timeout=900)  # compilers take minutes on a busy machine
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
            process.join(timeout=10)
        process.kill()
    assert codes == [exit_code] * len(processes), _stacks().read()


def train_until(tree: dict[str, Any], step: int | None = None, resume: str = "auto") -> None:
    """Train to the end, or be asked to stop after `step` steps: then only their checkpoint is left."""
    from indistill.distributed import preemption
    from indistill.training import loop

    with pytest.MonkeyPatch.context() as patch:
        if step is not None:
            patch.setattr(
                preemption.Agreement, "reached", lambda _, done, __: preemption.settle(done == step)
            )
        with contextlib.suppress(preemption.Preempted):
            loop.train(config.parse(tree, "test"), resume)


# --- two ways that must agree, on any processor -------------------------------------------------------------


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Networks, targets and losses in float64, where rounding is far below any limit of a test."""
    from indistill.models.network import DTYPES

    monkeypatch.setitem(DTYPES, "no", torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_float64(function: Callable, *arguments: Any) -> None:
    """`function(*arguments)` as the fixture has it, in a process of its own: `run_ranks(in_float64, 2,
    function, ...)`.

    For runs, whose steps enlarge rounding by factors that differ between processors. DeepSpeed and autocast
    know no float64: see `run_moved`.
    """
    from indistill.models.network import DTYPES

    DTYPES["no"] = torch.float64
    torch.set_default_dtype(torch.float64)
    function(*arguments)


@torch.no_grad()
def move(tensors: Iterable[torch.Tensor], unit: float, seed: int) -> None:
    """Make each number larger or smaller by a relative `unit`, at random. EPS changes its last bit."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        signs = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
        tensor *= 1 + unit * signs.to(tensor)


def run_moved(run: Callable[[dict[str, Any]], Any], tree: dict[str, Any], unit: float) -> None:
    """Two runs like `run(tree)`, in folders of their own, from weights that are moved.

    How far they stray tells how much this training enlarges rounding by `unit` on this processor: evenly, if
    the networks are SMOOTH.
    """
    from indistill.training import lessons

    networks = lessons.networks
    for seed in range(2):

        def moving_networks(*arguments: Any, seed: int = seed, **keywords: Any) -> tuple[Any, ...]:
            built = networks(*arguments, **keywords)
            move(built.student.parameters(), unit, seed)
            return built

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lessons, "networks", moving_networks)
            run({**tree, "run_dir": f"{tree['run_dir']}-moved{seed}"})


def strayed(losses: Callable[[str], Sequence[float]], run_dir: str) -> np.ndarray:
    """The farthest that `run_moved` strayed from the run in `run_dir` up to each step, relatively."""
    expected, *moved = (np.array(losses(run_dir + suffix)) for suffix in ("", "-moved0", "-moved1"))
    return np.maximum.accumulate(np.max([abs(run / expected - 1) for run in moved], axis=0))


def assert_rounding_explains(ours: Sequence[float], expected: Sequence[float], strayed: np.ndarray) -> None:
    """Each loss is as near to the expected one as a small multiple of what `strayed` at the same step.

    Two moves are not all ways in which rounding may go, and each operation of each step rounds anew.
    """
    assert len(ours) == len(expected)
    off, limits = abs(np.array(ours) / np.array(expected) - 1), 8 * (strayed + LOGGED)
    assert (off <= limits).all(), (off, limits)


def kill_at_checkpoint(function: Callable, tree: dict[str, Any], step: int, world: int | None = None) -> None:
    """Start `function(tree)` on `world` ranks and SIGKILL them as soon as the checkpoint of `step` is there.

    On a machine that looks away for longer than the rest of the run takes, the run may end first: then once
    more.
    """
    run_dir = Path(tree["run_dir"])
    for _ in range(5):
        processes = start_ranks(function, world, tree)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and all(process.is_alive() for process in processes):
            if (run_dir / "checkpoints" / f"step-{step:08d}").exists():
                break
            time.sleep(0.001)
        for process in processes:  # all, before one of them notices that another is gone
            process.kill()
        for process in processes:
            process.join()
        if not (run_dir / "summary.json").exists():
            assert {process.exitcode for process in processes} == {-signal.SIGKILL}
            assert list((run_dir / "checkpoints").glob("step-*"))
            return
        shutil.rmtree(run_dir)
    raise AssertionError("the run always ended before it could be killed")
