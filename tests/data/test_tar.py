"""The reader of tars against `tarfile` on good ones; on others it raises UserError and nothing else."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import tarfile
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tars import picture, write_tar

from indistill.config import UserError, limits
from indistill.data import index, samples
from indistill.data.index import build_index, parse_index
from indistill.data.shards import ShardSet
from indistill.data.tar import Tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar_of(members, form=tarfile.GNU_FORMAT):
    """A tar of (name, content or the type of another member)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content.encode(), "target" * 40
                tar.addfile(member)
    return out.getvalue()


def theirs(content):
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return [(m.name, m.offset_data, m.size, tar.extractfile(m).read()) for m in tar if m.isreg()]


def ours(content, **options):
    tar = Tar("x.tar", io.BytesIO(content), **options)
    return [(*member[:3], tar.content(2**30)) for member in tar if member.target is None]


def samples_of(path, content, load):
    return list(samples.samples_of(samples.tar_of(path, io.BytesIO(content)), load=load, others=Counter()))


def result(function, *arguments, **options):
    """What it returns, or the UserError that it raises."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        return error


NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=120)
KINDS = [kind.decode() for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE)]
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500) | st.sampled_from(KINDS)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(members=MEMBERS, form=st.sampled_from(FORMATS[1:]))
def test_a_good_tar_reads_as_with_tarfile(members, form):
    content = tar_of(members, form)
    expected = theirs(content)
    assert ours(content, gzipped=False, strict=True) == expected
    assert ours(gzip.compress(content), gzipped=True, strict=True) == expected
    for compress in (bytes, gzip.compress, bz2.compress, lzma.compress):
        assert ours(compress(content), strict=False) == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tar_is_read_or_refused(data):
    members = [("a.jpg", b"image"), ("a.cls", b"1"), ("long" * 40 + ".jpg", b"x"), ("link", KINDS[1])]
    content = bytearray(tar_of(members, data.draw(st.sampled_from(FORMATS[1:]))))
    for _ in range(data.draw(st.integers(0, 4))):
        block = 512 * data.draw(st.integers(0, len(content) // 512 - 1))
        # Most often in what decides how a header is read: its name, size and type.
        at = block + data.draw(st.sampled_from([0, 124, 125, 135, 156, 257, 482]) | st.integers(0, 511))
        new = data.draw(st.sampled_from([b"S", b"x", b"g", b"L", b"K", b"\xff", b"\x80", b"-"]) | st.binary())
        content[at : at + len(new)] = new
        if data.draw(st.booleans()):  # a checksum that fits, or else nothing behind it is reached
            header = content[block : block + 512]
            header[148:156] = b" " * 8
            content[block + 148 : block + 156] = b"%06o\0 " % sum(header)
    packed = data.draw(st.booleans())
    stored = gzip.compress(bytes(content)) if packed else bytes(content)
    stored = stored[: data.draw(st.integers(len(stored) // 2, len(stored)))]
    path = "x.tar.gz" if packed else "x.tar"
    for load in (False, True):
        found = result(samples_of, path, stored, load)
        if isinstance(found, UserError):
            assert path in str(found)
        else:
            assert all(len(image) == (size if load else 0) for _, (_, size), image, _ in found)
    found = result(ours, stored, strict=False)
    assert isinstance(found, list) or "x.tar" in str(found)


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["version", "bytes", "keys", "offsets", "sizes", "labels", "more"]), inner
            )
        ),
        max_leaves=12,
    )
    | st.fixed_dictionaries(
        {"version": st.just(1), "bytes": st.integers()}
        | {name: st.lists(st.integers() | st.floats(), max_size=3) for name in ("offsets", "sizes", "labels")}
        | {"keys": st.lists(st.text(), max_size=3)}
    )
)
def test_any_index_is_read_or_refused(content, tmp_path_factory):
    file = tmp_path_factory.mktemp("index") / "x.tar.index.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    found = result(parse_index, str(file))
    if isinstance(found, UserError):
        assert f"{file}: not an index" in str(found)
    else:
        assert 1 <= len(found.keys) == len(found.offsets) == len(found.sizes) == len(found.labels)
        assert found.offsets.min() >= 512
        assert (found.offsets + found.sizes).max() <= found.bytes


def test_an_index_of_names_that_are_no_text_is_read_again(tmp_path):
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    path = write_tar(tmp_path / "x.tar", [(name, b"1"), ("b.jpg", b"2")])
    built = build_index(path)
    stored = parse_index(f"{path}.index.json")
    assert built.keys.tolist() == stored.keys.tolist() == [b"caf\xe9", b"b"]
    assert [sample.image for sample in ShardSet(path).iterate()] == [b"1", b"2"]


def test_a_long_stream_is_read_with_little_memory():
    """What is skipped is not kept, and a compressed image is refused before it is whole."""
    image = tarfile.TarInfo("a.jpg")
    image.size = 2**28
    stored = gzip.compress(image.tobuf()) + 16 * gzip.compress(bytes(2**24))
    tracemalloc.start()
    with pytest.raises(UserError, match="MAX_EXPANSION"):
        ours(stored, strict=False)
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["a.JPG", "x.y/a.b.jpg", "a/b/c.cls", "./a.png", "a", ".jpg", "x/.cls", "a.jpg.txt"]
)
def test_keys_are_those_of_webdataset(name):
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    tar = Tar("x.tar", io.BytesIO(tar_of([(name, b"1")])), strict=True, gzipped=False)
    found = [member[:2] for member in samples.images_and_labels(tar, load=False, report=pytest.fail)]
    hidden = name.rpartition("/")[2].startswith(".")  # a key that ends with its folder: no sample here
    known = extension and extension.lower() in ("cls", *samples.IMAGE_EXTENSIONS)
    assert found == ([(key, extension.lower())] if known and not hidden else [])


def test_a_compressed_shard_must_fit_its_index(tmp_path):
    """The labels in the index are checked against the classes; those in the tar are the ones that train."""
    images = [[(f"{i}.jpg", picture(i)), (f"{i}.cls", b"7")] for i in range(3)]
    path = write_tar(tmp_path / "x.tar.gz", itertools.chain(*images), "w:gz")
    file = tmp_path / "x.tar.gz.index.json"
    assert len(list(ShardSet(path).iterate())) == 3
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"labels": [7, 1, 7]}))
    with pytest.raises(UserError, match="sample '1' is not where the index says"):
        list(ShardSet(path).iterate())
    columns = ("keys", "offsets", "sizes", "labels")
    file.write_text(json.dumps(stored | {name: stored[name][:2] for name in columns}))
    with pytest.raises(UserError, match="sample '2' is not where the index says"):
        list(ShardSet(path).iterate())
    last = stored["offsets"][2] + 2048
    more = {"keys": ["3"], "offsets": [last], "sizes": [1], "labels": [7]}
    file.write_text(json.dumps(stored | {name: stored[name] + more[name] for name in columns}))
    with pytest.raises(UserError, match="it has 3 samples, its index says 4"):
        list(ShardSet(path).iterate())


def test_limits_of_what_a_shard_holds(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", [(f"{'k' * 50 * i}{i}.jpg", b"1") for i in range(4)])
    for module, name, value in (
        (samples, "MAX_SHARD_SAMPLES", 3),
        (index, "MAX_KEYS_BYTES", 600),
        (index, "MAX_INDEX_BYTES", 100),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            with pytest.raises(UserError, match=rf"x\.tar.*{name}"):
                build_index(path)
    others = write_tar(tmp_path / "others.tar", [("a.jpg", b"1"), *((f"a.{i}", b"") for i in range(300))])
    counted = samples.Others()
    with open(others, "rb") as stream:
        list(samples.samples_of(samples.tar_of(others, stream), others=counted))
    assert len(counted.extensions) == limits.MAX_EXTENSIONS + 1
    assert counted.extensions["of further kinds"] == 200
