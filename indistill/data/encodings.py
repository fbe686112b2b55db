"""Lists of images and of classes as programs of Windows write them: text in other encodings than UTF-8."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path

from indistill.config import UserError
from indistill.config.files import read_bytes


def read_text(file: Path, limit: int, encoding: str | None) -> str:
    """Read a text file of at most `limit` bytes in an encoding (None: UTF-8), without a mark at its begin.

    Raises UserError for another encoding, and OSError like `read_bytes`.
    """
    content = read_bytes(file, limit)
    with errors_named(file, encoding):
        check(file, content[:4], encoding)
        text = content.decode(encoding or "utf-8").removeprefix("\ufeff")
    if "\0" in text:
        raise UserError(f"{file}: is not text (a NUL at character {text.index(chr(0)):,}): name another file")
    return text


@contextlib.contextmanager
def errors_named(file: Path, encoding: str | None) -> Iterator[None]:
    """Turn the error of decoding a file into a UserError that names the option for it."""
    try:
        yield
    except LookupError:
        raise UserError(
            f"--encoding {encoding!r}: is not an encoding that Python knows: choose one such as cp1252"
        ) from None
    except UnicodeError:
        guess = "it may be cp1252, which older programs of Windows write: set --encoding cp1252"
        remedy = guess if encoding is None else "set another --encoding"
        raise UserError(f"{file}: is not text in {encoding or 'UTF-8'}: {remedy}") from None


def check(file: Path, begin: bytes, encoding: str | None) -> None:
    """Raise UserError for a file in UTF-16 or UTF-32 that is to be read as UTF-8, by its first 4 bytes."""
    name = None
    if begin in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        name = "utf-32"
    elif begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        name = "utf-16"
    elif any(begin) and not any(begin[1::2]):
        name = "utf-16-le"
    elif any(begin) and not any(begin[::2]):
        name = "utf-16-be"
    if encoding is None and name is not None and len(begin) == 4:
        raise UserError(
            f"{file}: is not text in UTF-8 but seems to be {name[:6].upper()}: set --encoding {name}"
        )
