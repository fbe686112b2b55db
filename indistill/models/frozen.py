"""Make a frozen network cheaper: fold its batch norms, lower its precision, or shard its weights."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.utils.fusion import fuse_conv_bn_eval

from indistill.config import UserError
from indistill.models import graph
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


def fold(network: Network, input_size: tuple[int, int, int]) -> None:
    """Fold the batch norms of a frozen network in eval mode into the convolutions before them, in place.

    The outputs are the same but for rounding, and a map less is read and written for each norm. Those in
    `network.kept_norms` stay, as does everything that is not a plain convolution and batch norm. A network
    that `hold` has converted stays, too: another student that shares it has folded it.
    """
    held = any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in network.parameters())
    if held or not any(isinstance(module, nn.BatchNorm2d) for module in network.net.modules()):
        return
    names = defaultdict(list)
    for name, module in network.net.named_modules(remove_duplicate=False):
        names[module].append(name)
    for convolution, norm in _foldable(network, input_size):
        folded = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = folded.weight, folded.bias
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        for name in names[norm]:
            network.net.set_submodule(name, rest)
    network.to(memory_format=torch.channels_last)  # the new weights, as a 1x1 kernel does not tell its format


@torch.enable_grad()
def _foldable(network: Network, input_size: tuple[int, int, int]) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each batch norm that alone reads the output of a convolution, by the graph of one image."""
    net = network.net
    convolutions: dict[Node | None, nn.Conv2d] = {}  # by the node of their output
    norms: dict[nn.BatchNorm2d, Node | None] = {}  # and the node that each reads
    calls: Counter[nn.Module] = Counter()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            convolutions[output.grad_fn] = module
        elif isinstance(module, nn.BatchNorm2d) and module not in network.kept_norms:
            norms[module] = inputs[0].grad_fn

    kinds = (nn.Conv2d, Conv2dSame, nn.BatchNorm2d, BatchNormAct2d)
    hooks = [module.register_forward_hook(record) for module in net.modules() if type(module) in kinds]
    images = torch.zeros(1, *input_size, device=network.mean.device, dtype=network.mean.dtype)
    images.requires_grad_()  # gives a frozen network a graph
    try:
        stages = [stage.index for stage in find_stages(net)]
        final, maps = net.forward_intermediates(images, indices=stages, output_fmt="NCHW")
        everything = sum(output.sum() for output in (*maps, final, net.forward_head(final)))
    finally:
        for hook in hooks:
            hook.remove()
    readers = Counter(node for reader in graph.walk(everything.grad_fn) for node, _ in reader.next_functions)
    pairs = [(convolutions[node], norm) for norm, node in norms.items() if node in convolutions]
    return [
        (convolution, norm)
        for convolution, norm in pairs
        if readers[norms[norm]] == calls[convolution] == calls[norm] == 1 and norm.running_mean is not None
    ]


def shard(network: Network, device: torch.device, input_size: tuple[int, int, int]) -> None:
    """Fold a frozen network's batch norms and shard its parameters over all ranks (FSDP2), in place.

    The outputs are those of the folded network, bit for bit. The parameters of a block are gathered for its
    forward pass and freed after it; those outside any block are gathered while `forward` or `maps` of the
    network runs. Only these two methods may be called from now on: on all ranks, equally often and equally
    deep, without gradients. The network may be on the CPU: it is moved to the device block by block. Raises
    UserError for a network that calls parts of a block instead of the block.
    """
    fold(network, input_size)
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
