"""Check a node's GPUs, cores, shared memory and open files."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
from pathlib import Path

import torch

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Item, Said, counted_word, size_text
from indistill.config import Config, UserError, in_one_line
from indistill.data import shards
from indistill.targets.manifest import load_manifest, targets_root

PREFETCH = 2  # batches of each loader worker: DataLoader's default
_SHARED_MEMORY = "/dev/shm"  # nosec B108  # only its free space is read
BATCH_TENSORS = 3  # images, labels, ids; each needs a file descriptor while it is sent


# --- the node -----------------------------------------------------------------------------------------------
def gpu(here: Here) -> Said:
    """Check that the GPUs are visible, compute, and have free memory."""
    if not torch.cuda.is_available():
        yield _no_gpu()
        return
    count = torch.cuda.device_count()
    if here.local_world > count:
        gpus = f"{count} visible {counted_word('GPU', count)}"
        what = f"{here.local_world} processes on this node, which has {gpus}"
        yield FAIL, what, f"use torchrun --nproc-per-node {count}"
        return
    teachers = [one.teacher for settings in here.settings for one in settings.by_teacher.values()]
    precisions = {settings.mixed_precision for settings in here.settings}
    precisions |= {teacher.precision for teacher in teachers if teacher and teacher.precision}
    for index in [here.local_rank] if here.ranks.has_local_rank else range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        right = (2 * torch.ones(8, device=f"cuda:{index}")).sum().item() == 16
        capability = f"{properties.major}.{properties.minor}"
        what = f"{index}: {properties.name}, compute capability {capability}, driver {driver_version()}, "
        what += f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"
        if not right:
            yield FAIL, f"{what}: it computes a wrong sum of eight numbers", "have it repaired"
        elif "bf16" in precisions and properties.major < 8 and torch.version.cuda:
            yield WARN, f"{what}: bf16 needs capability 8.0 to be fast", "set mixed_precision: fp16"
        elif free < 0.9 * total:
            yield (
                WARN,
                what,
                "end the processes that use the rest (nvidia-smi), or request the GPU exclusively",
            )
        else:
            yield OK, what


def _no_gpu() -> Item:
    """The reason why there is no GPU."""
    driver = driver_version()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if driver is None:
        remedy = "in a container, use Docker's --gpus all or Apptainer's --nv"
        return WARN, "none: a run computes on the CPU", remedy
    if visible in ("", "-1"):
        what = f"CUDA_VISIBLE_DEVICES={visible} hides those of this node: a run computes on the CPU"
        return WARN, what, "unset it, or request GPUs from the scheduler"
    if torch.version.cuda is None and torch.version.hip is None:
        return FAIL, f"driver {driver}, but this torch is built for CPUs", "install torch with CUDA"
    try:
        torch.cuda.init()
        reason = "no device"
    except RuntimeError as error:
        reason = in_one_line(error, 300)
    remedy = "update the driver, or install a torch that supports it"
    return FAIL, f"driver {driver}, but torch cannot use it: {reason}", remedy


def driver_version() -> str | None:
    """The version of NVIDIA's driver; None without one."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        match = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", text)
        return match[1] if match else "unknown"
    return None


def cores(here: Here) -> Said:
    """Compare the cores of this process with its loader workers."""
    own = os.sched_getaffinity(0)
    # A rank with fewer cores than its launcher has been bound to them, and shares them with no other.
    sharers = here.local_world if own == os.sched_getaffinity(os.getppid()) else 1
    allowed = allowed_cores()
    what = f"{allowed:g} of {os.cpu_count()} allowed to {sharers} {counted_word('process', sharers)}"
    workers = max(map(_workers, here.settings), default=0)
    if workers:
        what += f", each with {workers} loader {counted_word('worker', workers)} (data.workers)"
    if sharers * (workers + 1) <= allowed:
        yield OK, what
        return
    remedy = "request more (--cpus-per-task)"
    fitting = max(int(allowed / sharers) - 1, 1)
    if fitting < workers:
        remedy += f", or data.workers={fitting}"
    yield WARN, what, remedy


def allowed_cores() -> float:
    """The number of cores that this process may use, with those that it shares them with."""
    return min(float(len(os.sched_getaffinity(0))), _quota())


def _quota() -> float:
    """The number of cores that the cgroup allows; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) / int(period)
    return float("inf")


def _workers(settings: Config) -> int:
    return 0 if settings.data.in_memory else settings.data.workers


def shared_memory(here: Here) -> Said:
    """Compare /dev/shm with the batches that loader workers pass through it."""
    try:
        space = shutil.disk_usage(_SHARED_MEMORY)
    except OSError as error:
        yield WARN, f"{_SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there, or data.workers=0"
        return
    needed = here.local_world * max((_batches_bytes(s, here.world) for s in here.settings), default=0)
    what = f"{_SHARED_MEMORY} has {size_text(space.free)} of {size_text(space.total)} free"
    if needed:
        what += f", the loaders of this node need up to {size_text(needed)} there"
    remedy = "use docker run --ipc host or --shm-size, a larger tmpfs, or fewer data.workers"
    if needed > space.free:
        yield FAIL, what, remedy
    elif not here.settings and space.total <= 2**26:  # Docker's default
        yield WARN, f"{what}, which is little for batches of images", remedy
    else:
        yield OK, what


def _batches_bytes(settings: Config, world: int) -> int:
    """Bytes of all batches of one rank's loaders; training keeps its batches during an evaluation."""
    section = settings.data
    image = 3 * section.full_size**2
    batch = section.global_batch // (world * settings.grad_accumulation)
    size = batch * image
    if section.eval is not None:
        size += settings.evaluate.batch * image
    if settings.targets.source == "cached":
        with contextlib.suppress(UserError):  # reported by `weights`
            fields = load_manifest(targets_root(settings)).fields.values()
            size += batch * sum(field.record.itemsize for field in fields)
    return PREFETCH * _workers(settings) * size


def open_files(here: Here) -> Said:
    """Compare the limit of open files with shards, batches that are sent, and connections to other ranks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd"))
    needed += 2 * here.world  # gloo connects all ranks, and a second time for checkpoints
    if here.settings:
        needed += shards.OPEN_SHARDS
        loaders = 2  # of training and of evaluation
        needed += loaders * PREFETCH * BATCH_TENSORS * max(map(_workers, here.settings))
    what = f"{soft:,} allowed to a process, which needs about {needed:,}"
    if soft == resource.RLIM_INFINITY:
        yield OK, "without limit"
    elif needed > soft:
        remedy = f"ulimit -n {2 * needed}"
        if needed > hard != resource.RLIM_INFINITY:
            remedy += " (above the hard limit: have it raised)"
        yield FAIL, what, remedy
    else:
        yield OK, what
