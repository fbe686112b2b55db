"""Remote shards: every fault on the way, the cache and its limit, several processes."""

import http.server
import os
import pickle
import socket
import struct
import threading
import time

import fsspec
import numpy as np
import pytest
from tars import expected, samples

from indistill.config import UserError
from indistill.data import remote, verify
from indistill.data.packing import pack
from indistill.data.shards import ShardSet


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
    monkeypatch.setattr(remote, "FETCH_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(remote, "FETCH_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(remote, "FETCH_ATTEMPTS", 3)
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
    with pytest.raises(
        UserError, match=r"x-000001\.tar: the shard is cut or changed.*indistill shards index"
    ):
        data.read(7)
    verify.index(urls, cache_dir=str(tmp_path / "cache"))  # the remedy that the message names
    assert ShardSet(urls, cache_dir=str(tmp_path / "cache")).read(7).key == "00007"


def test_shards_without_index_are_fetched_and_counted_once(server, tmp_path):
    packed, urls = serve(server, indexed=False)
    for _ in range(2):
        assert list(ShardSet(urls, cache_dir=str(tmp_path / "cache")).iterate()) == packed
    assert sorted(server.served) == sorted(
        [f"x-{i:06d}.tar{end}" for i in range(4) for end in ("", ".index.json")]
    )


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
    assert sorted(server.served) == sorted(
        [f"x-{i:06d}.tar{end}" for i in range(4) for end in ("", ".index.json")]
    )


def test_processes_together_stay_within_the_limit(server, tmp_path):
    packed, urls = serve(server, count=60)
    size = max(path.stat().st_size for path in server.directory.glob("*.tar"))
    cache = remote.ShardCache(str(tmp_path / "cache"), 3 * size)
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
                e.name.removesuffix(".part"): e.stat().st_size
                for e in os.scandir(dead.parent)
                if "lock" not in e.name
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


def test_other_sources(server, tmp_path, monkeypatch):
    packed, urls = serve(server)
    cache = str(tmp_path / "cache")
    memory = fsspec.filesystem("memory")
    for path in server.directory.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    local, signed = f"file://{server.directory}/x-000000.tar", f"{server.url}/x-000001.tar?signature=a/b.c"
    mixed = [local, signed, "memory://bucket/x-000002.tar", f"pipe:cat {server.directory}/x-000003.tar"]
    monkeypatch.setenv("INDISTILL_ALLOW_PIPE", "1")
    data = ShardSet(mixed, cache_dir=cache)
    assert list(data.iterate()) == packed
    for urls, options, message in (
        (signed, {}, r"need data\.cache_dir"),
        ("memory://bucket/none.tar", {"cache_dir": cache}, r"memory://bucket/none\.tar: cannot be fetched"),
        ("what://bucket/x.tar", {"cache_dir": cache}, "what://bucket/x.tar: is not a URL that is read"),
        ("pipe:exit 3", {"cache_dir": cache}, "ended with status 3"),
    ):
        with pytest.raises(UserError, match=message):
            ShardSet(urls, **options)
