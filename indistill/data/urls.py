"""Which URLs may be opened: the only place that decides whether a shard may start a program."""

import os

from indistill.config import UserError

ALLOW_PIPE = "INDISTILL_ALLOW_PIPE"  # environment variable; the option --allow-pipe sets it for all processes
# http(s), and the stores and file servers of fsspec. Its other protocols start programs, load pickles, or
# open further URLs that a file names.
PROTOCOLS = (
    *("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "tos", "hf"),
    *("ftp", "sftp", "ssh", "smb", "webhdfs", "memory", "file", "local"),
)


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command."""
    return "://" in path or path.startswith("pipe:")


def without_file(path: str) -> str:
    """A path without `file://`: such a URL names a local file, and is read like one."""
    return path.removeprefix("file://")


def check_url(url: str) -> None:
    """Raise UserError if this URL may not be opened; local paths pass.

    Call it with the URL as it will be opened: without prefixes, with its root, and with braces expanded.
    """
    if url.startswith("pipe:"):
        _check_command(url)
    elif is_remote(url):
        protocol, _, rest = url.partition("://")
        if protocol not in PROTOCOLS or ("::" in rest and protocol not in ("http", "https")):
            raise UserError(
                f"{url}: is not a URL that is read: begin it with one of {', '.join(PROTOCOLS)}, without ::"
            )


def _check_command(url: str) -> None:
    # WebDataset's own switch. Whatever it is set to, other than off, forbids.
    secure = os.environ.get("WDS_SECURE", "")
    if secure not in ("", "0"):
        raise UserError(f"{url}: runs a command, which WDS_SECURE={secure} forbids: unset the variable")
    if os.environ.get(ALLOW_PIPE) != "1":
        raise UserError(
            f"{url}: runs a command: if you trust it, add --allow-pipe to the command line, or set "
            f"{ALLOW_PIPE}=1; a config cannot allow it"
        )
