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
from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Said, counted_word, listed
from indistill.commands.doctor.software import torch_build
from indistill.commands.plan.network import all_reduce_bytes
from indistill.config import UserError
from indistill.distributed.accelerator import create_engine
from indistill.distributed.agree import agree, setup, software_versions
from indistill.distributed.deepspeed_config import zero_config
from indistill.training.start import check_devices

SKEW_SECONDS = 1.0  # between clocks, on which time limits and the times in logs depend
CLOCK_ROUNDS = 20
REDUCED_ELEMENTS = {"cuda": 2**24, "cpu": 2**22}  # float32 numbers in an all-reduce that measures the network


# --- the processes ------------------------------------------------------------------------------------------
def start(here: Here) -> Said:
    """Start the process group as training does."""
    zero = None
    precision = "no"
    several = here.world > 1
    absent = [*here.ranks.missing, *(n for n in ("MASTER_ADDR", "MASTER_PORT") if n not in os.environ)]
    if several and absent:
        what = f"WORLD_SIZE={here.world}, but no {', '.join(absent)}"
        yield FAIL, what, "unset it, or start with torchrun or accelerate launch"
        return
    try:
        for settings in here.settings[::-1]:  # the first config decides
            check_devices(settings, here.world)
            zero, precision = zero_config(settings, here.ranks), settings.mixed_precision
    except UserError as error:  # the ranks can connect all the same
        yield FAIL, str(error)
    if several and here.rank:
        here.connect(findings.START_SECONDS)
        here.send("came", here.host)
    # Collectives get a longer limit than any check: at theirs NCCL would abort the process without a message.
    limit_minutes = 4 * max(findings.START_SECONDS, findings.CHECK_SECONDS) / 60
    started = create_engine(zero, precision, ranks=here.ranks, timeout_minutes=limit_minutes)
    accelerator = started.accelerator
    here.device = accelerator.device
    if accelerator.num_processes != here.world:
        what = f"the launcher started {here.world} processes, Accelerate sees {accelerator.num_processes}"
        yield FAIL, what, "unset ACCELERATE_* variables of another job, or check the accelerate config"
        return
    if several and not here.rank:
        here.connect(findings.CHECK_SECONDS)
    here.met = several
    backend = f", {dist.get_backend()}" if dist.is_initialized() else ""
    what = f"{here.world} {counted_word('process', here.world)} on {here.device.type}{backend}"
    yield OK, f"{what}, {started.describe()}"


def agreement(here: Here) -> Said:
    """Whether all ranks have the same config and software, as a run requires, and the same environment."""
    fields: dict[str, Any] = software_versions()
    for name, settings in here.stages:
        fields |= {f"{name} {key}".strip(): value for key, value in setup(settings).items()}
    agree(fields)
    packages = ("torchvision", "accelerate", "webdataset", "deepspeed")
    others: dict[str, Any] = {name: software.installed_version(name) for name in packages}
    others |= {"python": platform.python_version(), "build": torch_build(), "driver": node.driver_version()}
    try:
        agree(others)
    except UserError as error:
        yield WARN, str(error)
        return
    nodes = list(dict.fromkeys(here.hosts.values()))
    where = f"{len(nodes)} {counted_word('node', nodes)} ({listed(nodes)})"
    yield OK, f"{here.world} ranks on {where}: the same software and config"


def all_reduce(here: Here) -> Said:
    """Sum numbers over all ranks, and check the sums and the time that they take."""
    numbers = torch.full((1024,), here.rank + 1.0, device=here.device)
    expected = here.world * (here.world + 1) / 2
    dist.all_reduce(numbers)
    if not (numbers == expected).all():
        what = f"the sum over the ranks is {numbers[0].item():g} instead of {expected:g}"
        yield FAIL, what, "check the hardware"
        return
    numbers = torch.ones(REDUCED_ELEMENTS[here.device.type], device=here.device)
    rounds = 3
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
        remedy = f"NCCL_DEBUG=INFO shows which transport NCCL uses; if it is right, set machine.{key}"
        yield WARN, f"{what}, far below the {planned / 1e9:.3g} of machine.{key}", remedy
    else:
        yield OK, what


def clocks(here: Here) -> Said:
    """Compare the clocks with rank 0's.

    A collective ends on no rank before it has begun on every rank. So in each round, its end on one rank is
    later than its beginning on another, which bounds the difference of their clocks from both sides, however
    slow the network is.
    """
    marks = torch.empty(CLOCK_ROUNDS, 2, dtype=torch.float64)
    one = torch.ones((), device=here.device)
    for i in range(CLOCK_ROUNDS):
        marks[i, 0] = time.time()
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
        one.item()  # waits for the device
        marks[i, 1] = time.time()
    gathered = [torch.empty_like(marks, device=here.device) for _ in range(here.world)]
    dist.all_gather(gathered, marks.to(here.device))
    began, ended = torch.stack(gathered).cpu().unbind(dim=2)  # [ranks, rounds]
    least = (began - ended[0]).amax(dim=1)  # [ranks]
    most = (ended - began[0]).amin(dim=1)  # [ranks]
    ahead = ((least + most) / 2).tolist()
    bound = ((most - least) / 2).tolist()
    off = [rank for rank in range(here.world) if abs(ahead[rank]) - bound[rank] > SKEW_SECONDS]
    for rank in off:
        direction = "ahead of" if ahead[rank] > 0 else "behind"
        what = f"{here.named([rank])} is {abs(ahead[rank]):.3f} s {direction} rank 0 ({here.hosts[0]}), "
        what += f"± {1e3 * bound[rank]:.2g} ms"
        yield WARN, what, "synchronise the clocks of the nodes (chrony, NTP)"
    if not off:
        yield OK, f"within {1e3 * max(map(abs, ahead)):.2g} ms of rank 0's, ± {1e3 * max(bound):.2g} ms"


def one_file_system(here: Here) -> Said:
    """Whether all ranks see in run_dir what rank 0 writes there."""
    if not here.settings:
        return
    run_dir = here.settings[0].run_dir
    if here.rank:
        name = here.receive("file", 0, findings.CHECK_SECONDS / 2)
        visible = name is None or os.path.exists(name)
        here.send("seen", visible)
        if not visible and here.settings[0].mirror is not None and not here.uses_deepspeed:
            yield OK, f"{run_dir}: is this node's own, and gets its checkpoints from the mirror"
        elif not visible:
            what = f"{run_dir}: a file that rank 0 wrote there is not visible here"
            yield FAIL, what, "choose a run_dir on a file system that all nodes share, or set mirror"
        return
    try:
        with tempfile.NamedTemporaryFile(prefix=".indistill-doctor-", dir=existing_parent(run_dir)) as file:
            here.send("file", file.name)
            seen_by = [
                here.receive("seen", rank, findings.CHECK_SECONDS / 2) for rank in range(1, here.world)
            ]
    except OSError:  # reported by run_dir
        here.send("file", None)
        return
    if all(seen_by):
        yield OK, f"all ranks see what rank 0 writes to {run_dir}"
