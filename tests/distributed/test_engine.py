"""What ZeRO needs of us, without DeepSpeed; with it: cluster/test_zero.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from indistill import config
from indistill.curriculum import Timetable
from indistill.distributed import zero
from indistill.training import optim


def test_unused_parameters_get_no_step(tree):
    """The groups are split; then a gradient of zero, as under ZeRO, moves nothing and counts no step."""
    settings = config.parse(tree | {"optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.5}}, "test")
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    timetable = Timetable.of(settings, steps_per_epoch=5, pairs=3)
    optimizer = optim.create(network, settings.optimizer)
    deep = set(network[1].parameters())
    phase_optim = optim.PhaseOptim(
        optimizer, settings, timetable, {(0,): deep, (1,): deep, (2,): deep, (): set()}
    )
    assert sorted(len(group["params"]) for group in optimizer.param_groups) == [1, 1, 1, 1]

    def step(at):
        phase_optim.begin_step(at, timetable.curriculum.at(at))
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    before = [parameter.detach().clone() for parameter in network.parameters()]
    step(0)
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters())]
    assert moved == [True, False, False, False]  # a weight decays, a bias does not
    assert not any(parameter in optimizer.state for parameter in deep)
    step(20)
    assert {optimizer.state[parameter]["step"].item() for parameter in deep} == {1.0}
    assert optimizer.state[network[0].weight]["step"].item() == 2.0


@pytest.mark.parametrize("each", [False, True])
def test_repartition(each):
    """From any number of ranks to any other: the parts that the other number would have had."""
    wholes = [torch.arange(1.0, size + 1) + 100 * size for size in (7, 1, 12, 5)]

    def parts(world):
        if each:
            cut = [list(torch.cat([x, torch.zeros(-len(x) % world)]).view(world, -1)) for x in wholes]
            return [torch.cat(pieces) for pieces in zip(*cut)]
        flat = torch.cat(wholes)
        return list(torch.cat([flat, torch.zeros(-len(flat) % (2 * world))]).view(world, -1))

    sizes = [len(x) for x in wholes]
    for old in (1, 2, 3, 8, 512):
        for new in (1, 2, 4, 5, *([512] if old in (1, 8) else [])):
            saved = parts(old)
            found = [zero.repartition(saved, sizes, each=each, rank=rank, world=new) for rank in range(new)]
            assert all(torch.equal(a, b) for a, b in zip(found, parts(new)))
