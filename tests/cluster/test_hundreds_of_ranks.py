"""512 ranks, one of which is simulated: to it, all others of torch's fake process group compute the same.

What ranks send each other is tested with two to four real ones.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, losses, pack_images, start
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup, FakeStore

from indistill import Callback, config
from indistill.commands.plan import estimate
from indistill.config.files import read_lines
from indistill.data.batch import Batch
from indistill.data.loader import IndexedTraining
from indistill.distributed import preemption
from indistill.distributed.zero import ZeRO
from indistill.losses import pkt, sp
from indistill.losses.gather import gather
from indistill.training import loop

WORLD = 512
SAMPLES, STEPS = 1100, 4
BYTES = 4  # of a float32

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(FakeProcessGroup, "Options", None), "simulate_uniform_ranks"),
    reason="needs a newer torch, whose fake process group fills in what the other ranks send",
)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or importlib.util.find_spec("transformers") is None,
    reason="needs deepspeed and transformers: pip install deepspeed transformers",
)


def on_rank(rank: int, function: Callable, *arguments: Any) -> None:
    """Run `function(*arguments)` on one of the simulated ranks."""
    process = start(_simulated, rank, function, arguments, rank=rank, world=WORLD)
    process.join(timeout=300)
    assert process.exitcode == 0


def _simulated(rank: int, function: Callable, arguments: tuple) -> None:
    options = FakeProcessGroup.Options()
    options.simulate_uniform_ranks = True
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD, pg_options=options)
    new_group = distributed.new_group
    distributed.new_group = lambda *_, backend=None, **keywords: new_group(
        **keywords
    )  # gloo needs the others
    function(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    pack_images(folder, "train", SAMPLES, per_shard=300, seed=1, size=8)
    return folder


@pytest.fixture
def small_tree(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Images of 8 pixels, one for each rank and step; a step for each phase of the warm-up, then KD."""
    vit = {"img_size": 8, "patch_size": 4, "num_heads": 2, "depth": 3}
    tree["data"] = {
        "root": str(folder), "train": "train-*.tar", "num_classes": CLASSES, "image_size": 8, "workers": 0,
        "global_batch": WORLD, "streams": WORLD, "augment": {"recipe": "pad_crop"},
    }  # fmt: skip
    tree["student"] = {"name": "test_vit", "kwargs": vit | {"embed_dim": 128}}
    tree["teacher"] |= {"name": "test_vit", "kwargs": vit | {"embed_dim": 128}}
    tree["warmup"] = {"curriculum": "sequential", "durations": ["1 steps"] * 3}
    tree["kd"]["losses"] = [{"name": "ce"}, {"name": "sp"}]
    tree["duration"] = f"{STEPS + 2} steps"
    return tree


# --- the order ----------------------------------------------------------------------------------------------
def test_the_ranks_share_each_global_batch(small_tree):
    section = config.parse(small_tree, "test").data
    section = section.model_copy(update={"global_batch": 2 * WORLD, "repeats": 1})
    ranks = [IndexedTraining(section, 0, rank=rank, world=WORLD, accumulation=2) for rank in range(WORLD)]
    requests = [list(training._requests(3, 4)) for training in ranks]
    assert {len(of_rank) for of_rank in requests} == {2}
    rows = [request.first_row for of_rank in requests for request in of_rank]
    assert rows == list(range(2 * WORLD))
    ids = np.concatenate([request.ids for of_rank in requests for request in of_rank])
    assert len(np.unique(ids)) == 2 * WORLD
    assert ids.tolist() == ranks[0].order.batch(3, 0, 2 * WORLD).tolist()
    single = IndexedTraining(section, 0, rank=0, world=1, accumulation=1)
    assert ids.tolist() == next(single._requests(3, 4)).ids.tolist()


# --- gathering ----------------------------------------------------------------------------------------------
def compare_gathered(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 7, generator=generator)
    for loss_of in (sp, pkt):
        mine = torch.randn(2, 5, generator=generator, requires_grad=True)
        loss_of(*gather(mine, teacher)).backward()
        everyone = mine.detach().repeat(WORLD, 1).requires_grad_()
        loss = loss_of(everyone, teacher.repeat(WORLD, 1))
        loss.backward()
        # DDP averages the gradients of the ranks, and that of the one loss is their sum.
        expected = WORLD * everyone.grad.view(WORLD, 2, 5)[rank]
        torch.testing.assert_close(mine.grad, expected)
        assert expected.abs().max() > 0


def test_losses_see_the_samples_of_all_ranks():
    on_rank(300, compare_gathered, 300)


# --- a run, its memory and its checkpoints ------------------------------------------------------------------
class Record(Callback):
    """The samples of each step, and what the rank keeps after it."""

    def __init__(self) -> None:
        self.ids: list[list[int]] = []
        self.kept: dict[str, Any] = {}

    def on_step_begin(self, run: Any, phase: Any) -> None:
        if not self.ids:
            run.batches = map(self._noted, run.batches)

    def _noted(self, batch: Batch) -> Batch:
        self.ids.append(batch.ids.tolist())
        return batch

    def on_step(self, run: Any, phase: Any, line: Any) -> None:
        optimizer = run.engine.optimizer_part()["optimizer"]
        states = optimizer if isinstance(optimizer, list) else optimizer["state"].values()
        tensors = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        partitions = run.engine._partitions() if isinstance(run.engine, ZeRO) else []
        self.kept = {
            # Stage 3 keeps a part of each parameter, or nothing between two steps.
            "sizes": [getattr(weight, "ds_numel", weight.numel()) for weight in run.student.parameters()],
            "optimizer state": sum(tensor.nbytes for tensor in tensors if tensor.dim()),
            "ZeRO's own part of the weights": sum(part.nbytes for _, part in partitions),
        }


def train_and_record(tree: dict[str, Any], path: str) -> None:
    """Train until the run is asked to stop, after STEPS steps."""
    record = Record()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(preemption.Preempted):
        patch.setattr(preemption.Agreement, "reached", lambda _, done, __: preemption.settle(done == STEPS))
        loop.train(config.parse(tree, "test"), callbacks=[record])
    Path(path).write_text(json.dumps({"ids": record.ids, **record.kept}))


def trained(tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    on_rank(0, train_and_record, tree, str(tmp_path / "recorded.json"))
    return json.loads((tmp_path / "recorded.json").read_text())


def checkpoint(tree: dict[str, Any]) -> set[str]:
    return {path.name for path in Path(tree["run_dir"], "checkpoints", f"step-{STEPS:08d}").iterdir()}


def test_a_run_under_ddp_goes_on_with_one_rank(small_tree, tmp_path):
    planned = estimate.of_run(config.parse(small_tree, "test"), WORLD).memory["ddp"]
    recorded = trained(small_tree, tmp_path)
    section = config.parse(small_tree, "test").data
    order = IndexedTraining(section, 0, rank=0, world=1, accumulation=1).order
    batches = [order.batch(*divmod(step, SAMPLES // WORLD), WORLD).tolist() for step in range(STEPS)]
    assert recorded["ids"] == [batch[:1] for batch in batches]
    assert BYTES * sum(recorded["sizes"]) == planned["weights"]
    assert recorded["optimizer state"] == planned["optimizer state"] == 2 * planned["weights"]
    assert checkpoint(small_tree) == {
        "manifest.json",
        "model.safetensors",
        "optimizer-00000.pt",
        "state.json",
    }

    loop.train(config.parse(small_tree, "test"))
    history = read_lines(Path(small_tree["run_dir"]) / "history.jsonl")
    assert len(losses(small_tree["run_dir"])) == STEPS + 2
    assert [line["world_size"] for line in history if "world_size" in line] == [WORLD, 1]


@needs_deepspeed
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_zero_gives_each_rank_its_share(small_tree, tmp_path, stage):
    small_tree["engine"] = {"name": "deepspeed", "stage": stage}
    planned = estimate.of_run(config.parse(small_tree, "test"), WORLD).memory[f"ZeRO {stage}"]
    recorded = trained(small_tree, tmp_path)
    sizes = recorded["sizes"]
    shares = [math.ceil(size / WORLD) for size in sizes] if stage == 3 else [sum(sizes) / WORLD]
    for name, copies in {"ZeRO's own part of the weights": 1, "optimizer state": 2}.items():
        assert planned[name] <= recorded[name] <= 1.05 * planned[name]
        assert recorded[name] == pytest.approx(BYTES * copies * sum(shares), rel=0.01)
    assert checkpoint(small_tree) == {
        "manifest.json",
        "model.safetensors",
        "optimizer-00000.pt",
        "state.json",
    }
