"""Will a run work here? `indistill doctor` looks at what it needs of this node or, launched on several ranks, of all.

A check is a function that yields (level, what, remedy); one that crashes is a FAIL with the error's text. They leave
nothing behind: what they write are temporary files. Ranks tell each other what they found through the store where they
met, not by collectives, which may be what is broken; a thread ends a process that hangs, with what is known by then.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import resource
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import huggingface_hub
import numpy as np
import psutil
import timm
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from safetensors import safe_open

from indistill import config, estimate
from indistill.config import Config, UserError
from indistill.config.run_dir import has_begun, in_one_line
from indistill.data import class_names, overlap, remote, shards
from indistill.data.dataset import open_shards
from indistill.data.index import index_files, load_index
from indistill.data.loader import IndexedTraining, check_accumulation
from indistill.data.stream import StreamedTraining
from indistill.data.training import Training
from indistill.distributed import engine
from indistill.distributed.agree import agree, setup, software_versions
from indistill.distributed.deepspeed_config import zero_config
from indistill.distributed.environment import contradictions
from indistill.models import timm_model
from indistill.order import SampleOrder
from indistill.targets.manifest import check_classes, load_manifest, targets_root
from indistill.training import optim
from indistill.training.start import check_devices

OK, WARN, FAIL = "ok", "warn", "FAIL"
Item = tuple[str, str] | tuple[str, str, str]  # level, what, and what to do about it where that does not say so
Said = Iterator[Item]

START_SECONDS = 120.0  # for all ranks to import torch, from a file system that may be cold, and to meet
CHECK_SECONDS = 60.0  # for any other check, with its wait for other ranks
LOOK_SECONDS = 2.0  # that something is measured
MOST_INDEX_BYTES = 5 * 10**8  # to load for it: ten million images, ten seconds
OVERLAP_SECONDS = 20.0  # to look for evaluation images among the training images
FETCH_SECONDS = 20.0  # for a remote shard, which a run fetches whole
SKEW_SECONDS = 1.0  # between clocks: time limits and the times in logs go by them
CLOCK_ROUNDS = 20
REDUCED_ELEMENTS = {"cuda": 2**24, "cpu": 2**22}  # float32, to measure the network with
LOADER_BATCH = 32  # images
PREFETCH = 2  # batches of each loader worker: DataLoader's default
BATCH_TENSORS = 3  # images, labels, ids; each is a file descriptor on its way
MOST_SHOWN = 8  # ranks in a line, and lines of a check


class Line(NamedTuple):
    check: str
    level: str
    what: str
    remedy: str = ""


class Finding(NamedTuple):
    """A line and the ranks that have it."""

    check: str
    level: str
    what: str
    remedy: str
    ranks: list[int]
    hosts: list[str]


class Here:
    """What the checks look at: configs (none: the machine alone), and this process among the others."""

    def __init__(self, stages: Sequence[tuple[str, Config]] = ()) -> None:
        self.stages, self.settings = stages, [settings for _, settings in stages]
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.host = socket.gethostname()
        self.hosts = {self.rank: self.host}
        self.store: dist.TCPStore | None = None
        self.met = False  # the ranks, in a process group
        self.device = torch.device("cpu")
        self.found: list[Line] = []
        self.at = "", 0.0  # the check under way, and since when by time.monotonic

    @cached_property
    def machine(self) -> config.Machine:
        return self.settings[0].machine if self.settings else config.Machine()

    @cached_property
    def uses_deepspeed(self) -> bool:
        asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
        return asked or any(isinstance(settings.engine, config.DeepSpeed) for settings in self.settings)

    @cached_property
    def by_data(self) -> list[Config]:
        """The first config of each section `data`: most stages and all students share one."""
        return list({settings.data.model_dump_json(): settings for settings in self.settings[::-1]}.values())

    # --- what ranks tell each other ----------------------------------------------------------------------------------

    def connect(self, seconds: float) -> None:
        """To the store where the process group meets, on the first node. Raises dist.DistError."""
        address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
        self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def tell(self, topic: str, value: Any) -> None:
        self.store.set(f"doctor/{topic}/{self.rank}", json.dumps(value))

    def hear(self, topic: str, rank: int, seconds: float) -> Any:
        """None if that rank has not told it by then."""
        key = f"doctor/{topic}/{rank}"
        try:
            self.store.wait([key], timedelta(seconds=max(seconds, 0.01)))
            return json.loads(self.store.get(key))
        except dist.DistError:
            return None

    def all_ready(self) -> bool:
        """Whether every rank has come this far. Rank 0 decides; all know each other's hosts then."""
        if self.rank:
            self.tell("ready", self.host)
            hosts = self.hear("go", 0, 2 * CHECK_SECONDS)
        else:
            end = time.monotonic() + CHECK_SECONDS
            hosts = [self.host] + [self.hear("ready", rank, end - time.monotonic()) for rank in range(1, self.world)]
            hosts = None if None in hosts else hosts
            self.tell("go", hosts)
        self.hosts |= dict(enumerate(hosts or ()))
        return hosts is not None

    def named(self, ranks: Sequence[int]) -> str:
        """As in: rank 3 (node1)."""
        names = [f"{rank} ({self.hosts.get(rank, 'host unknown')})" for rank in ranks[:MOST_SHOWN]]
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(names)}" + ", ..." * (len(ranks) > MOST_SHOWN)


# --- the software ----------------------------------------------------------------------------------------------------


def versions(here: Here) -> Said:
    """Against the requirements in this package's own metadata."""
    python, names = platform.python_version(), ("torchvision", "accelerate", "timm", "webdataset")
    others = [f"{name} {_installed(name)}" for name in names]
    yield OK, ", ".join([f"indistill {software_versions()['indistill']}", f"python {python}", _torch(), *others])
    try:
        required, wanted = metadata.requires("indistill") or [], metadata.metadata("indistill")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield WARN, "indistill is not installed as a package, which says what versions it needs", "pip install -e ."
        return
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        yield FAIL, f"python {python}, indistill needs {wanted}", "make another environment"
    for requirement in map(Requirement, required):
        extra = {"extra": "deepspeed" if here.uses_deepspeed else ""}
        if requirement.marker and not requirement.marker.evaluate(extra):
            continue
        found, needed = _installed(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            told = f"{requirement.name} {found or 'is missing'}, indistill needs {needed}"
            yield FAIL, told, f"pip install '{needed}'"


def _installed(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _torch() -> str:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "for CPUs"
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if dist.is_nccl_available() else ""
    return f"torch {torch.__version__} ({build}{nccl})"


def deepspeed(here: Here) -> Said:
    version = _installed("deepspeed")
    if not here.uses_deepspeed:
        yield OK, f"{version} is installed, and not used" if version else "not installed, and not needed"
    elif version is not None:  # else it is told by versions and by start
        import deepspeed  # noqa: F401

        left_out = "" if torch.cuda.is_available() else " (what it would compile on CPUs, for minutes, gloo replaces)"
        transformers = f"transformers {_installed('transformers')}, which Accelerate asks for"
        yield OK, f"{version} can be imported, beside {transformers}; a start compiles nothing{left_out}"


def environment(here: Here) -> Said:
    """Variables that change a run behind its config's back, slow it down, or keep its ranks from meeting."""
    found = [*_hurting(here, {name: value for name, value in os.environ.items() if value})]
    for level, name, effect, *remedy in found:
        yield level, f"{name}={os.environ[name]} {effect}", remedy[0] if remedy else f"unset {name}"
    if not found:
        yield OK, "no variable that hurts a run"


def _hurting(here: Here, values: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Level, variable, what it does, and the remedy if it is another than to unset it."""
    for name, contradiction in dict(pair for one in here.settings for pair in contradictions(one)).items():
        yield FAIL, name, f"contradicts the config: {contradiction}", f"unset {name}, or let them agree"
    if values.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and torch.cuda.is_available():
        yield WARN, "ACCELERATE_USE_CPU", "trains on the CPU, beside a GPU"
    if values.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        yield WARN, "CUDA_LAUNCH_BLOCKING", "has the CPU wait for every operation of the GPU"
    if values.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        yield WARN, "TORCH_DISTRIBUTED_DEBUG", "compares all ranks before every collective"
    for name, way in (("P2P", "between GPUs"), ("SHM", "within a node"), ("IB", "over InfiniBand between nodes")):
        if values.get(f"NCCL_{name}_DISABLE", "0") != "0":
            yield WARN, f"NCCL_{name}_DISABLE", f"takes NCCL's fast way {way} from it"
    interfaces = psutil.net_if_addrs()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = values.get(name, "^").removeprefix("=").split(",")
        if wanted[0].startswith("^"):
            continue  # all but these
        if not any(own.startswith(tuple(wanted)) for own in interfaces):
            yield FAIL, name, "names no network interface of this node", f"choose from {', '.join(interfaces)}"
        elif wanted == ["lo"] and here.world > here.local_world:
            yield FAIL, name, "is the loopback, which leads to no other node"


# --- the processes ---------------------------------------------------------------------------------------------------


def start(here: Here) -> Said:
    """The process group that training would use, made in the same way."""
    zero, precision, several = None, "no", here.world > 1
    absent = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if several and absent:
        told = f"WORLD_SIZE={here.world}, but no {', '.join(absent)}"
        yield FAIL, told, "unset it, or start with torchrun or accelerate launch"
        return
    try:
        for settings in here.settings[::-1]:  # the first one's is the one that counts
            check_devices(settings, here.world)
            zero, precision = zero_config(settings, here.world), settings.mixed_precision
    except UserError as error:  # the ranks can meet all the same
        yield FAIL, str(error)
    if several and here.rank:
        here.connect(START_SECONDS)
        here.tell("came", here.host)
    # Collectives have longer than any check may take: at their end NCCL would abort the process without a word.
    accelerator = engine.start(zero, precision, here.world, 4 * max(START_SECONDS, CHECK_SECONDS) / 60, [])
    here.device = accelerator.device
    if accelerator.num_processes != here.world:
        told = f"the launcher started {here.world} processes, Accelerate sees {accelerator.num_processes}"
        yield FAIL, told, "unset ACCELERATE_* variables of another job, or check the accelerate config"
        return
    if several and not here.rank:
        here.connect(CHECK_SECONDS)
    here.met = several
    backend = f", {dist.get_backend()}" if dist.is_initialized() else ""
    told = f"{here.world} process{'es' * several} on {here.device.type}{backend}"
    yield OK, f"{told}, {engine.describe(accelerator)}"


def agreement(here: Here) -> Said:
    """Of the ranks, on config and software, as a run wants it; and on the rest."""
    fields: dict[str, Any] = software_versions()
    for name, settings in here.stages:
        fields |= {f"{name} {key}".strip(): value for key, value in setup(settings).items()}
    agree(fields)
    others = {name: _installed(name) for name in ("torchvision", "accelerate", "webdataset", "deepspeed")}
    try:
        agree(others | {"python": platform.python_version(), "build": _torch(), "driver": _driver()})
    except UserError as error:
        yield WARN, str(error)
        return
    nodes = list(dict.fromkeys(here.hosts.values()))
    told = ", ".join(nodes[:MOST_SHOWN]) + ", ..." * (len(nodes) > MOST_SHOWN)
    yield OK, f"{here.world} ranks on {len(nodes)} node{'s' * (len(nodes) > 1)} ({told}): the same software and config"


def all_reduce(here: Here) -> Said:
    """Sums over all ranks: whether they are right, and how fast."""
    numbers, wanted = torch.full((1024,), here.rank + 1.0, device=here.device), here.world * (here.world + 1) / 2
    dist.all_reduce(numbers)
    if not (numbers == wanted).all():
        yield FAIL, f"the sum over the ranks is {numbers[0].item():g} in place of {wanted:g}", "look at the hardware"
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
    rate = estimate.all_reduce_bytes(numbers.nbytes, here.world) / seconds
    what = f"{dist.get_backend()}: sums are right, {numbers.nbytes / 1e6:.0f} MB take {1e3 * seconds:.3g} ms, "
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
        name = here.hear("file", 0, CHECK_SECONDS / 2)
        seen = name is None or os.path.exists(name)
        here.tell("seen", seen)
        if not seen:
            yield FAIL, f"{run_dir}: what rank 0 writes there is not seen", "take one that all nodes see"
        return
    try:
        with tempfile.NamedTemporaryFile(prefix=".indistill-doctor-", dir=_existing(run_dir)) as file:
            here.tell("file", file.name)
            seen = [here.hear("seen", rank, CHECK_SECONDS / 2) for rank in range(1, here.world)]
    except OSError:  # told by run_dir
        here.tell("file", None)
        return
    if all(seen):
        yield OK, f"all ranks see what rank 0 writes to {run_dir}"


# --- the node --------------------------------------------------------------------------------------------------------


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
    for index in [here.local_rank] if "LOCAL_RANK" in os.environ else range(count):
        found, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        right = (2 * torch.ones(8, device=f"cuda:{index}")).sum().item() == 16
        what = f"{index}: {found.name}, compute capability {found.major}.{found.minor}, driver {_driver()}, "
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
    driver, hidden = _driver(), os.environ.get("CUDA_VISIBLE_DEVICES")
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
        reason = " ".join(str(error).split())[:300]
    return FAIL, f"driver {driver}, but torch cannot use it: {reason}", "renew the driver, or take a torch for it"


def _driver() -> str | None:
    """Version of NVIDIA's; None without one."""
    with contextlib.suppress(OSError):
        found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
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
    need = here.local_world * max((_batches_bytes(settings, here.world) for settings in here.settings), default=0)
    what = f"/dev/shm has {_size(space.free)} of {_size(space.total)} free"
    what += f", the loaders of this node hold up to {_size(need)} there" * bool(need)
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
    need = len(os.listdir("/proc/self/fd")) + 2 * here.world  # gloo connects all ranks, for checkpoints by itself
    need += shards.OPEN_SHARDS * bool(here.settings)
    need += 2 * PREFETCH * BATCH_TENSORS * max(map(_workers, here.settings), default=0)  # training and evaluation
    if soft == resource.RLIM_INFINITY:
        yield OK, "without limit"
    elif need > soft:
        above = " (above the hard limit: have it raised)" * (need > hard != resource.RLIM_INFINITY)
        yield FAIL, f"{soft:,} allowed to a process, which needs some {need:,}", f"ulimit -n {2 * need}{above}"
    else:
        yield OK, f"{soft:,} allowed to a process, which needs some {need:,}"


def _size(number: float) -> str:
    unit, least = next(((u, n) for u, n in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if number >= n), ("kB", 1e3))
    return f"{number / least:.3g} {unit}"


# --- disks -----------------------------------------------------------------------------------------------------------


def run_dir(here: Here) -> Said:
    """Writable, and of this config if there is a run in it."""
    for settings in here.settings:
        begun = has_begun(settings)  # UserError if it is another config's
        if problem := _unwritable(settings.run_dir):
            yield FAIL, f"{settings.run_dir}: cannot be written ({problem})", "choose another run_dir"
        else:
            yield OK, f"{settings.run_dir}: can be written" + ", and holds this run, which would go on" * begun


def checkpoints(here: Here) -> Said:
    """The disk's space against what `checkpoint` keeps of the student, built as training builds it."""
    for settings in here.settings:
        if here.rank or settings.student is None:
            continue
        section = settings.student.model_copy(update={"pretrained": False, "checkpoint": None})
        student = timm_model.create(section, settings.data.num_classes, settings.data.image_size, "student")
        weights = sum(value.nbytes for value in student.state_dict().values())
        one = weights * (1 + (settings.ema is not None))
        one += estimate.state_bytes(optim.create(student, settings.optimizer))
        kept = one * (settings.checkpoint.keep_last + settings.checkpoint.keep_best + 1)  # and one being written
        free = shutil.disk_usage(_existing(settings.run_dir)).free
        what = f"{_size(one)} each, up to {_size(kept)} at a time; {settings.run_dir} has {_size(free)} free"
        if kept > free:
            yield FAIL if 2 * one > free else WARN, what, "make room, or lower checkpoint.keep_last and keep_best"
        else:
            yield OK, what


def cache_dir(here: Here) -> Said:
    for section in [settings.data for settings in here.by_data if settings.data.cache_dir]:
        if problem := _unwritable(section.cache_dir):
            yield FAIL, f"{section.cache_dir}: cannot be written ({problem})", "choose another data.cache_dir"
            continue
        cached = Path(section.cache_dir, "remote-shards")
        free = shutil.disk_usage(_existing(section.cache_dir)).free
        have = sum(file.stat().st_size for file in cached.iterdir() if file.is_file()) if cached.is_dir() else 0
        what = f"{section.cache_dir}: can be written, {_size(free)} free"
        urls = [section.train] if isinstance(section.train, str) else section.train
        if not any(remote.is_remote(os.path.join(section.root or "", url)) for url in urls):
            yield OK, what
            continue
        what += f" and {_size(have)} of shards, of {_size(section.cache_bytes)} (data.cache_bytes)"
        if free + have < section.cache_bytes:
            yield WARN, what, f"a larger disk, or data.cache_bytes={0.9 * (free + have):.1e}"
        else:
            yield OK, what


def _existing(path: str) -> Path:
    """The path, or what there is of it: a run makes the rest."""
    whole = Path(path).absolute()
    return next(place for place in [whole, *whole.parents] if place.exists())


def _unwritable(path: str) -> str | None:
    """Why nothing can be written there."""
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    return None


# --- what a run reads ------------------------------------------------------------------------------------------------


def weights(here: Here) -> Said:
    """What networks begin with, and stored targets; but not what an earlier stage is yet to make."""
    made = {f"{s.run_dir}/{'heads' if s.stage == 'heads' else 'student'}.safetensors" for s in here.settings}
    for settings in here.settings:
        cached = settings.targets.source == "cached"  # without the teacher
        if cached:
            yield _stored_targets(targets_root(settings))
        for role, section in (("teacher", None if cached else settings.teacher), ("student", settings.student)):
            for key in ("checkpoint", "heads"):
                path = getattr(section, key, None)
                if path and (path not in made or os.path.exists(path)):
                    yield _weights_file(f"{role}.{key}", path)
            if section is not None and section.pretrained:
                yield _pretrained(role, section.name)


def _stored_targets(root: str) -> Item:
    try:
        return OK, f"targets of {len(load_manifest(root).samples)} shards in {root}"
    except UserError as error:
        return FAIL, str(error)


def _weights_file(key: str, path: str) -> Item:
    """Whether it can be read, without reading it all."""
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                file.keys()
        else:
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        return FAIL, f"{key}: no file {path}", "correct it; every node needs it"
    except Exception as error:  # a damaged file fails in pickle, zip or safetensors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return FAIL, f"{key}: {path} is not a readable checkpoint: {reason}", "copy or save it anew"
    return OK, f"{key}: {path}, {_size(os.path.getsize(path))}"


def _pretrained(role: str, name: str) -> Item:
    kind, _, place = name.rpartition(":")
    if kind == "local-dir":
        there = os.path.isdir(place)
        return (OK, f"{role}.name: {place}") if there else (FAIL, f"{role}.name: no folder {place}", "correct it")
    found = timm.get_pretrained_cfg(name) if not kind and timm.is_model(name) else None
    hub = place if kind == "hf-hub" else found and found.hf_hub_id
    files = [file for file in (found and found.hf_hub_filename, "model.safetensors", "pytorch_model.bin") if file]
    if hub and any(isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str) for file in files):
        return OK, f"{role}: the weights of {name} are in this node's cache ({hub})"
    remedy = f"without internet {role}.pretrained=false {role}.checkpoint=FILE, or a filled HF_HOME"
    return WARN, f"{role}: the weights of {name} are not in this node's cache, a run has to fetch them", remedy


def data_shards(here: Here) -> Said:
    """All there, with indices that fit; and a batch that divides."""
    if here.local_rank:  # the first process of a node looks for all
        return
    for settings in here.by_data:
        section, accumulation = settings.data, settings.grad_accumulation
        if section.access == "stream":
            streamed = StreamedTraining(section, settings.seed, here.rank, here.world, accumulation)
            yield OK, f"data.train: {len(streamed.urls)} shards to stream, {streamed.steps_per_epoch} steps an epoch"
        for key in ("eval",) if section.access == "stream" else ("train", "eval"):
            urls = getattr(section, key)
            if urls is None:
                continue
            paths = shards.expand(urls, section.root, section.allow_pipe)
            sizes, missing, damaged = _indices(paths, section.cache_dir)
            for problem in damaged[:MOST_SHOWN]:
                yield FAIL, f"data.{key}: {problem}"
            if missing:
                words = [os.path.join(section.root or "", url) for url in ([urls] if isinstance(urls, str) else urls)]
                words += ["--cache-dir", section.cache_dir] if section.cache_dir else []
                told = f"data.{key}: {len(missing)} of {len(paths)} shards have no index ({missing[0]})"
                remedy = f"indistill shards index {shlex.join(words)}"
                yield WARN, f"{told}: the first start makes them", remedy
            whole = len(sizes) == len(paths)
            if key == "train":
                check_accumulation(section, here.world, accumulation)
                known = sizes if whole else [2**40]  # as many as any batch may want
                order = SampleOrder(known, settings.seed, section.streams, section.window)
                order.check(section.global_batch, here.world)
            if not damaged:
                told = f"{len(paths)} shard{'s' * (len(paths) > 1)}"
                told += f", {sum(sizes):,} samples" if whole else f", {len(sizes)} of them looked at" * bool(sizes)
                yield OK, f"data.{key}: {told}"


def _indices(paths: Sequence[str], directory: str | None) -> tuple[list[int], list[str], list[str]]:
    """Samples of the local shards that there is time to look at, shards without index, and what is wrong with any."""
    sizes, missing, damaged = [], [], []
    end = time.monotonic() + 2 * LOOK_SECONDS
    for path in np.random.permutation(paths).tolist():  # some of them should be any of them
        if remote.is_remote(path) or time.monotonic() > end:
            continue
        if not any(map(os.path.exists, index_files(path, directory))):
            missing.append(path)
            continue
        try:
            sizes.append(len(load_index(path, directory).keys))
        except UserError as error:
            damaged.append(str(error))
    return sizes, sorted(missing), sorted(damaged)


def class_lists(here: Here) -> Said:
    """Whether labels are of the same classes in data.train, data.eval, stored targets and the teacher's weights."""
    if here.rank:
        return
    for settings in here.settings:
        section = settings.data
        try:
            names = class_names.check(section)
            _check_other_lists(settings, names)
        except UserError as error:
            yield FAIL, str(error)
            continue
        if names is None:
            yield OK, f"no class names beside data.train ({class_names.RECORD}), so labels are compared as numbers only"
            continue
        told = f"data.train has {len(names.names)} class names"
        if section.eval is not None:
            same = class_names.beside(section.eval, section.root)
            told += (
                ", data.eval numbers its classes alike"
                if same
                else f", data.eval none ({class_names.RECORD}) to compare them with"
            )
        if len(names.names) != section.num_classes:
            yield WARN, told, f"set data.num_classes, which is {section.num_classes}, to their number"
        else:
            yield OK, told


def _check_other_lists(settings: Config, names: class_names.Names | None) -> None:
    """Raise UserError for stored targets or a teacher of other classes than data.train."""
    root, teacher = targets_root(settings), settings.teacher
    if settings.targets.source == "cached" and os.path.exists(f"{root}/manifest.json"):
        check_classes(root, load_manifest(root), names)
    elif teacher is not None and teacher.checkpoint:
        class_names.check_weights(class_names.of_weights(teacher.checkpoint), settings.data, "teacher")


def evaluation_images(here: Here) -> Said:
    """Whether some of them are trained on, too."""
    if here.rank:
        return
    for settings in here.by_data:
        section = settings.data
        if section.eval is None:
            continue
        training, evaluation = (_with_index(section, urls) for urls in (section.train, section.eval))
        if training is None or evaluation is None:
            limit = f"less than {MOST_INDEX_BYTES / 1e9:g} GB of indices"
            yield OK, f"not compared with the training images: only local shards are that have {limit}"
            continue
        found = overlap.find(training, evaluation, OVERLAP_SECONDS)
        of = f"{found.looked_at:,} images"
        of += f", a random sample of {len(evaluation):,}" if found.looked_at < len(evaluation) else ""
        of += f", compared with {found.compared:.0%} of the training images" if found.compared < 1 else ""
        if found.shared:
            told = f"data.eval: {found.shared:,} of {of}, are in data.train too, byte for byte"
            yield WARN, told, "their scores say nothing about new images: remove them from one, and pack it again"
        else:
            yield OK, f"data.eval: of {of}, none is in data.train"


def _with_index(section: config.Data, urls: str | list[str]) -> shards.ShardSet | None:
    """Local shards that have an index; None for others, and for what data_shards tells of."""
    try:
        paths = shards.expand(urls, section.root, section.allow_pipe)
        if any(map(remote.is_remote, paths)):
            return None
        files = [next(filter(os.path.exists, index_files(path, section.cache_dir)), None) for path in paths]
        if None in files or sum(map(os.path.getsize, files)) > MOST_INDEX_BYTES:
            return None
        return shards.ShardSet(paths, cache_dir=section.cache_dir)
    except UserError:
        return None


def reading(here: Here) -> Said:
    """Speed from this node, by what a run reads with: a stream of bytes, and one loader worker."""
    for settings in here.by_data:
        section = settings.data
        try:
            paths = shards.expand(section.train, section.root, section.allow_pipe)
        except UserError:
            continue  # told by data_shards
        first = here.rank % len(paths)  # ranks read different ones
        paths = paths[first:] + paths[:first]
        what, fetching = remote.base_name(paths[0]), 0.0
        if not what.startswith("pipe:"):  # a command that is not heard out ends with an error
            rate, fetching = _stream(paths)
            what += f": {_size(rate)}/s"
        fetched = section.access == "index" and remote.is_remote(paths[0])
        if fetched and fetching > FETCH_SECONDS:
            yield WARN, f"{what}, a shard takes {fetching:.0f} s to fetch", "a nearer store, or smaller shards"
            continue
        place = _existing(section.cache_dir) if fetched and section.cache_dir else None
        with tempfile.TemporaryDirectory(prefix=".indistill-doctor-", dir=place) as directory:
            speed, replaced = _load(settings, paths, directory)
        what += f", {speed:,.0f} images/s {'from memory' if section.in_memory else 'by one loader worker'}"
        planned = settings.machine.decode_images_per_second
        if replaced:
            told = f"{what}; {len(replaced)} cannot be decoded ({replaced[0]})"
            yield WARN, told, "`indistill shards verify` names all of them"
        elif not section.in_memory and speed < planned / 2:
            told = f"{what}, less than half of the {planned:g} of machine.decode_images_per_second"
            told += f" (load average here: {os.getloadavg()[0]:.1f})"
            yield WARN, told, "smaller images (`shards pack --resize`), more data.workers, a nearer disk"
        else:
            yield OK, what


def _stream(paths: Sequence[str]) -> tuple[float, float]:
    """Bytes a second of reading shards one after the other for a while, and the seconds that the first one takes."""
    done, first, began = 0, None, time.monotonic()
    for path in paths:
        with _opened(path) as (stream, length):
            while block := stream.read(1 << 20):
                done += len(block)
                seconds = time.monotonic() - began
                if seconds > LOOK_SECONDS:
                    return done / seconds, first or (length or float("inf")) * seconds / done
        first = first or time.monotonic() - began
    return done / (time.monotonic() - began), first


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """A shard's stream and, of a remote one, its size, where the source tells."""
    if remote.is_remote(path):
        with remote.open_remote(path) as opened:
            yield opened
        return
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the disk is meant, not the memory
        yield stream, None


def _load(settings: Config, paths: Sequence[str], directory: str) -> tuple[float, list[str]]:
    """Images a second from a loader on the first shard, and what cannot be decoded.

    Indices and remote shards go to `directory`.
    """
    section, kind = settings.data, StreamedTraining
    changes = {"train": list(paths[:1]), "root": None, "cache_dir": directory, "workers": min(section.workers, 1)}
    section = section.model_copy(update=changes | {"streams": 1, "window": None, "global_batch": LOADER_BATCH})
    if section.access == "index":
        samples = len(open_shards(section, section.train))
        section, kind = section.model_copy(update={"global_batch": min(LOADER_BATCH, samples)}), IndexedTraining
    training: Training = kind(section, settings.seed, 0, 1, 1)
    batches = iter(training.loader(0, 10**9, torch.device("cpu")))
    replaced = list(next(batches).replaced)  # by then the worker has begun
    images, began = 0, time.monotonic()
    while time.monotonic() - began < LOOK_SECONDS:
        batch = next(batches)
        images += len(batch.ids)
        replaced += batch.replaced
    return images / (time.monotonic() - began), sorted(set(replaced))


# --- all of them -----------------------------------------------------------------------------------------------------

Check = Callable[[Here], Said]
ALONE: tuple[Check, ...] = (versions, environment, start, deepspeed, gpu, cores, shared_memory, open_files)
ALONE += (run_dir, checkpoints, cache_dir, weights, data_shards, class_lists, evaluation_images, reading)
TOGETHER: tuple[Check, ...] = (agreement, all_reduce, clocks, one_file_system)  # on all ranks, in this order


def run(stages: Sequence[tuple[str, Config]] = (), as_json: bool = False) -> int:
    """Print what is found for the configs of `runs.load`, and return the exit code: 1 if anything is FAIL.

    On several ranks rank 0 prints what all have found, and its code is the one that counts.
    """
    here, out, over = Here(stages), sys.stdout, threading.Event()
    threading.Thread(target=_watch, args=(here, as_json, out, over), name="doctor", daemon=True).start()
    with contextlib.redirect_stdout(sys.stderr):  # where libraries may say what they like
        for check in ALONE:
            _look(check, here)
        if here.met and here.all_ready():
            for check in TOGETHER:
                # Ranks that disagree all know it. After another failure the others may be at another collective.
                if FAIL in _look(check, here) and check is not agreement:
                    break
        over.set()
        return _report(here, as_json, out)


def _look(check: Check, here: Here) -> list[str]:
    """Keep the lines of a check, FAIL for a crash; returns their levels."""
    name, levels = _name(check), []
    here.at = name, time.monotonic()
    for item in _said(check, here):
        here.found.append(Line(name, *item))
        levels.append(item[0])
    here.at = "", 0.0
    return levels


def _said(check: Check, here: Here) -> Said:
    try:
        yield from check(here)
    except Exception as error:  # of whatever it tried
        text = " ".join(in_one_line(error).split())[:500]
        yield FAIL, text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _watch(here: Here, as_json: bool, out: IO[str], over: threading.Event) -> None:
    """End the process if a check takes too long: nothing else would, where a disk or the network hangs."""
    while not over.wait(0.1):
        name, since = here.at
        limit = START_SECONDS if name == _name(start) else CHECK_SECONDS
        if not name or time.monotonic() - since < limit:
            continue
        what, remedy = f"not over within {limit:g} s", "see what it waits for: a file system, the network"
        if name == _name(start):
            what, remedy = f"{what}: {_absence(here)}", "start all of them; open the ports between the nodes"
        here.found.append(Line(name, FAIL, what, remedy))
        os._exit(_report(here, as_json, out))


def _absence(here: Here) -> str:
    """Who has not come to where the ranks meet."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.connect(5.0)
    except (dist.DistError, KeyError, ValueError):
        return f"{place} cannot be reached"
    absent = [rank for rank in range(1, here.world) if here.hear("came", rank, 0.01) is None]
    if absent:
        return f"of {here.world} processes {here.named(absent)} did not come to {place}"
    return f"all {here.world} processes came to {place}, and did not get through to each other"


def _report(here: Here, as_json: bool, out: IO[str]) -> int:
    """Rank 0 hears the others and prints; they tell what they have found. Returns the exit code."""
    if here.rank and here.met:
        with contextlib.suppress(dist.DistError):
            here.connect(CHECK_SECONDS)  # the main thread's connection may be waiting
            here.tell("found", [here.host, here.found])
        return 0
    if here.rank:
        for line in here.found:
            if line.level == FAIL:
                print(f"indistill: {here.named([here.rank])}: {line.check}: {line.what}", file=sys.stderr, flush=True)
        time.sleep(5.0)  # for rank 0: torchrun ends all when one has ended so
        return 1
    found = {0: list(here.found)}
    if here.met:
        end = time.monotonic() + CHECK_SECONDS
        with contextlib.suppress(dist.DistError):
            here.connect(5.0)
        for rank in range(1, here.world):
            told = here.hear("found", rank, end - time.monotonic())
            if told is None:
                here.hosts[rank] = here.hear("came", rank, 0.01) or "host unknown"
                found[0].append(Line("ranks", FAIL, f"{here.named([rank])} does not answer", "see its output"))
            else:
                here.hosts[rank], found[rank] = told[0], [Line(*line) for line in told[1]]
    findings = merged(found, here.hosts)
    bad = any(finding.level == FAIL for finding in findings)
    tree = {"ok": not bad, "processes": here.world, "lines": [finding._asdict() for finding in findings]}
    print(json.dumps(tree) if as_json else text(findings, len(found)), file=out, flush=True)
    return int(bad)


def merged(found: dict[int, list[Line]], hosts: dict[int, str]) -> list[Finding]:
    """The lines of all ranks in the order of the checks, each once, with those that have it."""
    ranks: dict[Line, dict[int, str]] = {}  # and their hosts
    for rank, lines in found.items():
        for line in lines:
            ranks.setdefault(line, {})[rank] = hosts[rank]
    order = {name: i for i, name in enumerate(map(_name, (*ALONE, *TOGETHER)))}  # that of other ranks may be another
    findings = [Finding(*line, list(who), list(dict.fromkeys(who.values()))) for line, who in ranks.items()]
    return sorted(findings, key=lambda finding: order.get(finding.check, len(order)))


def text(findings: Sequence[Finding], heard: int) -> str:
    """A line each, of `heard` ranks; of what is ok and differs by rank only rank 0's."""
    lines, shown = [], dict[tuple[str, str], int]()
    for check, level, what, remedy, ranks, hosts in findings:
        if level == OK and 0 not in ranks:
            continue
        shown[check, level] = shown.get((check, level), 0) + 1
        if shown[check, level] > MOST_SHOWN:
            continue
        who = ""
        if level != OK and len(ranks) < heard:
            numbers = ", ".join(map(str, ranks[:MOST_SHOWN])) + ", ..." * (len(ranks) > MOST_SHOWN)
            who = f"rank{'s' * (len(ranks) > 1)} {numbers} ({', '.join(hosts[:MOST_SHOWN])}): "
        lines.append(f"{level:4}  {check}: {who}{what}" + f": {remedy}" * bool(remedy))
    for (check, level), count in shown.items():
        if count > MOST_SHOWN:
            lines.append(f"{level:4}  {check}: {count - MOST_SHOWN} more of this kind (--json has them)")
    counts = [f"{sum(n for (_, of), n in shown.items() if of == level)} {level}" for level in (OK, WARN, FAIL)]
    return "\n".join([*lines, ", ".join(counts)])
