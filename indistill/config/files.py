"""Read and write files safely: atomic replacement, JSON lines, SHA-256."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from io import BufferedReader, BufferedWriter, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pydantic_core import from_json

from indistill.config.limits import MAX_RECORD_LINE_BYTES, MAX_RECORD_LINES_BYTES

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file, by its specification


# --- writing ------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` at the end of the `with` block, in one step.

    A reader finds the old content or all of the new one, which is on the disk by then. Several processes may
    write the same file: the last one wins. If the block raises, the old content stays. Only a killed process
    leaves its unfinished `<path>.<random>.part` behind.
    """
    part = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.part"
    try:
        with open(part, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error matters
            os.unlink(part)
        raise


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, as `replacing` does. Halves of a character, as in names that are not UTF-8,
    are written as escapes.
    """
    with replacing(path) as stream:
        stream.write(text.encode(errors="backslashreplace"))


class HashedFile(BufferedWriter):
    """A file that is hashed while it is written, so that nothing has to read it again for its SHA-256.

    Use it in a `with` block, at whose end its content is on the disk. It can be handed to a library that
    writes its output in order, without going back.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(FileIO(path, "w"))
        self.size = 0  # bytes
        self._digest = hashlib.sha256()

    def write(self, data: ReadableBuffer) -> int:
        self._digest.update(data)
        count = super().write(data)
        self.size += count
        return count

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        with contextlib.closing(self):
            if kind is None:
                self.flush()
                os.fsync(self.fileno())


def give_usual_mode(path: str | Path) -> None:
    """Give a file the permissions that `open` gives to new files there; safetensors makes its own 0600.

    The umask alone would not tell: it cannot be read without setting it, and a folder may have default ACLs.
    """
    probe = f"{path}.{os.getpid()}.{os.urandom(4).hex()}.part"
    with open(probe, "xb") as stream:
        mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
        os.unlink(probe)
    os.chmod(path, mode)


def sort_metadata(path: str | Path) -> None:
    """Sort the metadata of a safetensors file in place: the library writes it in random order, so that equal
    content would have different hashes.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # else the library writes JSON in another way, and its order stays
            file.seek(8)
            file.write(text.ljust(size))


# --- reading ------------------------------------------------------------------------------------------------
def sha256(path: Path, *, ignore_metadata_order: bool = False) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal.

    ignore_metadata_order: sort the header of a safetensors file before it is hashed. Files that were not
        written with `sort_metadata` have it in random order, so two with the same weights may differ in
        bytes. Other files are not affected.
    """
    with open_regular(path) as file:
        if not (ignore_metadata_order and path.suffix == ".safetensors"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        header = file.read(min(int.from_bytes(file.read(8), "little"), _MAX_HEADER_BYTES))
        with contextlib.suppress(ValueError):  # a damaged file is reported where its weights are loaded
            header = json.dumps(json.loads(header), sort_keys=True).encode()
        digest = hashlib.sha256(header)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def denied(path: str | Path) -> bool:
    """Whether permissions keep a file from being found or read; False if it is simply not there."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: text that is no path
        return isinstance(error, PermissionError)
    return not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file that may come from outside, for reading.

    Raises OSError, whose `strerror` says why, also for anything but a regular file: a FIFO would wait, and a
    device has no end.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # else a FIFO without a writer would wait

    stream = open(path, "rb", opener=opener)  # noqa: SIM115 (the caller closes it)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return stream


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Read a file that may come from outside.

    Raises OSError like `open_regular`, and for a file of more than `limit` bytes.
    """
    with open_regular(path) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"Larger than {limit:,} bytes", str(path))
    return content


def read_json(content: str | bytes) -> Any:
    """Parse JSON from outside. Raises ValueError, also for lists in lists without end."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("too many lists or mappings in each other") from None


def json_lines(path: Path, most: int, *, last: bool = False) -> Iterator[Any]:
    """Yield the content of each line of a file with one JSON value per line, None for a damaged line.

    A missing file has no lines. Raises OSError like `open_regular`, and for a file of more than `most` bytes;
    with `last`, reads the lines that begin in its last `most` bytes instead.
    """
    if not os.path.lexists(path):
        return
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            if not last:
                raise OSError(errno.EFBIG, f"Larger than {most:,} bytes", str(path))
            stream.seek(size - most - 1)
            _skip_line(stream)
        while line := stream.readline(MAX_RECORD_LINE_BYTES):
            content = None
            if line.endswith(b"\n") or len(line) < MAX_RECORD_LINE_BYTES:
                with contextlib.suppress(ValueError):
                    content = _read_line(line)
            else:
                _skip_line(stream)
            yield content


def _read_line(line: bytes) -> Any:
    """Parse one line as `read_json` does, in a fifth of the time: logs have hundreds of thousands."""
    try:
        return from_json(line)
    except ValueError:  # damaged, or what only Python's parser takes, as a byte order mark
        return read_json(line)


def _skip_line(stream: BufferedReader) -> None:
    """Go on to the beginning of the next line."""
    while (part := stream.readline(MAX_RECORD_LINE_BYTES)) and not part.endswith(b"\n"):
        pass


def read_text(path: str | Path, limit: int) -> str:
    """Read a text file in UTF-8, with or without a mark at its begin, as `read_bytes` does.

    Raises OSError also for a file that is not text: invalid UTF-8, or with a NUL.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"Not text in UTF-8 (byte {error.start:,})"
        raise OSError(errno.EILSEQ, reason, str(path)) from None
    if "\0" in text:
        raise OSError(errno.EILSEQ, f"Not text (a NUL at character {text.index(chr(0)):,})", str(path))
    return text


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line. Skips damaged lines; a missing file has none."""
    return [line for line in json_lines(path, MAX_RECORD_LINES_BYTES) if line is not None]
