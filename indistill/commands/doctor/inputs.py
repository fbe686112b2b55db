"""Check weights, stored targets and shards, and how fast images are read."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO

import huggingface_hub
import numpy as np
import timm
import torch
from safetensors import safe_open

from indistill import config
from indistill.commands.doctor.disks import existing_parent
from indistill.commands.doctor.findings import FAIL, MOST_SHOWN, OK, WARN, Here, Item, Said, size_text
from indistill.config import Config, UserError, in_one_line
from indistill.config.run_dir import weights_file
from indistill.data import class_names, overlap, remote, shards
from indistill.data.dataset import open_shards
from indistill.data.index import index_files, load_index
from indistill.data.loader import IndexedTraining, check_accumulation
from indistill.data.stream import StreamedTraining
from indistill.data.training import TrainingData
from indistill.order import SampleOrder
from indistill.targets.manifest import check_classes, load_manifest, targets_root

LOOK_SECONDS = 2.0  # that something is measured
MOST_INDEX_BYTES = 5 * 10**8  # to load for it: ten million images, ten seconds
OVERLAP_SECONDS = 20.0  # to look for evaluation images among the training images
FETCH_SECONDS = 20.0  # for a remote shard, which a run fetches whole
LOADER_BATCH = 32  # images


# --- what a run reads ---------------------------------------------------------------------------------------
def weights(here: Here) -> Said:
    """What networks begin with, and stored targets; but not what an earlier stage is yet to make."""
    made = {weights_file(settings) for settings in here.settings}
    for settings in here.settings:
        cached = settings.targets.source == "cached"  # without the teacher
        if cached:
            yield _stored_targets(targets_root(settings))
        for role, section in (
            ("teacher", None if cached else settings.teacher),
            ("student", settings.student),
        ):
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
        reason = in_one_line(error, 200)
        return FAIL, f"{key}: {path} is not a readable checkpoint: {reason}", "copy or save it anew"
    return OK, f"{key}: {path}, {size_text(os.path.getsize(path))}"


def _pretrained(role: str, name: str) -> Item:
    kind, _, place = name.rpartition(":")
    if kind == "local-dir":
        there = os.path.isdir(place)
        return (
            (OK, f"{role}.name: {place}")
            if there
            else (FAIL, f"{role}.name: no folder {place}", "correct it")
        )
    found = timm.get_pretrained_cfg(name) if not kind and timm.is_model(name) else None
    hub = place if kind == "hf-hub" else found and found.hf_hub_id
    files = [
        file for file in (found and found.hf_hub_filename, "model.safetensors", "pytorch_model.bin") if file
    ]
    if hub and any(isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str) for file in files):
        return OK, f"{role}: the weights of {name} are in this node's cache ({hub})"
    remedy = f"without internet {role}.pretrained=false {role}.checkpoint=FILE, or a filled HF_HOME"
    return (
        WARN,
        f"{role}: the weights of {name} are not in this node's cache, a run has to fetch them",
        remedy,
    )


def data_shards(here: Here) -> Said:
    """All there, with indices that fit; and a batch that divides."""
    if here.local_rank:  # the first process of a node looks for all
        return
    for settings in here.by_data:
        section, accumulation = settings.data, settings.grad_accumulation
        if section.access == "stream":
            streamed = StreamedTraining(
                section, settings.seed, rank=here.rank, world=here.world, accumulation=accumulation
            )
            yield (
                OK,
                f"data.train: {len(streamed.urls)} shards to stream, {streamed.steps_per_epoch} steps an epoch",
            )
        for key in ("eval",) if section.access == "stream" else ("train", "eval"):
            urls = getattr(section, key)
            if urls is None:
                continue
            paths = shards.expand(urls, section.root, section.allow_pipe)
            sizes, missing, damaged = _indices(paths, section.cache_dir)
            for problem in damaged[:MOST_SHOWN]:
                yield FAIL, f"data.{key}: {problem}"
            if missing:
                words = [
                    os.path.join(section.root or "", url)
                    for url in ([urls] if isinstance(urls, str) else urls)
                ]
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
                told += (
                    f", {sum(sizes):,} samples"
                    if whole
                    else f", {len(sizes)} of them looked at" * bool(sizes)
                )
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
            yield (
                OK,
                f"no class names beside data.train ({class_names.RECORD}), so labels are compared as numbers only",
            )
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
            yield (
                WARN,
                told,
                "their scores say nothing about new images: remove them from one, and pack it again",
            )
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
            what += f": {size_text(rate)}/s"
        fetched = section.access == "index" and remote.is_remote(paths[0])
        if fetched and fetching > FETCH_SECONDS:
            yield (
                WARN,
                f"{what}, a shard takes {fetching:.0f} s to fetch",
                "a nearer store, or smaller shards",
            )
            continue
        place = existing_parent(section.cache_dir) if fetched and section.cache_dir else None
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
    changes = {
        "train": list(paths[:1]),
        "root": None,
        "cache_dir": directory,
        "workers": min(section.workers, 1),
    }
    section = section.model_copy(
        update=changes | {"streams": 1, "window": None, "global_batch": LOADER_BATCH}
    )
    if section.access == "index":
        samples = len(open_shards(section, section.train))
        section, kind = (
            section.model_copy(update={"global_batch": min(LOADER_BATCH, samples)}),
            IndexedTraining,
        )
    training: TrainingData = kind(section, settings.seed, rank=0, world=1, accumulation=1)
    batches = iter(training.loader(0, 10**9, torch.device("cpu")))
    replaced = list(next(batches).replaced)  # by then the worker has begun
    images, began = 0, time.monotonic()
    while time.monotonic() - began < LOOK_SECONDS:
        batch = next(batches)
        images += len(batch.ids)
        replaced += batch.replaced
    return images / (time.monotonic() - began), sorted(set(replaced))
