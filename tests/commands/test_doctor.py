"""Each check against a situation made for it; what it says is compared with what the situation is."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import pack_images
from safetensors.torch import save_file
from tars import picture, write_tar
from torch.utils.data import DataLoader

from indistill import config
from indistill.commands import cli
from indistill.commands.doctor import disks, inputs, node, ranks, software
from indistill.commands.doctor import run as doctor_run
from indistill.commands.doctor.findings import FAIL, OK, WARN, Here, Line
from indistill.commands.doctor.node import PREFETCH
from indistill.commands.doctor.run import _look, merged, run, text
from indistill.commands.plan import estimate
from indistill.config import UserError
from indistill.curriculum import Timetable
from indistill.data import overlap, packing, shards, verify
from indistill.data.dataset import open_shards
from indistill.data.index import load_index
from indistill.data.samples import Others
from indistill.data.stream import read_shard
from indistill.training import loop


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    monkeypatch.setattr(inputs, "LOOK_SECONDS", 0.1)


def look(check, *trees) -> list[Line]:
    here = Here([("", config.parse(tree, "test")) for tree in trees])
    _look(check, here)
    return here.found


def with_data(tree, **keys):
    return tree | {"data": tree["data"] | keys}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def space(monkeypatch, free: float, total: float = 1e15) -> None:
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=total, used=total - free, free=free)
    )


# --- the software -------------------------------------------------------------------------------------------


def test_versions_are_those_of_the_metadata(tree, monkeypatch):
    (line,) = look(software.versions)
    assert line.level == OK
    assert f"torch {torch.__version__} (" in line.what
    installed = software.installed_version
    found = {"timm": "0.9.1", "deepspeed": None}
    monkeypatch.setattr(
        software, "installed_version", lambda name: found[name] if name in found else installed(name)
    )
    told = [line for line in look(software.versions) if line.level == FAIL]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needed = next(text for text in project["dependencies"] if text.startswith("timm"))
    assert [line.what for line in told] == [f"timm 0.9.1, indistill needs {needed}"]
    assert told[0].remedy == f"pip install '{needed}'"
    # DeepSpeed's extra counts where the config uses it.
    told = [line.what for line in look(software.versions, tree | {"engine": {"name": "deepspeed"}})]
    assert any(what.startswith("deepspeed is missing, indistill needs deepspeed>=") for what in told)


@pytest.mark.parametrize(
    ("variable", "value", "level", "what"),
    [
        (
            "ACCELERATE_USE_FSDP",
            "true",
            FAIL,
            "contradicts the config: engine.name is not set (ddp or deepspeed), and",
        ),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            FAIL,
            "contradicts the config: grad_accumulation is 1",
        ),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", FAIL, "contradicts the config: compile is false"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", FAIL, "contradicts the config: mixed_precision is no"),
        ("ACCELERATE_TORCH_DEVICE", "cpu", WARN, "chooses the device of every process"),
        ("ACCELERATE_DEBUG_MODE", "1", WARN, "compares the tensors of all ranks"),
        ("CUDA_VISIBLE_DEVICES", "", WARN, "hides every GPU: a run computes on the CPU"),
        ("CUDA_VISIBLE_DEVICES", "-1", WARN, "hides every GPU: a run computes on the CPU"),
        ("OMP_NUM_THREADS", "1000000", WARN, "is more than the "),
        ("OMP_NUM_THREADS", "many", WARN, "is not a positive integer, and has no effect"),
        ("CUDA_LAUNCH_BLOCKING", "1", WARN, "makes the CPU wait"),
        ("NCCL_P2P_DISABLE", "1", WARN, "disables NCCL's fast transport between GPUs"),
        ("GLOO_SOCKET_IFNAME", "eth77", FAIL, "names no network interface of this node"),
    ],
)
def test_variables_that_hurt(tree, monkeypatch, variable, value, level, what):
    before = look(software.environment, tree)
    monkeypatch.setenv(variable, value)
    (line,) = [line for line in look(software.environment, tree) if line not in before]
    assert line.level == level
    assert line.what.startswith(f"{variable}={value} {what}")


def test_variables_that_do_not_hurt(tree, monkeypatch):
    monkeypatch.setattr(software, "_another_copy", lambda: iter(()))  # a worktree is one
    for name in os.environ:
        if name.startswith(software._READ_BY_LIBRARIES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("NCCL_IB_DISABLE", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (line,) = look(software.environment, tree)
    assert line.level == OK
    set_here = "ACCELERATE_DYNAMO_BACKEND=NO, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=1, OMP_NUM_THREADS=1"
    assert line.what == f"no variable that harms a run; set are {set_here}"


@pytest.mark.parametrize("through", ["PYTHONPATH", "the current folder"])
def test_another_copy_of_the_package_is_named(tmp_path, monkeypatch, through):
    """One that is installed elsewhere, by the record that pip leaves; the one that runs is this one."""
    record = tmp_path / "site" / "indistill-0.1.0.dist-info"
    (tmp_path / "site" / "indistill").mkdir(parents=True)
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: indistill\nVersion: 0.1.0\n")
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(record))
    here = Path(software.__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"/other:{here.parent}" if through == "PYTHONPATH" else "/other")
    told = [line for line in look(software.environment) if "is imported from" in line.what]
    assert [line.level for line in told] == [WARN]
    assert told[0].what.startswith(
        f"indistill is imported from {here}, and not from {tmp_path}/site/indistill: {through}"
    )
    url = {"url": here.parent.as_uri(), "dir_info": {"editable": True}}
    (record / "direct_url.json").write_text(json.dumps(url))  # installed with `pip install -e`
    assert not [line for line in look(software.environment) if "is imported from" in line.what]


# --- the node -----------------------------------------------------------------------------------------------


def test_gpus_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(node, "driver_version", lambda: None)
    (line,) = look(node.gpu)
    assert (line.level, line.what) == (WARN, "none: a run computes on the CPU")
    monkeypatch.setattr(node, "driver_version", lambda: "550.54")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (line,) = look(node.gpu)
    assert (line.level, "hides those of this node" in line.what) == (WARN, True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.version, "cuda", None)
    (line,) = look(node.gpu)
    assert (line.level, line.what) == (FAIL, "driver 550.54, but this torch is built for CPUs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (line,) = look(node.gpu)
    assert (line.level, line.what) == (FAIL, "2 processes on this node, which has 1 visible GPU")


def test_too_few_cores(tree, monkeypatch):
    monkeypatch.setattr(node, "_quota", lambda: float("inf"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    (line,) = look(node.cores, with_data(tree, in_memory=False, workers=3))
    assert (line.level, line.remedy) == (OK, "")
    (line,) = look(node.cores, with_data(tree, in_memory=False, workers=9))
    assert line.level == WARN
    assert (
        line.what
        == f"8 of {os.cpu_count()} allowed to 2 processes, each with 9 loader workers (data.workers)"
    )
    assert line.remedy.endswith("or data.workers=3")
    monkeypatch.setattr(node, "_quota", lambda: 1.5)
    assert look(node.cores, with_data(tree, in_memory=False, workers=3))[0].level == WARN


def test_shared_memory_against_the_loaders(tree, monkeypatch):
    tree = with_data(tree, in_memory=False, workers=3)
    assert DataLoader([0], num_workers=1).prefetch_factor == PREFETCH
    need = 2 * 3 * (32 + 256) * 3 * 32 * 32  # bytes: batches of 32 images and, in evaluation, 256
    space(monkeypatch, need)
    (line,) = look(node.shared_memory, tree)
    assert (line.level, f"up to {need / 1e6:.3g} MB" in line.what) == (OK, True)
    space(monkeypatch, need - 1)
    (line,) = look(node.shared_memory, tree)
    assert (line.level, "--shm-size" in line.remedy) == (FAIL, True)
    space(monkeypatch, 2**26, total=2**26)
    assert look(node.shared_memory)[0].level == WARN


def test_open_files(tree, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    (line,) = look(node.open_files, tree)
    assert (line.level, line.remedy.startswith("ulimit -n ")) == (FAIL, True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    (line,) = look(node.open_files, tree)
    assert (line.level, line.what.startswith("4,096 allowed")) == (OK, True)


# --- disks --------------------------------------------------------------------------------------------------


def test_a_run_dir(tree, tmp_path):
    (line,) = look(disks.run_dir, tree)
    assert (line.level, line.what) == (OK, f"{tree['run_dir']}: can be written")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    (line,) = look(disks.run_dir, tree | {"run_dir": f"{tmp_path}/file/run"})
    assert (line.level, "cannot be written (Not a directory)" in line.what) == (FAIL, True)
    Path(tree["run_dir"]).mkdir()
    Path(tree["run_dir"], "config.yaml").write_text(config.dump(config.parse(tree | {"seed": 5}, "test")))
    assert look(disks.run_dir, tree)[0].level == OK  # refused before its first line
    Path(tree["run_dir"], "metrics.jsonl").write_text('{"step": 1}\n')
    (line,) = look(disks.run_dir, tree)
    assert (line.level, "holds a run of another config (seed: 5 -> 0)" in line.what) == (FAIL, True)


def test_a_mirror(tree, tmp_path):
    assert look(disks.mirror, tree) == []
    tree["mirror"] = f"file://{tmp_path}/mirror"
    (line,) = look(disks.mirror, tree)
    assert (line.level, line.what) == (OK, f"{tree['mirror']}: can be written, read and deleted")
    assert everything(tmp_path / "mirror") == {}
    (tmp_path / "file").touch()
    (line,) = look(disks.mirror, tree | {"mirror": f"file://{tmp_path}/file/run"})
    assert line.level == FAIL
    assert line.what.startswith(f"mirror: file://{tmp_path}/file/run cannot be written")


def test_checkpoints_have_the_size_that_is_told(tree, monkeypatch):
    tree |= {"ema": {"decay": 0.9}, "checkpoint": {"keep_last": 1, "keep_best": 0}}
    loop.train(config.parse(tree, "test"))  # to KD, in which every layer has its optimizer state
    (folder,) = Path(tree["run_dir"], "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    space(monkeypatch, 2.2 * size)
    (line,) = look(disks.checkpoints, tree)
    assert line.level == OK
    told, unit = line.what.split(" each, up to ")[0].split()
    assert float(told) * {"kB": 1e3, "MB": 1e6}[unit] == pytest.approx(
        size, rel=0.1
    )  # with names, hashes and JSON, 20 kB
    assert look(disks.checkpoints, tree | {"checkpoint": {"keep_last": 8}})[0].level == WARN
    space(monkeypatch, 1.5 * size)
    assert look(disks.checkpoints, tree)[0].level == FAIL


def test_a_cache_dir(tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (line,) = look(disks.cache_dir, with_data(tree, cache_dir=f"{tmp_path}/file/cache"))
    assert (line.level, "cannot be written" in line.what) == (FAIL, True)
    cache = tmp_path / "cache" / "remote-shards"
    cache.mkdir(parents=True)
    (cache / "shard").write_bytes(bytes(500_000))
    far = with_data(
        tree, cache_dir=f"{tmp_path}/cache", root="memory://far", train="a-{0..3}.tar", cache_bytes=3e6
    )
    space(monkeypatch, 2.6e6)
    assert look(disks.cache_dir, far)[0].level == OK
    space(monkeypatch, 2.4e6)
    (line,) = look(disks.cache_dir, far)
    assert (line.level, line.remedy) == (WARN, "use a larger disk, or data.cache_bytes=2.6e+06")
    assert look(disks.cache_dir, with_data(tree, cache_dir=f"{tmp_path}/cache"))[0].level == OK  # not remote


# --- what a run reads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": "0 steps"}, "duration is less than one step (an epoch has 6): raise it"),
        ({"evaluate": {"every": "0.01 epochs"}}, "evaluate.every is less than one step"),
        (
            {"warmup": {"curriculum": "sequential", "pairs": [(0, 0)], "durations": ["0.01 epochs"]}},
            "warmup.durations: 0.01 epochs for pair 1 is less than one step",
        ),
        (
            {"warmup": {"pairs": "auto", "durations": ["4 steps"]}},
            "warmup.durations: 1 given for 3 pairs: give one per pair",
        ),
        ({"warmup": {"curriculum": "sequential", "lr": [0.1, 0.2]}}, "warmup.lr: 2 values for 3 pairs"),
        (
            {"schedule": {"name": "step", "decay_every": "3 samples"}, "warmup": None},
            "schedule.decay_every: 3 samples is less than one step: raise it",
        ),
        (
            {"schedule": {"name": "cosine", "warmup": "25 steps"}, "warmup": None},
            "schedule.warmup: 25 steps are 25 steps, and the phase kd has 24, so that it never reaches",
        ),
        (
            {"warmup": {"durations": ["1 step", "1 step", "2 steps"], "schedule": {"warmup": "1 epoch"}}},
            "warmup.schedule.warmup: 1 epoch are 6 steps, and the phase warmup 1/1 has 4",
        ),
        (
            {
                "warmup": {"durations": ["6 steps", "6 steps", "8 steps"]},
                "kd": {"schedule": {"warmup": "6 steps"}},
            },
            "kd.schedule.warmup: 6 steps are 6 steps, and the phase kd has 4",
        ),
    ],
)
def test_durations_are_refused_as_by_a_run(tree, change, message):
    tree = tree | {"duration": "24 steps"} | change
    verify.index("train-*.tar", tree["data"]["root"])
    (line,) = (line for line in look(inputs.data_shards, tree) if line.level == FAIL)
    assert message in line.what
    with pytest.raises(UserError, match=re.escape(message)):
        loop.train(config.parse(tree, "test"))


def test_a_phase_that_inherits_a_warmup_of_the_rate_which_it_cannot_end_is_shown(tree, capsys):
    tree |= {
        "duration": "24 steps",
        "schedule": {"name": "cosine", "warmup": "1 epoch"},
        "warmup": {"durations": ["1 step", "1 step", "2 steps"]},
    }
    verify.index("train-*.tar", tree["data"]["root"])
    lines = [line for line in look(inputs.data_shards, tree) if line.level != OK]
    note = "schedule.warmup: 1 epoch are 6 steps, and the phase warmup 1/1 has 4, so that it never reaches"
    assert [line.level for line in lines if line.what.startswith(note)] == [WARN]
    settings = config.parse(tree, "test")
    assert len([one for one in estimate.of_run(settings, 1).notes if one.startswith(note)]) == 1
    loop.train(settings)
    assert capsys.readouterr().err.count(f"indistill: WARNING: {note}") == 1
    tree["warmup"]["schedule"] = {"name": "constant"}
    assert not [line for line in look(inputs.data_shards, tree) if "schedule" in line.what]


def test_a_decay_that_its_phase_does_not_reach_is_shown(tree):
    def notes(**keys):
        settings = config.parse(tree | {"duration": "24 steps"} | keys, "test")
        return Timetable.of(settings, 6, pairs=3).notes

    warmup = {"durations": ["4 steps", "4 steps", "2 steps"]}
    schedule = {"name": "multistep", "decay_at": ["13 steps", "14 steps", "95 percent"]}
    note = "schedule.decay_at: 14 steps, 95 percent: from its start, the phase kd has 14 steps"
    (found,) = notes(warmup=warmup, schedule=schedule)
    assert found.startswith(note)
    (found,) = notes(warmup=warmup, kd={"losses": [{"name": "ce"}], "schedule": schedule})
    assert found.startswith(f"kd.{note}")
    assert notes(warmup=None, schedule=schedule) == ()
    assert notes(warmup=warmup | {"curriculum": "auto"}, schedule=schedule) == ()
    assert len(notes(warmup=warmup | {"schedule": schedule, "curriculum": "sequential"})) == 3
    assert notes(warmup=warmup, schedule=schedule | {"name": "cosine"}) == ()


def test_durations_of_each_stage_are_checked(tree):
    verify.index("train-*.tar", tree["data"]["root"])
    tree |= {"duration": "24 steps", "warmup": None}
    other = tree | {"evaluate": {"every": "0.01 epochs"}}
    failed = [line.what for line in look(inputs.data_shards, tree, other) if line.level == FAIL]
    assert failed == ["evaluate.every is less than one step (an epoch has 6): raise it"]


def test_single_images_are_refused_as_by_a_run(tree):
    student = {"name": "test_resnet"}
    (line,) = look(disks.checkpoints, with_data(tree, global_batch=1, streams=1) | {"student": student})
    assert line.level == FAIL  # its last map has one pixel
    assert "data.global_batch: 1 leaves one image to each rank and accumulation step" in line.what
    (line,) = look(disks.checkpoints, tree | {"student": student})
    assert line.level == OK


def test_weights(tree, tmp_path):
    names = ("whole.safetensors", "cut.safetensors", "objects.pt", "other.pt", "diverged.pt")
    whole, cut, objects, other, diverged = (tmp_path / name for name in names)
    state = timm.create_model("cnn32_auxiliary", num_classes=tree["data"]["num_classes"]).state_dict()
    save_file(state, whole)
    torch.save({"weight": torch.zeros(1000)}, other)
    torch.save({name: value * float("nan") for name, value in state.items()}, diverged)
    cut.write_bytes(whole.read_bytes()[:-1])
    torch.save({"path": Path("object")}, objects)
    levels = {}
    for path in (whole, cut, objects, other, diverged, tmp_path / "gone.pt"):
        (line,) = look(
            inputs.weights, tree | {"teacher": {"name": "cnn32_auxiliary", "checkpoint": str(path)}}
        )
        levels[path.name] = line.level
        assert line.what.startswith("teacher.checkpoint: ")
        assert str(path) in line.what
    assert levels.pop("whole.safetensors") == OK
    assert set(levels) == {"cut.safetensors", "objects.pt", "other.pt", "diverged.pt", "gone.pt"}
    assert set(levels.values()) == {FAIL}
    made = f"{tree['run_dir']}/student.safetensors"  # by an earlier stage
    assert not look(inputs.weights, tree, tree | {"teacher": {"name": "cnn32_student", "checkpoint": made}})
    (line,) = look(
        inputs.weights, tree | {"targets": "cached", "data": tree["data"] | {"augment": {"views": 2}}}
    )
    assert (line.level, "no stored targets there" in line.what) == (FAIL, True)


def test_weights_from_the_hub(tree, tmp_path, monkeypatch):
    tree |= {"student": {"name": "resnet18", "pretrained": True}}
    (line,) = look(inputs.weights, tree)
    assert (line.level, "student: the weights of resnet18 are not in this node's cache" in line.what) == (
        WARN,
        True,
    )
    monkeypatch.setattr(
        inputs.huggingface_hub, "try_to_load_from_cache", lambda hub, file: f"{tmp_path}/{hub}/{file}"
    )
    (line,) = look(inputs.weights, tree)
    assert (line.level, "in this node's cache (timm/resnet18" in line.what) == (OK, True)


def test_shards(tree, data_dir, tmp_path, monkeypatch):
    told = {line.what.split(":")[0]: line for line in look(inputs.data_shards, tree)}
    assert told["data.train"].what == "data.train: 3 shards, 192 samples"
    assert told["data.eval"].what == "data.eval: 1 shard, 51 samples"
    (line,) = look(inputs.data_shards, with_data(tree, train="gone-{0..3}.tar"))
    assert (line.level, "gone-0.tar: no such shard" in line.what) == (FAIL, True)
    (line,) = look(inputs.data_shards, with_data(tree, streams=5))
    assert (line.level, "data.global_batch (32) must be divisible by data.streams (5)" in line.what) == (
        FAIL,
        True,
    )

    moved = tmp_path / "moved"
    shutil.copytree(data_dir, moved)
    cut, unindexed = sorted(moved.glob("train-*.tar"))[:2]
    cut.write_bytes(cut.read_bytes()[:-1024])
    Path(f"{unindexed}.index.json").unlink()
    before = everything(moved)
    lines = look(inputs.data_shards, with_data(tree, root=str(moved)))
    assert [line.level for line in lines] == [FAIL, WARN, OK]
    assert f"{cut}: the shard is cut or changed" in lines[0].what
    assert f"data.train: 1 of 3 shards have no index ({unindexed})" in lines[1].what
    assert lines[1].remedy == f"indistill shards index '{moved}/train-*.tar'"
    assert everything(moved) == before


REFUSED = {
    "no label": ([("a.jpg", picture(0))], r"sample a: has no label, because there is no a\.cls: "),
    "label": (
        [("a.jpg", picture(0)), ("a.cls", b"10")],
        "sample a: label 10 is none of the data.num_classes",
    ),
    "word": ([("a.jpg", picture(0)), ("a.cls", b"cat")], r"a\.cls holds b'cat': a label is a non-negative"),
    "no image": ([("a.cls", b"1")], r"sample 'a' has a \.cls but no image"),
    "twice": ([("a.jpg", picture(0)), ("a.png", picture(1)), ("a.cls", b"1")], "sample 'a' has two images"),
    "dots": ([("s_0.5.jpg", picture(0)), ("s_0.5.cls", b"1")], "images or labels belong to no sample"),
    "no member": ([], "hold"),
    "sparse": (None, "a.jpg is a sparse member"),
}


@pytest.mark.parametrize(("members", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("key", ["data.train", "data.eval", "streamed"])
@pytest.mark.parametrize("indexed", [False, True])
def test_what_train_refuses_fails(tree, tmp_path, members, message, key, indexed):
    path = tmp_path / "bad.tar"
    if members is None:
        (tmp_path / "a.jpg").write_bytes(b"")
        os.truncate(tmp_path / "a.jpg", 10**6)
        subprocess.run(["tar", "-C", tmp_path, "--sparse", "-cf", path, "a.jpg"], check=True, timeout=60)
    else:
        write_tar(path, members)
    keys = {"eval" if key == "data.eval" else "train": str(path)}
    if key == "streamed":
        keys |= {"access": "stream", "epoch_samples": 192, "in_memory": False, "workers": 0}
    tree = with_data(tree, **keys)
    settings = config.parse(tree, "test")
    if indexed:
        with contextlib.suppress(UserError):  # what has no index is refused before
            load_index(str(path))
    before = everything(tmp_path)
    failed = [line.what for line in look(inputs.data_shards, tree) if line.level == FAIL]
    assert everything(tmp_path) == before
    if members == [] and key == "streamed":  # other shards may hold samples
        assert failed == []
        return
    (what,) = failed
    assert re.search(message, what)

    def train():
        if key == "streamed":
            return list(read_shard(str(path), settings.data.num_classes, others=Others()))
        return open_shards(settings.data, str(path))

    with pytest.raises(UserError, match=message):
        train()


def test_a_compressed_shard_that_is_read_at_random_fails(tree, tmp_path):
    content = Path(write_tar(tmp_path / "a.tar", [("a.jpg", picture(0)), ("a.cls", b"1")])).read_bytes()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(content))
    lines = look(inputs.data_shards, with_data(tree, eval=str(path), in_memory=False))
    (what,) = (line.what for line in lines if line.level == FAIL)
    assert what.startswith(f"data.eval: {path}: a compressed shard cannot be read at random")
    settings = config.parse(with_data(tree, eval=str(path), in_memory=False), "test")
    with pytest.raises(UserError, match="a compressed shard cannot be read at random"):
        open_shards(settings.data, str(path))


def test_the_index_of_a_remote_shard_is_checked(tree, tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    path = write_tar(tmp_path / "a.tar", [("a.jpg", picture(0)), ("a.cls", b"10")])
    load_index(path)
    for name in ("a.tar", "a.tar.index.json"):
        files.pipe(f"/doctor/{name}", (tmp_path / name).read_bytes())
    files.pipe("/doctor/b.tar", (tmp_path / "a.tar").read_bytes())  # without an index, it is not fetched
    cache = tmp_path / "cache"
    far = {"train": "memory://doctor/{a,b}.tar", "cache_dir": str(cache)}
    (line,) = (line for line in look(inputs.data_shards, with_data(tree, **far)) if line.level == FAIL)
    assert line.what.startswith("data.train: a.tar: sample a: label 10 is none of the data.num_classes")
    assert not cache.exists()


SLOW = {"machine": {"decode_images_per_second": 1.0}}  # which any machine surpasses


def test_reading(tree, data_dir, tmp_path):
    tree = with_data(tree, in_memory=False, workers=1) | SLOW
    before = everything(data_dir)
    (line,) = look(inputs.reading, tree)
    assert (line.level, "images/s by one loader worker" in line.what) == (OK, True)
    (line,) = look(inputs.reading, tree | {"machine": {"decode_images_per_second": 1e9}})
    assert (line.level, "less than half of the 1e+09" in line.what) == (WARN, True)
    assert everything(data_dir) == before

    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / "train-0.tar"
    cut.write_bytes(sorted(data_dir.glob("train-*.tar"))[0].read_bytes()[:20480])  # and no index
    (line,) = look(inputs.reading, with_data(tree, root=str(cut.parent)))
    assert (line.level, f"{cut}: the tar is cut or damaged" in line.what) == (FAIL, True)
    assert list(cut.parent.iterdir()) == [cut]
    packed = cut.with_name("train-0.tar.gz")
    packed.write_bytes(gzip.compress(sorted(data_dir.glob("train-*.tar"))[0].read_bytes()))
    (line,) = look(
        inputs.reading, with_data(tree, root=str(cut.parent), train="train-0.tar.gz")
    )  # in the worker
    assert (line.level, line.what.startswith(f"{packed}: a compressed shard cannot be read at")) == (
        FAIL,
        True,
    )


def test_reading_what_cannot_be_decoded(tree, tmp_path):
    pack_images(tmp_path / "bad", "train", samples=32, per_shard=32, seed=1)
    (tar,) = (tmp_path / "bad").glob("*.tar")
    content = bytearray(tar.read_bytes())
    begin = content.index(b"IHDR")
    content[begin : begin + 16] = bytes(16)
    tar.write_bytes(content)
    (line,) = look(inputs.reading, with_data(tree, root=str(tmp_path / "bad"), in_memory=False, workers=0))
    assert (line.level, "1 cannot be decoded (" in line.what) == (WARN, True)
    assert "train0000" in line.what


def test_reading_remote_shards_leaves_the_cache_as_it_is(tree, data_dir, tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    for path in data_dir.glob("train-*"):
        files.pipe(f"/far/{path.name}", path.read_bytes())
    names = [path.name for path in sorted(data_dir.glob("train-*.tar"))]
    far = {
        "root": "memory://far",
        "train": names,
        "cache_dir": f"{tmp_path}/cache",
        "in_memory": False,
        "workers": 0,
    }
    for access in ({}, {"access": "stream", "epoch_samples": 192}):
        (line,) = look(inputs.reading, with_data(tree, **far, **access) | SLOW)
        assert (line.level, line.what.startswith(f"{names[0]}: ")) == (OK, True)
    assert not list(tmp_path.iterdir())


def test_retrieval_of_a_class_that_the_database_lacks_fails_as_it_would_in_train(tree, tmp_path):
    pack_images(tmp_path / "few", "train", samples=8, per_shard=8, seed=1)  # of classes 0 to 7
    keys = {"train": str(tmp_path / "few" / "train-*.tar")}
    found = look(inputs.evaluation_images, with_data(tree, **keys) | {"evaluate": {"retrieval": True}})
    (line,) = (line for line in found if line.level == FAIL)
    assert line.what.startswith("evaluate.retrieval: data.train has no image of 2 of data.eval's classes")
    assert not [
        line for line in look(inputs.evaluation_images, with_data(tree, **keys)) if line.level == FAIL
    ]


def test_evaluation_images_that_are_trained_on(tree, tmp_path, monkeypatch):
    train_dir, eval_dir = tmp_path / "train", tmp_path / "eval"
    pack_images(train_dir, "train", samples=60, per_shard=20, seed=1)
    pack_images(eval_dir, "eval", samples=20, per_shard=20, seed=2)
    keys = {"root": str(tmp_path), "train": "train/*.tar", "eval": "eval/*.tar"}
    (line,) = look(inputs.evaluation_images, with_data(tree, **keys))
    assert (line.level, line.what) == (OK, "data.eval: of 20 images, none is in data.train")

    # Seven images of the training set among the others, one of them twice; their keys and labels say nothing.
    copied = [sample.image for sample in shards.ShardSet("train/*.tar", str(tmp_path)).iterate()][10:57:8]
    own = [sample.image for sample in shards.ShardSet("eval/*.tar", str(tmp_path)).iterate()]
    images = [*own, *copied, copied[0]]
    packed = [(f"new{i}", image, "png", i % 10) for i, image in enumerate(images)]
    packing.pack(packed, tmp_path / "mixed", "eval", samples_per_shard=9)
    shared = sum(image in copied for image in images)
    count = f"{shared} of 27 images"
    assert shared == 7
    with gzip.open(tmp_path / "mixed" / "eval.tar.gz", "wb") as stream:
        (whole,) = packing.pack(packed, tmp_path / "whole", "eval", samples_per_shard=99)
        stream.write(whole.read_bytes())
    verify.index(str(tmp_path / "mixed" / "eval.tar.gz"))
    for urls in ("mixed/*.tar", "mixed/eval.tar.gz"):
        (line,) = look(inputs.evaluation_images, with_data(tree, **keys | {"eval": urls}))
        assert (line.level, line.what) == (WARN, f"data.eval: {count}, are in data.train too, byte for byte")
        assert "scores say nothing about new images" in line.remedy

    # Of a large set a sample; and what there is no time for is said.
    monkeypatch.setattr(overlap, "MOST_IMAGES", 10)
    (line,) = look(inputs.evaluation_images, with_data(tree, **keys | {"eval": "train/*.tar"}))
    told = "data.eval: 10 of 10 images, a random sample of 60, are in data.train too, byte for byte"
    assert (line.level, line.what) == (WARN, told)
    monkeypatch.setattr(inputs, "OVERLAP_SECONDS", -1.0)
    (line,) = look(inputs.evaluation_images, with_data(tree, **keys))
    assert line.what.startswith("data.eval: of 1 images, a random sample of 20, compared with ")

    # Shards without an index, which would have to be read from end to end.
    for file in train_dir.glob("*.json"):
        file.unlink()
    (line,) = look(inputs.evaluation_images, with_data(tree, **keys))
    assert (line.level, line.what.startswith("not compared")) == (OK, True)
    assert not list(train_dir.glob("*.json"))


def test_class_lists(tree, tmp_path):
    tree = with_data(tree, root=str(tmp_path), train="train/*.tar", eval="eval/*.tar")
    (line,) = look(inputs.class_lists, tree)
    assert (line.level, line.what.startswith("no class names next to data.train")) == (OK, True)

    def named(name: str, names: list[str]) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "dataset.json").write_text(json.dumps({"classes": names}))

    ten = [f"class {i}" for i in range(10)]
    named("train", ten)
    (line,) = look(inputs.class_lists, tree)
    assert line.what.startswith("data.train has 10 class names, data.eval has none")
    named("eval", ten)
    (line,) = look(inputs.class_lists, tree)
    assert (line.level, line.what) == (
        OK,
        "data.train has 10 class names, data.eval has the same",
    )
    (line,) = look(inputs.class_lists, with_data(tree, num_classes=12))
    assert (line.level, line.remedy) == (WARN, "set data.num_classes, which is 12, to their number")
    named("eval", ten[1:])
    (line,) = look(inputs.class_lists, tree)
    assert (line.level, "label 0 is 'class 1' in" in line.what) == (FAIL, True)
    named("eval", ten)
    teacher = {"name": "cnn32_auxiliary", "checkpoint": str(tmp_path / "student.safetensors")}
    (tmp_path / "classes.json").write_text(json.dumps(ten[::-1]))
    (line,) = look(inputs.class_lists, tree | {"teacher": teacher})
    assert line.level == FAIL
    assert line.what.startswith(f"data.train: its classes are not those of {tmp_path}/classes.json: label 0")


# --- all of them --------------------------------------------------------------------------------------------


def test_a_check_that_crashes_is_a_line(capsys, monkeypatch):
    def broken_check(here):
        yield OK, "so far so good"
        raise ValueError("the text\nof the error")

    monkeypatch.setattr(doctor_run, "ALONE", (broken_check,))
    assert run() == 1
    assert capsys.readouterr().out.splitlines() == [
        "ok    broken check: so far so good",
        "FAIL  broken check: ValueError: the text of the error",
        "1 ok, 0 warn, 1 FAIL",
    ]


def test_a_launch_that_is_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    (line,) = look(ranks.start)
    assert (line.level, line.what.startswith("WORLD_SIZE=2, but no RANK, ")) == (FAIL, True)


def test_lines_of_many_ranks():
    shared, mine = (
        Line("versions", OK, "torch 3"),
        [Line("reading", OK, f"{rank} MB/s") for rank in range(12)],
    )
    full, slow = (
        Line("run dir", FAIL, "full", "empty it"),
        [Line("gpu", WARN, f"number {rank}") for rank in range(12)],
    )
    found = {rank: [shared, slow[rank], *[full] * (rank in (3, 5)), mine[rank]] for rank in range(12)}
    findings = merged(found, {rank: f"node{rank // 8}" for rank in range(12)})
    assert findings[0] == ("versions", OK, "torch 3", "", list(range(12)), ["node0", "node1"])
    printed = text(findings, 12).splitlines()
    assert printed[0] == "ok    versions: torch 3"
    assert printed[1] == "warn  gpu: rank 0 (node0): number 0"
    assert printed[9:11] == ["FAIL  run dir: ranks 3, 5 (node0): full: empty it", "ok    reading: 0 MB/s"]
    assert printed[11:] == ["warn  gpu: 4 more of this kind (--json has them)", "2 ok, 12 warn, 1 FAIL"]


def test_the_command(tree, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))

    def exit_code(*arguments: str) -> int:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["doctor", *arguments])
        return exit_.value.code

    assert exit_code(str(path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["processes"]) == (True, 1)
    assert {"versions", "start", "cores", "run dir", "data shards", "reading"} <= {
        line["check"] for line in told["lines"]
    }
    assert not Path(tree["run_dir"]).exists()
    assert exit_code(str(path), "teacher={name: resnet18, checkpoint: gone.pt}", "data.train=gone.tar") == 1
    printed = capsys.readouterr().out
    assert (
        "\nFAIL  weights: teacher.checkpoint: no file gone.pt: correct the path; every node needs the file\n"
        in printed
    )
    assert printed.count("gone.tar: no such shard") == 1
    assert exit_code() == 0
    assert "run dir" not in capsys.readouterr().out
    assert exit_code(str(path), "data.num_clases=3") == 2
    assert shards.ShardSet("train-*.tar", tree["data"]["root"])  # as before
