"""Remote shards: every fault on the way, the cache and its limit, several processes."""

import errno
import fcntl
import hashlib
import http.server
import json
import os
import pickle
import socket
import struct
import sys
import threading
import time
import urllib.parse
from pathlib import Path
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from tars import expected, samples

from indistill.config import UserError, limits
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
        server, name = self.server, urllib.parse.unquote(self.path.split("?")[0].strip("/"))
        server.served.append(name)
        fault = server.faults.pop(0) if server.faults and name.endswith(".tar") else ""
        file = server.directory / name
        if fault == "500" or not file.exists():
            return self.send_error(500 if fault else 404)
        content = file.read_bytes()
        if fault.startswith("redirect "):
            self.send_response(302)
            self.send_header("Location", fault.removeprefix("redirect "))
            return self.end_headers()
        if fault == "not http":
            return self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        self.send_response(206 if fault == "part" else 200)
        if fault == "cut chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"%x\r\n%s" % (len(content), content[:1000]))
        if fault == "headers":
            while True:
                self.wfile.write(b"X-More: " + bytes(60_000) + b"\r\n")
        if fault == "slow headers":
            return self.drip(b"X-More: " + bytes(10_000))
        if fault == "continue":
            while True:
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault == "trailers":
            self.protocol_version = "HTTP/1.1"
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n" % (len(content), content))
            while True:
                self.wfile.write(b"X-More: " + bytes(1000) + b"\r\n")
        if fault in ("drip", "no end"):
            self.end_headers()
            if fault == "drip":
                return self.drip(content)
            while True:
                self.wfile.write(bytes(1 << 16))
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

    def drip(self, content):
        """Send it byte by byte, each well within the time limit for one."""
        for i in range(len(content)):
            self.wfile.write(content[i : i + 1])
            time.sleep(0.05)

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


@pytest.mark.parametrize(
    "fault",
    ["drip", "slow headers", "headers", "continue", "trailers", "no end", "part", "not http", "cut chunks"],
)
@pytest.mark.parametrize("indexed", [True, False])
def test_a_server_without_an_end_is_a_clear_error(server, tmp_path, monkeypatch, fault, indexed):
    monkeypatch.setattr(limits, "FETCH_WINDOW_SECONDS", 0.3)
    packed, urls = serve(server, count=5, indexed=indexed)
    cache = str(tmp_path / "cache")
    limit = 2 * (server.directory / "x-000000.tar").stat().st_size
    server.faults = [fault] * 3
    expected = (
        "do not fit data.cache_bytes" if fault == "no end" and not indexed else "cannot be fetched: .* 3"
    )
    with pytest.raises(UserError, match=expected):
        list(ShardSet(urls, cache_dir=cache, cache_bytes=limit).iterate())
    assert not cached(tmp_path / "cache")
    server.faults = []
    assert list(ShardSet(urls, cache_dir=cache, cache_bytes=limit).iterate()) == packed


def test_a_reader_may_take_its_time(server, tmp_path, monkeypatch):
    """Only the time spent waiting for the server counts: in stream access, training sets the pace."""
    monkeypatch.setattr(limits, "FETCH_WINDOW_SECONDS", 0.1)
    content = os.urandom(300_000)
    (server.directory / "x").write_bytes(content)
    with remote.open_stream(f"{server.url}/x") as stream:
        parts = [stream.read(1000)]
        while part := stream.read(100_000):
            time.sleep(0.15)
            parts.append(part)
    assert b"".join(parts) == content


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "//127.0.0.1:1/x"])
def test_redirections_stay_with_http(server, tmp_path, target):
    _, urls = serve(server, count=5)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    server.faults = [f"redirect {target}"] * 3
    with pytest.raises(UserError, match=r"x-000000\.tar: cannot be fetched: "):
        data.read(0)
    asked = server.served.count("x-000000.tar")
    assert asked == (3 if target.startswith("//") else 1)  # a refused connection may be an outage
    server.faults = [f"redirect {server.url}/x-000000.tar"]
    assert data.read(0).key == "00000"


@pytest.mark.parametrize("length", ["-5", "many", str(10**30)])
def test_a_length_that_lies(server, tmp_path, monkeypatch, length):
    packed, urls = serve(server, count=5)
    whole = http.server.BaseHTTPRequestHandler.send_header
    lie = lambda self, name, value: whole(self, name, length if name == "Content-Length" else value)  # noqa: E731
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "send_header", lie)
    if length == str(10**30):
        with pytest.raises(UserError, match="the shard is cut or changed"):
            data.read(0)
    else:
        assert list(data.iterate()) == packed


def test_a_user_name_in_an_address_is_refused_without_showing_it(server, tmp_path):
    _, urls = serve(server, count=5)
    with pytest.raises(UserError, match="user name or password is not supported"):
        ShardSet(urls.replace("//", "//me:secret@"), cache_dir=str(tmp_path / "cache"))
    assert not server.served


@pytest.mark.parametrize("kept", [False, True])
def test_a_page_instead_of_an_index_is_not_kept(server, tmp_path, caplog, kept):
    packed, urls = serve(server, count=5)
    index = server.directory / "x-000000.tar.index.json"
    whole = index.read_bytes()
    page = b"<!DOCTYPE html>"
    if kept:  # by an earlier version
        (tmp_path / "cache").mkdir()
        name = remote.cache_name(f"{server.url}/x-000000.tar") + ".index.json"
        (tmp_path / "cache" / name).write_bytes(page)
    else:
        index.write_bytes(page)
    for _ in range(2):
        assert list(ShardSet(urls, cache_dir=str(tmp_path / "cache")).iterate()) == packed
    assert server.served.count(index.name) == 1
    assert ("the shard is fetched to build one" in caplog.text) is not kept
    assert whole == next((tmp_path / "cache").glob("*.index.json")).read_bytes()


def test_an_index_without_end(server, tmp_path, monkeypatch):
    _, urls = serve(server, count=5)
    monkeypatch.setattr(limits, "MAX_SMALL_FILE_BYTES", 100)
    with pytest.raises(
        UserError, match=r"x-000000.tar.index.json: has more than 100 bytes \(MAX_SMALL_FILE_BYTES\)"
    ):
        ShardSet(urls, cache_dir=str(tmp_path / "cache"))


# --- the SHA-256 of shards ----------------------------------------------------------------------------------


def test_a_shard_with_another_sha256_is_refused(server, tmp_path):
    packed, urls = serve(server, count=5)
    tar = server.directory / "x-000000.tar"
    plain = Path(f"{tar}.index.json").read_bytes()
    verify.index(str(tar), hashed=True)
    stored = json.loads(Path(f"{tar}.index.json").read_bytes())
    assert stored == {**json.loads(plain), "sha256": hashlib.sha256(tar.read_bytes()).hexdigest()}
    hashed = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    assert list(hashed.iterate()) == packed
    assert hashed.fingerprint == ShardSet(str(tar)).fingerprint  # that of runs with older indices
    assert not [member for member in verify.verify(str(tar)).bad if not member.key]

    content = bytearray(tar.read_bytes())
    content[600] ^= 1  # within the first image
    tar.write_bytes(content)
    for read in (lambda data: data.read(0), lambda data: list(data.iterate())):
        with pytest.raises(UserError, match=r"x-000000.tar: the shard is cut or changed: its SHA-256 is "):
            read(ShardSet(urls, cache_dir=str(tmp_path / "other")))
    assert [member.problem for member in verify.verify(str(tar)).bad if not member.key] == [
        f"{tar}.index.json does not fit the shard: run `indistill shards index` on it"
    ]
    verify.index(str(tar))
    assert Path(f"{tar}.index.json").read_bytes() == plain


def test_a_sha256_that_is_none(server):
    serve(server, count=5)
    index = server.directory / "x-000000.tar.index.json"
    for wrong in ("abc", 5, "Z" * 64):
        index.write_text(json.dumps({**json.loads(index.read_bytes()), "sha256": wrong}))
        with pytest.raises(UserError, match="not an index that this version reads"):
            ShardSet(str(index).removesuffix(".index.json"))


# --- the cache directory ------------------------------------------------------------------------------------


def test_a_new_cache_is_private(server, tmp_path):
    _, urls = serve(server, count=5)
    ShardSet(urls, cache_dir=str(tmp_path / "a" / "cache")).read(0)
    modes = [(tmp_path / "a" / path).stat().st_mode & 0o777 for path in ("cache", "cache/remote-shards")]
    assert modes == [0o700, 0o700]


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("folder", ["cache", "cache/remote-shards"])
def test_a_cache_of_another_user_is_refused(server, tmp_path, folder):
    _, urls = serve(server, count=5)
    (tmp_path / "cache/remote-shards").mkdir(parents=True)
    os.chown(tmp_path / folder, 4321, 4321)
    with pytest.raises(UserError, match=r"belongs to another user \(uid 4321\)"):
        ShardSet(urls, cache_dir=str(tmp_path / "cache"))


def test_what_links_into_the_cache_point_to_stays(server, tmp_path, monkeypatch):
    packed, urls = serve(server, count=5)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    victim = tmp_path / "victim"
    victim.write_text("precious")
    file = tmp_path / "cache/remote-shards" / remote.cache_name(f"{server.url}/x-000000.tar")
    for end in ("", ".part"):
        os.symlink(victim, f"{file}{end}")
    assert list(data.iterate()) == packed
    assert victim.read_text() == "precious"
    assert not file.is_symlink()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(37, "No locks available"), "No locks available"),  # as on NFS without a lock service
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_a_folder_without_locks_is_named(server, tmp_path, monkeypatch, error, reason):
    _, urls = serve(server, count=5)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    with pytest.raises(UserError, match=rf"\.lock: cannot be locked \({reason}\): choose a folder on a disk"):
        data.read(0)


def test_a_file_system_without_flock_has_locks_of_another_kind(server, tmp_path, monkeypatch):
    packed, urls = serve(server, count=5)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    with pytest.warns(UserWarning, match="flock not supported"):
        assert list(data.iterate()) == packed


def test_a_lock_that_is_held_is_waited_for_and_then_an_error(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(remote, "LOCK_MESSAGE_SECONDS", 0.05)
    monkeypatch.setattr(limits, "MAX_LOCK_SECONDS", 0.1)
    _, urls = serve(server, count=5)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    file = tmp_path / "cache/remote-shards" / remote.cache_name(f"{server.url}/x-000000.tar")
    with (
        FileLock(f"{file}.lock"),
        pytest.raises(UserError, match=r"lock: another process holds it .*MAX_LOCK_SEC"),
    ):
        data.read(0)
    assert "waiting for another process" in caplog.text
    assert data.read(0).key == "00000"


def test_a_missing_shard_is_not_asked_for_again(server, tmp_path):
    _, urls = serve(server)
    data = ShardSet(urls, cache_dir=str(tmp_path / "cache"))
    os.unlink(server.directory / "x-000001.tar")
    with pytest.raises(UserError, match=r"x-000001\.tar: cannot be fetched: .*404"):
        data.read(7)
    assert len(server.served) == 4 + 1
    with pytest.raises(UserError, match=r"x-9\.tar: cannot be fetched: .*404"):
        ShardSet(f"{server.url}/x-9.tar", cache_dir=str(tmp_path / "cache"))


def test_names_are_percent_encoded_once(server, tmp_path):
    """A URL with spaces and other letters, and one that is encoded already."""
    packed = samples(3)
    pack(packed, server.directory, "\u00e4 b", 3)
    for name in ("\u00e4 b-000000.tar", "%C3%A4%20b-000000.tar"):
        data = ShardSet(f"{server.url}/{name}", cache_dir=str(tmp_path / name))
        assert len(data) == 3
        assert data.read(0).image
    with pytest.raises(UserError, match=r"is not a valid URL"):
        ShardSet("http://127.0.0.1:port/x.tar", cache_dir=str(tmp_path / "cache"))


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


@pytest.mark.parametrize(
    ("url", "module", "extra"),
    [
        ("s3://bucket/a.tar", "s3fs", "s3"),
        ("s3a://bucket/a.tar", "s3fs", "s3"),
        ("gs://bucket/a.tar", "gcsfs", "gcs"),
        ("hf://datasets/a/b/c.tar", "huggingface_hub", "hf"),
    ],
)
def test_a_missing_package_of_a_store_is_named_with_its_extra(url, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = (
        rf"^{url.partition('/')[0]}// needs {module.replace('_', '-')}: pip install 'indistill\[{extra}\]'"
    )
    with pytest.raises(UserError, match=message), remote.open_remote(url):
        pass
