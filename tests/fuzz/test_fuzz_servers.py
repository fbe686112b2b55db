"""Made-up answers of a server that has shards, their indices and lists of classes."""

from __future__ import annotations

import json
import shutil
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import BAD_JSON, fuzz, mutated
from hypothesis import strategies as st
from test_fuzz_data import TARS

from indistill.data import class_names, remote, shards
from indistill.data.index import build_index


class Server(socketserver.ThreadingTCPServer):
    """Answers each request for a name with the bytes in `answers`, and closes the connection."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, bytes] = {}


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        try:
            name = self.rfile.readline(10_000).split(b" ")[1].decode().rpartition("/")[2].partition("?")[0]
            while self.rfile.readline(10_000).strip():
                pass
            assert isinstance(self.server, Server)
            self.wfile.write(self.server.answers.get(name, b"HTTP/1.1 404 Not Found\r\n\r\n"))
        except (OSError, IndexError):  # the client has gone
            pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FETCH_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(remote, "FETCH_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(remote, "FETCH_ATTEMPTS", 2)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def answer(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, headers, len(body), body)


STATUS = st.sampled_from(
    [b"200 OK", b"206 Partial Content", b"204 No Content", b"301 Moved", b"302 Found", b"404 Not Found",
     b"403 Forbidden",
     b"416 Range", b"429 Too Many", b"500 Error", b"100 Continue", b"999 ?", b"0", b"x", b""]
)  # fmt: skip
HEADER = st.sampled_from(
    [b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 3",
     b"Content-Length: x",
     b"Content-Length: 1\r\nContent-Length: 2", b"Transfer-Encoding: chunked", b"Content-Encoding: gzip",
     b"Location: /a",
     b"Location: file:///dev/zero", b"Location: ftp://127.0.0.1:1/", b"Content-Type: text/html",
     b"X: " + b"x" * 70_000,
     b"X: \x1b[2J", b":", b"Content-Length:"]
)  # fmt: skip


def made_up(body: bytes) -> st.SearchStrategy[bytes]:
    """An answer with other headers, another status or another body, or cut off or with other bytes."""
    bodies = mutated(body) | st.sampled_from(
        [body, b"", b"<html>login</html>", b"5\r\nhello\r\n0\r\n\r\n", b"FFFFFFFFFF\r\nx", b"-1\r\n"]
    )
    headers = st.lists(HEADER, max_size=3).map(lambda lines: b"".join(line + b"\r\n" for line in lines))
    built = st.builds(lambda *parts: b"HTTP/1.1 %b\r\n%b\r\n%b" % parts, STATUS, headers, bodies)
    return mutated(answer(body)) | built | st.builds(answer, bodies, STATUS, headers)


def test_shards_of_a_server(server, tmp_path):
    (tmp_path / "a.tar").write_bytes(TARS[0])
    build_index(str(tmp_path / "a.tar"))
    index = (tmp_path / "a.tar.index.json").read_bytes()
    cache = tmp_path / "cache"
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"

    def read(answers: tuple[bytes, bytes]) -> None:
        server.answers = dict(zip(("a.tar", "a.tar.index.json"), answers))
        shutil.rmtree(cache, ignore_errors=True)
        try:
            list(shards.ShardSet(url, cache_dir=str(cache)).iterate())
        finally:
            left = [path.name for path in Path(cache).rglob("*.part")]
        assert left == []

    right = (answer(TARS[0]), answer(index))
    fuzz(
        read,
        st.tuples(made_up(TARS[0]) | st.just(right[0]), made_up(index) | st.just(right[1])),
        ordinary=[right],
        first=[
            (right[0], answer(b"", b"404 Not Found")),
            *((right[0], answer(bad)) for bad in BAD_JSON),
        ],
    )


def test_lists_of_a_server(server):
    url = f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    content = json.dumps({"plan": "0", "complete": True, "classes": ["ant", "bee"]}).encode()

    def read(text: bytes) -> None:
        server.answers = {"dataset.json": text}
        class_names.beside(url)

    fuzz(read, made_up(content), ordinary=[answer(content)], first=[*map(answer, BAD_JSON)])
