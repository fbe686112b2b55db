"""Check a node's GPUs, cores, shared memory and open files."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
from pathlib import Path

import torch

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Item, Said, size_text
from indistill.config import Config, UserError, in_one_line
from indistill.data import shards
from indistill.targets.manifest import load_manifest, targets_root

PREFETCH = 2  # batches of each loader worker: DataLoader's default
BATCH_TENSORS = 3  # images, labels, ids; each is a file descriptor on its way


# --- the node -----------------------------------------------------------------------------------------------
def gpu(here: Here) -> Said:
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    count = torch.cuda.device_count()
    if here.local_world > count:
        told = f"{here.local_world} processes on this node, which shows them {count} GPU{'s' * (count > 1)}"
        yield FAIL, told, f"torchrun --nproc-per-node {count}"
        return
    precisions = {p for s in here.settings for p in (s.mixed_precision, s.teacher and s.teacher.precision)}
    for index in [here.local_rank] if here.ranks.has_local_rank else range(count):
        found, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        right = (2 * torch.ones(8, device=f"cuda:{index}")).sum().item() == 16
        what = f"{index}: {found.name}, compute capability {found.major}.{found.minor}, driver {driver_version()}, "
        what += f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if not right:
            yield FAIL, f"{what}: it does not add up eight numbers", "have it looked at"
        elif "bf16" in precisions and found.major < 8 and torch.version.cuda:
            yield WARN, f"{what}: bf16 is fast from capability 8.0 on", "mixed_precision: fp16"
        elif free < 0.9 * total:
            yield WARN, what, "end the processes that hold the rest (nvidia-smi), or ask for the GPU alone"
        else:
            yield OK, what


def _no_gpu() -> Item:
    driver, hidden = driver_version(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None:
        remedy = "in containers Docker's --gpus all or Apptainer's --nv show them"
        return WARN, "none: a run computes on the CPU", remedy
    if hidden in ("", "-1"):
        told = f"CUDA_VISIBLE_DEVICES={hidden} hides those of this node: a run computes on the CPU"
        return WARN, told, "unset it, or ask the scheduler for some"
    if torch.version.cuda is None and torch.version.hip is None:
        return FAIL, f"driver {driver}, but this torch is one for CPUs", "install torch with CUDA"
    try:
        torch.cuda.init()
        reason = "no device"
    except RuntimeError as error:
        reason = in_one_line(error, 300)
    return (
        FAIL,
        f"driver {driver}, but torch cannot use it: {reason}",
        "renew the driver, or take a torch for it",
    )


def driver_version() -> str | None:
    """Version of NVIDIA's; None without one."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text()
        )
        return found[1] if found else "unknown"
    return None


def cores(here: Here) -> Said:
    """Against the loader workers, and the processes that they load for."""
    own = os.sched_getaffinity(0)
    # A rank with fewer cores than its launcher has been bound to its own.
    sharers = here.local_world if own == os.sched_getaffinity(os.getppid()) else 1
    allowed = min(float(len(own)), _quota())
    what = f"{allowed:g} of {os.cpu_count()} allowed to {sharers} process{'es' * (sharers > 1)}"
    workers = max(map(_workers, here.settings), default=0)
    what += f", each with {workers} loader worker{'s' * (workers != 1)} (data.workers)" * bool(workers)
    if sharers * (workers + 1) > allowed:
        fits = max(int(allowed / sharers) - 1, 1)
        yield WARN, what, "ask for more (--cpus-per-task)" + f", or data.workers={fits}" * (fits < workers)
    else:
        yield OK, what


def _quota() -> float:
    """Cores that the cgroup grants; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return float("inf")


def _workers(settings: Config) -> int:
    return 0 if settings.data.in_memory else settings.data.workers


def shared_memory(here: Here) -> Said:
    """Loader workers hand batches over in it."""
    try:
        space = shutil.disk_usage("/dev/shm")
    except OSError as error:
        yield WARN, f"/dev/shm: {error.strerror}", "mount a tmpfs there, or data.workers=0"
        return
    need = here.local_world * max(
        (_batches_bytes(settings, here.world) for settings in here.settings), default=0
    )
    what = f"/dev/shm has {size_text(space.free)} of {size_text(space.total)} free"
    what += f", the loaders of this node hold up to {size_text(need)} there" * bool(need)
    remedy = "docker run --ipc host or --shm-size, a larger tmpfs, or fewer data.workers"
    if need > space.free:
        yield FAIL, what, remedy
    elif not here.settings and space.total <= 2**26:  # Docker's default
        yield WARN, f"{what}, little for batches of images", remedy
    else:
        yield OK, what


def _batches_bytes(settings: Config, world: int) -> int:
    """Of all batches of one rank's loaders; that of the training set keeps its own while the other evaluates."""
    section, image = settings.data, 3 * settings.data.image_size**2
    batch = section.global_batch // (world * settings.grad_accumulation)
    size = batch * image + settings.evaluate.batch * image * (section.eval is not None)
    if settings.targets.source == "cached":
        with contextlib.suppress(UserError):  # told by weights
            fields = load_manifest(targets_root(settings)).fields.values()
            size += batch * sum(field.record.itemsize for field in fields)
    return PREFETCH * _workers(settings) * size


def open_files(here: Here) -> Said:
    """The limit against shards, batches on their way, and connections to other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = (
        len(os.listdir("/proc/self/fd")) + 2 * here.world
    )  # gloo connects all ranks, for checkpoints by itself
    need += shards.OPEN_SHARDS * bool(here.settings)
    need += (
        2 * PREFETCH * BATCH_TENSORS * max(map(_workers, here.settings), default=0)
    )  # training and evaluation
    if soft == resource.RLIM_INFINITY:
        yield OK, "without limit"
    elif need > soft:
        above = " (above the hard limit: have it raised)" * (need > hard != resource.RLIM_INFINITY)
        yield (
            FAIL,
            f"{soft:,} allowed to a process, which needs some {need:,}",
            f"ulimit -n {2 * need}{above}",
        )
    else:
        yield OK, f"{soft:,} allowed to a process, which needs some {need:,}"
