"""Check weights, stored targets and shards, and how fast images are read."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import huggingface_hub
import numpy as np
import timm
import torch
from safetensors import safe_open

from indistill import config
from indistill.commands.doctor.disks import existing_parent
from indistill.commands.doctor.findings import (
    FAIL,
    MOST_SHOWN,
    OK,
    WARN,
    Here,
    Item,
    Said,
    counted_word,
    size_text,
)
from indistill.config import Config, UserError, in_one_line, label_reader
from indistill.config.metric_names import eval_key
from indistill.config.run_dir import weights_file
from indistill.curriculum import ImageSizes, Timetable
from indistill.data import class_names, labels, overlap, remote, shards
from indistill.data.dataset import check_shard, open_shards
from indistill.data.index import Index, index_files, load_index, numbered, parse_index, stored_index
from indistill.data.loader import IndexedTraining, check_accumulation, sample_order
from indistill.data.samples import CLS, Others
from indistill.data.stream import StreamedTraining, read_shard
from indistill.data.training import TrainingData, bank_shards, eval_shards
from indistill.evaluate.bank import check_bank
from indistill.models import timm_model
from indistill.targets.manifest import check_classes, load_manifest, targets_root
from indistill.training import lessons, parts

LOOK_SECONDS = 2.0  # for a measurement
SHARDS_SECONDS = 15.0  # to check the shards of a set
MOST_UNINDEXED_BYTES = 2 * 10**9  # of a shard that is read to its end, because it has no index
MOST_INDEX_BYTES = 5 * 10**8  # of the indices that are loaded: ten million images, ten seconds
OVERLAP_SECONDS = 20.0  # to search the training images for evaluation images
FETCH_SECONDS = 20.0  # for a remote shard, which a run fetches whole
LOADER_BATCH = 32  # images


# --- inputs of a run ---------------------------------------------------------------------------------------
def weights(here: Here) -> Said:
    """Check the initial weights and stored targets, except the files that an earlier stage will write."""
    made = {weights_file(settings) for settings in here.settings}
    for settings in here.settings:
        cached = settings.targets.source == "cached"  # without the teacher
        sections: list[tuple[str, config.Model | None]] = [("student", settings.student)]
        for one in reversed(settings.by_teacher.values()):
            if cached:
                yield _stored_targets(targets_root(one))
            else:
                sections.insert(0, ("teacher", one.teacher))
        for role, section in sections:
            for key in ("checkpoint", "heads"):
                path = getattr(section, key, None)
                if path and (path not in made or os.path.exists(path)):
                    item = _weights_file(f"{role}.{key}", path)
                    if section and key == "checkpoint" and item[0] == OK and not here.rank:
                        item = _fitting(item, settings, section, role)
                    yield item
            if section is not None and section.pretrained:
                yield _pretrained(role, section)


def _stored_targets(root: str) -> Item:
    try:
        return OK, f"targets of {len(load_manifest(root).samples)} shards in {root}"
    except UserError as error:
        return FAIL, str(error)


def _weights_file(key: str, path: str) -> Item:
    """Check that a file of weights can be read, without reading all of it."""
    try:
        timm_model.check_file(key, path)
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                file.keys()
        else:
            torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UserError as error:
        return FAIL, str(error), "correct the path; every node needs the file"
    except Exception as error:  # a damaged file fails in pickle, zip or safetensors
        reason = in_one_line(error, 200)
        return FAIL, f"{key}: {path} is not a readable checkpoint: {reason}", "copy or save it again"
    return OK, f"{key}: {path}, {size_text(os.path.getsize(path))}"


def _fitting(item: Item, settings: config.Config, section: config.Model, role: str) -> Item:
    """The item of a file of weights if they fit the network, and else the reason why a run refuses them."""
    try:
        net = timm_model.create(section, settings.data.num_classes, settings.data.full_size, role)
        parts.check_sizes(settings, net, role)
    except UserError as error:
        return FAIL, str(error)
    return item


def _pretrained(role: str, section: config.Model) -> Item:
    """Check that a timm model's weights are available without the internet."""
    try:
        timm_model.check_name(section, role)
    except UserError as error:
        return FAIL, str(error)
    name = section.name
    kind, _, location = name.rpartition(":")
    if kind == "local-dir":
        return OK, f"{role}.name: {location}"
    record = timm.get_pretrained_cfg(name) if not kind and timm.is_model(name) else None
    hub = location if kind == "hf-hub" else record and record.hf_hub_id
    names = (record and record.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    files = [file for file in names if file]
    if hub and any(isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str) for file in files):
        return OK, f"{role}: the weights of {name} are in this node's cache ({hub})"
    what = f"{role}: the weights of {name} are not in this node's cache, so a run has to download them"
    remedy = f"without internet, set {role}.pretrained=false {role}.checkpoint=FILE, or fill HF_HOME"
    return WARN, what, remedy


def data_shards(here: Here) -> Said:
    """Check that all shards exist and match their indices, and that the batch can be divided."""
    if here.local_rank:  # the first process of a node checks for all
        return
    for settings in here.by_data:
        section = settings.data
        if section.access == "stream":
            streamed = StreamedTraining(
                section,
                settings.seed,
                rank=here.rank,
                world=here.world,
                accumulation=settings.grad_accumulation,
                mix=settings.kd.mixing,
            )
            checked, damaged = _streamed(settings, streamed.urls)
            for problem in damaged[:MOST_SHOWN]:
                yield FAIL, f"data.train: {problem}"
            counts = f"{len(streamed.urls)} shards to stream, {streamed.steps_per_epoch} steps an epoch"
            if checked < len(streamed.urls):
                counts += f", {checked} of them checked"
            if not damaged:
                yield OK, f"data.train: {counts}"
            yield from _durations(here, settings, streamed.steps_per_epoch)
        else:
            reader = label_reader(settings)
            yield from _indexed_shards(here, settings, key="data.train", urls=section.train, reader=reader)
        for name, one in section.eval_sets.items():
            mapped = one.label_map is not None
            key = eval_key(name)
            reader = f"top-1 on {key}"
            yield from _indexed_shards(here, settings, key=key, urls=one.shards, mapped=mapped, reader=reader)
    for settings in {str(one.evaluate.bank): one for one in here.settings}.values():
        if settings.evaluate.on_bank and settings.evaluate.bank is not None:
            bank = settings.evaluate.bank
            yield from _indexed_shards(here, settings, key="evaluate.bank", urls=bank, reader=None)


def _indexed_shards(
    here: Here,
    settings: Config,
    *,
    key: str,
    urls: str | list[str],
    mapped: bool = False,
    reader: str | None = "",
) -> Said:
    section = settings.data
    paths = shards.expand(urls, section.root)
    sizes, missing, damaged = _indices(section, paths, mapped=mapped, reader=reader)
    for problem in damaged[:MOST_SHOWN]:
        yield FAIL, f"{key}: {problem}"
    if missing:
        listed_urls = [urls] if isinstance(urls, str) else urls
        words = [os.path.join(section.root or "", url) for url in listed_urls]
        if section.cache_dir:
            words += ["--cache-dir", section.cache_dir]
        what = f"{key}: {len(missing)} of {len(paths)} shards have no index ({missing[0]})"
        remedy = f"indistill shards index {shlex.join(words)}"
        if section.label is not None:
            what += " of the labels of data.label"
            remedy = "start it on one process first, if several would read them all"
        yield WARN, f"{what}: the first start builds them", remedy
    complete = len(sizes) == len(paths)
    if key == "data.train":
        _check_order(here, settings, sizes if complete else None)
        if complete:
            order = sample_order(section, settings.seed, sizes, settings.kd.mixing)
            yield from _durations(here, settings, order.steps_per_epoch(section.global_batch))
    if not damaged:
        what = f"{len(paths)} {counted_word('shard', paths)}"
        if complete:
            what += f", {sum(sizes):,} samples"
        else:
            what += f", {len(sizes)} of them checked"
        yield OK, f"{key}: {what}"


def _check_order(here: Here, settings: Config, sizes: Sequence[int] | None) -> None:
    """Raise UserError for batches that a run refuses.

    `sizes` has the samples of each shard; None if they are not known.
    """
    section = settings.data
    check_accumulation(section, here.world, settings.grad_accumulation, settings.kd.mixing)
    known_sizes = sizes or [2**40]  # more than any batch needs
    order = sample_order(section, settings.seed, known_sizes, settings.kd.mixing)
    order.check(section.global_batch, here.world)


def _durations(here: Here, settings: Config, steps_per_epoch: int) -> Said:
    """Check durations and learning rate schedules, as a run does, of all that have this section `data`."""
    for one in here.settings:
        if one.data == settings.data:
            try:
                notes = Timetable.of(one, steps_per_epoch, pairs=lessons.warmup_pairs(one)).notes
                ImageSizes.of(one, steps_per_epoch)
            except UserError as error:
                yield FAIL, str(error)
            else:
                yield from ((WARN, note) for note in notes)


def _indices(
    section: config.Data, paths: Sequence[str], *, mapped: bool, reader: str | None
) -> tuple[list[int], list[str], list[str]]:
    """Check as many shards as time allows, as a run does when it opens them; nothing is saved.

    Returns their sizes, the shards without index, and the problems. A remote shard without index is not
    fetched.
    """
    sizes, missing, damaged = [], [], []
    classes = labels.of_section(section)
    with tempfile.TemporaryDirectory(prefix=".indistill-doctor-") as directory:
        for path in _while_time_lasts(paths):
            files = index_files(path, section.cache_dir, section.label)
            known = any(map(os.path.exists, files))
            try:
                if not remote.is_remote(path):
                    if not known:
                        missing.append(path)
                        if os.path.getsize(path) > MOST_UNINDEXED_BYTES:
                            continue
                    index = load_index(path, section.cache_dir, save=False, label=section.label)
                elif known:
                    index = parse_index(files[0])
                elif (fetched := _remote_index(section, path, directory)) is not None:
                    index = fetched
                else:
                    continue
                index = numbered(path, index, classes) if classes else index
                check_shard(section, path, index=index, mapped=mapped, label_reader=reader)
                sizes.append(len(index.keys))
            except UserError as error:
                damaged.append(str(error))
    return sizes, sorted(missing), sorted(damaged)


def _remote_index(section: config.Data, path: str, directory: str) -> Index | None:
    """The index beside a remote shard, if there is one."""
    cache = remote.cache_for([path], section.cache_dir and directory)
    if cache is None or path.startswith("pipe:"):
        return None
    return stored_index(path, index_files(path, directory, section.label)[0], cache)


def _while_time_lasts(paths: Sequence[str]) -> Iterator[str]:
    """Yield the shards in random order for a while, so that those that are checked are a random sample."""
    end = time.monotonic() + SHARDS_SECONDS
    for path in np.random.permutation(paths).tolist():
        if time.monotonic() > end:
            return
        yield path


def _streamed(settings: Config, paths: Sequence[str]) -> tuple[int, list[str]]:
    """Read as many local shards as time allows, as a run streams them.

    Returns their number, and the problems.
    """
    checked, damaged = 0, []
    classes, reader = settings.data.num_classes, label_reader(settings)
    how = labels.of_section(settings.data) or CLS
    for path in _while_time_lasts([path for path in paths if not remote.is_remote(path)]):
        if os.path.getsize(path) > MOST_UNINDEXED_BYTES:
            continue
        checked += 1
        try:
            others = Others()
            for _ in read_shard(path, classes, others=others, load=False, label_reader=reader, labels=how):
                pass
        except UserError as error:
            damaged.append(str(error))
    return checked, sorted(damaged)


def class_lists(here: Here) -> Said:
    """Compare the class names of data.train with those of data.eval, stored targets and the teacher."""
    if here.rank:
        return
    for settings in here.settings:
        section = settings.data
        if not section.num_classes:
            yield OK, "data.num_classes: 0: training reads no labels, and no class names"
            continue
        try:
            names = class_names.check(section)
            _check_other_lists(settings, names)
        except UserError as error:
            yield FAIL, str(error)
            continue
        if names is None:
            yield (
                OK,
                f"no class names next to data.train ({class_names.RECORD}): labels are compared as numbers",
            )
            continue
        what = f"data.train has {len(names.names)} class names"
        for name, one in section.eval_sets.items():
            key = eval_key(name)
            if one.label_map is not None:
                what += f", {key} has a label map"
            elif section.label is not None or class_names.beside(one.shards, section.root):
                what += f", {key} has the same"
            else:
                what += f", {key} has none ({class_names.RECORD}) to compare them with"
        if len(names.names) != section.num_classes:
            yield WARN, what, f"set data.num_classes, which is {section.num_classes}, to their number"
        else:
            yield OK, what


def _check_other_lists(settings: Config, names: class_names.Names | None) -> None:
    """Raise UserError if stored targets or the teacher have other classes than data.train."""
    for one in settings.by_teacher.values():
        root, teacher = targets_root(one), one.teacher
        if settings.targets.source == "cached" and os.path.exists(f"{root}/manifest.json"):
            check_classes(root, load_manifest(root), names)
        elif teacher is not None and teacher.checkpoint and teacher.num_classes != 0:
            class_names.check_weights(class_names.of_weights(teacher.checkpoint), settings.data, "teacher")


def evaluation_images(here: Here) -> Said:
    """Search the training images for evaluation images."""
    if here.rank:
        return
    for settings in here.by_data:
        section = settings.data
        training = _with_index(section, section.train)
        for name, one in section.eval_sets.items():
            key = eval_key(name)
            yield from _overlap(key, training, _with_index(section, one.shards))
    yield from dict.fromkeys(item for settings in here.settings for item in _bank(settings))


def _overlap(key: str, training: shards.ShardSet | None, evaluation: shards.ShardSet | None) -> Said:
    """Search the training images for those of one evaluation set."""
    if training is None or evaluation is None:
        limit = f"less than {MOST_INDEX_BYTES / 1e9:g} GB of indices"
        named = "" if key == "data.eval" else f"{key}: "
        yield OK, f"{named}not compared with the training images, which needs local shards with {limit}"
        return
    found = overlap.find(training, evaluation, OVERLAP_SECONDS)
    compared = f"{found.looked_at:,} images"
    if found.looked_at < len(evaluation):
        compared += f", a random sample of {len(evaluation):,}"
    if found.compared < 1:
        compared += f", compared with {found.compared:.0%} of the training images"
    if found.shared:
        what = f"{key}: {found.shared:,} of {compared}, are in data.train too, byte for byte"
        remedy = "their scores say nothing about new images: remove them from one set, and pack it again"
        yield WARN, what, remedy
    else:
        yield OK, f"{key}: of {compared}, none is in data.train"


def _bank(settings: Config) -> Said:
    """Check the label maps, and what k-NN, linear probe and retrieval need, as a run does before its first
    step.
    """
    section = settings.data
    urls = [one.shards for one in section.eval_sets.values()]
    bank = settings.evaluate.bank or section.train if settings.evaluate.on_bank else None
    if any(_with_index(section, one) is None for one in [*urls, *([] if bank is None else [bank])]):
        return  # reported by data_shards, or too much to read
    try:
        sets = {name: eval_shards(section, name, settings.evaluate.bank) for name in section.eval_sets}
        if bank is not None:
            check_bank(settings, bank_shards(settings), sets)
    except UserError as error:
        yield FAIL, str(error)


def _with_index(section: config.Data, urls: str | list[str]) -> shards.ShardSet | None:
    """Open local shards that have an index; None for others, and for mistakes that data_shards reports."""
    try:
        paths = shards.expand(urls, section.root)
        if any(map(remote.is_remote, paths)):
            return None
        files = [index_files(path, section.cache_dir, section.label) for path in paths]
        existing = [list(filter(os.path.exists, candidates)) for candidates in files]
        if not all(existing) or sum(os.path.getsize(files[0]) for files in existing) > MOST_INDEX_BYTES:
            return None
        return shards.ShardSet(paths, cache_dir=section.cache_dir, labels=labels.of_section(section))
    except UserError:
        return None


def reading(here: Here) -> Said:
    """Measure how fast this node reads: a stream of bytes, and images by one loader worker."""
    for settings in here.by_data:
        section = settings.data
        try:
            paths = shards.expand(section.train, section.root)
        except UserError:
            continue  # reported by data_shards
        first = here.rank % len(paths)  # ranks read different shards
        paths = paths[first:] + paths[:first]
        what = remote.base_name(paths[0])
        fetch_seconds = 0.0
        if not what.startswith("pipe:"):  # a command whose output is not read to the end fails
            rate, fetch_seconds = _stream(paths)
            what += f": {size_text(rate)}/s"
        fetched = section.access == "index" and remote.is_remote(paths[0])
        if fetched and fetch_seconds > FETCH_SECONDS:
            what += f", it takes {fetch_seconds:.0f} s to fetch a shard"
            yield WARN, what, "use a nearer store, or smaller shards"
            continue
        parent = existing_parent(section.cache_dir) if fetched and section.cache_dir else None
        with tempfile.TemporaryDirectory(prefix=".indistill-doctor-", dir=parent) as directory:
            speed, replaced = _load(settings, paths, directory)
        yield _speed_item(settings, what, speed, replaced)


def _speed_item(settings: Config, what: str, speed: float, replaced: list[str]) -> Item:
    """Judge the loader's images per second, and the images that cannot be decoded."""
    in_memory = settings.data.in_memory
    what += f", {speed:,.0f} images/s {'from memory' if in_memory else 'by one loader worker'}"
    planned = settings.machine.decode_images_per_second
    if replaced:
        what += f"; {len(replaced)} cannot be decoded ({replaced[0]})"
        return WARN, what, "`indistill shards verify` lists all of them"
    if not in_memory and speed < planned / 2:
        what += f", less than half of the {planned:g} of machine.decode_images_per_second"
        what += f" (load average here: {os.getloadavg()[0]:.1f})"
        remedy = "use smaller images (`shards pack --resize`), more data.workers, or a nearer disk"
        return WARN, what, remedy
    return OK, what


def _stream(paths: Sequence[str]) -> tuple[float, float]:
    """Read shards for a while; returns bytes per second, and the seconds that the first shard takes."""
    done = 0
    first_seconds: float | None = None
    began = time.monotonic()
    for path in paths:
        with _opened(path) as (stream, length):
            while block := stream.read(1 << 20):
                done += len(block)
                seconds = time.monotonic() - began
                if seconds > LOOK_SECONDS:
                    return done / seconds, first_seconds or (length or float("inf")) * seconds / done
        first_seconds = first_seconds or time.monotonic() - began
    return done / (time.monotonic() - began), first_seconds or 0.0


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """Open a shard; yields its stream and, for a remote shard, its size if the source reports it."""
    if remote.is_remote(path):
        with remote.open_remote(path) as opened:
            yield opened
        return
    with open(path, "rb") as stream:
        os.posix_fadvise(
            stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED
        )  # measure the disk, not the page cache
        yield stream, None


def _load(settings: Config, paths: Sequence[str], directory: str) -> tuple[float, list[str]]:
    """Measure a loader's images per second on the first shard, and list images that cannot be decoded.

    Indices and remote shards go to `directory`.
    """
    changes = {
        "train": list(paths[:1]),
        "root": None,
        "cache_dir": directory,
        "workers": min(settings.data.workers, 1),
        "streams": 1,
        "repeats": 1,
        "window": None,
        "global_batch": LOADER_BATCH,
    }
    section = settings.data.model_copy(update=changes)
    training: TrainingData
    alone: dict[str, Any] = {"rank": 0, "world": 1, "accumulation": 1, "label_reader": None}
    if section.access == "index":
        samples = len(open_shards(section, section.train, label_reader=None))
        section = section.model_copy(update={"global_batch": min(LOADER_BATCH, samples)})
        training = IndexedTraining(section, settings.seed, **alone)
    else:
        training = StreamedTraining(section, settings.seed, **alone)
    batches = iter(training.loader(0, 10**9, torch.device("cpu")))
    replaced = list(next(batches).replaced)  # the worker has started by then
    images = 0
    began = time.monotonic()
    while time.monotonic() - began < LOOK_SECONDS:
        batch = next(batches)
        images += len(batch.ids)
        replaced += batch.replaced
    return images / (time.monotonic() - began), sorted(set(replaced))
