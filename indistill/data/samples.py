"""Samples in the tars of shards: which members are images and labels, and what belongs to no sample."""

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple, NoReturn

from indistill.config import UserError
from indistill.config.limits import (
    MAX_EXTENSIONS,
    MAX_IMAGE_BYTES,
    MAX_LABEL_BYTES,
    MAX_SHARD_SAMPLES,
)
from indistill.data.remote import base_name
from indistill.data.tar import Tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_WITHOUT_EXTENSION = (b"GIF8", b"BM", b"II*\0", b"MM\0*")  # beginnings of GIF, BMP and TIFF
MOST_SHOWN = 5  # names in a message


def extension_of(image: bytes) -> str:
    """The extension of an image in a shard, by its first bytes.

    Other types than those of IMAGE_EXTENSIONS are called jpg: readers find an image by its extension, and
    `decode` goes by the content.
    """
    if image.startswith(b"\x89PNG"):
        return "png"
    return "webp" if image.startswith(b"RIFF") and image[8:12] == b"WEBP" else "jpg"


def without_extension(image: bytes) -> bool:
    """Whether an image is a GIF, BMP or TIFF, for which a shard has no extension of its own."""
    return image.startswith(_WITHOUT_EXTENSION)


# --- labels -------------------------------------------------------------------------------------------------
LABEL_REMEDY = "write it into KEY.cls, an integer in ASCII, beside the image KEY.jpg"


def parse_label(content: bytes) -> int | None:
    """The label in a .cls file; None if it is not a non-negative integer."""
    fits = len(content) <= MAX_LABEL_BYTES
    return int(content) if fits and re.fullmatch(rb"\s*\d{1,9}\s*", content) else None


def malformed_label(key: str, content: bytes) -> str:
    """The error message for a .cls file that `parse_label` rejects."""
    if len(content) > MAX_LABEL_BYTES:
        return f"{key}.cls has more than {MAX_LABEL_BYTES} bytes (MAX_LABEL_BYTES): a label is an integer"
    return f"{key}.cls holds {content[:20]!r}: a label is a non-negative integer"


def label_problem(
    key: str, label: int, *, num_classes: int, reader: str | None = "", missing: str = "cls"
) -> str | None:
    """Why training rejects a sample with this label (-1: no label); None if it accepts it.

    reader: what reads labels, for the message; None: nothing does, and a sample may have no label. missing:
        `Labels.missing`.
    """
    if label < 0:
        if reader is None:
            return None
        remedy = LABEL_REMEDY if missing == "cls" else "add it, or leave the image out"
        remedy = f"{remedy} ({reader} reads labels)" if reader else remedy
        return f"has no label, because there is no {key}.{missing}: {remedy}"
    if label >= num_classes:
        return f"label {label} is none of the data.num_classes, 0 to {num_classes - 1}"
    return None


class Labels:
    """How the label of a sample is read: here as an integer in KEY.cls; labels.py has others."""

    extension = "cls"  # of the member that has the label
    missing = "cls"  # what an image without label lacks, for messages
    most_bytes = MAX_LABEL_BYTES
    alone = False  # whether such a member may belong to no image

    def read(self, key: str, content: bytes) -> int:
        """The label, -1 for none. Raises ValueError for a malformed one."""
        label = parse_label(content)
        if label is None:
            raise ValueError(malformed_label(key, content))
        return label


CLS = Labels()


def shown(names: Sequence[str]) -> str:
    """List the first few names, for a message."""
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(map(repr, names[:MOST_SHOWN])) + more


class Others:
    """What a shard has beside its samples."""

    def __init__(self) -> None:
        self.extensions = Counter[str]()  # of members that are neither images nor labels
        self.unread: list[str] = []  # members that look like images or labels; set when all are read
        self._alike: dict[str, str] = {}  # name that ends like that of an image or a label -> key

    def add(self, key: str, name: str, extension: str) -> None:
        """Count a member that is neither an image nor a label by WebDataset's rule."""
        known = extension in self.extensions or len(self.extensions) < MAX_EXTENSIONS
        self.extensions[extension if known else "of further kinds"] += 1
        _, dot, last = extension.rpartition(".")
        alike = (
            dot and last in (*IMAGE_EXTENSIONS, "cls") and key.rpartition("/")[2] and not _META.match(name)
        )
        if alike and len(self._alike) < MAX_SHARD_SAMPLES:
            self._alike[name] = key

    def end(self, keys: Container[str]) -> None:
        """Find what looks like images or labels and belongs to none of the samples `keys`."""
        self.unread = [name for name, key in self._alike.items() if key not in keys]

    @property
    def problem(self) -> str:
        """Describes `unread`; empty if there is none."""
        if not self.unread:
            return ""
        return (
            "images or labels belong to no sample, because the key of a name ends at its first dot: "
            f"{len(self.unread)} ({shown(self.unread)}): rename them, with one dot each, or run "
            "`indistill shards pack` on the shard, which does so"
        )


# --- reading tars -------------------------------------------------------------------------------------------
_META = re.compile(r"__[^/]*__/")  # WebDataset's folder for what belongs to no sample
SAMPLE = "a sample is {key}.jpg (jpeg, png, webp) and {key}.cls"
_TOO_MANY = f"holds more than {MAX_SHARD_SAMPLES} samples (MAX_SHARD_SAMPLES): pack smaller shards"


class ImageOrLabel(NamedTuple):
    """An image or a label in a tar."""

    key: str
    extension: str
    offset: int  # of the content; -1: of an image that is reported already
    size: int
    content: bytes  # b"" for an image that is not loaded; of a label at most one byte more than allowed


def compressed(path: str) -> bool:
    """Whether a shard is compressed with gzip or zstd, by its name."""
    return base_name(path).endswith((".gz", ".tgz", ".zst")) and not path.startswith("pipe:")


def tar_of(path: str, stream: IO[bytes]) -> Tar:
    """Return the tar in a shard's file, for `samples_of`."""
    return Tar(path, stream, gzipped=compressed(path), strict=True)


def samples_of(
    tar: Tar,
    *,
    load: bool = True,
    report: Callable[[str, str], None] | None = None,
    others: Others | None = None,
    may_be_empty: bool = False,
    keys: Mapping[str, str] = {},
    labels: Labels = CLS,
) -> Iterator[tuple[str, tuple[int, int], bytes, int]]:
    """Yield (key, (offset, size) of the image, image, label) of every sample of a shard, in one pass.

    load: whether to read images; else they are b"". A sample without a label has -1.
    report: called with the key and the problem of every malformed sample; by default UserError is raised.
    others: counts the members that belong to no sample. labels: how the label is read.
    keys: of images and labels, by name, that would belong to none.

    Raises UserError for a damaged tar and, unless it `may_be_empty`, for one without samples.
    """
    refuse = functools.partial(_refuse, tar)
    report = report or refuse
    others = others or Others()
    seen = set()
    empty = True
    members = images_and_labels(tar, load=load, report=report, others=others, keys=keys, labels=labels)
    for key, group in itertools.groupby(members, lambda member: member.key):
        image, label = _image_and_label(key, group, report=report, labels=labels, repeated=key in seen)
        seen.add(key)
        if len(seen) > MAX_SHARD_SAMPLES:
            refuse("", _TOO_MANY)
        empty = empty and image is None and labels.alone
        if image is not None and image.offset >= 0:
            yield key, (image.offset, image.size), image.content, -1 if label is None else label
        elif image is None and label is not None:
            report(key, f"sample '{key}' has a .cls but no image ({', '.join(IMAGE_EXTENSIONS)})")
    others.end(seen)
    if empty and not may_be_empty:
        refuse("", f"holds no sample: {others.problem or SAMPLE}")


def _refuse(tar: Tar, key: str, problem: str) -> NoReturn:
    raise UserError(f"{tar.path}: {problem}")


def _image_and_label(
    key: str,
    members: Iterable[ImageOrLabel],
    *,
    report: Callable[[str, str], None],
    labels: Labels,
    repeated: bool,
) -> tuple[ImageOrLabel | None, int | None]:
    """The image and the label among a sample's members. The label is None if missing, -1 if malformed.

    repeated: other members with this key came earlier, before those of another sample.
    """
    if repeated:
        remedy = "unpack the shard, and write it again with `tar --sort=name`"
        report(key, f"the members of sample '{key}' are not next to each other: {remedy}")
    image: ImageOrLabel | None = None
    of_label: ImageOrLabel | None = None
    for member in members:
        if member.extension == labels.extension:
            if of_label is not None:
                report(key, f"sample '{key}' has two labels")
            of_label = member
        elif image is not None:
            report(key, f"sample '{key}' has two images")
        else:
            image = member
    if of_label is None or (labels.alone and image is None):
        return image, None
    try:
        return image, labels.read(key, of_label.content)
    except ValueError as error:
        report(key, str(error))
        return image, -1


def images_and_labels(
    tar: Tar,
    *,
    load: bool,
    report: Callable[[str, str], None],
    others: Others | None = None,
    keys: Mapping[str, str] = {},
    labels: Labels = CLS,
) -> Iterator[ImageOrLabel]:
    """Yield every image and label; without `load`, images have no content.

    report: called with the key and the problem of an image that is too large and of a link that cannot be
        followed; the image then has the offset -1, and the label is left out.
    others: counts all other files. keys, labels: as for `samples_of`.
    """
    for member in tar:
        # WebDataset's rule: the key ends at the first dot of the base name, and the rest is the extension.
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        extension = extension.lower()
        key = f"{folder}{slash}{stem}"
        if member.name in keys:
            key, extension = keys[member.name], extension.rpartition(".")[2]
        is_label = extension == labels.extension
        if not stem or _META.match(member.name) or not (is_label or extension in IMAGE_EXTENSIONS):
            if others is not None:
                others.add(key, member.name, extension)
            continue
        try:
            _, offset, size, _ = tar.follow(member)
            if size > MAX_IMAGE_BYTES and not is_label:
                size_limit = f"more than {MAX_IMAGE_BYTES} (MAX_IMAGE_BYTES)"
                raise LookupError(f"{key}.{extension} has {size} bytes, {size_limit}")
        except LookupError as error:
            report(key, str(error))
            if not is_label:
                yield ImageOrLabel(key, extension, -1, 0, b"")
            continue
        most = labels.most_bytes + 1 if is_label else size if load else 0
        yield ImageOrLabel(key, extension, offset, size, tar.content(most))
