"""Open files over HTTP from a server that may be slow, broken or hostile.

A time limit for each byte is not enough: a server that sends one now and then would hold a run up for ever.
Here the average rate has a lower bound, from the first byte of the headers on.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from indistill.config import UserError, in_one_line, limits

_SAFE = "/:?#[]@!$&'()*+,;=~%"  # what may be in a path and a query as it is
_SCHEMES = ("http://", "https://")


def open_http(url: str, timeout: float) -> http.client.HTTPResponse:
    """Open a URL for reading. Raises OSError, or UserError for an address with a user name and for no URL.

    Spaces and characters that are not ASCII are percent-encoded; what is encoded already stays.

    timeout: seconds to wait for a connection and for each byte.
    """
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise UserError(f"{url}: an address with a user name or password is not supported: use a signed URL")
    opener = urllib.request.build_opener(_Http, _Https, _Redirects)
    try:
        with _as_os_error():
            response = opener.open(_encoded(url), timeout=timeout)
    except http.client.InvalidURL as error:
        raise UserError(f"{url}: is not a valid URL ({in_one_line(error)}): correct it") from None
    if response.status != 200:
        with response:
            raise OSError(f"HTTP status {response.status} instead of 200")
    return response


def _encoded(url: str) -> str:
    """The URL with its path and query percent-encoded where they are not yet."""
    parts = urllib.parse.urlsplit(url)
    path, query = (
        urllib.parse.quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", part), safe=_SAFE)
        for part in (parts.path, parts.query)
    )
    return parts._replace(path=path, query=query).geturl()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    """Raise OSError for an answer that is not HTTP or breaks off; `http.client` has errors of its own."""
    try:
        yield
    except http.client.InvalidURL:  # another attempt would not help
        raise
    except http.client.HTTPException as error:
        raise OSError(in_one_line(error, with_type=True)) from None


class _Paced(io.RawIOBase):
    """What a connection receives; reading fails if it comes too slowly, or is more than `left` bytes."""

    def __init__(self, received: Any) -> None:
        self._received = received
        self._bytes = 0
        self._seconds = 0.0  # spent waiting for them: the reader may take its time
        self.left: int | None = limits.MAX_RESPONSE_HEADER_BYTES  # None: any number

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        began = time.monotonic()
        count = self._received.readinto(buffer)
        self._seconds += time.monotonic() - began
        self._bytes += count
        if self._seconds >= limits.FETCH_WINDOW_SECONDS:
            if self._bytes < limits.MIN_FETCH_BYTES_PER_SECOND * self._seconds:
                raise TimeoutError(
                    f"{self._bytes} bytes in {self._seconds:.0f} s are fewer than "
                    f"{limits.MIN_FETCH_BYTES_PER_SECOND} in a second (MIN_FETCH_BYTES_PER_SECOND)"
                )
            self._bytes = 0
            self._seconds = 0.0
        if self.left is not None:
            self.left -= count
            if self.left < 0:
                most = limits.MAX_RESPONSE_HEADER_BYTES
                raise OSError(f"headers of more than {most} bytes (MAX_RESPONSE_HEADER_BYTES)")
        return count

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        self._paced.left = None

    def _read_and_discard_trailer(self) -> None:
        self._paced.left = limits.MAX_RESPONSE_HEADER_BYTES
        super()._read_and_discard_trailer()  # type: ignore[misc]  # typeshed lacks it

    def read(self, amt: int | None = None) -> bytes:
        with _as_os_error():
            return super().read(amt)

    def read1(self, n: int = -1) -> bytes:
        with _as_os_error():
            return super().read1(n)

    def readinto(self, b: Any) -> int:
        with _as_os_error():
            return super().readinto(b)


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirects to other schemes are refused: urllib itself would follow one to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(_SCHEMES):
            raise urllib.error.HTTPError(newurl, code, f"{msg}: to {newurl}, not http", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
