"""Losses that compare the samples of a batch do not depend on the number of ranks that share it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LOGGED, in_float64, run_ranks, use_vits
from torch import Tensor, nn

from indistill import config, losses
from indistill.config.files import read_lines
from indistill.curriculum import Phase
from indistill.losses import gather as losses_gather
from indistill.losses.gather import gather
from indistill.losses.objective import Objective
from indistill.models.outputs import Output, Targets
from indistill.training import loop

BATCH = 16
LABELS = torch.arange(BATCH) % 5


def crd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = (nn.functional.normalize(x, dim=1) for x in (student, teacher[:, :4]))
    return losses.crd(student, teacher, 0.07, labels)


LOSSES = {
    "dist": lambda student, teacher, _: losses.dist(student, teacher[:, :4]),
    "pkt": lambda student, teacher, _: losses.pkt(student, teacher),
    "pkt scaled": lambda student, teacher, _: losses.pkt(student, teacher, scale="batch"),
    "sp": lambda student, teacher, _: losses.sp(student, teacher),
    "rkd": lambda student, teacher, _: losses.rkd(student, teacher),
    "crd": crd,
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(folder: str, scope: str) -> None:
    """Compute each loss on this rank's part of a batch under DDP; save the loss and averaged gradients."""
    import accelerate

    accelerator = accelerate.Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = slice(BATCH * rank // world, BATCH * (rank + 1) // world)
    images, teacher = random(BATCH, 6, seed=1)[mine], random(BATCH, 7, seed=2)[mine]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    wrapped = accelerator.prepare_model(net)
    results = {}
    for name, loss_of in LOSSES.items():
        net.zero_grad()
        loss = loss_of(*gather(wrapped(images), teacher, LABELS[mine], scope=scope))
        accelerator.backward(loss)
        results[name] = [loss.detach(), *(parameter.grad.clone() for parameter in net.parameters())]
    torch.save(results, Path(folder) / f"{world}-{rank}.pt")


@pytest.mark.portable
@pytest.mark.parametrize("scope", ["global", "auto"])
def test_loss_and_gradient_do_not_depend_on_the_number_of_ranks(tmp_path, scope):
    for world in (1, 2, 4):
        run_ranks(in_float64, world, gradients, str(tmp_path), scope)
    expected = torch.load(tmp_path / "1-0.pt")
    for world in (2, 4):
        for rank in range(world):
            results = torch.load(tmp_path / f"{world}-{rank}.pt")
            for name in LOSSES:
                assert results[name][0].item() == pytest.approx(expected[name][0].item(), rel=1e-10)
                largest = max(gradient.abs().max().item() for gradient in expected[name][1:])
                assert largest > 1e-4
                for ours, one in zip(results[name][1:], expected[name][1:]):
                    assert torch.allclose(ours, one, rtol=0, atol=1e-10 * largest), (name, world)


def test_local_scope_compares_each_ranks_own(tmp_path):
    for world in (1, 2):
        run_ranks(gradients, world, str(tmp_path), "local")
    one, two = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt"))
    assert not torch.isclose(one["sp"][0], two["sp"][0], rtol=1e-3)


def scaled_terms(folder: str) -> None:
    """Compute pkt and information_flow on this rank's part of a batch, with and without scale."""
    import accelerate

    accelerator = accelerate.Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = slice(BATCH * rank // world, BATCH * (rank + 1) // world)
    output = Output((random(BATCH, 3, 2, 2, seed=1)[mine],), random(BATCH, 6, seed=2)[mine])
    targets = Targets((random(BATCH, 4, 2, 2, seed=3)[mine],), random(BATCH, 7, seed=4)[mine])
    phase = Phase("kd", 1, (), (), 0, None)
    results = {}
    for scope in ("global", "auto", "local"):
        for name in ("pkt", "information_flow"):
            for scale in ("none", "batch"):
                section = config.KD(losses=[{"name": name, "scale": scale}])
                objective = Objective(section.losses, steps_per_epoch=1, scope=scope)
                total, _ = objective(output, targets, labels=LABELS[mine], phase=phase, step=0)
                results[scope, name, scale] = total.item()
    torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.mark.portable
def test_scale_batch_counts_the_samples_of_all_ranks_that_were_gathered(tmp_path):
    run_ranks(in_float64, 2, scaled_terms, str(tmp_path))
    for rank in (0, 1):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name in ("pkt", "information_flow"):
            for scope, batch in (("global", BATCH), ("auto", BATCH), ("local", BATCH // 2)):
                expected = batch * results[scope, name, "none"]
                assert results[scope, name, "batch"] == pytest.approx(expected, rel=1e-10)


def gathered_rows(folder: str) -> None:
    import accelerate

    rank = accelerate.Accelerator().process_index
    cases = [("fits", 4 * 6, 6, 2), ("wide", 4 * 6 - 1, 6, 2), ("pairs", 15, 1, 2), ("triplets", 63, 1, 3)]
    for name, limit, width, related in cases:
        losses_gather.MAX_ELEMENTS = limit
        (rows,) = gather(torch.full((2, width), float(rank)), scope="auto", related=related)
        (Path(folder) / f"{name}-{rank}").write_text(str(len(rows)))


def test_auto_gathers_while_neither_rows_nor_relations_are_many(tmp_path):
    run_ranks(gathered_rows, 2, str(tmp_path))
    for rank in (0, 1):
        lengths = {
            name: int((tmp_path / f"{name}-{rank}").read_text())
            for name in ("fits", "wide", "pairs", "triplets")
        }
        assert lengths == {"fits": 4, "wide": 2, "pairs": 2, "triplets": 2}


def run(tree: dict[str, Any]) -> None:
    loop.train(config.parse(tree, "test"))


@pytest.mark.portable
def test_a_run_with_every_loss_is_the_same_on_two_ranks(tree, tmp_path):
    """A config with trained layers and all relational losses, without batch norm, so that ranks can agree."""
    use_vits(tree)
    tree["warmup"] = {
        "curriculum": "sequential",
        "pairs": [[0, 0], [1, 1], [2, 2]],
        "durations": ["2 steps", "2 steps", "2 steps"],
    }
    names = ["ce", "kd", "dist", "dkd", "pkt", "information_flow", "rkd", "crd", "sp", "at", "hint", "vid"]
    tree["kd"] = {"losses": [{"name": name, "weight": 0.1} for name in names], "pairs": [[0, 0], [2, 2]]}
    tree["duration"] = "12 steps"
    tree["clip_grad_norm"] = 1.0
    lines = []
    for world in (1, 2):
        started = {**copy.deepcopy(tree), "run_dir": str(tmp_path / f"run{world}")}
        run_ranks(in_float64, world, run, started)
        lines.append([x for x in read_lines(Path(started["run_dir"]) / "metrics.jsonl") if "loss" in x])
    assert len(lines[0]) == 12
    assert {"hint", "vid", "crd", "information_flow"} <= lines[0][-1].keys()
    for one, two in zip(*lines):
        for name in {"loss", *names} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=LOGGED), (name, one["step"])
