"""The guard against steps that are not finite, on a network by itself; and what ranks compare at start."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from indistill.config.ranks import Ranks
from indistill.distributed.accelerator import create_engine
from indistill.training.guard import Buffers, Ema


@pytest.mark.parametrize("keys", [{"foreach": True}, {"fused": True}])
def test_the_scaler_skips_and_scales_by_one(keys):
    """Scaler or optimizer may skip the step: both are noticed, and the factors change no scale."""
    ddp = create_engine(None, "no", ranks=Ranks(), timeout_minutes=30.0)
    accelerator = ddp.accelerator
    assert accelerator.scaler.get_growth_factor() > 1 > accelerator.scaler.get_backoff_factor()
    accelerator.scaler.set_growth_interval(1)  # it grows at each good step
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, **keys)
    network, optimizer, was_skipped = ddp.prepare(network, optimizer)
    for factor in (1.0, torch.nan, torch.inf, 1.0):
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()))
        accelerator.backward(factor * network(torch.ones(1, 2, device=accelerator.device)).sum())
        optimizer.step()
        optimizer.zero_grad()
        assert was_skipped().dtype == torch.bool
        assert was_skipped() == (factor != 1.0)
        assert accelerator.scaler.get_scale() == 1.0
        same = str(before) == str((network.state_dict(), optimizer.state_dict()))
        assert same == (factor != 1.0)


def test_buffers_come_back():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network(torch.rand(2, 3, 8, 8))
    buffers = Buffers(network)
    network(torch.rand(2, 3, 8, 8))
    buffers.keep()
    kept = copy.deepcopy(list(network.buffers()))
    network(torch.full((2, 3, 8, 8), torch.nan))
    assert network[1].running_mean.isnan().all()
    buffers.put_back(torch.tensor(False))
    assert network[1].running_mean.isnan().all()
    buffers.put_back(torch.tensor(True))
    assert all(torch.equal(buffer, value) for buffer, value in zip(network.buffers(), kept, strict=True))
    assert network[1].num_batches_tracked == 2
    Buffers(nn.Linear(2, 2)).keep()  # none at all


def test_the_average_of_a_tensor_that_layers_share():
    shared = nn.Linear(3, 3)
    network = nn.Sequential(shared, nn.BatchNorm1d(3), shared)
    average = Ema(network, 0.75)
    expected = {name: value.double() for name, value in network.state_dict().items()}
    for step in range(1, 4):
        for parameter in network.parameters():
            parameter.data.normal_()
        network(torch.rand(4, 3))
        average.update(network, step, torch.tensor(False))
        for name, value in network.state_dict().items():
            weight = 0.25 if step > 1 and value.is_floating_point() else 1.0
            expected[name] = (1 - weight) * expected[name] + weight * value
            found = average.module.state_dict()[name].double()
            torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
