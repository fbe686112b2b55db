"""Count the parameters and operations of a run's networks, and measure their speed."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from indistill import config
from indistill.commands.report.read import Run
from indistill.config import Config, in_one_line
from indistill.config.files import replace_text
from indistill.config.run_dir import RunDir

if TYPE_CHECKING:
    from torch import Tensor, nn

    from indistill.models.timm_model import TimmModel

_SPEED_SECONDS = 5.0  # of measuring rounds; the first round is not counted
_MOST_ROUNDS = 50
_LEAST_ROUNDS = 3
_BATCH = {"cpu": 8, "cuda": 64}  # images of a forward pass


def networks(run: Run, measure: bool) -> dict[str, Any]:
    """Return the content of `networks.json`, after adding what it lacks.

    These are parameters and operations, and with `measure` also the seconds of a forward pass.
    """
    known = dict(run.networks)
    sections: dict[str, config.Model] = {**run.settings.teacher_sections}
    if run.settings.student is not None:
        sections["student"] = run.settings.student
    for role, section in sections.items():
        if "parameters" not in known.get(role, {}):
            sizes = _or_reason(partial(size, section, run.settings.data))
            known[role] = {"name": section.name, **sizes}
    if measure and "seconds" not in known.get("speed", {}):
        known["speed"] = _or_reason(lambda: speed(sections, run.settings))
    if known != run.networks:
        with contextlib.suppress(OSError):
            replace_text(RunDir(run.path).networks, json.dumps(known, indent=2) + "\n")
    return known


def _or_reason(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `find`, or {"unknown": reason} if it raises: each library fails in its own way."""
    try:
        return find()
    except Exception as error:
        return {"unknown": in_one_line(error, 300, with_type=True)}


def _create(section: config.Model, data: config.Data) -> TimmModel:
    """Create the timm model of a section, without its weights."""
    from indistill.models.timm_model import build, timm_model  # `models` registers the small networks
    from indistill.models.views import without_weights

    bare = without_weights(section, "network").get("num_classes", section.num_classes)
    classes = {"num_classes": data.num_classes if bare is None else bare}
    kwargs = classes | section.kwargs if data.num_classes else section.kwargs | classes
    return timm_model(build(section, kwargs, "network").eval())


def size(section: config.Model, data: config.Data) -> dict[str, int]:
    """Count parameters, and operations of a forward pass per image (a multiply-add counts as two)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from indistill.models.timm_model import fit_input

    with torch.device("meta"), torch.no_grad():
        net = _create(section, data)
        side = fit_input(net, section, data.full_size)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, side, side))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": counter.get_total_flops()}


def speed(sections: Mapping[str, config.Model], settings: Config) -> dict[str, Any]:
    """Measure the median seconds of each network's forward pass on a batch.

    The networks take turns, so disturbances affect them alike. They compute as in evaluation, normalised and
    in channels_last, in the run's precision on a GPU and in float32 on CPUs.
    """
    import torch

    from indistill.distributed import engine
    from indistill.models.network import DTYPES, Network
    from indistill.models.timm_model import fit_input

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = settings.mixed_precision if device.type == "cuda" else "no"
    half = (0.5, 0.5, 0.5)
    with torch.random.fork_rng():
        nets = {}
        for role, section in sections.items():
            net = _create(section, settings.data)
            own_side = fit_input(net, section, settings.data.full_size)
            nets[role] = Network(net, (half, half), image_size=own_side)
    nets = {role: net.to(device).eval() for role, net in nets.items()}
    batch = _BATCH[device.type]
    side = settings.data.full_size
    images = torch.zeros(batch, 3, side, side, dtype=torch.uint8, device=device)
    with torch.inference_mode(), torch.autocast(device.type, DTYPES[precision], enabled=precision != "no"):
        rounds = _rounds(nets, images)
    return {
        "seconds": {role: statistics.median(seconds[role] for seconds in rounds) for role in nets},
        "rounds": len(rounds),
        "batch": batch,
        "precision": precision,
        "device": engine.device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
    }


def _rounds(nets: Mapping[str, nn.Module], images: Tensor) -> list[dict[str, float]]:
    """Time each network once per round until the time is up; the first round warms up and is not returned."""
    import torch

    def seconds(net: nn.Module) -> float:
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        begin = time.perf_counter()
        net(images)
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - begin

    rounds: list[dict[str, float]] = []
    begin = time.perf_counter()
    while len(rounds) <= _LEAST_ROUNDS or (
        time.perf_counter() - begin < _SPEED_SECONDS and len(rounds) <= _MOST_ROUNDS
    ):
        rounds.append({role: seconds(net) for role, net in nets.items()})
    return rounds[1:]
