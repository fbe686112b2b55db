"""Members of tars that belong to no sample: nothing that looks like an image is left out in silence."""

import bz2
import gzip
import io
import logging
import lzma
import tarfile
from pathlib import Path

import pytest
from tars import picture, write_tar

from indistill.config import UserError
from indistill.data import verify
from indistill.data.index import build_index, load_index
from indistill.data.shards import expand
from indistill.data.tar import Tar


def members(keys, dotted=()):
    pairs = [(f"{key}.{kind}", picture(i) if kind == "jpg" else b"1") for i, key in enumerate(keys)
             for kind in ("jpg", "cls")]  # fmt: skip
    return pairs + [(name, b"x") for name in dotted]


def tar_with_links(path, targets):
    """A tar with the image 0.jpg, links to it, and a label for each. Hard links are what GNU tar writes."""
    with tarfile.open(path, "w") as tar:
        for name, kind in {"0": tarfile.REGTYPE, **targets}.items():
            for extension, content in (("jpg", picture(0)), ("cls", b"1")):
                member = tarfile.TarInfo(f"{name}.{extension}")
                if extension == "jpg" and kind != tarfile.REGTYPE:
                    member.type = kind
                    member.linkname = "0.jpg"
                    tar.addfile(member)
                else:
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(path)


def test_names_with_several_dots_are_counted_and_named(tmp_path, caplog):
    path = write_tar(tmp_path / "x.tar", members(["a", "b"], ["s0_0.5.jpg", "s0_0.5.cls", "d.e/s1_1.5.PNG"]))
    (bad,) = verify.verify(path).bad
    assert bad.problem.startswith("3 images or labels belong to no sample")
    assert "('s0_0.5.jpg', 's0_0.5.cls', 'd.e/s1_1.5.PNG'): rename them" in bad.problem
    with caplog.at_level(logging.WARNING):
        assert verify.index(path) == {path: 2}
        assert "x.tar: 3 images or labels belong to no sample" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_index(path)  # the stored one: each open of a shard does not repeat it
        assert caplog.text == ""


def test_other_members_of_a_sample_are_none_of_them(tmp_path, caplog):
    others = [
        "a.seg.png",
        "b.left.jpg",
        "README.md",
        "._a.jpg",
        "d/._b.cls",
        "a.json",
        "__x__/y.json",
        "__x__/y.0.jpg",
    ]
    path = write_tar(tmp_path / "x.tar", members(["a", "b"], others))
    content = verify.verify(path)
    assert content.bad == []
    assert content.others.total() == len(others)
    with caplog.at_level(logging.WARNING):
        assert len(build_index(path).keys) == 2
        assert caplog.text == ""


def test_a_shard_whose_names_all_have_several_dots_says_so(tmp_path):
    path = write_tar(tmp_path / "x.tar", members([], ["s0_0.5.jpg", "s0_0.5.cls"]))
    message = r"x\.tar: holds no sample: 2 images or labels belong to no sample, .*first dot \('s0_0\.5\.jpg'"
    with pytest.raises(UserError, match=message):
        build_index(path)
    assert len(verify.verify(path).bad) == 1


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_named_with_a_remedy(tmp_path, kind):
    path = tar_with_links(tmp_path / "x.tar", {"1": kind})
    message = r"sample '1' has a \.cls but no image .1 images or labels are links, .*--hard-dereference"
    with pytest.raises(UserError, match=message):
        build_index(path)
    problems = [bad.problem for bad in verify.verify(path).bad]
    assert len(problems) == 2
    assert all(
        "1 images or labels are links, which are not read ('1.jpg')" in problem for problem in problems
    )


@pytest.mark.parametrize(
    ("name", "compress", "message"),
    [
        ("x.tar", gzip.compress, r"is compressed with gzip, .* rename it to end with \.tar\.gz"),
        ("x.tar.bz2", bz2.compress, "is compressed with bzip2, .*: decompress it with bunzip2"),
        ("x.tar.xz", lzma.compress, "is compressed with xz, .*: decompress it with unxz"),
        ("x.tar.zst", lambda _: b"\x28\xb5\x2f\xfd" + bytes(9), "is compressed with zstd, .* with unzstd"),
    ],
)
def test_compression_that_the_name_does_not_say_is_named(tmp_path, name, compress, message):
    plain = write_tar(tmp_path / "plain.tar", members(["a"]))
    path = tmp_path / name
    path.write_bytes(compress(Path(plain).read_bytes()))
    with pytest.raises(UserError, match=message):
        build_index(str(path))
    if name == "x.tar":  # the remedy works
        path.rename(tmp_path / "x.tar.gz")
        assert len(build_index(str(tmp_path / "x.tar.gz")).keys) == 1
    if name == "x.tar.zst":
        with open(path, "rb") as stream, pytest.raises(UserError, match="with zstd, which is not read"):
            Tar(str(path), stream, strict=False)


def test_a_folder_and_brackets_in_paths(tmp_path):
    (tmp_path / "set[1]").mkdir()
    path = write_tar(tmp_path / "set[1]" / "x.tar", members(["a"]))
    assert expand("set[1]/*.tar", str(tmp_path)) == [path]
    assert expand(str(tmp_path / "set[1]" / "*.tar")) == [path]
    assert expand(str(tmp_path / "set?1?" / "[xy].tar")) == [path]
    with pytest.raises(UserError, match=r"set\[1\]: is a folder: name the shards in it, as .*/\*\.tar"):
        expand("set[1]", str(tmp_path))
