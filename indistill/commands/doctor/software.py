"""Check versions of packages and environment variables."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Said, counted_word
from indistill.commands.doctor.node import allowed_cores
from indistill.distributed.agree import software_versions
from indistill.distributed.environment import contradictions

_READ_BY_LIBRARIES = ("ACCELERATE_", "CUDA_VISIBLE_DEVICES", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def versions(here: Here) -> Said:
    """Compare the installed versions with the requirements in this package's metadata."""
    python = platform.python_version()
    texts = [f"indistill {software_versions()['indistill']}", f"python {python}", torch_build()]
    texts += [
        f"{name} {installed_version(name)}" for name in ("torchvision", "accelerate", "timm", "webdataset")
    ]
    yield OK, ", ".join(texts)
    try:
        requirements = metadata.requires("indistill") or []
        needed_python = metadata.metadata("indistill")["Requires-Python"]
    except metadata.PackageNotFoundError:
        what = "indistill is not installed as a package, so the versions that it needs are unknown"
        yield WARN, what, "pip install -e ."
        return
    if needed_python and not SpecifierSet(needed_python).contains(python, prereleases=True):
        yield FAIL, f"python {python}, indistill needs {needed_python}", "create another environment"
    for requirement in map(Requirement, requirements):
        extra = {"extra": "deepspeed" if here.uses_deepspeed else ""}
        if requirement.marker and not requirement.marker.evaluate(extra):
            continue
        installed = installed_version(requirement.name)
        needed = f"{requirement.name}{requirement.specifier}"
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            what = f"{requirement.name} {installed or 'is missing'}, indistill needs {needed}"
            yield FAIL, what, f"pip install '{needed}'"


def installed_version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def torch_build() -> str:
    """Torch's version and the devices that it was built for."""
    build = "for CPUs"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = "ROCm"
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if dist.is_nccl_available() else ""
    return f"torch {torch.__version__} ({build}{nccl})"


def deepspeed(here: Here) -> Said:
    """Import DeepSpeed if a run would use it."""
    version = installed_version("deepspeed")
    if not here.uses_deepspeed:
        yield OK, f"{version} is installed, but not used" if version else "not installed, and not needed"
    elif version is not None:  # else `versions` and `start` report it
        import deepspeed  # noqa: F401

        replaced = ""
        if not torch.cuda.is_available():
            replaced = " (gloo replaces the extension that it would compile on CPUs, for minutes)"
        transformers = f"transformers {installed_version('transformers')}, which Accelerate requires"
        yield OK, f"{version} can be imported, and {transformers}; a start compiles nothing{replaced}"


def environment(here: Here) -> Said:
    """Find variables that override the config, slow a run down, or keep its ranks from connecting."""
    harmful = [*_harmful(here, {name: value for name, value in os.environ.items() if value})]
    for level, name, effect, *remedy in harmful:
        yield level, f"{name}={os.environ[name]} {effect}", remedy[0] if remedy else f"unset {name}"
    copies = [*_another_copy()]
    yield from copies
    if not harmful and not copies:
        read = sorted(name for name in os.environ if name.startswith(_READ_BY_LIBRARIES))
        named = ", ".join(f"{name}={os.environ[name]}" for name in read)
        yield OK, "no variable that harms a run" + (f"; set are {named}" if named else "")


def _another_copy() -> Said:
    """Find out whether another copy of this package is imported than the one that is installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):  # `versions` reports it
        distribution = metadata.distribution("indistill")
        installed = Path(str(distribution.locate_file("indistill")))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            installed = Path(unquote(urlsplit(origin["url"]).path), "indistill")
        used = Path(__file__).parents[2]
        if not installed.is_dir() or installed.samefile(used):
            return
        paths = os.environ.get("PYTHONPATH", "")
        listed = str(used.parent) in paths.split(os.pathsep)
        why, remedy = "the current folder has it", "start from another folder"
        if listed:
            why, remedy = f"PYTHONPATH={paths} leads there", "unset PYTHONPATH"
        yield WARN, f"indistill is imported from {used}, and not from {installed}: {why}", remedy


def _threads(here: Here, values: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Compare the threads of a process with its share of the cores."""
    cores = max(1, int(allowed_cores() / here.local_world))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        number = values.get(name)
        if number is None:
            continue
        if not number.isdecimal() or int(number) < 1:
            yield WARN, name, "is not a positive integer, and has no effect"
        elif int(number) > cores:
            yield WARN, name, f"is more than the {cores} {counted_word('core', range(cores))} of a process"


def _harmful(here: Here, values: dict[str, str]) -> Iterator[tuple[str, ...]]:
    """Level, variable, effect and, unless it is to unset the variable, the remedy."""
    for name, contradiction in dict(pair for one in here.settings for pair in contradictions(one)).items():
        yield (
            FAIL,
            name,
            f"contradicts the config: {contradiction}",
            f"unset {name}, or set both to the same value",
        )
    if values.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and torch.cuda.is_available():
        yield WARN, "ACCELERATE_USE_CPU", "trains on the CPU, although there is a GPU"
    if values.get("ACCELERATE_TORCH_DEVICE"):
        yield WARN, "ACCELERATE_TORCH_DEVICE", "chooses the device of every process"
    if values.get("ACCELERATE_DEBUG_MODE", "").lower() in ("true", "1"):
        yield WARN, "ACCELERATE_DEBUG_MODE", "compares the tensors of all ranks before every collective"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield WARN, "CUDA_VISIBLE_DEVICES", "hides every GPU: a run computes on the CPU"
    yield from _threads(here, values)
    if values.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        yield WARN, "CUDA_LAUNCH_BLOCKING", "makes the CPU wait for every operation of the GPU"
    if values.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        yield WARN, "TORCH_DISTRIBUTED_DEBUG", "compares all ranks before every collective"
    transports = {"P2P": "between GPUs", "SHM": "within a node", "IB": "over InfiniBand between nodes"}
    for name, way in transports.items():
        if values.get(f"NCCL_{name}_DISABLE", "0") != "0":
            yield WARN, f"NCCL_{name}_DISABLE", f"disables NCCL's fast transport {way}"
    interfaces = psutil.net_if_addrs()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = values.get(name, "^").removeprefix("=").split(",")
        if chosen[0].startswith("^"):
            continue  # all interfaces but these
        if not any(own.startswith(tuple(chosen)) for own in interfaces):
            what = "names no network interface of this node"
            yield FAIL, name, what, f"choose from {', '.join(interfaces)}"
        elif chosen == ["lo"] and here.world > here.local_world:
            yield FAIL, name, "is the loopback interface, which reaches no other node"
