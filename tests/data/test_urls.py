"""Which URLs are opened, and that nothing but a permission from outside lets one run a command."""

from __future__ import annotations

import pytest

from indistill.config import UserError
from indistill.data import class_names, remote
from indistill.data.shards import ShardSet, expand
from indistill.data.urls import check_url


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A shell command without a slash, so that it can be a file's name, and the file that it makes."""
    monkeypatch.chdir(tmp_path)
    for name in ("INDISTILL_ALLOW_PIPE", "WDS_SECURE"):
        monkeypatch.delenv(name, raising=False)
    return "pipe:touch ran; echo", tmp_path / "ran"


WRITTEN = ["pipe:touch ran; echo", "file://pipe:touch ran", "{pipe:touch ran,x.tar}", "{p,x}ipe:touch ran"]


@pytest.mark.parametrize("url", WRITTEN)
def test_a_command_needs_permission(command, url):
    text, ran = command
    with pytest.raises(UserError):
        expand(url)
    with pytest.raises(UserError, match="--allow-pipe"), remote.open_stream(text):
        pass
    assert not ran.exists()


@pytest.mark.parametrize("allowed", [False, True])
def test_only_what_is_written_as_a_command_is_one(command, allowed, monkeypatch):
    """A prefix, a root and a file's name never make a command, whatever is allowed."""
    text, ran = command
    if allowed:
        monkeypatch.setenv("INDISTILL_ALLOW_PIPE", "1")
    for urls, root in ((f"file://{text}", None), ("x.tar", text), ("*.tar", text)):
        with pytest.raises(UserError, match="would run a command"):
            ShardSet(urls, root, cache_dir="cache")
        assert class_names.beside(urls, root) == []
    (ran.parent / f"{text}.tar").touch()
    with pytest.raises(UserError, match=r"\*: leads to pipe:.*, which would run a command"):
        expand("*")
    assert not ran.exists()


def test_the_environment_permits_and_forbids(command, monkeypatch):
    text, ran = command
    monkeypatch.setenv("INDISTILL_ALLOW_PIPE", "1")
    monkeypatch.setenv("WDS_SECURE", "1")
    with pytest.raises(UserError, match="WDS_SECURE=1 forbids"):
        expand(text)
    monkeypatch.setenv("WDS_SECURE", "0")
    assert expand(text) == [text]
    with remote.open_stream(text) as stream:
        assert stream.read() == b"\n"
    assert ran.exists()
    monkeypatch.setenv("INDISTILL_ALLOW_PIPE", "yes")  # only 1 permits
    with pytest.raises(UserError, match="INDISTILL_ALLOW_PIPE=1"):
        expand(text)


@pytest.mark.parametrize(
    "url",
    [
        "reference://x::file:///refs.json",  # opens what a file names
        "hdfs://host/x.tar",  # starts `hadoop`
        "dask://x.tar",  # loads pickles from a server
        "git://repository/x.tar",
        "simplecache::s3://bucket/x.tar",
        "s3://bucket/x.tar::reference://y",
        "/folder/reference://x.tar",
    ],
)
def test_other_protocols_are_refused(url):
    with pytest.raises(UserError, match="is not a URL that is read"):
        expand(url)
    with pytest.raises(UserError, match="is not a URL that is read"), remote.open_stream(url):
        pass


def test_ordinary_urls_pass():
    for url in ("https://host/x::y.tar?a=b", "s3://bucket/x.tar", "hf://datasets/a/b/x.tar", "folder/x.tar"):
        check_url(url)
