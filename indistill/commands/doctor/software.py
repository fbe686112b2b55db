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
    """Against the requirements in this package's own metadata."""
    python, names = platform.python_version(), ("torchvision", "accelerate", "timm", "webdataset")
    others = [f"{name} {installed_version(name)}" for name in names]
    yield (
        OK,
        ", ".join(
            [f"indistill {software_versions()['indistill']}", f"python {python}", torch_build(), *others]
        ),
    )
    try:
        required, wanted = (
            metadata.requires("indistill") or [],
            metadata.metadata("indistill")["Requires-Python"],
        )
    except metadata.PackageNotFoundError:
        yield (
            WARN,
            "indistill is not installed as a package, which says what versions it needs",
            "pip install -e .",
        )
        return
    if wanted and not SpecifierSet(wanted).contains(python, prereleases=True):
        yield FAIL, f"python {python}, indistill needs {wanted}", "make another environment"
    for requirement in map(Requirement, required):
        extra = {"extra": "deepspeed" if here.uses_deepspeed else ""}
        if requirement.marker and not requirement.marker.evaluate(extra):
            continue
        found, needed = installed_version(requirement.name), f"{requirement.name}{requirement.specifier}"
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            told = f"{requirement.name} {found or 'is missing'}, indistill needs {needed}"
            yield FAIL, told, f"pip install '{needed}'"


def installed_version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def torch_build() -> str:
    build = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "for CPUs"
    )
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if dist.is_nccl_available() else ""
    return f"torch {torch.__version__} ({build}{nccl})"


def deepspeed(here: Here) -> Said:
    version = installed_version("deepspeed")
    if not here.uses_deepspeed:
        yield OK, f"{version} is installed, and not used" if version else "not installed, and not needed"
    elif version is not None:  # else it is told by versions and by start
        import deepspeed  # noqa: F401

        left_out = (
            ""
            if torch.cuda.is_available()
            else " (what it would compile on CPUs, for minutes, gloo replaces)"
        )
        transformers = f"transformers {installed_version('transformers')}, which Accelerate asks for"
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
        yield (
            FAIL,
            name,
            f"contradicts the config: {contradiction}",
            f"unset {name}, or set both to the same value",
        )
    if values.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") and torch.cuda.is_available():
        yield WARN, "ACCELERATE_USE_CPU", "trains on the CPU, beside a GPU"
    if values.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        yield WARN, "CUDA_LAUNCH_BLOCKING", "has the CPU wait for every operation of the GPU"
    if values.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        yield WARN, "TORCH_DISTRIBUTED_DEBUG", "compares all ranks before every collective"
    for name, way in (
        ("P2P", "between GPUs"),
        ("SHM", "within a node"),
        ("IB", "over InfiniBand between nodes"),
    ):
        if values.get(f"NCCL_{name}_DISABLE", "0") != "0":
            yield WARN, f"NCCL_{name}_DISABLE", f"takes NCCL's fast way {way} from it"
    interfaces = psutil.net_if_addrs()
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = values.get(name, "^").removeprefix("=").split(",")
        if wanted[0].startswith("^"):
            continue  # all but these
        if not any(own.startswith(tuple(wanted)) for own in interfaces):
            yield (
                FAIL,
                name,
                "names no network interface of this node",
                f"choose from {', '.join(interfaces)}",
            )
        elif wanted == ["lo"] and here.world > here.local_world:
            yield FAIL, name, "is the loopback, which leads to no other node"
