"""Plain streaming: exact counts for every rank, a seeded order, resume at a shard."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections import Counter

import pytest
import torch
from conftest import pack_images
from tars import picture, write_tar

from indistill import config
from indistill.config import UserError
from indistill.data import packing, shards, stream
from indistill.data.decode import decode

CPU = torch.device("cpu")


@pytest.fixture
def section(tree, tmp_path):
    """200 samples in 8 shards of 25, each label telling nothing of its shard."""
    pack_images(tmp_path, "s", samples=200, per_shard=25, seed=3)
    return config.Data(
        **tree["data"]
        | {
            "root": str(tmp_path),
            "train": "s-*.tar",
            "access": "stream",
            "epoch_samples": 200,
            "in_memory": False,
        }
        | {
            "workers": 0,
            "global_batch": 40,
            "shuffle_buffer": 30,
            "augment": {"recipe": "none", "flip": False},
        }
    )


def with_(section, **changes):
    return config.Data(**section.model_dump() | changes)


def images(section, first=0, last=5, rank=0, world=1, accumulation=1, seed=0):
    training = stream.StreamedTraining(section, seed, rank=rank, world=world, accumulation=accumulation)
    return [batch.images for batch in training.loader(first, last, CPU)]


def keys(section):
    """Which sample an image is: its bytes, to its place in the shards."""
    table = {}
    for i, sample in enumerate(shards.ShardSet(section.train, section.root).iterate()):
        table[decode(sample.image, "").transpose(2, 0, 1).tobytes()] = i
    return table


def samples(batches, table):
    return [table[image.numpy().tobytes()] for batch in batches for image in batch]


def test_an_epoch_is_nearly_the_set(section):
    table = keys(section)
    assert len(table) == 200
    seen = samples(images(section), table)
    assert len(seen) == 200
    # What the shuffle buffer still holds is missing, and as many of the next epoch are there instead.
    assert len(set(seen)) >= 200 - 30
    assert max(Counter(samples(images(section, last=10), table)).values()) <= 3
    assert seen != sorted(seen)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (2, 2)])
def test_every_rank_gets_exactly_its_share(section, world, workers):
    section, table = with_(section, workers=workers), keys(section)
    own = []
    for rank in range(world):
        batches = images(section, last=7, rank=rank, world=world, accumulation=2)
        assert [len(batch) for batch in batches] == [40 // world // 2] * 14
        own.append({sample // 25 for sample in samples(batches[:4], table)})
    for i in range(world):
        for other in own[i + 1 :]:
            assert not own[i] & other  # within an epoch, no shard is read by two ranks


def test_the_order_is_a_function_of_the_seed(section):
    assert all(torch.equal(a, b) for a, b in zip(images(section), images(section), strict=True))
    assert not torch.equal(images(section)[0], images(section, seed=1)[0])


def test_resume_begins_at_the_shard_of_the_step(section):
    section, table = with_(section, shuffle_buffer=1), keys(section)
    through = [sample // 25 for sample in samples(images(section, last=10), table)]
    resumed = [sample // 25 for sample in samples(images(section, first=3, last=10), table)]
    assert len(resumed) == 7 * 40
    order = list(dict.fromkeys(through[:200]))  # the first epoch's shards
    assert resumed[0] == order[3 * 40 // 25]


def test_fewer_shards_than_readers_are_refused(section):
    with pytest.raises(UserError, match="16 readers of 8 shards"):
        stream.StreamedTraining(with_(section, workers=4), 0, rank=0, world=4, accumulation=1)


def test_what_stream_needs_is_asked_for_at_load(tree):
    tree["data"] |= {"access": "stream"}
    with pytest.raises(UserError, match="epoch_samples"):
        config.parse(tree, "test")
    tree["data"] |= {"epoch_samples": 192, "in_memory": False}
    tree["evaluate"] = {"retrieval": True}
    with pytest.raises(UserError, match="retrieval"):
        config.parse(tree, "test")


def test_a_bad_image_is_left_out_and_named(section, tmp_path):
    packed = [(f"k{i}", b"no" if i == 3 else s.image, "png", s.label) for i, s in enumerate(
        shards.ShardSet(section.train, section.root).iterate()
    )]  # fmt: skip
    packing.pack(packed, tmp_path / "bad", "s", samples_per_shard=25)
    section = with_(section, root=str(tmp_path / "bad"))
    batches = list(stream.StreamedTraining(section, 0, rank=0, world=1, accumulation=1).loader(0, 6, CPU))
    assert [len(batch.labels) for batch in batches] == [40] * 6
    assert any("sample k3" in name for batch in batches for name in batch.replaced)


def test_a_shard_cut_inside_a_member_is_named(section, tmp_path):
    path = sorted(tmp_path.glob("s-*.tar"))[2]
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match=path.name):
        images(section, last=10)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.cls", b"0;1")], r"bad-0\.tar: k\.cls holds b'0;1': a label is a non-negative integer"),
        ([("k.txt", b"1")], r"sample k: has no label, because there is no k\.cls: write it into KEY\.cls"),
        ([("k.cls", b"10")], r"sample k: label 10 is none of the data\.num_classes, 0 to 9"),
    ],
)
def test_labels_are_refused_as_with_an_index(section, tmp_path, members, message):
    write_tar(tmp_path / "bad-0.tar", [("k.jpg", picture(0)), *members])
    section = with_(section, root=str(tmp_path), train="bad-0.tar", workers=0)
    with pytest.raises(UserError, match=message):
        images(section, last=1)


def test_what_is_no_sample_is_left_out(section, tmp_path):
    """An empty shard among others, a text of any size, and WebDataset's folders of metadata."""
    write_tar(tmp_path / "s-9.tar", [("README", b"")])
    write_tar(tmp_path / "s-8.tar", [("__meta__/a.jpg", b"no"), ("x.json", b"{}"), ("x.json", b"{}")])
    batches = list(stream.StreamedTraining(section, 0, rank=0, world=1, accumulation=1).loader(0, 6, CPU))
    assert [len(batch.labels) for batch in batches] == [40] * 6
    assert not any(batch.replaced for batch in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_image_end_the_run(section, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(stream, "MAX_BAD_IN_A_ROW", 100)
    write_tar(tmp_path / "empty-0.tar", [("README", b"")])
    write_tar(tmp_path / "bad-0.tar", [(f"{i}.{kind}", b"1") for i in range(9) for kind in ("jpg", "cls")])
    for name, message in (("empty", "empty-0.tar: neither it"), ("bad", "bad-0.tar.*100 in a row")):
        changed = with_(section, root=str(tmp_path), train=f"{name}-0.tar", workers=workers)
        with pytest.raises(UserError, match=message):
            images(changed, first=3, last=4)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("k.cls", b"1"), ("k.cls", b"1")], "sample 'k' has two labels"),
        ([("k.png", picture(0, "png")), ("k.cls", b"1")], "sample 'k' has two images"),
        (
            [("k.cls", b"1"), ("l.jpg", picture(1)), ("l.cls", b"1"), ("k.jpg", picture(0))],
            "not next to each",
        ),
        ([("k.cls", b"1" * 2000)], "MAX_LABEL_BYTES"),
        ([("k.cls", b"cat")], r"k\.cls holds b'cat': a label is a non-negative integer"),
        ([("k.cls", b"1.0")], r"k\.cls holds b'1\.0': a label is a non-negative integer"),
        ([("l.cls", b"1")], r"sample 'l' has a \.cls but no image"),
    ],
)
def test_samples_are_refused_as_with_an_index(section, tmp_path, members, message):
    path = write_tar(tmp_path / "bad-0.tar", [("k.jpg", picture(0)), *members])
    section = with_(section, root=str(tmp_path), train="bad-0.tar", workers=0, shuffle_buffer=1)
    with pytest.raises(UserError, match=message):
        shards.ShardSet(path)
    with pytest.raises(UserError, match=message if members[0][0] != "l.cls" else "has no label"):
        images(section, last=1)


def test_texts_and_metadata_are_skipped_as_with_an_index(section, tmp_path):
    texts = [("README.md", b"# x"), ("LICENSE", b""), ("__meta__/a.jpg", b"no"), ("._k.jpg", b"no")]
    path = write_tar(tmp_path / "x-0.tar", [*texts, ("k.jpg", picture(0)), ("k.cls", b"1"), *texts])
    assert len(shards.ShardSet(path)) == 1
    section = with_(section, root=str(tmp_path), train="x-0.tar", workers=0, shuffle_buffer=1)
    (batch,) = images(section, last=1)
    assert len(batch) == 40
    assert (batch == batch[:1]).all()


def test_images_with_several_dots_are_named(section, tmp_path, caplog):
    write_tar(tmp_path / "x-0.tar", [("k.jpg", picture(0)), ("k.cls", b"1"), ("s_0.5.jpg", picture(1))])
    section = with_(section, root=str(tmp_path), train="x-0.tar", workers=0, shuffle_buffer=1)
    images(section, last=1)
    assert caplog.text.count("x-0.tar: images or labels belong to no sample") == 1


def test_a_damaged_header_is_found(section, tmp_path):
    """Plain WebDataset takes it for the end of the shard."""
    path = sorted(tmp_path.glob("s-*.tar"))[2]
    content = bytearray(path.read_bytes())
    content[20 * 512 + 3 :] = content[20 * 512 + 4 :]
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path.name}: the tar is cut or damaged"):
        images(section, last=10)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_shard_streams_as_it_is(section, tmp_path, compress):
    expected = images(section)
    for path in tmp_path.glob("s-*.tar"):
        path.write_bytes(compress(path.read_bytes()))
    assert all(torch.equal(a, b) for a, b in zip(images(section), expected, strict=True))
