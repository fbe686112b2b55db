"""Run a frozen network in another precision, keep its weights in that precision, or shard them."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from indistill.config import UserError
from indistill.models.network import DTYPES, Network
from indistill.models.stages import find_stages


def run_in(network: Network, precision: str) -> None:
    """Make a frozen network run under autocast in `precision` (no: float32), not the caller's autocast."""
    autocast = torch.autocast(network.mean.device.type, DTYPES[precision], enabled=precision != "no")
    for method in ("forward", "maps"):
        setattr(network, method, autocast(getattr(network, method)))


def hold(network: Network, precision: str) -> None:
    """Convert the weights that autocast would convert in every pass to its precision, in place.

    The outputs are the same, bit for bit: a layer that does more with its weights than multiply by them
    (NFNet's, which standardises them) is left as it is.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(DTYPES[precision])


def shard(network: Network, device: torch.device, input_size: tuple[int, int, int]) -> None:
    """Shard a frozen network's parameters over all ranks (FSDP2), in place.

    The outputs are the same, bit for bit. The parameters of a block are gathered for its forward pass and
    freed after it; those outside any block are gathered while `forward` or `maps` of the network runs. Only
    these two methods may be called from now on: on all ranks, equally often and equally deep, without
    gradients. The network may be on the CPU: it is moved to the device block by block. Raises UserError for a
    network that calls parts of a block instead of the block.
    """
    network.to(memory_format=torch.contiguous_format)  # FSDP accepts no other
    world = torch.distributed.group.WORLD
    assert world is not None  # callers shard only where several processes run
    mesh = DeviceMesh.from_group(world, device.type)
    scalars = {parameter for parameter in network.parameters() if parameter.dim() == 0}  # FSDP accepts none
    for part in [*_blocks(network.net), network]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    register_fsdp_forward_method(network, "maps")
    network.to(device)  # scalars
    images = torch.zeros(1, *input_size, device=device)
    try:
        with torch.no_grad():
            network.maps(images, [stage.index for stage in find_stages(network.net)])
            network(images)
    except RuntimeError as error:  # of operators on parameters that were not gathered
        if "DTensor" not in str(error):
            raise
        name = type(network.net).__name__
        raise UserError(
            f"teacher.shard: {name} runs some blocks by parts, which cannot be gathered: remove teacher.shard"
        ) from None


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats, inner ones first: elements of lists, not lists, not layers."""
    lists = (nn.Sequential, nn.ModuleList)
    parents = [
        module
        for module in net.modules()
        # RegNet's stages have their blocks as attributes instead of a list.
        if isinstance(module, lists) or len({type(child) for child in module.children()}) == 1
    ]
    parts = dict.fromkeys(part for module in parents for part in module.children())
    return [part for part in reversed(parts) if not isinstance(part, lists) and [*part.children()]]
