"""Measure size and speed of a run's networks."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from indistill import config
from indistill.commands.report.read import Run
from indistill.config import Config, in_one_line
from indistill.config.run_dir import RunDir

if TYPE_CHECKING:
    from torch import nn

_SPEED_SECONDS = 5.0  # for the rounds of measuring, the first of which is not counted
_MOST_ROUNDS = 50
_LEAST_ROUNDS = 3
_BATCH = {"cpu": 8, "cuda": 64}  # images of a forward pass


# --- the networks: size, and speed -----------------------------------------------------------------------------------
def networks(run: Run, measure: bool) -> dict[str, Any]:
    """What `networks.json` says, with what it lacked: parameters, operations and, to `measure`, seconds."""
    known = dict(run.networks)
    sections = {"teacher": run.settings.teacher, "student": run.settings.student}
    sections = {role: section for role, section in sections.items() if section is not None}
    for role, section in sections.items():
        if "parameters" not in known.get(role, {}):
            known[role] = {
                "name": section.name,
                **_told(lambda section=section: size(section, run.settings.data)),
            }
    if measure and "seconds" not in known.get("speed", {}):
        known["speed"] = _told(lambda: speed(list(sections.items()), run.settings))
    if known != run.networks:
        with contextlib.suppress(OSError):
            RunDir(run.path).networks.write_text(json.dumps(known, indent=2) + "\n")
    return known


def _told(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is found, or why it could not be: each library fails in its own way."""
    try:
        return find()
    except Exception as error:
        return {"unknown": in_one_line(error, 300, with_type=True)}


def _create(section: config.Model, data: config.Data) -> nn.Module:
    """The timm model of a section, without its weights."""
    import timm

    from indistill import models  # noqa: F401  registers the small networks

    return timm.create_model(section.name, **{"num_classes": data.num_classes, **section.kwargs}).eval()


def size(section: config.Model, data: config.Data) -> dict[str, int]:
    """Parameters, and operations of an image's forward pass (a multiply-add counts as two), found without computing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), torch.no_grad():
        net = _create(section, data)
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, data.image_size, data.image_size))
    return {"parameters": sum(p.numel() for p in net.parameters()), "flops": counter.get_total_flops()}


def speed(sections: Sequence[tuple[str, config.Model]], settings: Config) -> dict[str, Any]:
    """Median seconds of each network's forward pass on the same images, in turns: what disturbs one disturbs the other.

    In the run's precision on a GPU, in float32 on CPUs, as evaluation runs them: normalised and channels_last.
    """
    import torch

    from indistill.distributed import engine
    from indistill.models.network import DTYPES, Network

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = settings.mixed_precision if device.type == "cuda" else "no"
    half = (0.5, 0.5, 0.5)
    with torch.random.fork_rng():
        nets = {role: Network(_create(section, settings.data), (half, half)) for role, section in sections}
    nets = {role: net.to(device).eval() for role, net in nets.items()}
    batch = _BATCH[device.type]
    images = torch.zeros(
        batch, 3, settings.data.image_size, settings.data.image_size, dtype=torch.uint8, device=device
    )

    def seconds(net: nn.Module) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        net(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    autocast = torch.autocast(device.type, DTYPES[precision], enabled=precision != "no")
    rounds: list[dict[str, float]] = []
    with torch.inference_mode(), autocast:
        begin = time.perf_counter()
        while len(rounds) <= _LEAST_ROUNDS or (
            time.perf_counter() - begin < _SPEED_SECONDS and len(rounds) <= _MOST_ROUNDS
        ):
            rounds.append({role: seconds(net) for role, net in nets.items()})
    counted = rounds[1:]
    return {
        "seconds": {role: statistics.median(one[role] for one in counted) for role in nets},
        "rounds": len(counted),
        "batch": batch,
        "precision": precision,
        "device": engine.device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
    }
