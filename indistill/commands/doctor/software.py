"""Check versions of packages and environment variables."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib import metadata

import psutil
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Said
from indistill.distributed.agree import software_versions
from indistill.distributed.environment import contradictions


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
    if not harmful:
        yield OK, "no variable that harms a run"


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
