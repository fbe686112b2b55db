"""Tars with an index, against what the `webdataset` package and tarfile read."""

import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from tars import expected, picture, samples, webdataset_samples, write_tar

from indistill import config
from indistill.config import UserError
from indistill.data import index, shards, verify
from indistill.data.dataset import open_shards
from indistill.data.index import build_index
from indistill.data.packing import pack
from indistill.data.samples import samples_of
from indistill.data.shards import Sample, ShardSet


def test_read_and_iterate_give_what_was_packed(tmp_path):
    packed = samples(25)
    paths = pack(packed, tmp_path, "train", samples_per_shard=10)
    assert [path.name for path in paths] == [f"train-{i:06d}.tar" for i in range(3)]
    data = ShardSet(f"{tmp_path}/train-{{000000..000002}}.tar")
    assert data.sizes == [10, 10, 5]
    assert len(data) == 25
    assert list(data.iterate()) == expected(packed)
    assert [data.read(i) for i in reversed(range(25))] == expected(packed)[::-1]
    with pytest.raises(IndexError):
        data.read(25)


def test_webdataset_reads_the_same(tmp_path):
    paths = pack(samples(25), tmp_path, "train", samples_per_shard=10)
    assert list(ShardSet(str(tmp_path / "*.tar")).iterate()) == list(webdataset_samples(paths))


def test_foreign_tar_groups_as_webdataset_does(tmp_path):
    path = write_tar(
        tmp_path / "foreign.tar",
        [
            ("./deep.dir/a.JPG", b"image a"),
            ("./deep.dir/a.cls", b" 12\n"),
            ("README", b"no sample"),
            ("caf\u00e9/" + "long" * 60 + ".cls", b"3"),
            ("caf\u00e9/" + "long" * 60 + ".json", b"{}"),
            ("caf\u00e9/" + "long" * 60 + ".png", b"image b"),
            ("unlabelled.webp", b"image c"),
        ],
    )
    data = ShardSet(path)
    assert list(data.iterate()) == [data.read(i) for i in range(3)]
    assert [sample.label for sample in data.iterate()] == [12, 3, -1]
    assert list(data.iterate()) == list(webdataset_samples([path]))


def test_pack_is_deterministic(tmp_path):
    for name in ("a", "b"):
        pack(samples(12), tmp_path / name, "x", samples_per_shard=5)
    for file in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list(tmp_path.glob("**/*.part"))


def test_compressed_shards_iterate_but_do_not_read(tmp_path):
    members = [("a.jpg", b"1" * 600), ("a.cls", b"4"), ("b.jpg", b"2"), ("b.cls", b"5")]
    path = write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    data = ShardSet(path)
    assert list(data.iterate()) == [Sample("a", b"1" * 600, 4), Sample("b", b"2", 5)]
    with pytest.raises(UserError, match=r"data\.in_memory: true.*indistill shards pack"):
        data.read(0)


def test_paths_expand_in_order(tmp_path):
    pack(samples(30), tmp_path, "x", samples_per_shard=3)
    data = ShardSet(["x-{000003..000001}.tar", "x-00000[5-6].tar"], root=str(tmp_path))
    assert [os.path.basename(path) for path in data.paths] == [f"x-{i:06d}.tar" for i in (3, 2, 1, 5, 6)]
    assert len(ShardSet(f"file://{tmp_path}/*")) == len(ShardSet("*", root=f"file://{tmp_path}")) == 30
    assert len(ShardSet("*", root=str(tmp_path))) == 30  # indices beside the shards are no shards
    for urls, message in (
        ("x-{1..2}.tar", r"x-1\.tar: no such shard"),
        ("y*.tar", r"y\*.tar: no such shard"),
        ([], "empty"),
        (["x-000000.tar"] * 2, "listed twice"),
        ("x-{000000..000001.tar", "correct the braces"),
        ("s3://bucket/x-*.tar", r"\* is for local files"),
    ):
        with pytest.raises(UserError, match=message):
            ShardSet(urls, root=str(tmp_path))


def test_fingerprint_tells_data_sets_apart(tmp_path):
    packed = samples(9)
    pack(packed, tmp_path / "a", "x", 3)
    pack(packed, tmp_path / "moved", "x", 3)
    packed[4] = (*packed[4][:3], (packed[4][3] + 1) % 10)
    pack(packed, tmp_path / "label", "x", 3)
    packed[4] = ("renamed", *packed[4][1:])
    pack(packed, tmp_path / "key", "x", 3)
    prints = [ShardSet(f"{tmp_path}/{name}/*.tar").fingerprint for name in ("a", "moved", "label", "key")]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
    reverse = ShardSet([f"{tmp_path}/a/x-{i:06d}.tar" for i in (2, 1, 0)])
    assert reverse.fingerprint not in prints


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_tar_cut_anywhere_is_found(tmp_path, suffix):
    members = [(f"{i}.{kind}", b"7" * 30) for i in range(4) for kind in ("jpg", "txt")]
    whole = Path(
        write_tar(tmp_path / f"whole.{suffix}", members, "w:gz" if suffix == "tar.gz" else "w")
    ).read_bytes()
    # At every header, inside headers and contents; behind 8 * 1,024 bytes only the archive's trailer follows.
    cuts = range(0, len(whole) - 8, 7) if suffix == "tar.gz" else range(0, 8 * 1024 + 1, 256)
    for cut in cuts:
        path = tmp_path / f"{cut}.{suffix}"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"{cut}\.{suffix}: .*cut or damaged"):
            ShardSet(str(path))


def test_a_damaged_header_is_found(tmp_path):
    path = pack(samples(4), tmp_path, "x", 4)[0]
    content = bytearray(path.read_bytes())
    index = build_index(str(path))
    content[index.offsets[2] - 512 + 10] ^= 0xFF  # in the name of the third image's header
    path.write_bytes(content)
    os.unlink(f"{path}.index.json")
    with pytest.raises(UserError, match=r"x-000000\.tar: the tar is cut or damaged"):
        ShardSet(str(path))


def test_a_shard_changed_after_indexing_is_found(tmp_path):
    path = pack(samples(20), tmp_path, "x", 20)[0]
    data = ShardSet(str(path))
    content = path.read_bytes()
    os.truncate(path, len(content) - 512)
    for open_it in (lambda: ShardSet(str(path)), lambda: data.read(0)):
        with pytest.raises(UserError, match=r"x-000000\.tar: the shard is cut or changed"):
            open_it()
    # Same byte size, other members: the header in front of the image tells.
    path.write_bytes(content[1024:] + content[:1024])
    with pytest.raises(UserError, match=r"x-000000\.tar: the shard is cut or changed: sample '00007'"):
        ShardSet(str(path)).read(7)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"x"), ("a.cls", b"cat")], r"a\.cls holds b'cat'"),
        ([("a.jpg", b"x"), ("a.cls", b"-1")], r"a\.cls holds b'-1'"),
        ([("a.jpg", b"x"), ("a.cls", b"")], r"a\.cls holds b''"),
        ([("a.bmp", b"x"), ("a.cls", b"1")], "'a' has a .cls but no image"),
        ([("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1")], "'a' are not next to each other"),
        ([("a.jpg", b"x"), ("a.png", b"x")], "'a' has two images"),
        ([("a.txt", b"x")], "holds no sample"),
    ],
)
def test_malformed_samples_are_named(tmp_path, members, message):
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=rf"bad\.tar: .*{message}"):
        ShardSet(path)


def test_the_remedy_for_members_apart_works(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.cls", b"1"), ("b.cls", b"2")])
    with pytest.raises(UserError, match=r"unpack the shard, and write it again with `tar --sort=name`"):
        ShardSet(path)
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "files", filter="data")
    again = tmp_path / "again.tar"
    command = ["tar", "--sort=name", "-C", str(tmp_path / "files"), "-cf", str(again), "."]
    subprocess.run(command, check=True, timeout=60)
    assert [sample.label for sample in ShardSet(str(again)).iterate()] == [1, 2]


def test_index_goes_to_the_cache_directory(tmp_path):
    for name in ("a", "b"):  # two shards of one name
        pack(samples(5, first=ord(name)), tmp_path / name, "x", 5)
        os.unlink(tmp_path / name / "x-000000.tar.index.json")
    urls, cache = str(tmp_path / "{a,b}/x-000000.tar"), str(tmp_path / "cache")
    first = ShardSet(urls, cache_dir=cache)
    assert len(os.listdir(cache)) == 2
    assert os.listdir(tmp_path / "a") == ["x-000000.tar"]
    again = ShardSet(urls, cache_dir=cache)
    assert (
        list(again.iterate())
        == list(first.iterate())
        == expected(samples(5, first=97) + samples(5, first=98))
    )


def test_an_index_that_fits_is_used_wherever_it_is(tmp_path):
    path = pack(samples(20), tmp_path, "x", 20)[0]
    cache = str(tmp_path / "cache")
    os.unlink(f"{path}.index.json")
    ShardSet(str(path), cache_dir=cache)
    pack(samples(9, seed=3), tmp_path, "x", 20)  # packed anew, with an index beside it
    assert list(ShardSet(str(path), cache_dir=cache).iterate()) == expected(samples(9, seed=3))


def test_processes_build_an_index_together(tmp_path):
    packed = samples(200)
    for path in pack(packed, tmp_path, "x", 20):
        os.unlink(f"{path}.index.json")
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                os._exit(0 if list(ShardSet(str(tmp_path / "*.tar")).iterate()) == expected(packed) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert len(list(tmp_path.iterdir())) == 20


def test_reads_survive_pickle_fork_and_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_SHARDS", 2)
    packed = samples(40)
    pack(packed, tmp_path, "x", 4)
    data = ShardSet(str(tmp_path / "*.tar"))
    data.read(0)
    order = np.random.RandomState(1).permutation(40)
    child = os.fork()
    mine = [data.read(int(i)) for i in order] == [expected(packed)[i] for i in order]
    if child == 0:
        os._exit(0 if mine else 1)
    assert mine
    assert os.waitpid(child, 0)[1] == 0
    assert list(pickle.loads(pickle.dumps(data)).iterate()) == expected(packed)


def test_verify_reports_every_bad_member(tmp_path):
    good = [(f"{i}", picture(i), "jpg", i) for i in range(6)]
    bad = [*good]
    bad[1] = ("1", good[1][1][:-200], "jpg", 1)
    bad[4] = ("4", b"no image", "png", 4)
    paths = [str(path) for path in pack([*good, *bad], tmp_path, "x", 6)]
    malformed = write_tar(
        tmp_path / "y.tar", [("a.jpg", good[0][1]), ("a.cls", b"x"), ("b.jpg", b""), ("b.cls", b"-")]
    )
    cut = tmp_path / "z.tar"
    cut.write_bytes(Path(paths[0]).read_bytes()[:1536])
    content = verify.verify([*paths, malformed, str(cut)])
    found = content.bad
    assert [(member.shard, member.key) for member in found] == [
        *((paths[1], "1"), (paths[1], "4")),
        *((malformed, "a"), (malformed, "b"), (malformed, "b")),
        (str(cut), ""),
    ]
    assert verify.verify([*paths, malformed, str(cut)], workers=2) == content
    assert verify.verify(paths[0]).bad == []


def test_verify_finds_the_labels_that_training_refuses(tmp_path):
    """Tars of which it used to say that nothing is bad: labels in json or txt, no label, or one too large."""
    contents = {
        "json": [
            ("a.jpg", picture(0)),
            ("a.json", b'{"label": 1}'),
            ("b.jpg", picture(1)),
            ("b.json", b"{}"),
        ],
        "txt": [("a.jpg", picture(0)), ("a.txt", b"1"), ("README", b"none")],
        "part": [("a.jpg", picture(0)), ("a.cls", b"2"), ("b.png", picture(1, "png"))],
        "large": [("a.jpg", picture(0)), ("a.cls", b"0"), ("b.jpg", picture(1)), ("b.cls", b"3")],
        "right": [
            ("a.jpg", picture(0)),
            ("a.cls", b"0"),
            ("b.jpg", picture(1)),
            ("b.cls", b"2"),
            ("b.wnid", b"n01"),
        ],
    }
    paths = {name: write_tar(tmp_path / f"{name}.tar", members) for name, members in contents.items()}
    expected_lines = {
        "json": [
            "2 images, 0 labelled, 2 unlabelled; other members: 2 json",
            "losses that read labels refuse images without one; ",
        ],
        "txt": [
            "1 images, 0 labelled, 1 unlabelled; other members: 1 without extension, 1 txt",
            "losses that read labels refuse images without one; ",
        ],
        "part": [
            "2 images, 1 labelled (2 to 2, 1 different), 1 unlabelled",
            "losses that read labels refuse images without one; ",
        ],
        "large": ["2 images, 2 labelled (0 to 3, 2 different), 0 unlabelled"],
        "right": ["2 images, 2 labelled (0 to 2, 2 different), 0 unlabelled; other members: 1 wnid"],
    }
    bad = {"json": ["a", "b"], "txt": ["a"], "part": ["b"], "large": ["b"], "right": []}
    for name, path in paths.items():
        by_default, content = verify.verify(path), verify.verify(path, num_classes=3)
        assert by_default.bad == []
        lines = by_default.summary().split("\n")
        assert lines[0] == expected_lines[name][0]
        assert [
            line[: len(start)] for line, start in zip(lines, expected_lines[name], strict=True)
        ] == expected_lines[name]
        assert [member.key for member in content.bad] == bad[name]
        # Training says the same, of the first one.
        section = config.Data(train=path, num_classes=3, global_batch=1)
        if not bad[name]:
            open_shards(section, path)
            continue
        with pytest.raises(UserError) as refused:
            open_shards(section, path)
        assert str(refused.value) == f"{name}.tar: sample {bad[name][0]}: {content.bad[0].problem}"
    whole = verify.verify([*paths.values()], num_classes=3, workers=2)
    assert len(whole.bad) == 5
    assert (whole.images, whole.labels, whole.others) == (
        9, {2: 2, 0: 2, 3: 1}, {"json": 2, "txt": 1, "": 1, "wnid": 1},
    )  # fmt: skip


def test_index_is_built_anew(tmp_path):
    path = pack(samples(8), tmp_path, "x", 8)[0]
    other = pack(samples(8, seed=1), tmp_path / "other", "x", 8)[0]
    os.replace(other, path)
    with pytest.raises(UserError, match="cut or changed"):
        ShardSet(str(path)).read(3)
    assert [
        member
        for member in verify.verify(str(path)).bad
        if member.problem.endswith("`indistill shards index` on it")
    ]
    assert verify.index(str(path)) == {str(path): 8}
    assert list(ShardSet(str(path)).iterate()) == expected(samples(8, seed=1))


def hostile_shards(folder):
    """Shards of which only the last is good, with what is wrong with the others."""
    size = tarfile.TarInfo("a.jpg")
    size.pax_headers = {"size": "-1024"}
    (folder / "1.tar").write_bytes(size.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    write_tar(folder / "2.tar", [("a.jpg", picture(0)), ("a.cls", b"1")])
    write_tar(folder / "3.tar", [("a.jpg", picture(0)), ("a.cls", b"1" * 2000)])
    write_tar(folder / "4.tar", [("a.jpg", picture(0)), ("a.cls", b"1")])
    return {"1.tar": "invalid size", "2.tar": "out of memory", "3.tar": "MAX_LABEL_BYTES"}


@pytest.mark.parametrize("action", [verify.verify, verify.index])
def test_a_hostile_shard_does_not_end_the_others(tmp_path, action, monkeypatch, caplog):
    expected = hostile_shards(tmp_path)
    read = samples_of

    def failing(tar, **options):  # as any library may
        if tar.path.endswith("2.tar"):
            raise MemoryError("out of memory")
        return read(tar, **options)

    for module in (verify, index):
        monkeypatch.setattr(module, "samples_of", failing)
    if action is verify.verify:
        content = verify.verify(f"{tmp_path}/*.tar")
        faults = [f"{member.shard}: {member.problem}" for member in content.bad]
        assert (content.images, content.labels) == (2, {1: 1})
    else:
        with pytest.raises(UserError, match="3 of 4 shards cannot be indexed"):
            verify.index(f"{tmp_path}/*.tar")
        faults = caplog.messages
        assert list(tmp_path.glob("*.json")) == [tmp_path / "4.tar.index.json"]
    for fault, (name, problem) in zip(faults, expected.items(), strict=True):
        assert name in fault
        assert problem in fault


def test_a_worker_that_is_killed_ends_in_one_line(tmp_path):
    with pytest.raises(UserError, match="--workers 1 to see which shard"):
        list(verify.parallel(os._exit, [3, 3], workers=2, progress=False))
