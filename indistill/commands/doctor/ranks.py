"""Check that ranks start, agree, communicate and share a file system."""

from __future__ import annotations

import os
import platform
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist

from indistill.commands.doctor import findings, node, software
from indistill.commands.doctor.disks import existing_parent
from indistill.commands.doctor.findings import FAIL, MOST_SHOWN, OK, WARN, Here, Said
from indistill.commands.doctor.software import torch_build
from indistill.commands.plan.network import all_reduce_bytes
from indistill.config import UserError
from indistill.distributed import engine
from indistill.distributed.agree import agree, setup, software_versions
from indistill.distributed.deepspeed_config import zero_config
from indistill.training.start import check_devices

SKEW_SECONDS = 1.0  # between clocks: time limits and the times in logs go by them
CLOCK_ROUNDS = 20
REDUCED_ELEMENTS = {"cuda": 2**24, "cpu": 2**22}  # float32, to measure the network with


# --- the processes ------------------------------------------------------------------------------------------
def start(here: Here) -> Said:
    """The process group that training would use, made in the same way."""
    zero, precision, several = None, "no", here.world > 1
    absent = [*here.ranks.missing, *(n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ)]
    if several and absent:
        told = f"WORLD_SIZE={here.world}, but no {', '.join(absent)}"
        yield FAIL, told, "unset it, or start with torchrun or accelerate launch"
        return
    try:
        for settings in here.settings[::-1]:  # the first one's is the one that counts
            check_devices(settings, here.world)
            zero, precision = zero_config(settings, here.ranks), settings.mixed_precision
    except UserError as error:  # the ranks can meet all the same
        yield FAIL, str(error)
    if several and here.rank:
        here.connect(findings.START_SECONDS)
        here.tell("came", here.host)
    # Collectives have longer than any check may take: at their end NCCL would abort the process without a word.
    timeout_minutes = 4 * max(findings.START_SECONDS, findings.CHECK_SECONDS) / 60
    started = engine.start(zero, precision, ranks=here.ranks, timeout_minutes=timeout_minutes)
    accelerator = started.accelerator
    here.device = accelerator.device
    if accelerator.num_processes != here.world:
        told = f"the launcher started {here.world} processes, Accelerate sees {accelerator.num_processes}"
        yield FAIL, told, "unset ACCELERATE_* variables of another job, or check the accelerate config"
        return
    if several and not here.rank:
        here.connect(findings.CHECK_SECONDS)
    here.met = several
    backend = f", {dist.get_backend()}" if dist.is_initialized() else ""
    told = f"{here.world} process{'es' * several} on {here.device.type}{backend}"
    yield OK, f"{told}, {started.describe()}"


def agreement(here: Here) -> Said:
    """Of the ranks, on config and software, as a run wants it; and on the rest."""
    fields: dict[str, Any] = software_versions()
    for name, settings in here.stages:
        fields |= {f"{name} {key}".strip(): value for key, value in setup(settings).items()}
    agree(fields)
    others = {
        name: software.installed_version(name)
        for name in ("torchvision", "accelerate", "webdataset", "deepspeed")
    }
    try:
        agree(
            others
            | {"python": platform.python_version(), "build": torch_build(), "driver": node.driver_version()}
        )
    except UserError as error:
        yield WARN, str(error)
        return
    nodes = list(dict.fromkeys(here.hosts.values()))
    told = ", ".join(nodes[:MOST_SHOWN]) + ", ..." * (len(nodes) > MOST_SHOWN)
    yield (
        OK,
        f"{here.world} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)} ({told}): the same software and config",
    )


def all_reduce(here: Here) -> Said:
    """Sums over all ranks: whether they are right, and how fast."""
    numbers, wanted = (
        torch.full((1024,), here.rank + 1.0, device=here.device),
        here.world * (here.world + 1) / 2,
    )
    dist.all_reduce(numbers)
    if not (numbers == wanted).all():
        yield (
            FAIL,
            f"the sum over the ranks is {numbers[0].item():g} in place of {wanted:g}",
            "look at the hardware",
        )
        return
    numbers, rounds = torch.ones(REDUCED_ELEMENTS[here.device.type], device=here.device), 3
    dist.all_reduce(numbers)
    numbers[0].item()  # waits for the device
    began = time.monotonic()
    for _ in range(rounds):
        dist.all_reduce(numbers)
    numbers[0].item()
    slowest = torch.tensor((time.monotonic() - began) / rounds, device=here.device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    seconds = slowest.item()
    rate = all_reduce_bytes(numbers.nbytes, here.world) / seconds
    what = (
        f"{dist.get_backend()}: sums are right, {numbers.nbytes / 1e6:.0f} MB take {1e3 * seconds:.3g} ms, "
    )
    what += f"{rate / 1e9:.3g} GB/s sent by each rank"
    key = f"{'inter' if here.world > here.local_world else 'intra'}_node_bytes_per_second"
    planned = getattr(here.machine, key)
    if here.device.type == "cuda" and rate < planned / 4:
        remedy = f"NCCL_DEBUG=INFO tells which way NCCL takes; else give machine.{key} to `indistill plan`"
        yield WARN, f"{what}, far from the {planned / 1e9:.3g} of machine.{key}", remedy
    else:
        yield OK, what


def clocks(here: Here) -> Said:
    """Against rank 0's.

    A collective ends nowhere before it has begun everywhere. So in every round its end on one rank is later than its
    beginning on another, which bounds the difference of their clocks from both sides, whatever the network does.
    """
    marks, one = torch.empty(CLOCK_ROUNDS, 2, dtype=torch.float64), torch.ones((), device=here.device)
    for i in range(CLOCK_ROUNDS):
        marks[i, 0] = time.time()
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
        one.item()  # waits for the device
        marks[i, 1] = time.time()
    told = [torch.empty_like(marks, device=here.device) for _ in range(here.world)]
    dist.all_gather(told, marks.to(here.device))
    began, ended = torch.stack(told).cpu().unbind(dim=2)  # [ranks, rounds]
    least, most = (began - ended[0]).amax(dim=1), (ended - began[0]).amin(dim=1)  # [ranks]
    ahead, bound = ((least + most) / 2).tolist(), ((most - least) / 2).tolist()
    off = [rank for rank in range(here.world) if abs(ahead[rank]) - bound[rank] > SKEW_SECONDS]
    for rank in off:
        told = f"{here.named([rank])} is {abs(ahead[rank]):.3f} s {'ahead of' if ahead[rank] > 0 else 'behind'} rank 0"
        told += f" ({here.hosts[0]}), ± {1e3 * bound[rank]:.2g} ms"
        yield WARN, told, "have the nodes keep one time (chrony, NTP)"
    if not off:
        yield OK, f"within {1e3 * max(map(abs, ahead)):.2g} ms of rank 0's, ± {1e3 * max(bound):.2g} ms"


def one_file_system(here: Here) -> Said:
    """Whether all ranks see in run_dir what rank 0 writes there."""
    if not here.settings:
        return
    run_dir = here.settings[0].run_dir
    if here.rank:
        name = here.hear("file", 0, findings.CHECK_SECONDS / 2)
        seen = name is None or os.path.exists(name)
        here.tell("seen", seen)
        if not seen:
            yield FAIL, f"{run_dir}: what rank 0 writes there is not seen", "take one that all nodes see"
        return
    try:
        with tempfile.NamedTemporaryFile(prefix=".indistill-doctor-", dir=existing_parent(run_dir)) as file:
            here.tell("file", file.name)
            seen = [here.hear("seen", rank, findings.CHECK_SECONDS / 2) for rank in range(1, here.world)]
    except OSError:  # told by run_dir
        here.tell("file", None)
        return
    if all(seen):
        yield OK, f"all ranks see what rank 0 writes to {run_dir}"
