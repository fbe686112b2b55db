"""Batches against the sample order and against the shards as the `webdataset` package reads them."""

import io
import itertools
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import webdataset
from PIL import Image

from indistill import config
from indistill.config import UserError
from indistill.data import augment, loader, packing, shards
from indistill.data.batch import Batch
from indistill.data.dataset import ImageDataset, open_shards
from indistill.data.decode import decode
from indistill.data.loader import IndexedTraining, eval_shares
from indistill.models.views import EvalView

CPU = torch.device("cpu")
BATCH, STEPS_PER_EPOCH = 32, 6  # of the 192 training samples


@pytest.fixture
def section(tree):
    """Views without augmentation and a set that is not in memory, unless a test asks for other."""
    return config.Data(
        **tree["data"] | {"in_memory": False, "workers": 0, "augment": {"recipe": "none", "flip": False}}
    )


def with_(section, **changes):
    return config.Data(**section.model_dump() | changes)


def open_eval(section):
    return ImageDataset(open_shards(section, section.eval), section, seed=0, view=EvalView("bilinear", 1.0))


def training(section, rank=0, world=1, accumulation=1, seed=0):
    return IndexedTraining(section, seed, rank=rank, world=world, accumulation=accumulation)


def loaded(section, first=0, last=STEPS_PER_EPOCH, **keywords):
    return list(training(section, **keywords).loader(first, last, CPU))


def joined(batches):
    *tensors, replaced, _, _ = zip(*batches)
    return Batch(*(torch.cat(parts) for parts in tensors), list(itertools.chain(*replaced)))


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3])) and batch.replaced == other.replaced
        for batch, other in zip(ours, theirs)
    )


def as_webdataset_reads_it(section, pattern):
    """Pixels [N, H, W, 3] and labels [N] of all shards in order."""
    paths = [str(path) for path in sorted(Path(section.root).glob(pattern))]
    found = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    return np.stack([image for image, _ in found]), np.array([label for _, label in found])


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [False, True])
def test_batches_are_those_of_the_order(section, in_memory):
    section = with_(section, in_memory=in_memory)
    pixels, labels = as_webdataset_reads_it(section, "train-*.tar")
    assert len(pixels) == 192
    order = training(section, seed=5).order
    batches = loaded(section, last=2 * STEPS_PER_EPOCH + 1, seed=5)
    assert len(batches) == 2 * STEPS_PER_EPOCH + 1
    for step, batch in enumerate(batches):
        ids = order.batch(step // STEPS_PER_EPOCH, step % STEPS_PER_EPOCH, BATCH)
        assert batch.ids.tolist() == ids.tolist()
        assert batch.labels.tolist() == labels[ids].tolist()
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), pixels[ids])
    assert not torch.equal(batches[0].ids, batches[STEPS_PER_EPOCH].ids)


@pytest.mark.parametrize("recipe", ["pad_crop", "random_resized_crop"])
def test_views_depend_on_seed_epoch_and_sample(section, recipe):
    section = with_(section, augment={"recipe": recipe}, image_size=24)
    pixels, _ = as_webdataset_reads_it(section, "train-*.tar")
    batches = loaded(section, first=4, last=8, seed=9)
    for step, batch in zip(range(4, 8), batches):
        for image, sample in zip(batch.images, batch.ids.tolist()):
            draws = augment.uniforms(9, step // STEPS_PER_EPOCH, np.array([sample]))[0]
            view = augment.train_view(pixels[sample], draws, recipe=section.augment, size=24)
            assert np.array_equal(image.permute(1, 2, 0).numpy(), view)
    assert not torch.equal(joined(batches).images, joined(loaded(section, first=4, last=8, seed=10)).images)


@pytest.mark.parametrize("views", [None, 4])
@pytest.mark.parametrize("in_memory", [False, True])
def test_repeats_are_different_views_of_the_same_samples(section, views, in_memory):
    section = with_(section, augment={"recipe": "pad_crop", "views": views}, repeats=2, in_memory=in_memory)
    pixels, _ = as_webdataset_reads_it(section, "train-*.tar")
    batches = loaded(section, last=4 * STEPS_PER_EPOCH, seed=9)
    for step in (0, 8, 23):
        batch, epoch = batches[step], step // STEPS_PER_EPOCH
        seen: dict[int, list[int]] = {}
        for image, sample in zip(batch.images, batch.ids.tolist()):
            possible = [
                2 * epoch + repeat if views is None else (2 * epoch + repeat) % 4 for repeat in (0, 1)
            ]
            drawn = [
                augment.train_view(
                    pixels[sample],
                    augment.uniforms(9, view, np.array([sample]))[0],
                    recipe=section.augment,
                    size=32,
                )
                for view in possible
            ]
            match = [np.array_equal(image.permute(1, 2, 0).numpy(), view) for view in drawn]
            seen.setdefault(sample, []).append(match.index(True) if sum(match) == 1 else -1)
        assert len(seen) == BATCH // 2
        assert all(sorted(repeats) == [0, 1] or -1 in repeats for repeats in seen.values())
        assert sum(-1 in repeats for repeats in seen.values()) <= 4  # two views may be the same by chance
    for world in (2, 4):
        ranks = [
            loaded(section, last=4 * STEPS_PER_EPOCH, rank=rank, world=world, seed=9) for rank in range(world)
        ]
        assert equal([joined(parts) for parts in zip(*ranks)], batches)
    assert equal(loaded(section, first=8, last=4 * STEPS_PER_EPOCH, seed=9), batches[8:])


def test_the_next_of_the_stream_stands_in_for_all_repeats(section, damaged):
    section, bad = damaged
    section = with_(section, repeats=2)
    for batch in loaded(section, last=2 * STEPS_PER_EPOCH):
        share = batch.ids.reshape(section.streams, 2, -1)  # stream, repeat, sample
        assert torch.equal(share[:, 0], share[:, 1])
        assert not bad.intersection(batch.ids.tolist())


def test_a_loader_can_begin_at_any_step(section):
    section = with_(section, augment={"recipe": "pad_crop"})
    through = loaded(section, last=2 * STEPS_PER_EPOCH)
    for first in range(2 * STEPS_PER_EPOCH + 1):
        assert equal(loaded(section, first=first, last=2 * STEPS_PER_EPOCH), through[first:])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_ranks_slices_join_to_the_batch(section, world):
    section = with_(section, augment={"recipe": "pad_crop"})
    ranks = [loaded(section, rank=rank, world=world) for rank in range(world)]
    assert {len(batch.ids) for batches in ranks for batch in batches} == {BATCH // world}
    assert equal([joined(parts) for parts in zip(*ranks)], loaded(section))


def test_remote_shards_are_asked_for_ahead_of_their_use(section, monkeypatch):
    asked = []
    monkeypatch.setattr(loader, "PREFETCH_STEPS", 3)
    monkeypatch.setattr(shards.ShardSet, "remote", True)
    monkeypatch.setattr(shards.ShardSet, "prefetch", lambda self, ids: asked.append(ids.tolist()))
    used = [batch.ids.tolist() for batch in loaded(section, first=4, last=12, rank=1, world=2)]
    assert asked[:5] == used[3:]
    assert asked[5:] == [used[-1]] * 3  # nothing lies behind the last step


def test_accumulation_splits_the_batch(section):
    section = with_(section, augment={"recipe": "pad_crop"})
    micro = loaded(section, accumulation=4)
    assert len(micro) == 4 * STEPS_PER_EPOCH
    assert {len(batch.ids) for batch in micro} == {BATCH // 4}
    assert equal([joined(micro[i : i + 4]) for i in range(0, len(micro), 4)], loaded(section))


def test_accumulation_that_does_not_divide_is_refused(section):
    with pytest.raises(UserError, match=r"not divisible by world size \(2\) times grad_accumulation \(3\)"):
        training(section, world=2, accumulation=3)
    with pytest.raises(UserError, match=r"data.streams \(8\) must be divisible by the world size \(3\)"):
        training(section, world=3)


def test_workers_give_the_same_bytes(section):
    section = with_(section, augment={"recipe": "random_resized_crop"})
    alone = loaded(section, first=3, last=9)
    assert equal(loaded(with_(section, workers=2), first=3, last=9), alone)
    assert equal(loaded(with_(section, in_memory=True), first=3, last=9), alone)


def test_a_worker_passes_the_error_on(section, tmp_path):
    packing.pack([("bad", b"no image", "png", 0)], tmp_path, "eval", samples_per_shard=1)
    dataset = open_eval(with_(section, root=str(tmp_path), workers=1))
    with pytest.raises(UserError, match=r"eval-0+.tar: sample bad: not a readable image") as caught:
        list(loader.eval_loader(dataset, 1, rank=0, world=1, device=CPU))
    assert caught.value.found_by_one_rank


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [7, 256])
def test_evaluation_covers_each_sample_once(section, world, batch):
    pixels, labels = as_webdataset_reads_it(section, "eval-*.tar")
    dataset = open_eval(section)
    ranks = [
        list(loader.eval_loader(dataset, batch, rank=rank, world=world, device=CPU)) for rank in range(world)
    ]
    assert max(len(one.ids) for batches in ranks for one in batches) <= batch
    counts = [sum(len(one.ids) for one in batches) for batches in ranks]
    assert max(counts) - min(counts) <= 1
    whole = joined(one for batches in ranks for one in batches)
    assert whole.ids.tolist() == list(range(51))
    assert whole.labels.tolist() == labels.tolist()
    assert np.array_equal(whole.images.permute(0, 2, 3, 1).numpy(), pixels)


def test_more_ranks_than_samples(section):
    for world in (51, 64, 200):
        shares = eval_shares(51, world)
        assert [sample for share in shares for sample in share] == list(range(51))
        assert {len(share) for share in shares} <= {0, 1}
    dataset = open_eval(section)
    empty = [rank for rank, share in enumerate(eval_shares(51, 64)) if not share]
    assert len(empty) == 13
    assert list(loader.eval_loader(dataset, 8, rank=empty[0], world=64, device=CPU)) == []


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_training_set_seen_for_evaluation(section, in_memory, monkeypatch):
    section = with_(section, in_memory=in_memory, augment={"recipe": "pad_crop"}, image_size=28)
    dataset = training(section).dataset
    if in_memory:
        monkeypatch.setattr(augment, "decode_whole", None)
    pixels, _ = as_webdataset_reads_it(section, "train-*.tar")
    seen = dataset.for_evaluation(EvalView("bicubic", 0.875))
    plain = joined(loader.eval_loader(seen, 50, rank=0, world=1, device=CPU))
    centre = pixels[:, 2:30, 2:30]  # 28 / 0.875 = 32: nothing to resize
    assert np.array_equal(plain.images.permute(0, 2, 3, 1).numpy(), centre)
    assert dataset.order is not None


# --- what cannot be used ------------------------------------------------------------------------------------


def pack_sizes(folder, sizes):
    packed = []
    for i, size in enumerate(sizes):
        buffer = io.BytesIO()
        Image.fromarray(np.full((*size, 3), i, dtype=np.uint8)).save(buffer, "PNG")
        packed.append((f"n{i:02d}", buffer.getvalue(), "png", i % 3))
    packing.pack(packed, folder, "train", samples_per_shard=10)


def test_images_of_unequal_sizes_do_not_fit_in_memory(section, tmp_path):
    pack_sizes(tmp_path, [(40, 40), (40, 40), (40, 41)])
    section = with_(section, root=str(tmp_path), global_batch=1, streams=1)
    with pytest.raises(
        UserError, match=r"data.in_memory .* sample n02 has \(40, 41\), the first has \(40, 40\)"
    ):
        training(with_(section, in_memory=True))
    batches = loaded(section, last=3)
    assert [tuple(batch.images.shape) for batch in batches] == [(1, 3, 32, 32)] * 3
    assert sorted(batch.images.unique().item() for batch in batches) == [0, 1, 2]


@pytest.mark.parametrize("in_memory", [False, True])
def test_an_image_of_too_many_pixels_is_one_that_cannot_be_decoded(section, tmp_path, in_memory):
    pack_sizes(tmp_path, [(40, 40), (50, 50), (40, 40)])
    section = with_(section, root=str(tmp_path), global_batch=1, streams=1, max_image_pixels=1600)
    section = with_(section, in_memory=in_memory)
    batches = loaded(section, last=3)
    assert sorted(batch.ids.item() for batch in batches) in ([0, 0, 2], [0, 2, 2])
    refused = "train-000000.tar: sample n01: 50 x 50 pixels are more than data.max_image_pixels (1600)"
    assert [name for batch in batches for name in batch.replaced] == [refused]
    dataset = training(section).dataset.for_evaluation(EvalView("bilinear", 1.0))
    with pytest.raises(UserError, match=re.escape(refused)):
        list(loader.eval_loader(dataset, 3, rank=0, world=1, device=CPU))


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_label_beyond_the_classes_is_refused(section, tmp_path, in_memory):
    pack_sizes(tmp_path, [(32, 32)] * 3)
    section = with_(section, root=str(tmp_path), global_batch=1, streams=1, in_memory=in_memory)
    assert sorted(batch.labels.item() for batch in loaded(with_(section, num_classes=3), last=3)) == [0, 1, 2]
    with pytest.raises(UserError, match=r"sample n02: label 2 is none of the data.num_classes, 0 to 1"):
        loaded(with_(section, num_classes=2), last=3)


# --- images that cannot be decoded --------------------------------------------------------------------------


@pytest.fixture
def damaged(section, tmp_path):
    """The training set with three undecodable images, two of them consecutive in a stream of epoch 0."""
    row = training(section).order.batch(0, 0, BATCH)  # 8 streams of 4 samples
    bad = {int(row[5]), int(row[6]), int(row[20])}
    packed = []
    for i, sample in enumerate(open_shards(section, section.train).iterate()):
        packed.append((sample.key, b"no image" if i in bad else sample.image, "png", sample.label))
    packing.pack(packed, tmp_path, "train", samples_per_shard=64)
    return with_(section, root=str(tmp_path), augment={"recipe": "pad_crop"}), bad


@pytest.mark.parametrize("in_memory", [False, True])
def test_the_next_of_the_stream_stands_in(section, damaged, in_memory):
    section, bad = damaged
    section = with_(section, in_memory=in_memory)
    order = training(section).order
    batches = loaded(section, last=2 * STEPS_PER_EPOCH)
    per_stream = BATCH // section.streams
    for step, batch in enumerate(batches):
        epoch, step = divmod(step, STEPS_PER_EPOCH)
        streams = [
            np.concatenate(
                [order.batch(epoch, s, BATCH).reshape(section.streams, -1)[i] for s in range(STEPS_PER_EPOCH)]
            )
            for i in range(section.streams)
        ]  # each stream's whole row, from the batches
        for row, got in enumerate(batch.ids.tolist()):
            stream, place = divmod(row, per_stream)
            later = np.roll(streams[stream], -(step * per_stream + place))
            assert got == next(sample for sample in later.tolist() if sample not in bad)
    replaced = [name for batch in batches for name in batch.replaced]
    assert len(set(replaced)) == 3
    assert all("not a readable image" in name for name in replaced)
    assert any(len(batch.replaced) >= 3 for batch in batches)

    for world in (2, 4):
        ranks = [loaded(section, last=2 * STEPS_PER_EPOCH, rank=rank, world=world) for rank in range(world)]
        assert equal([joined(parts) for parts in zip(*ranks)], batches)


def test_the_stand_ins_label_and_view_are_its_own(section, damaged):
    whole = list(open_shards(section, section.train).iterate())
    section, _ = damaged
    (batch,) = loaded(section, last=1)
    for sample, label, image in zip(batch.ids.tolist(), batch.labels.tolist(), batch.images):
        view = augment.train_view(
            decode(whole[sample].image, ""),
            augment.uniforms(0, 0, np.array([sample]))[0],
            recipe=section.augment,
            size=32,
        )
        assert label == whole[sample].label
        assert np.array_equal(image.permute(1, 2, 0).numpy(), view)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_stream_without_a_readable_image_is_an_error(section, tmp_path, in_memory):
    packing.pack(
        [("one", b"GIF no", "png", 0), ("two", b"", "png", 0)], tmp_path, "train", samples_per_shard=2
    )
    section = with_(section, root=str(tmp_path), global_batch=1, streams=1, in_memory=in_memory)
    with pytest.raises(UserError, match="can be decoded"):
        loaded(section, last=1)


def test_in_evaluation_it_is_named(section, damaged):
    section, _ = damaged
    dataset = training(section).dataset.for_evaluation(EvalView("bilinear", 1.0))
    with pytest.raises(UserError, match=r"sample train0\d+: not a readable image"):
        list(loader.eval_loader(dataset, 64, rank=0, world=1, device=CPU))


def test_images_that_do_not_fit_in_memory_are_refused(tree, monkeypatch):
    section = config.Data(**tree["data"])
    available = psutil.virtual_memory()._replace(available=100_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: available)
    with pytest.raises(UserError, match=r"589,824 bytes for 192 images of 32 x 32 pixels.*in_memory: false"):
        ImageDataset(open_shards(section, section.train), section, seed=0, view=None)
