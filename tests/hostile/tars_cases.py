"""Tars and their indices: what they say must neither fill memory nor keep a command busy for ever."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Case, Inputs
from tars import picture, write_tar

GOOD = [("a.jpg", picture(0)), ("a.cls", b"1")]


# --- tars ---------------------------------------------------------------------------------------------------
def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def link(name: str, target: str) -> bytes:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = target
    return member.tobuf(tarfile.GNU_FORMAT)


def extended(kind: bytes, content: bytes) -> bytes:
    """A header that extends the next one, with its content."""
    return header("x", len(content), kind) + content + bytes(-len(content) % 512)


def pax(keyword: str, value: str) -> bytes:
    rest = f" {keyword}={value}\n".encode()
    length = next(n for n in range(len(rest), len(rest) + 20) if len(str(n)) + len(rest) == n)
    return extended(tarfile.XHDTYPE, str(length).encode() + rest)


def sparse() -> bytes:
    """A GNU sparse file whose one piece lies behind 4 GB of nothing."""
    block = bytearray(header("a.jpg", 512, tarfile.GNUTYPE_SPARSE))
    block[386:410] = b"%011o\0%011o\0" % (2**32 - 512, 512)
    block[483:495] = b"%011o\0" % 2**32
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(512)


def slow_pax() -> bytes:
    """Digits that a search for `hdrcharset` of older Pythons goes through once for each of them."""
    return extended(tarfile.XHDTYPE, b"1" * 2**20)


def chain() -> bytes:
    return b"".join(link(f"{i}.jpg", f"{i + 1}.jpg") for i in range(10_000)) + END


PIXEL = header("a.jpg", 3) + b"jpg".ljust(512, b"\0")
END = bytes(1024)
TARS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a sparse member": (sparse() + END, "sparse member"),
    "a sparse member by PAX": (pax("GNU.sparse.major", "1") + PIXEL + END, "sparse member"),
    "a sparse map without end": (
        pax("GNU.sparse.map", ",".join(["0"] * 2000)) + PIXEL + END,
        "sparse member",
    ),
    "a negative PAX size": (pax("size", "-1024") + PIXEL + END, r"invalid size b'-1024'"),
    "a PAX size with 4,000 digits": (pax("size", "9" * 4000) + PIXEL + END, "invalid size"),
    "a PAX size of 8 EiB": (pax("size", str(2**63)) + PIXEL + END, "unexpected end of data"),
    "a negative size": (header("a.jpg", -(2**40)) + END, "negative size"),
    "10,000 PAX headers": (pax("comment", "x") * 10_000 + PIXEL + END, "16 headers of one member"),
    "500 long links": (
        extended(tarfile.GNUTYPE_LONGLINK, b"x" * 200) * 500 + PIXEL + END,
        "16 headers of one member",
    ),
    "a link to itself": (link("a.jpg", "a.jpg") + END, "a link to a.jpg, which is no file in this tar"),
    "a link out of the tar": (link("a.jpg", "/dev/zero") + END, "a link to /dev/zero, which is no file"),
    "a link to a name of 100,000 folders": (
        pax("linkpath", "a/" * 100_000) + link("a.jpg", "x") + END,
        "MAX_NAME_BYTES",
    ),
    "a chain of 10,000 links": (
        chain,
        "0.jpg is a link to 1.jpg, which is no file in this tar",
    ),
    "headers without a member": (pax("comment", "x") + END, "unexpected end of data"),
    "a header of 8 GB": (header("x", 2**33 - 1, tarfile.GNUTYPE_LONGNAME), "MAX_TAR_HEADER_BYTES"),
    "a PAX header of digits": (slow_pax() + PIXEL + END, "invalid PAX header"),
    "a PAX record of no length": (
        extended(tarfile.XHDTYPE, b"0 path=a.jpg\n") + PIXEL + END,
        "invalid PAX header",
    ),
    "a name of 100,000 folders": (
        extended(tarfile.GNUTYPE_LONGNAME, b"a/" * 100_000) + PIXEL + END,
        "MAX_NAME_BYTES",
    ),
}


def tar_file(content: bytes | Callable[[], bytes]) -> Callable[[Inputs], list[str]]:
    def arguments(inputs: Inputs) -> list[str]:
        (inputs.folder / "x.tar").write_bytes(content() if callable(content) else content)
        return ["shards", "index", str(inputs.folder / "x.tar")]

    return arguments


def huge(name: str) -> Callable[[Inputs], list[str]]:
    """A tar with a member of 1 GB of zeros, which take no room on the disk."""

    def arguments(inputs: Inputs) -> list[str]:
        with open(inputs.folder / "x.tar", "wb") as file:
            file.write(header(name, 2**30))
            file.truncate(512 + 2**30 + 1024)
        return ["shards", "index", str(inputs.folder / "x.tar")]

    return arguments


def zeros(inputs: Inputs) -> list[str]:
    """A tar of which only the end is there, 64 GB of it."""
    with open(inputs.folder / "x.tar", "wb") as file:
        file.write(PIXEL)
        file.truncate(2**36)
    return ["shards", "index", str(inputs.folder / "x.tar")]


def bomb(path: Path, first: bytes) -> str:
    """A gzip file of 17 MB that begins with `first` and goes on with 16 GiB of zeros."""
    path.write_bytes(gzip.compress(first) + 1024 * gzip.compress(bytes(2**24)))
    return str(path)


def bombs(first: bytes) -> Callable[[Inputs], list[str]]:
    return lambda inputs: ["shards", "index", bomb(inputs.folder / "x.tar.gz", first)]


def among_others(action: str) -> Callable[[Inputs], list[str]]:
    """A good shard behind two hostile ones and one that is no file any more."""

    def arguments(inputs: Inputs) -> list[str]:
        (inputs.folder / "1.tar").write_bytes(sparse() + END)
        bomb(inputs.folder / "2.tar.gz", b"")
        (inputs.folder / "3.tar").write_bytes(header("a.cls", 600) + b"1".ljust(1024) + END)
        write_tar(inputs.folder / "4.tar", GOOD)
        return ["shards", action, "--workers", "1", str(inputs.folder / "*.tar*")]

    return arguments


FAULTS = r"(?s)1\.tar: .*sparse.*2\.tar\.gz: .*MAX_TAR_END_BYTES.*3\.tar: a: .*no image.*"


def others_are_indexed(inputs: Inputs) -> None:
    assert [path.name for path in sorted(inputs.folder.glob("*.index.json"))] == ["4.tar.index.json"]


# --- indices ------------------------------------------------------------------------------------------------
def index(**changes: Any) -> dict[str, Any]:
    """The index of a tar with the two samples of `indexed`."""
    columns = {"keys": ["a", "b"], "offsets": [512, 2048], "sizes": [3, 3], "labels": [1, 2]}
    return {"version": 1, "bytes": 10240, **columns, **changes}


def indexed(content: bytes | dict[str, Any] | Callable[[Path], None]) -> Callable[[Inputs], list[str]]:
    """Pack a shard again whose index is not its own."""

    def arguments(inputs: Inputs) -> list[str]:
        members = [(f"{key}.{kind}", text) for key in "ab" for kind, text in (("jpg", b"jpg"), ("cls", b"1"))]
        path = write_tar(inputs.folder / "x.tar", members)
        file = Path(f"{path}.index.json")
        if callable(content):
            content(file)
        else:
            file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return ["shards", "pack", path, str(inputs.folder / "packed")]

    return arguments


def many(count: int, key: str) -> dict[str, Any]:
    return index(
        bytes=10**12,
        keys=[key, *["b"] * (count - 1)],
        offsets=list(range(512, 512 + 2048 * count, 2048)),
        sizes=[3] * count,
        labels=[1] * count,
    )


INDICES: dict[str, tuple[Any, str]] = {
    "one key of 1 MB among 10,000": (many(10_000, "x" * 2**20), "MAX_KEYS_BYTES"),
    "a shard of 2^70 bytes": (index(bytes=2**70), "size of the shard is negative or too large"),
    "negative offsets": (index(offsets=[-512, 2048]), "negative or too large"),
    "images that overlap": (index(offsets=[512, 513]), "the images overlap"),
    "a huge offset": (index(offsets=[512, 2**64]), "negative or too large"),
    "an offset behind the end": (index(offsets=[512, 2**40]), "behind the end"),
    "a negative size": (index(sizes=[3, -1]), "size is not from 0"),
    "a size of 4 GB": (index(bytes=2**40, sizes=[3, 2**32]), "MAX_IMAGE_BYTES"),
    "lists of unequal length": (index(labels=[1]), "differ in length"),
    "texts for numbers": (index(sizes=["3", "3"]), "sizes is not a list of integers"),
    "true for a number": (index(labels=[True, 1]), "labels is not a list of integers"),
    "numbers for keys": (index(keys=[1, 2]), "keys is not a list of texts"),
    "NaN": (index(sizes=[3, float("nan")]), "sizes is not a list of integers"),
    "a file elsewhere": (index(path="../../etc/passwd"), "its keys are not"),
    "no samples": (index(keys=[], offsets=[], sizes=[], labels=[]), "keys is not a list of texts"),
    "lists in lists": (b"[" * 100_000, "in each other"),
    "22 million lists": (b"[" + b"[]," * (22 * 10**6) + b"[]]", "MAX_INDEX_BRACKETS"),
    "half a character": (index(keys=["\ud800", "b"]), "surrogates not allowed"),
    "not JSON": (b"<html>not here</html>", "Expecting value"),
    "not UTF-8": (b"\xff\xfe\xfd", "decode"),
    "200 MB": (lambda path: (path.touch(), os.truncate(path, 2 * 10**8)), "Larger than"),
    "a FIFO": (os.mkfifo, "Not a regular file"),
    "an endless device": (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
}


# --- training -----------------------------------------------------------------------------------------------
def streamed(tree: Callable[[Inputs], None]) -> Callable[[Inputs], list[str]]:
    """Train on the shards that `tree` writes, without an index."""

    def arguments(inputs: Inputs) -> list[str]:
        tree(inputs)
        return inputs.train(root=str(inputs.folder), train="x*", eval=None, access="stream", epoch_samples=64)

    return arguments


def undecodable(inputs: Inputs) -> None:
    members = [(f"{i}.{kind}", b"1") for i in range(200) for kind in ("jpg", "cls")]
    write_tar(inputs.folder / "x.tar", members)


def empty(inputs: Inputs) -> None:
    for i in range(3):
        write_tar(inputs.folder / f"x{i}.tar", [("README", b"no sample")])


def many_classes(inputs: Inputs) -> list[str]:
    """Classes are counted in a list by label."""
    path = write_tar(inputs.folder / "x.tar", [("a.jpg", b"1"), ("a.cls", b"999999999")])
    return ["shards", "pack", path, str(inputs.folder / "packed")]


def text_of_zeros(inputs: Inputs) -> None:
    bomb(inputs.folder / "x.tar", header("a.json", 2**33 - 1))


CASES = [
    *(Case(f"tar: {name}", tar_file(content), error) for name, (content, error) in TARS.items()),
    Case("tar: .cls of 1 GB", huge("a.cls"), r"a\.cls has more than 1024 bytes \(MAX_LABEL_BYTES\)"),
    Case("tar: .jpg of 1 GB", huge("a.jpg"), r"a\.jpg has 1073741824 bytes, .*MAX_IMAGE_BYTES"),
    Case("tar: zeros without end", zeros, "MAX_TAR_END_BYTES"),
    Case("tar: gzip of zeros", bombs(b""), "MAX_TAR_END_BYTES"),
    Case("tar: gzip of an image of zeros", bombs(header("a.jpg", 2**28)), "MAX_EXPANSION"),
    Case("tar: gzip of a text of zeros", bombs(header("a.json", 2**33 - 1)), "MAX_EXPANSION"),
    Case("tar: index goes on after hostile shards", among_others("index"), "3 of 4 shards cannot be indexed",
         after=others_are_indexed),
    Case("tar: verify goes on after hostile shards", among_others("verify"), code=1,
         output=FAULTS + "1 images, 1 labelled.*3 bad members"),
    *(Case(f"index: {name}", indexed(content), error) for name, (content, error) in INDICES.items()),
    Case("tar: pack of label 999,999,999", many_classes, "label 999999999 is not below 16777216"),
    Case("stream: no image can be decoded", streamed(undecodable), r"10000 in a row \(MAX_BAD_IN_A_ROW\)"),
    Case("stream: shards without samples", streamed(empty), "hold a sample"),
    Case("stream: gzip of a text of zeros", streamed(text_of_zeros), "MAX_EXPANSION"),
]  # fmt: skip
