"""Run a frozen network in another precision, and hold or shard its weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from indistill.config import UserError
from indistill.models.network import DTYPES, Network
from indistill.models.stages import find_stages


def run_in(network: Network, precision: str) -> None:
    """Have a frozen network run under autocast in `precision` (no: float32), whatever the caller's autocast says."""
    autocast = torch.autocast(network.mean.device.type, DTYPES[precision], enabled=precision != "no")
    network.forward, network.maps = autocast(network.forward), autocast(network.maps)


def hold(network: Network, precision: str) -> None:
    """Keep the weights that autocast would convert at every pass in its precision, in place.

    The outputs are the same, bit for bit: a layer that does more with its weights than multiply (NFNet's, which
    standardises them) keeps them.
    """
    for module in network.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.to(DTYPES[precision])


def shard(network: Network, device: torch.device, input_size: tuple[int, int, int]) -> None:
    """Cut a frozen network's parameters over all ranks (FSDP2), in place; its outputs stay the same, bit for bit.

    The parameters of a block are gathered for its forward pass and freed after it; those outside any block, for as long
    as `forward` or `maps` of the network runs. Those two are what may be called from now on: on all ranks, equally
    often and equally deep, without gradients. The network may come from the CPU: block by block goes to the device.
    Raises UserError for one that runs a block by parts.
    """
    network.to(memory_format=torch.contiguous_format)  # FSDP takes no other
    mesh = DeviceMesh.from_group(torch.distributed.group.WORLD, device.type)
    scalars = {parameter for parameter in network.parameters() if parameter.dim() == 0}  # FSDP refuses them
    for part in [*_blocks(network.net), network]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    register_fsdp_forward_method(network, "maps")
    network.to(device)  # scalars
    images = torch.zeros(1, *input_size, device=device)
    try:
        with torch.no_grad():
            network.maps(images, [stage.index for stage in find_stages(network.net)])
            network(images)
    except RuntimeError as error:  # of operators that met what nobody gathered
        if "DTensor" not in str(error):
            raise
        name = type(network.net).__name__
        raise UserError(
            f"teacher.shard: {name} runs some blocks by parts, which cannot be gathered: remove it"
        ) from None


def _blocks(net: nn.Module) -> list[nn.Module]:
    """What a network repeats, inner ones first: the elements of its lists that are neither lists nor single layers."""
    lists = (nn.Sequential, nn.ModuleList)
    # RegNet's stages name their blocks one by one instead.
    listing = [
        m for m in net.modules() if isinstance(m, lists) or len({type(child) for child in m.children()}) == 1
    ]
    parts = dict.fromkeys(part for module in listing for part in module.children())
    return [part for part in reversed(parts) if not isinstance(part, lists) and [*part.children()]]
