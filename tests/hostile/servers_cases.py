"""Servers that answer with too much, with something else, or with the way to somewhere else."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable

from hostile import Case, Inputs

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
DIRECT = {"no_proxy": "127.0.0.1"}


class Server(http.server.ThreadingHTTPServer):
    """Serves a case's shards on 127.0.0.1; `answer` may answer a request, and returns whether it did."""

    daemon_threads = True

    def __init__(self, inputs: Inputs, answer: Callable[[http.server.BaseHTTPRequestHandler], bool]) -> None:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments) -> None:
                super().__init__(*arguments, directory=str(inputs.data))

            def do_GET(self) -> None:
                if not answer(self):
                    super().do_GET()

            def log_message(self, *arguments) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        pass  # of clients that have had enough


def _head(handler: http.server.BaseHTTPRequestHandler, **headers: str) -> None:
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()


def _page_for_index(handler: http.server.BaseHTTPRequestHandler) -> bool:
    handler.path = handler.path.partition("?")[0]
    if not handler.path.endswith(".json"):
        return False
    _head(handler, Content_Length=str(len(PAGE)))
    handler.wfile.write(PAGE)
    return True


def _endless(suffix: str) -> Callable[[http.server.BaseHTTPRequestHandler], bool]:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> bool:
        if not handler.path.endswith(suffix):
            return handler.path.endswith(".json") and handler.send_error(404) is None
        _head(handler)
        while True:
            handler.wfile.write(bytes(1 << 20))

    return answer


def _petabyte(handler: http.server.BaseHTTPRequestHandler) -> bool:
    _head(handler, Content_Length=str(10**15))
    return True


def _to_file(handler: http.server.BaseHTTPRequestHandler) -> bool:
    handler.send_response(302)
    handler.send_header("Location", "file:///etc/passwd")
    handler.end_headers()
    return True


def _train(inputs: Inputs, answer: Callable, **data) -> list[str]:
    address = f"http://127.0.0.1:{Server(inputs, answer).server_port}"
    cache = str(inputs.folder / "cache")
    return inputs.train(
        train=f"{address}/train-00000{{0..2}}.tar", eval=None, cache_dir=cache, root=None, **data
    )


def _index(inputs: Inputs, answer: Callable) -> list[str]:
    address = f"http://127.0.0.1:{Server(inputs, answer).server_port}/train-000000.tar"
    return ["shards", "index", address, "--cache-dir", str(inputs.folder / "cache"), "--workers", "1"]


def _signed(inputs: Inputs, *, missing: bool = False) -> list[str]:
    """Train from a signed URL, at which a page is found instead of an index."""
    address = f"http://127.0.0.1:{Server(inputs, _page_for_index).server_port}"
    shards = f"{address}/{'no' if missing else 'train'}-00000{{0..2}}.tar?signature=SECRET"
    tree = inputs.tree()
    tree["data"] |= {"train": shards, "eval": None, "root": None, "cache_dir": str(inputs.folder / "cache")}
    return ["train", inputs.write(tree | {"trackers": ["tensorboard"]})]


def _kept_no_secret(inputs: Inputs) -> None:
    """Neither output nor any file of the run has the secret; its config goes on with another one."""
    files = [path for path in (inputs.folder / "run").rglob("*") if path.is_file()]
    assert (
        any(path.name.startswith("events.") for path in files)
        or not (inputs.folder / "run/summary.json").exists()
    )
    for path in [*files, inputs.folder / "out", inputs.folder / "err"]:
        assert b"SECRET" not in path.read_bytes(), path
    assert (
        b"?REDACTED"
        in (inputs.folder / "run/config.yaml").read_bytes() + (inputs.folder / "err").read_bytes()
    )


def _of_saved_config(inputs: Inputs) -> list[str]:
    config = inputs.tree()
    config["data"] |= {"train": "https://example.com/x.tar?REDACTED", "eval": None, "root": None}
    config["data"]["cache_dir"] = str(inputs.folder / "cache")
    return ["train", inputs.write(config)]


CASES = [
    Case(
        "signed URL, page instead of an index",
        _signed,
        output=r"\?REDACTED: what is beside it is .*; the shard is fetched to build one",
        environment=DIRECT,
        after=_kept_no_secret,
    ),
    Case(
        "signed URL, error",
        lambda inputs: _signed(inputs, missing=True),
        error=r"no-00000\d.tar\?REDACTED: cannot be fetched",
        environment=DIRECT,
        after=_kept_no_secret,
    ),
    Case("signed URL, saved config", _of_saved_config, error="does not keep the query or the password"),
    Case(
        "server, index without end",
        lambda inputs: _train(inputs, _endless(".json")),
        error="MAX_SMALL_FILE_BYTES",
        environment=DIRECT,
    ),
    Case(
        "server, shard without end",
        lambda inputs: _train(inputs, _endless(".tar"), cache_bytes=1e6),
        error="do not fit data.cache_bytes",
        environment=DIRECT,
    ),
    Case(
        "server, length of a petabyte",
        lambda inputs: _index(inputs, _petabyte),
        error="do not fit data.cache_bytes",
        environment=DIRECT,
    ),
    Case(
        "server, redirection to a file",
        lambda inputs: _index(inputs, _to_file),
        error="cannot be fetched: .*file:///etc/passwd",
        environment=DIRECT,
    ),
]
