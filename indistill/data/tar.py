"""Read the members of a tar from front to end, within limits.

`tarfile` does what a header says: it expands sparse files, goes back where a size is negative, follows chains
of headers as long as they are, and searches PAX headers in quadratic time. This reader takes only what shards
consist of, files with ordinary or long names and links to them, and refuses the rest. A header's fields and
its checksum are parsed by `tarfile`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, NoReturn, cast

from indistill.config import UserError
from indistill.config.extras import need
from indistill.config.limits import (
    MAX_EXPANSION,
    MAX_NAME_BYTES,
    MAX_SHARD_SAMPLES,
    MAX_TAR_END_BYTES,
    MAX_TAR_HEADER_BYTES,
    MAX_TAR_HEADERS,
    MIN_EXPANDED_BYTES,
)

BLOCK = tarfile.BLOCKSIZE  # bytes: size of a member's header; contents are padded to a multiple of it
_SOLARIS_PAX = b"X"
_PAX = (tarfile.XHDTYPE, _SOLARIS_PAX)
_LONG = {tarfile.GNUTYPE_LONGNAME: b"path", tarfile.GNUTYPE_LONGLINK: b"linkpath"}  # to PAX's keywords
_EXTENDING = (*_PAX, tarfile.XGLTYPE, *_LONG)
_SPARSE = re.compile(rb"GNU\.sparse\.")  # PAX's keywords of a sparse member
_GZIP = b"\x1f\x8b"  # the first bytes of compressed files
_BZIP2 = b"BZh"
_XZ = b"\xfd7zXZ"
_ZSTD = b"\x28\xb5\x2f\xfd"
_MAX_LINKS = 40  # in a chain, as in Linux
_PIECE = 1 << 20  # bytes read at once where they are not kept
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class Member(NamedTuple):
    """A regular file in a tar, or a link, which has no content."""

    name: str
    offset: int  # bytes from the begin of the (uncompressed) tar to the content
    size: int  # bytes of the content
    target: str | None = None  # of a link, the name that it leads to, without . and ..; None: a regular file


class Tar:
    """The regular files and links of a tar, in order. While one is iterated over, `content` reads it.

    path: for messages.
    stream: the tar from its begin. It is read from front to end; contents that are not read are skipped
        without reading them if it can seek and `gzipped` is False.
    gzipped: whether it is compressed, with gzip or zstd. None: its first bytes tell, and bzip2 and xz are
        possible, too.
    strict: whether a tar without its end, a block of zeros, or with anything but zeros behind it is damaged.
        Otherwise a tar may end behind any member, and what follows the end is not read.

    Iteration and `content` raise UserError for a tar that is damaged or passes a limit.
    """

    def __init__(self, path: str, stream: IO[bytes], *, gzipped: bool | None = None, strict: bool) -> None:
        self.path = path
        self._strict = strict
        self._size: int | None = None  # bytes of a tar that can seek
        self._source = _Source(stream)
        self._stream = stream
        self._compressed = gzipped is not False
        if gzipped:
            buffered = io.BufferedReader(self._source, _PIECE)
            first = buffered.peek(6)
            zstd = first.startswith(_ZSTD)
            if first and not zstd and not first.startswith(_GZIP):
                _refuse_compressed(path, first)
                raise UserError(
                    f"{path}: is not compressed with gzip or zstd, as its name says: rename it to end with "
                    ".tar, or fetch it again"
                )
            self._stream = cast(IO[bytes], _Zstd(path, buffered) if zstd else gzip.GzipFile(fileobj=buffered))
        elif gzipped is None:
            self._stream, self._compressed = _opened(path, self._source)
        elif stream.seekable():
            _refuse_compressed(path, stream.read(6))
        if not self._compressed and stream.seekable():
            self._stream = stream
            self._size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
        self._at = 0  # position in the uncompressed tar
        self._following = 0  # position of the next header
        self._named: dict[str, Member] | None = None  # all members by name, once a link is followed
        self._left = 0  # bytes of the current file that `content` has not read

    def __iter__(self) -> Iterator[Member]:
        with self._damage_named():
            while (member := self._next()) is not None:
                yield member
            if self._strict:
                self._check_end()

    def content(self, most: int) -> bytes:
        """Read the next bytes of the current file: all that are left, but at most `most`."""
        with self._damage_named():
            size = min(most, self._left)
            self._left -= size
            content = self._read(size)
            if len(content) < size:
                raise EOFError("unexpected end of data")
            return content

    def follow(self, member: Member) -> Member:
        """The file that a link leads to, which `content` reads then; a regular file is returned as it is.

        Raises LookupError, with the problem, if there is none in this tar or it cannot be read again.
        """
        if member.target is None:
            return member
        file: Member | None = member
        for _ in range(_MAX_LINKS):
            if file is None or file.target is None:
                break
            file = self._members(member.name).get(file.target)
        if file is None or file.target is not None:
            raise LookupError(
                f"{member.name} is a link to {member.target}, which is no file in this tar: write the tar "
                "again with `tar --dereference`, or leave the link out"
            )
        self._skip_to(file.offset)
        self._left = file.size
        return file

    def _members(self, link: str) -> dict[str, Member]:
        """All members by name, to follow a `link`. Of those with one name, the last regular file counts."""
        if self._named is None:
            if self._size is None:
                remedy = "decompress it" if self._compressed else "run `indistill shards pack` on it"
                raise LookupError(
                    f"{link} is a link, which is followed only in a tar on a disk that is not compressed: "
                    f"{remedy}"
                )
            self._named = {}
            for member in Tar(self.path, self._stream, gzipped=False, strict=False):
                name = posixpath.normpath(member.name)
                if member.target is None or name not in self._named:
                    self._named[name] = member
                if len(self._named) > MAX_SHARD_SAMPLES:
                    self._refuse(f"links among more than {MAX_SHARD_SAMPLES} members (MAX_SHARD_SAMPLES)")
        return self._named

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED as error:
            raise UserError(
                f"{self.path}: the tar is cut or damaged ({error}) at byte {self._at}: fetch or pack it again"
            ) from None

    def _refuse(self, what: str, remedy: str = "pack it again") -> NoReturn:
        raise UserError(f"{self.path}: {what} at byte {self._at}: {remedy}")

    def _next(self) -> Member | None:
        """The next regular file or link; None at the end."""
        # Of the headers that extend the next one; the first to say something counts.
        records: dict[bytes, bytes] = {}
        extended = 0
        while (header := self._header()) is not None:
            if header.type not in _EXTENDING:
                member = self._member(header, records)
                if header.type == tarfile.GNUTYPE_SPARSE or any(map(_SPARSE.match, records)):
                    name = _text(records.get(b"GNU.sparse.name", b"")) or member.name
                    self._refuse(f"{name} is a sparse member", "write the tar without --sparse")
                if header.isreg() or member.target is not None:
                    return member
                records, extended = {}, 0
                continue
            extended += 1
            if extended > MAX_TAR_HEADERS:
                self._refuse(f"more than {MAX_TAR_HEADERS} headers of one member (MAX_TAR_HEADERS)")
            content = self._extension(header)
            if header.type in _LONG:
                records.setdefault(_LONG[header.type], content.partition(b"\0")[0])
            elif header.type in _PAX:
                records = _pax_records(content) | records
            # A global PAX header says nothing about single files.
        if extended:
            raise EOFError("unexpected end of data")
        return None

    def _header(self) -> tarfile.TarInfo | None:
        """The next header; None at the end of the tar."""
        self._skip_to(self._following)
        block = self._read(BLOCK)
        if not block and self._at and not self._strict:
            return None
        if len(block) < BLOCK:
            raise EOFError("unexpected end of data")
        if not any(block):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0:
            raise tarfile.ReadError("negative size")
        return header

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        """The content of a header that extends the next one."""
        if header.size > MAX_TAR_HEADER_BYTES:
            self._refuse(
                f"a header of {header.size} bytes, more than {MAX_TAR_HEADER_BYTES} (MAX_TAR_HEADER_BYTES),"
            )
        self._begin_content(header.size)
        return self.content(header.size)

    def _member(self, header: tarfile.TarInfo, records: dict[bytes, bytes]) -> Member:
        """The file or link of a header and of those that extend it."""
        size = records.get(b"size")
        if size is not None and not (size.isdigit() and len(size) < 20):
            raise tarfile.ReadError(f"invalid size {size[:20]!r}")
        has_content = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        self._begin_content(int(size or header.size) if has_content else 0)
        name = _text(records[b"path"]).rstrip("/") if b"path" in records else header.name
        target = None
        if header.issym() or header.islnk():
            target = _text(records[b"linkpath"]) if b"linkpath" in records else header.linkname
            folder = posixpath.dirname(name) if header.issym() else ""  # hard links begin at the tar's root
            target = posixpath.normpath(posixpath.join(folder, target))
        for text in (name, target or ""):
            length = len(text.encode("utf-8", "surrogateescape"))
            if length > MAX_NAME_BYTES:
                self._refuse(
                    f"a member's name of {length} bytes, more than {MAX_NAME_BYTES} (MAX_NAME_BYTES),"
                )
        return Member(name, self._at, self._left, target)

    def _begin_content(self, size: int) -> None:
        self._left = size
        self._following = self._at + -(-size // BLOCK) * BLOCK
        if self._size is not None and self._following > self._size:
            raise EOFError("unexpected end of data")

    def _check_end(self) -> None:
        """Raise an error if anything but zeros follows the end: `tarfile` takes a damaged header for it."""
        end = self._at
        while piece := self._read(_PIECE):
            if piece.count(0) < len(piece):
                raise tarfile.ReadError("data behind the end")
            if self._at - end > MAX_TAR_END_BYTES:
                self._refuse(f"more than {MAX_TAR_END_BYTES} zeros behind the end (MAX_TAR_END_BYTES)")

    def _skip_to(self, position: int) -> None:
        if self._size is not None:
            self._stream.seek(position)
            self._at = position
        while self._at < position:
            if not self._read(min(position - self._at, _PIECE)):
                raise EOFError("unexpected end of data")

    def _read(self, size: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the stream."""
        pieces = []
        while size > 0 and (piece := self._stream.read(min(size, _PIECE))):
            pieces.append(piece)
            size -= len(piece)
            self._at += len(piece)
            if self._compressed and self._at > max(MIN_EXPANDED_BYTES, MAX_EXPANSION * self._source.count):
                self._refuse(f"it expands to more than {MAX_EXPANSION} times its size (MAX_EXPANSION)")
        return b"".join(pieces)


class _Source(io.RawIOBase):
    """A stream that counts the bytes that are read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.count = 0
        self._stream = stream

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer."""
        content = self._stream.read(len(buffer))
        buffer[: len(content)] = content
        self.count += len(content)
        return len(content)


class _Zstd:
    """A stream that is compressed with zstd. Reading raises EOFError where it is damaged."""

    def __init__(self, path: str, stream: IO[bytes]) -> None:
        need("zstd", f"{path}: is compressed with zstd, which")
        import zstandard

        self._error = zstandard.ZstdError
        # Without a size of its own, it takes windows of at most 128 MiB.
        self._reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes."""
        try:
            return self._reader.read(size)
        except self._error as error:
            raise EOFError(str(error)) from None


def _refuse_compressed(path: str, first: bytes) -> None:
    """Raise UserError for a shard that is compressed otherwise than its name says, by its first bytes."""
    for magic, name, ending, program in ((_GZIP, "gzip", "gz", "gunzip"), (_ZSTD, "zstd", "zst", "unzstd")):
        if first.startswith(magic):
            raise UserError(
                f"{path}: is compressed with {name}, but its name does not say so: rename it to end with "
                f".tar.{ending}, or decompress it with `{program} < OLD > NEW`"
            )
    for magic, name, program in (
        (_XZ, "xz", "unxz"),
        (_BZIP2, "bzip2", "bunzip2"),
    ):
        if first.startswith(magic):
            raise UserError(
                f"{path}: is compressed with {name}, of which no index is made: decompress it with "
                f"`{program} < OLD > NEW`"
            )


def _opened(path: str, source: _Source) -> tuple[IO[bytes], bool]:
    """The uncompressed stream, and whether it was compressed; its first bytes tell how."""
    buffered = io.BufferedReader(source, _PIECE)
    first = buffered.peek(6)
    if first.startswith(_ZSTD):
        return cast(IO[bytes], _Zstd(path, buffered)), True
    if first.startswith(_GZIP):
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered)), True
    if first.startswith(_BZIP2):
        return cast(IO[bytes], bz2.BZ2File(buffered)), True
    if first.startswith((_XZ, b"\x5d\x00\x00\x80")):
        return cast(IO[bytes], lzma.LZMAFile(buffered)), True
    return buffered, False


def _text(name: bytes) -> str:
    """A name as `tarfile` decodes it."""
    return name.decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> dict[bytes, bytes]:
    """The records `LENGTH KEYWORD=VALUE\\n` of a PAX header; the last of a keyword counts."""
    records = {}
    at = 0
    while at < len(content):
        digits = content[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else at
        keyword, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise tarfile.ReadError("invalid PAX header")
        records[keyword] = value
        at = end
    return records
