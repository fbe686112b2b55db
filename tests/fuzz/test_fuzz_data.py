"""Made-up shards, indices, images, lists and patterns."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
import tars
from fuzzing import BAD_JSON, TEXTS, encoded, fuzz, mutated, mutated_json
from hypothesis import strategies as st

from indistill import config
from indistill.config import UserError
from indistill.data import augment, class_names, packing, remote, shards, verify
from indistill.data.decode import decode, decode_crop
from indistill.data.index import build_index
from indistill.data.stream import StreamedTraining
from indistill.models.views import EvalView

FORMATS = {"jpg": tars.picture(0), "png": tars.picture(1, "png"), "webp": tars.picture(2, "webp")}
BLOCK = tarfile.BLOCKSIZE


# --- tars ---------------------------------------------------------------------------------------------------
def tar_of(form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for number, (extension, image) in enumerate(FORMATS.items()):
            for suffix, member in ((extension, image), ("cls", b"%d" % number)):
                name = f"{'long/' * 30 * (number == 2)}{number}.{suffix}"
                header = tarfile.TarInfo(name)
                header.size = len(member)
                if form == tarfile.PAX_FORMAT:
                    header.pax_headers = {"comment": "x" * 300}
                tar.addfile(header, io.BytesIO(member))
    return content.getvalue()


TARS = [tar_of(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
NUMBERS = st.one_of(
    st.integers(0, 8**11 - 1).map(lambda size: b"%011o\0" % size),
    st.integers(-(2**80), 2**80).map(lambda size: b"\xff" + size.to_bytes(11, "big", signed=True)),
    st.integers(0, 2**87).map(lambda size: b"\x80" + size.to_bytes(11, "big")),
    st.binary(min_size=12, max_size=12),
)
PAX_KEYS = st.sampled_from(
    ["size", "path", "linkpath", "GNU.sparse.size", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.minor",
     "GNU.sparse.realsize", "GNU.sparse.numblocks", "GNU.sparse.offset", "hdrcharset", "mtime", "comment"]
)  # fmt: skip
PAX_VALUES = st.sampled_from(
    ["-1", "0", "1", "512", "1e9", "9" * 30, "BINARY", "0,9999999999", "a.jpg", ""]
) | st.text(max_size=20)


def pax_record(key: str, value: str, off: int) -> bytes:
    """A record of a PAX header, whose stated length may be off."""
    text = f" {key}={value}\n".encode("utf-8", "surrogatepass")
    return b"%d" % (len(text) + len(str(len(text))) + off) + text


PAX = st.lists(
    st.builds(pax_record, PAX_KEYS, PAX_VALUES, st.sampled_from([0, 0, 0, 1, -1, 10**6])), max_size=4
)
HEADERS = st.tuples(
    st.sampled_from(
        [b"0", b"0", b"\0", b"1", b"2", b"5", b"6", b"7", b"g", b"x", b"x", b"L", b"K", b"S", b"Z"]
    ),
    st.sampled_from(
        [b"a.jpg", b"a.cls", b"b.png", b"././@LongLink", b"a", b".", b"\xff.jpg", b"\x1b[2J\n.jpg"]
    ),
    st.none() | NUMBERS,
    st.sampled_from([b"0", b"1", b"x", b"", *FORMATS.values()]) | PAX.map(b"".join) | st.binary(max_size=600),
)


def header(kind: bytes, name: bytes, size: bytes | None, content: bytes) -> bytes:
    """A member with a header whose checksum is right."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = size if size is not None else b"%011o\0" % len(content)
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    if kind == b"S":  # old GNU sparse: offset and length of a part, and the size of the whole
        block[386:410] = b"%011o\0" % 0 + b"%011o\0" % len(content)
        block[483:495] = size or b"%011o\0" % 8**10
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % BLOCK)


def tar_of_headers(members: list[tuple[bytes, bytes, bytes | None, bytes]], end: bytes) -> bytes:
    return b"".join(header(*member) for member in members) + end


SHARDS = mutated(*TARS) | st.builds(
    tar_of_headers, st.lists(HEADERS, max_size=8), st.sampled_from([bytes(1024), bytes(512), b"", b"x" * 512])
)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.with_name(path.name + ".index.json").unlink(missing_ok=True)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shards(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"

    def read(content: bytes) -> None:
        write(path, gzip.compress(content, 1) if suffix == "tar.gz" else content)
        report = verify.verify([str(path)], num_classes=10)
        assert all(member.problem for member in report.bad)
        with contextlib.suppress(UserError):
            build_index(str(path))
        list(shards.ShardSet(str(path)).iterate())

    fuzz(read, SHARDS, ordinary=TARS, first=[b"", bytes(10**6)])


def test_gzip(tmp_path):
    path = tmp_path / "a.tar.gz"

    def read(content: bytes) -> None:
        write(path, content)
        list(shards.ShardSet(str(path)).iterate())

    packed = [gzip.compress(content) for content in TARS]
    fuzz(
        read,
        mutated(*packed),
        ordinary=packed,
        first=[b"", packed[0] + packed[1], packed[0][:-8], gzip.compress(bytes(2**27))],
    )


def test_streams(tmp_path):
    path = tmp_path / "a.tar"
    section = {
        "train": str(path), "access": "stream", "epoch_samples": 8, "num_classes": 10, "image_size": 16,
        "global_batch": 4, "workers": 0, "shuffle_buffer": 1,
    }  # fmt: skip
    tree = {
        "run_dir": str(tmp_path / "run"), "duration": "2 steps", "data": section,
        "student": {"name": "cnn32_student"},
        "kd": {"losses": [{"name": "ce"}]}, "optimizer": {"name": "sgd", "lr": 0.1},
    }  # fmt: skip
    data = config.parse(tree, "test").data

    def read(content: bytes) -> None:
        import torch

        path.write_bytes(content)
        training = StreamedTraining(data, 0, rank=0, world=1, accumulation=1)
        try:
            list(training.loader(0, 2, torch.device("cpu")))
        except RuntimeError as error:  # how the loader passes on what its readers raise
            if not isinstance(error.__cause__, UserError):
                raise

    fuzz(read, SHARDS, ordinary=TARS)


# --- indices ------------------------------------------------------------------------------------------------
def test_indices(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(TARS[0])
    build_index(str(path))
    index = Path(f"{path}.index.json")
    original = json.loads(index.read_text())

    def read(content: bytes) -> None:
        index.write_bytes(content)
        with contextlib.suppress(UserError):
            verify.verify([str(path)])
        data = shards.ShardSet(str(path))
        list(data.iterate())
        for number in range(len(data)):
            data.where(number)

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_JSON)


# --- images -------------------------------------------------------------------------------------------------
def jpeg(**options: object) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    with Image.open(io.BytesIO(FORMATS["png"])) as image:
        image.save(content, "JPEG", **options)
    return content.getvalue()


def test_images():
    originals = [
        *FORMATS.values(),
        jpeg(progressive=True),
        jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0"),
    ]

    def read(content: bytes) -> None:
        for parse in (
            lambda: decode(content, "an image"),
            lambda: decode_crop(
                content, "an image", lambda shape: (0, 0, min(8, shape[0]), min(8, shape[1]))
            ),
            lambda: augment.eval_view(content, 16, view=EvalView("bilinear", 0.875), where="an image"),
        ):
            with contextlib.suppress(UserError):
                parse()
        decode(content, "an image")

    fuzz(
        read,
        mutated(*originals),
        ordinary=originals,
        first=[b"", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n"],
    )


# --- lists and patterns -------------------------------------------------------------------------------------
def test_csv_lists(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.jpg").write_bytes(FORMATS["jpg"])
    (tmp_path / "images" / "1.png").write_bytes(FORMATS["png"])
    source = tmp_path / "list.csv"
    destination = tmp_path / "packed"
    cells = TEXTS | st.sampled_from(
        ["images/0.jpg", "images/1.png", "images", "0", "7", "cat", '"', "'", "a;b", "[1]"]
    )
    lines = st.lists(st.lists(cells, max_size=3).map(",".join), max_size=6).map("\n".join)

    def read(content: bytes) -> None:
        source.write_bytes(content)
        for file in destination.glob("*"):
            file.unlink()
        packing.pack_source(str(source), destination)

    ordinary = b"path,label\nimages/0.jpg,cat\nimages/1.png,dog\n"
    fuzz(
        read,
        lines.map(lambda text: text.encode("utf-8", "surrogatepass")) | mutated(ordinary),
        ordinary=[ordinary],
        first=[b"", b"\xff", b"images/0.jpg," + b"9" * 5000, b'"' * 100_001],
    )


def test_lists_of_classes(tmp_path):
    (tmp_path / "a.tar").write_bytes(TARS[0])
    files = [tmp_path / "dataset.json", tmp_path / "classes.txt"]
    original = {
        "plan": "0" * 64,
        "complete": True,
        "shards": 1,
        "classes": ["ant", "bee", "cat"],
        "samples": 3,
    }

    def read(content: bytes) -> None:
        for file in files:
            file.write_bytes(content)
        for parse in (
            lambda: class_names.read(files[0]),
            lambda: class_names.read(files[1]),
            lambda: class_names.read(tmp_path),
        ):
            with contextlib.suppress(UserError):
                class_names.table(parse())
        class_names.beside(str(tmp_path / "a.tar"))

    fuzz(
        read,
        mutated_json(original) | mutated_json({"ant": 0, "bee": 1}) | mutated_json(["ant", "bee"]),
        ordinary=[encoded(original)],
        first=BAD_JSON,
    )


PATTERN = st.one_of(
    st.text(alphabet="{}{},.-0123456789ab*?[]~$:/\\%", max_size=60),
    st.lists(
        st.sampled_from(
            ["{", "}", ",", "..", "{a,b}", "{0..3}", "{0..1000000000}", "{0..9}", "{a..z}", "{1..9..0}",
             "file://",
             "pipe:", "https://", "s3://", "~", "*", "**", "\\", "{{", "}}", "a.tar", "-1", "\x1b",
             "\ud800", "\0"]
        ),
        max_size=30,
    ).map("".join),
)  # fmt: skip


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.setattr(
        remote, "read_if_there", lambda url: None
    )  # tests/fuzz/test_fuzz_servers.py has servers
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(TARS[0])

    def read(pattern: str) -> None:
        for root in (None, str(tmp_path)):
            with contextlib.suppress(UserError):
                shards.expand(pattern, root)
            class_names.beside(pattern, root)
        shards.expand([pattern, "a.tar"], str(tmp_path))

    fuzz(
        read,
        PATTERN,
        ordinary=["b*.tar"],
        first=["{0..1000000000}", "{a,b}" * 30, "{" * 5000, "{a,{a,{a,", "pipe:false", "file://pipe:false"],
    )
