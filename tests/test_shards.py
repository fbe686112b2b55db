import http.server
import io
import json
import os
import pickle
import socket
import struct
import tarfile
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from indistill import shards
from indistill.config import UserError
from indistill.shards import Sample, ShardSet, pack


def samples(count, seed=0, first=0):
    """Samples of varied sizes; the content need not be an image, shards never decode."""
    random = np.random.RandomState(seed)
    return [
        (f"{first + i:05d}", random.bytes(random.randint(1, 3000)), shards.IMAGE_EXTENSIONS[i % 4], int(i * 7 % 10))
        for i in range(count)
    ]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def expected(packed):
    return [Sample(key, image, label) for key, image, _, label in packed]


def webdataset_samples(paths):
    """The same shards as the webdataset package reads them."""
    import webdataset

    for sample in webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False):
        extension = next(name for name in sample if name in shards.IMAGE_EXTENSIONS)
        yield Sample(sample["__key__"], sample[extension], int(sample.get("cls", b"-1")))


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
    whole = Path(write_tar(tmp_path / f"whole.{suffix}", members, "w:gz" if suffix == "tar.gz" else "w")).read_bytes()
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
    index = shards.build_index(str(path))
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


def test_index_goes_to_the_cache_directory(tmp_path):
    for name in ("a", "b"):  # two shards of one name
        pack(samples(5, first=ord(name)), tmp_path / name, "x", 5)
        os.unlink(tmp_path / name / "x-000000.tar.index.json")
    urls, cache = str(tmp_path / "{a,b}/x-000000.tar"), str(tmp_path / "cache")
    first = ShardSet(urls, cache_dir=cache)
    assert len(os.listdir(cache)) == 2
    assert os.listdir(tmp_path / "a") == ["x-000000.tar"]
    again = ShardSet(urls, cache_dir=cache)
    assert list(again.iterate()) == list(first.iterate()) == expected(samples(5, first=97) + samples(5, first=98))


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


# --- remote shards ---------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves a directory on 127.0.0.1; `faults` are taken one by one by requests for tars, "" being none."""

    daemon_threads = True

    def __init__(self, directory):
        self.directory, self.faults, self.served = directory, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # of clients that have lost patience


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path.split("?")[0].strip("/")
        server.served.append(name)
        fault = server.faults.pop(0) if server.faults and name.endswith(".tar") else ""
        file = server.directory / name
        if fault == "500" or not file.exists():
            return self.send_error(500 if fault else 404)
        content = file.read_bytes()
        self.send_response(200)
        if fault != "chunked":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "stall":
            time.sleep(1.5)
        elif fault == "stall half-way":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            time.sleep(1.5)
        elif fault in ("truncate", "chunked"):
            self.wfile.write(content[: len(content) // 2])
        elif fault == "reset":
            self.wfile.write(content[: len(content) // 2])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        else:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "FETCH_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(shards, "FETCH_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(shards, "FETCH_ATTEMPTS", 3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    yield server
    server.shutdown()
    server.server_close()


def serve(server, count=20, per_shard=5, indexed=True):
    """Packs samples where the server finds them. Returns them, and their URLs."""
    packed = samples(count)
    paths = pack(packed, server.directory, "x", per_shard)
    if not indexed:
        for path in paths:
            os.unlink(f"{path}.index.json")
    return expected(packed), f"{server.url}/x-{{000000..{len(paths) - 1:06d}}}.tar"


def cached(directory):
    return sorted(file for file in (directory / "remote-shards").iterdir() if file.suffix == ".tar")


@pytest.mark.parametrize("fault", ["stall", "stall half-way", "truncate", "chunked", "reset", "500"])
def test_a_fault_on_the_way_loses_and_repeats_nothing(server, tmp_path, fault):
    packed, urls = serve(server)
    server.faults = [fault, "", fault, fault]
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    assert list(data.iterate()) == packed
    assert [data.read(i) for i in (19, 0, 7)] == [packed[i] for i in (19, 0, 7)]
    tars = [name for name in server.served if name.endswith(".tar")]
    assert len(tars) == 4 + 3  # one fetch a shard, one more a fault
    assert {file.read_bytes() for file in cached(tmp_path / "cache")} == {
        path.read_bytes() for path in server.directory.glob("*.tar")
    }
    assert not list(tmp_path.glob("cache/**/*.part"))


@pytest.mark.parametrize("fault", ["stall", "truncate", "reset", "500"])
def test_what_stays_broken_is_a_clear_error(server, tmp_path, fault):
    _, urls = serve(server)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    server.faults = [fault] * 3
    with pytest.raises(UserError, match=rf"{server.url}/x-000001\.tar: cannot be fetched: .* \(attempt 3\)"):
        data.read(7)
    assert len(server.served) == 4 + 3
    assert not cached(tmp_path / "cache")
    assert data.read(7).key == "00007"  # it is back


def test_a_missing_shard_is_not_asked_for_again(server, tmp_path):
    _, urls = serve(server)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    os.unlink(server.directory / "x-000001.tar")
    with pytest.raises(UserError, match=r"x-000001\.tar: cannot be fetched: .*404"):
        data.read(7)
    assert len(server.served) == 4 + 1
    with pytest.raises(UserError, match=r"x-9\.tar: cannot be fetched: .*404"):
        ShardSet(f"{server.url}/x-9.tar", cache_dir=str(tmp_path / "cache"))


def test_a_remote_shard_that_does_not_fit_its_index_is_found(server, tmp_path):
    _, urls = serve(server)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    path = server.directory / "x-000001.tar"
    path.write_bytes(path.read_bytes() + bytes(10240))
    with pytest.raises(UserError, match=r"x-000001\.tar: the shard is cut or changed.*indistill shards index"):
        data.read(7)
    shards.index(urls, cache_dir=str(tmp_path / "cache"))  # the remedy that the message names
    assert ShardSet(urls, cache_dir=str(tmp_path / "cache")).read(7).key == "00007"


def test_shards_without_index_are_fetched_and_counted_once(server, tmp_path):
    packed, urls = serve(server, indexed=False)
    for _ in range(2):
        assert list(ShardSet(urls, cache_dir=str(tmp_path / "cache")).iterate()) == packed
    assert sorted(server.served) == sorted([f"x-{i:06d}.tar{end}" for i in range(4) for end in ("", ".index.json")])


def test_a_cut_remote_shard_is_found_and_fetched_anew_when_mended(server, tmp_path):
    packed, urls = serve(server, indexed=False)
    path = server.directory / "x-000002.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:2048])
    with pytest.raises(UserError, match=r"127.*x-000002\.tar: the tar is cut or damaged"):
        ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    path.write_bytes(whole)
    assert list(ShardSet(urls, cache_dir=str(tmp_path / "cache")).iterate()) == packed


def test_the_cache_stays_within_its_limit(server, tmp_path, caplog):
    packed, urls = serve(server, count=40)
    limit = 3 * max(path.stat().st_size for path in server.directory.glob("*.tar"))
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"), cache_bytes=limit)
    for i in np.random.RandomState(0).permutation(40):
        assert data.read(int(i)) == packed[i]
        assert sum(file.stat().st_size for file in cached(tmp_path / "cache")) <= limit
    assert "raise data.cache_bytes" in caplog.text
    # The shard used last stays longest.
    server.served.clear()
    for shard in (0, 1, 0, 2, 0, 3, 0, 4):
        data.read(5 * shard)
        time.sleep(0.01)
    assert server.served.count("x-000000.tar") <= 1
    with pytest.raises(UserError, match=r"data\.cache_bytes \(1000\)"):
        ShardSet(urls, cache_dir=str(tmp_path / "cache"), cache_bytes=1000).read(39)


def test_processes_share_one_download(server, tmp_path):
    packed, urls = serve(server)
    children = []
    for _ in range(3):
        if (child := os.fork()) == 0:
            try:
                data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
                os._exit(0 if list(data.iterate()) == packed else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert sorted(server.served) == sorted([f"x-{i:06d}.tar{end}" for i in range(4) for end in ("", ".index.json")])


def test_processes_together_stay_within_the_limit(server, tmp_path):
    packed, urls = serve(server, count=60)
    size = max(path.stat().st_size for path in server.directory.glob("*.tar"))
    cache = shards.ShardCache(str(tmp_path / "cache"), 3 * size)
    dead = tmp_path / "cache" / "remote-shards" / ("0" * 16 + "-dead.tar.part")
    dead.write_bytes(bytes(2 * size))  # of a process that was killed: it must not block the others
    running = []
    for seed in range(4):
        if (child := os.fork()) == 0:
            try:
                data = ShardSet(urls, cache_dir=str(tmp_path / "cache"), cache_bytes=cache.limit_bytes)
                order = np.random.RandomState(seed).permutation(60)
                data.prefetch(order[:10])
                os._exit(0 if all(data.read(int(i)) == packed[i] for i in order) else 1)
            finally:
                os._exit(2)
        running.append(child)
    peak, left = 0, set(running)
    while left:
        with cache.room_lock():
            held = {
                e.name.removesuffix(".part"): e.stat().st_size for e in os.scandir(dead.parent) if "lock" not in e.name
            }
        peak = max(peak, sum(held.values()))
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                left.remove(child)
        time.sleep(0.005)
    assert 2 * size < peak <= 3 * size


def test_prefetched_shards_are_read_without_the_server(server, tmp_path):
    packed, urls = serve(server)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    server.faults = ["reset"]
    data.prefetch(np.array([17, 3, 16, 4]))
    deadline = time.monotonic() + 10
    while len(cached(tmp_path / "cache")) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    server.directory = tmp_path  # where no shard is
    assert [data.read(i) for i in (3, 4, 16, 17)] == [packed[i] for i in (3, 4, 16, 17)]
    copy = pickle.loads(pickle.dumps(data))
    copy.prefetch(np.array([3]))
    assert copy.read(3) == packed[3]
    with pytest.raises(UserError, match="404"):
        data.read(9)


def test_other_sources(server, tmp_path):
    packed, urls = serve(server)
    cache = str(tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    for path in server.directory.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    local, signed = f"file://{server.directory}/x-000000.tar", f"{server.url}/x-000001.tar?signature=a/b.c"
    mixed = [local, signed, "memory://bucket/x-000002.tar", f"pipe:cat {server.directory}/x-000003.tar"]
    data = ShardSet(mixed, cache_dir=cache, allow_pipe=True)
    assert list(data.iterate()) == packed
    for urls, options, message in (
        (mixed, {"cache_dir": cache}, "pipe:cat .*not allowed"),
        (signed, {}, r"need data\.cache_dir"),
        ("memory://bucket/none.tar", {"cache_dir": cache}, r"memory://bucket/none\.tar: cannot be fetched"),
        ("what://bucket/x.tar", {"cache_dir": cache}, "Protocol not known: what"),
        ("pipe:exit 3", {"cache_dir": cache, "allow_pipe": True}, "ended with status 3"),
    ):
        with pytest.raises(UserError, match=message):
            ShardSet(urls, **options)


# --- verify, index, pack ---------------------------------------------------------------------------------------------


def picture(seed, extension="jpg", size=(24, 16)):
    content = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension])
    return content.getvalue()


def folder(path, classes=("cat", "ant", "bee"), each=7):
    """An image folder. Returns {file content: label}."""
    content = {}
    for label, name in enumerate(sorted(classes)):
        (path / name / "more").mkdir(parents=True)
        for i in range(each):
            extension = ("jpg", "png", "webp")[i % 3]
            image = picture(100 * label + i, extension)
            (path / name / ("more" if i % 2 else "") / f"im.{i}.{extension.upper()}").write_bytes(image)
            content[image] = label
    (path / "cat" / "notes.txt").write_text("no image")
    return content


def tree(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_verify_reports_every_bad_member(tmp_path):
    good = [(f"{i}", picture(i), "jpg", i) for i in range(6)]
    bad = [*good]
    bad[1] = ("1", good[1][1][:-200], "jpg", 1)
    bad[4] = ("4", b"no image", "png", 4)
    paths = [str(path) for path in pack([*good, *bad], tmp_path, "x", 6)]
    malformed = write_tar(tmp_path / "y.tar", [("a.jpg", good[0][1]), ("a.cls", b"x"), ("b.jpg", b""), ("b.cls", b"-")])
    cut = tmp_path / "z.tar"
    cut.write_bytes(Path(paths[0]).read_bytes()[:1536])
    found = shards.verify([*paths, malformed, str(cut)])
    assert [(member.shard, member.key) for member in found] == [
        *((paths[1], "1"), (paths[1], "4")),
        *((malformed, "a"), (malformed, "b"), (malformed, "b")),
        (str(cut), ""),
    ]
    assert shards.verify([*paths, malformed, str(cut)], workers=2) == found
    assert shards.verify(paths[0]) == []


def test_index_is_built_anew(tmp_path):
    path = pack(samples(8), tmp_path, "x", 8)[0]
    other = pack(samples(8, seed=1), tmp_path / "other", "x", 8)[0]
    os.replace(other, path)
    with pytest.raises(UserError, match="cut or changed"):
        ShardSet(str(path)).read(3)
    assert [member for member in shards.verify(str(path)) if member.problem.endswith("`indistill shards index` on it")]
    assert shards.index(str(path)) == {str(path): 8}
    assert list(ShardSet(str(path)).iterate()) == expected(samples(8, seed=1))


def test_folder_is_packed_whole_and_mixed(tmp_path):
    content = folder(tmp_path / "images")
    summary = shards.pack_source(str(tmp_path / "images"), tmp_path / "a", prefix="train", shard_bytes=8000)
    data = ShardSet(summary["urls"], root=str(tmp_path / "a"))
    read = list(data.iterate())
    assert {sample.image: sample.label for sample in read} == content
    assert len(read) == summary["samples"] == 21
    assert summary["classes"] == ["ant", "bee", "cat"]
    assert summary["class_counts"] == [7, 7, 7]
    assert summary["ignored_files"] == 1
    assert summary["mean_bytes"] == pytest.approx(np.mean([len(image) for image in content]), abs=0.1)
    assert summary["shards"] == len(data.paths) > 3
    assert all(0.5 * 8000 < os.path.getsize(path) < 2 * 8000 for path in data.paths)
    assert json.loads((tmp_path / "a" / "dataset.json").read_text()) == summary
    assert list(webdataset_samples(data.paths)) == read
    assert [sample.label for sample in read] != sorted(sample.label for sample in read)
    other = shards.pack_source(str(tmp_path / "images"), tmp_path / "b", prefix="train", shard_bytes=8000, seed=1)
    assert [s.key for s in ShardSet(other["urls"], root=str(tmp_path / "b")).iterate()] != [s.key for s in read]


def test_packing_is_the_same_for_any_workers_and_resumes(tmp_path):
    folder(tmp_path / "images")
    arguments = {"shard_bytes": 2000, "resize": 12, "quality": 80}
    for name, workers in (("one", 1), ("two", 2), ("resumed", 1)):
        shards.pack_source(str(tmp_path / "images"), tmp_path / name, workers=workers, **arguments)
    first = tree(tmp_path / "one")
    assert tree(tmp_path / "two") == first
    # Killed half-way: some shards are missing, one has no index, one was being written.
    tars = sorted((tmp_path / "resumed").glob("*.tar"))
    kept = {path: path.stat().st_mtime_ns for path in tars[:2]}
    os.unlink(f"{tars[0]}.index.json")
    for path in tars[2:]:
        os.unlink(path)
        os.unlink(f"{path}.index.json")
    Path(f"{tars[2]}.1.part").write_bytes(b"half")
    shards.pack_source(str(tmp_path / "images"), tmp_path / "resumed", **arguments)
    assert tree(tmp_path / "resumed") == first
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    with pytest.raises(UserError, match=r"resumed: holds another packing.*empty directory"):
        shards.pack_source(str(tmp_path / "images"), tmp_path / "resumed", shard_bytes=2000)
    os.unlink(tmp_path / "resumed" / "dataset.json")
    with pytest.raises(UserError, match="not of this packing"):
        shards.pack_source(str(tmp_path / "images"), tmp_path / "resumed", **arguments)


def test_resize_reduces_only_what_is_larger(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    small, wide = picture(0, "png", (40, 10)), picture(1, "png", (60, 30))
    (tmp_path / "images" / "a" / "0.png").write_bytes(small)
    (tmp_path / "images" / "a" / "1.png").write_bytes(wide)
    summary = shards.pack_source(str(tmp_path / "images"), tmp_path / "out", resize=15)
    images = {s.key: s.image for s in ShardSet(summary["urls"], root=str(tmp_path / "out")).iterate()}
    assert images["00000000_0"] == small
    with Image.open(io.BytesIO(images["00000001_1"])) as reduced:
        assert (reduced.format, reduced.size) == ("JPEG", (30, 15))
    (tmp_path / "images" / "a" / "2.png").write_bytes(wide[:100])
    with pytest.raises(UserError, match="image '00000002_2' cannot be decoded"):
        shards.pack_source(str(tmp_path / "images"), tmp_path / "bad", resize=15)


def test_csv_sources(tmp_path):
    content = folder(tmp_path / "images")
    files = sorted(path for path in (tmp_path / "images").rglob("*") if path.is_file() and path.suffix != ".txt")
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    labels = [content[path.read_bytes()] for path in files]
    for file, written, classes in (
        ("numbers.csv", labels, None),
        ("names.csv", [f"class {label}" for label in labels], ["class 0", "class 1", "class 2"]),
    ):
        rows = [f"{name},{label}\n" for name, label in zip(names, written)]
        (tmp_path / file).write_text("path,label\n" + "".join(rows))
        summary = shards.pack_source(str(tmp_path / file), tmp_path / file[:-4], shard_bytes=4000)
        data = ShardSet(summary["urls"], root=str(tmp_path / file[:-4]))
        assert {sample.image: sample.label for sample in data.iterate()} == content
        assert summary["classes"] == classes
    (tmp_path / "bad.csv").write_text(f"{names[0]},1\nnone.jpg,2\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 2: .*none\.jpg is not an image"):
        shards.pack_source(str(tmp_path / "bad.csv"), tmp_path / "bad")
    (tmp_path / "bad.csv").write_text(f"{names[0]}\n")
    with pytest.raises(UserError, match=r"bad\.csv: line 1: holds 1 columns"):
        shards.pack_source(str(tmp_path / "bad.csv"), tmp_path / "bad")
    with pytest.raises(UserError, match="neither shards nor class folders"):
        shards.pack_source(str(tmp_path / "images" / "ant" / "more"), tmp_path / "bad")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shards_are_resharded_in_order(tmp_path, suffix):
    (tmp_path / "source").mkdir()
    images = [picture(i, ("jpg", "png", "webp")[i % 3]) for i in range(12)]
    for part in range(3):  # keys repeat from shard to shard, as some tools write them
        members = [
            member
            for i in range(4)
            for member in ((f"d/{i}.jpg", images[4 * part + i]), (f"d/{i}.cls", b"%d" % (4 * part + i)))
        ]
        write_tar(tmp_path / "source" / f"s{part}.{suffix}", members, "w:gz" if suffix == "tar.gz" else "w")
    for workers in (1, 2):
        summary = shards.pack_source(
            str(tmp_path / "source"), tmp_path / f"out{workers}", shard_bytes=5000, workers=workers
        )
        read = list(ShardSet(summary["urls"], root=str(tmp_path / f"out{workers}")).iterate())
        assert [(sample.image, sample.label) for sample in read] == list(zip(images, range(12)))
        assert len({sample.key for sample in read}) == 12
        assert summary["shards"] > 1
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")


def test_pack_refuses_what_it_would_mix_up(tmp_path):
    pack(samples(9), tmp_path, "x", 3)
    with pytest.raises(UserError, match=r"x-000002\.tar: left from an earlier packing"):
        pack(samples(6), tmp_path, "x", 3)
    with pytest.raises(UserError, match=r"cannot pack 'a\.b\.jpg'"):
        pack([("a.b", b"", "jpg", 0)], tmp_path / "y", "x", 3)
