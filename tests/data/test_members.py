"""Members of tars that belong to no sample: nothing that looks like an image is left out in silence."""

import bz2
import gzip
import io
import json
import logging
import lzma
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from tars import picture, tree, write_tar

from indistill.config import UserError, extras
from indistill.data import packing, verify
from indistill.data.index import build_index, load_index
from indistill.data.samples import Others, samples_of
from indistill.data.shards import ShardSet, expand
from indistill.data.stream import read_shard
from indistill.data.tar import Tar


def members(keys, dotted=()):
    pairs = [(f"{key}.{kind}", picture(i) if kind == "jpg" else b"1") for i, key in enumerate(keys)
             for kind in ("jpg", "cls")]  # fmt: skip
    return pairs + [(name, b"x") for name in dotted]


ZSTD = b"\x28\xb5\x2f\xfd" + bytes(9)
SOFT, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


def tar_with_links(path, links, form=tarfile.PAX_FORMAT, files=("0.jpg", "0.cls")):
    """A tar with files, and links of (name, kind, target)."""
    contents = {"jpg": picture(0), "cls": b"1"}
    with tarfile.open(path, "w", format=form) as tar:
        for name, kind, target in [(name, tarfile.REGTYPE, "") for name in files] + links:
            member = tarfile.TarInfo(name)
            content = contents.get(name[-3:], b"") if kind == tarfile.REGTYPE else b""
            member.type, member.linkname, member.size = kind, target, len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_names_with_several_dots_are_counted_and_named(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", members(["a", "b"], ["s0_0.5.jpg", "s0_0.5.cls", "d.e/s1_1.5.PNG"]))
    (bad,) = verify.verify(path).bad
    assert bad.problem.startswith("images or labels belong to no sample, because")
    assert "first dot: 3 ('s0_0.5.jpg', 's0_0.5.cls', 'd.e/s1_1.5.PNG'): rename them" in bad.problem
    with caplog.at_level(logging.WARNING):
        assert verify.index(path) == {path: 2}
        assert "x.tar: images or labels belong to no sample" in caplog.text
    assert verify.verify(path).bad == [bad]  # and nothing of its index, which fits
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_index(path)  # the stored one, with which another run would leave out as much
        assert caplog.text.count("x.tar: images or labels belong to no sample") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_index(write_tar(tmp_path / "y.tar", members(["a", "b"], [])))
        load_index(str(tmp_path / "y.tar"))
        assert caplog.text == ""


def test_the_problem_in_an_index_is_a_short_text(tmp_path):
    path = write_tar(tmp_path / "x.tar", members(["a"], ["s0_0.5.jpg"]))
    load_index(path)
    file = Path(f"{path}.index.json")
    stored = json.loads(file.read_text())
    for problem in (1, None, "x" * 4001):
        file.write_text(json.dumps(stored | {"problem": problem}))
        with pytest.raises(UserError, match="problem is no text of at most 4000 characters"):
            load_index(path)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_packing_rewrites_keys_with_dots(tmp_path, capsys, name, indexed, plain):
    stems = ["s000_0.5", "s000_0.75", "d.e/s1_1.5", "t.1", "v.1.0", "v_1.0"]
    kinds = ("JPG", "cls")
    dotted = [
        (f"{stem}.{kind}", picture(i) if kind == "JPG" else b"%d" % i)
        for i, stem in enumerate(stems)
        for kind in kinds
    ]
    beside = [("README.v1.md", b"x"), ("__meta__/s.0.jpg", picture(8))]
    if plain:
        beside += [*members(["a", "t_1"]), ("a.seg.png", picture(9))]
    path = write_tar(tmp_path / name, beside + dotted, "w:gz" if name.endswith("gz") else "w")
    if indexed and plain:
        load_index(path)
    before = tree(tmp_path)
    packed_dir = tmp_path.with_name(f"{tmp_path.name}-packed")
    packed = packing.pack_source(path, packed_dir)
    assert tree(tmp_path) == before
    note = (
        f"{name}: images and labels with several dots in their names, which are packed with _ instead: 12 ("
    )
    assert note in capsys.readouterr().err
    assert packed["samples"] == 6 + 2 * plain
    tars = str(packed_dir / "*.tar")
    samples = {sample.key: sample for sample in ShardSet(tars).iterate()}
    keys = ["s000_0_5", "s000_0_75", "d.e/s1_1_5", "t_1_" if plain else "t_1", "v_1_0", "v_1_0_"]
    assert [(samples[key].image, samples[key].label) for key in keys] == [(picture(i), i) for i in range(6)]
    assert len(samples) == packed["samples"]
    assert verify.verify(tars).bad == []


def test_packing_says_nothing_of_keys_without_dots(tmp_path, capsys):
    path = write_tar(tmp_path / "x.tar", members(["a", "b"], ["a.seg.png", "b.json"]))
    assert packing.pack_source(path, tmp_path / "packed")["samples"] == 2
    assert capsys.readouterr().err == ""


def test_other_members_of_a_sample_are_none_of_them(tmp_path, caplog):
    others = [
        "a.seg.png",
        "b.left.jpg",
        "README.md",
        "._a.jpg",
        "d/._b.cls",
        "a.json",
        "__x__/y.json",
        "__x__/y.0.jpg",
    ]
    path = write_tar(tmp_path / "x.tar", members(["a", "b"], others))
    content = verify.verify(path)
    assert content.bad == []
    assert content.others.total() == len(others)
    with caplog.at_level(logging.WARNING):
        assert len(build_index(path).keys) == 2
        assert caplog.text == ""


def test_a_shard_whose_names_all_have_several_dots_says_so(tmp_path):
    path = write_tar(tmp_path / "x.tar", members([], ["s0_0.5.jpg", "s0_0.5.cls"]))
    message = (
        r"x\.tar: holds no sample: images or labels belong to no sample, .*first dot: 2 \('s0_0\.5\.jpg'"
    )
    with pytest.raises(UserError, match=message):
        build_index(path)
    assert len(verify.verify(path).bad) == 1


LONG = "far/" + 40 * "folder/" + "image.jpg"
LINKS = [
    ("1.jpg", HARD, "0.jpg"),  # as GNU tar writes a second name of a file
    ("1.cls", HARD, "./0.cls"),
    ("d/2.jpg", SOFT, "../0.jpg"),
    ("d/2.cls", SOFT, "3.cls"),  # to a file behind it
    ("d/3.jpg", SOFT, "2.jpg"),  # through another link
]
FILES = ("0.jpg", "0.cls", "blobs/8f3a", LONG)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_in_a_tar_are_followed_as_tarfile_does(tmp_path, form):
    path = tmp_path / "x.tar"
    links = [*LINKS, ("d/3.cls", HARD, "0.cls"), ("4.jpg", HARD, LONG), ("4.cls", SOFT, "0.cls")]
    tar_with_links(path, links, form, FILES)
    expected = []
    with tarfile.open(path) as tar:
        for key in ("0", "1", "d/2", "d/3", "4"):
            image, label = (tar.extractfile(f"{key}.{kind}").read() for kind in ("jpg", "cls"))
            expected.append((key, image, int(label)))
    expected.insert(1, (LONG[:-4], picture(0), -1))
    for _ in range(2):  # the second time from the stored index
        assert list(ShardSet(str(path)).iterate()) == expected
    content = verify.verify(str(path))
    assert (content.bad, content.images, content.labels) == ([], 6, {1: 5})

    packed = packing.pack_source(str(path), tmp_path / "packed")
    assert packed["samples"] == 6
    with tarfile.open(tmp_path / "packed" / "shard-000000.tar") as tar:
        assert all(member.isreg() for member in tar)
    assert list(ShardSet(str(tmp_path / "packed" / "*.tar")).iterate()) == expected


def test_links_in_a_stream_are_followed_where_it_can_go_back(tmp_path):
    links = [*LINKS, ("d/3.cls", HARD, "0.cls")]
    path = tar_with_links(tmp_path / "x.tar", links, files=FILES[:2])
    expected = [(sample.key, sample.image, sample.label) for sample in ShardSet(path).iterate()]
    assert len(expected) == 4
    assert list(read_shard(path, 2, others=Others())) == expected
    Path(f"{path}.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    message = r"1\.jpg is a link, .*not compressed: decompress it$"
    with pytest.raises(UserError, match=message):
        list(read_shard(f"{path}.gz", 2, others=Others()))
    with pytest.raises(UserError, match=message):
        build_index(f"{path}.gz")
    with (
        open(path, "rb") as stream,
        pytest.raises(UserError, match=r"1\.jpg is a link, .* shards pack` on it"),
    ):
        list(samples_of(Tar(path, OneWay(stream), strict=False)))


class OneWay(io.RawIOBase):
    """What comes from a server or a command."""

    def __init__(self, stream):
        self.read = stream.read

    def seekable(self):
        return False


@pytest.mark.parametrize(
    "links",
    [
        [("1.jpg", SOFT, "gone.jpg")],
        [("1.jpg", HARD, "gone.jpg")],
        [("1.jpg", SOFT, "../0.jpg")],  # out of the tar
        [("1.jpg", SOFT, "/etc/passwd")],
        [("1.jpg", SOFT, "2.txt"), ("2.txt", SOFT, "1.jpg")],  # in a circle
        [("1.jpg", SOFT, "1.jpg")],
        [("1.jpg", SOFT, "d"), ("d", tarfile.DIRTYPE, "")],
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_links_that_lead_to_no_file_of_the_tar_are_refused_alike(tmp_path, links, labelled):
    path = tar_with_links(tmp_path / "x.tar", links, files=("0.jpg", "0.cls", *["1.cls"] * labelled))
    message = r"x\.tar: 1\.jpg is a link to \S+, which is no file in this tar: write .*--dereference"
    for read in (build_index, ShardSet, lambda path: list(read_shard(path, 2, others=Others()))):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match=message):
        packing.pack_source(path, tmp_path / "packed")
    (bad,) = verify.verify(path).bad
    assert bad.key == "1"
    assert bad.problem.startswith("1.jpg is a link to ")


def test_links_that_are_no_images_or_labels_may_lead_anywhere(tmp_path):
    links = [("README.md", SOFT, "/docs/README.md"), ("d/._a.jpg", SOFT, "gone"), ("latest", SOFT, "gone")]
    path = tar_with_links(tmp_path / "x.tar", links)
    assert len(build_index(path).keys) == 1
    assert verify.verify(path).bad == []


@pytest.mark.parametrize("program", ["--format=gnu", "--format=posix"])
def test_sparse_members_are_named(tmp_path, program):
    path = tmp_path / "x.tar"
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.write(picture(0))
        file.truncate(10_000_000)
    subprocess.run(
        ["tar", program, "--sparse", "-C", tmp_path, "-cf", path, "hole.jpg"], check=True, timeout=60
    )
    message = r"x\.tar: hole\.jpg is a sparse member at byte \d+: write the tar without --sparse"
    for read in (build_index, lambda path: list(read_shard(path, 2, others=Others()))):
        with pytest.raises(UserError, match=message):
            read(str(path))
    (bad,) = verify.verify(str(path)).bad
    assert "hole.jpg is a sparse member" in bad.problem


@pytest.mark.parametrize(
    ("name", "compress", "message"),
    [
        ("x.tar", gzip.compress, r"is compressed with gzip, .* rename it to end with \.tar\.gz"),
        ("x.tar.bz2", bz2.compress, "is compressed with bzip2, .*: decompress it with `bunzip2 < OLD > NEW`"),
        ("x.tar.xz", lzma.compress, "is compressed with xz, .*: decompress it with `unxz < OLD > NEW`"),
        ("x.tar.gz", bz2.compress, "is compressed with bzip2, .*: decompress it with `bunzip2 < OLD > NEW`"),
        ("x.tar", lambda _: ZSTD, r"is compressed with zstd, .* rename it to end with \.tar\.zst"),
        ("x.tar.gz", bytes, r"is not compressed with gzip or zstd, as its name says: rename it to end with"),
        ("x.tar.zst", bytes, r"is not compressed with gzip or zstd, as its name says: rename it to end with"),
    ],
)
def test_compression_that_the_name_does_not_say_is_named(tmp_path, name, compress, message):
    plain = write_tar(tmp_path / "plain.tar", members(["a"]))
    path = tmp_path / name
    path.write_bytes(compress(Path(plain).read_bytes()))
    with pytest.raises(UserError, match=message):
        build_index(str(path))
    if "rename" in message and compress is not bytes:  # the remedies work
        other = path.rename(tmp_path / f"x.tar.{'gz' if compress is gzip.compress else 'zst'}")
    elif compress is bytes:
        other = path.rename(tmp_path / "renamed.tar")
    else:
        other = tmp_path / "decompressed.tar"
        program = re.search(r"`(\w+) <", message)[1]
        with path.open("rb") as old, other.open("wb") as new:
            subprocess.run([program], stdin=old, stdout=new, check=True, timeout=60)
    if compress in (gzip.compress, bz2.compress, lzma.compress, bytes):  # ZSTD holds no shard
        assert len(build_index(str(other)).keys) == 1


def test_zstd_without_its_package_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.tar.zst"
    path.write_bytes(ZSTD)
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None)
    message = r"x\.tar\.zst: is compressed with zstd, which needs zstandard: pip install 'indistill\[zstd\]'"
    for read in (build_index, lambda path: list(read_shard(path, 2, others=Others()))):
        with pytest.raises(UserError, match=message):
            read(str(path))
    with pytest.raises(UserError, match=message):
        packing.pack_source(str(tmp_path), tmp_path.with_name(f"{tmp_path.name}-packed"))
    (bad,) = verify.verify(str(path)).bad
    assert "which needs zstandard: pip install" in bad.problem


def test_zstd_is_read_as_gzip_is(tmp_path):
    zstandard = pytest.importorskip("zstandard", reason="pip install -e '.[zstd]'")
    plain = write_tar(tmp_path / "plain.tar", members(["a", "b"]))
    content = Path(plain).read_bytes()
    path = tmp_path / "x.tar.zst"
    half = len(content) // 2  # in two frames, as pzstd writes
    frames = [zstandard.compress(part) for part in (content[:half], content[half:])]
    path.write_bytes(b"".join(frames))
    expected = list(ShardSet(plain).iterate())
    for _ in range(2):
        assert list(ShardSet(str(path)).iterate()) == expected
    assert [image for _, image, _ in read_shard(str(path), 2, others=Others())] == [
        one.image for one in expected
    ]
    assert verify.verify(str(path)).bad == []
    packing.pack_source(str(path), tmp_path / "packed")
    assert [one.image for one in ShardSet(str(tmp_path / "packed/*.tar")).iterate()] == [
        one.image for one in expected
    ]

    damaged = tmp_path / "y.tar.zst"
    damaged.write_bytes(frames[0] + b"\xff" * 100)
    with pytest.raises(UserError, match=r"y\.tar\.zst: the tar is cut or damaged \("):
        build_index(str(damaged))
    damaged.write_bytes(frames[0][:-20])
    with pytest.raises(UserError, match=r"y\.tar\.zst: the tar is cut or damaged \("):
        build_index(str(damaged))
    damaged.write_bytes(zstandard.compress(content + bytes(2**27)))
    with pytest.raises(UserError, match="MAX_TAR_END_BYTES"):
        build_index(str(damaged))


def test_a_folder_and_brackets_in_paths(tmp_path):
    (tmp_path / "set[1]").mkdir()
    path = write_tar(tmp_path / "set[1]" / "x.tar", members(["a"]))
    assert expand("set[1]/*.tar", str(tmp_path)) == [path]
    assert expand(str(tmp_path / "set[1]" / "*.tar")) == [path]
    assert expand(str(tmp_path / "set?1?" / "[xy].tar")) == [path]
    with pytest.raises(UserError, match=r"set\[1\]: is a folder: name the shards in it, as .*/\*\.tar"):
        expand("set[1]", str(tmp_path))
