"""The labels of ImageNet's validation images: from the development kit, its list alone, or Kaggle's list.

The kit numbers the classes in an order of its own. Their WordNet ids, sorted as text, have the labels that
timm and torchvision use.
"""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from indistill.config import UserError, in_one_line
from indistill.config.files import open_regular, read_bytes
from indistill.config.limits import MAX_CLASS_FILE_BYTES, MAX_META_BYTES
from indistill.data.tar import Tar

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_LIMITS = {_TRUTH: MAX_CLASS_FILE_BYTES, _META: MAX_META_BYTES}
_WNID = r"n\d{8}"
_NUMBER = r"\d{1,4}"
_MARK = codecs.BOM_UTF8
_BOX = rf"{_WNID}(?: \d+){{4}}"  # Kaggle's lists have a class and a box for each object


def class_of(label: str) -> str:
    """The WordNet id in a label of Kaggle's `LOC_val_solution.csv`; any other label as it is."""
    if not re.fullmatch(rf"{_BOX}(?: {_BOX})*", label):
        return label
    return ";".join(dict.fromkeys(re.findall(_WNID, label)))  # several are refused like other lists of labels


def is_devkit(source: str) -> bool:
    """Whether a path is that of the development kit, as an archive or a folder."""
    name = os.path.basename(source)
    if name.startswith("ILSVRC2012_devkit") and ".t" in name:
        return True
    return any(os.path.isfile(os.path.join(source, folder, _TRUTH)) for folder in ("", "data"))


def ground_truth(file: Path) -> Iterator[tuple[str, str, str]] | None:
    """Yield name, WordNet id and line (for messages) of the validation images; None for any other list.

    file: the development kit, or one label on each line in the order of the images: a WordNet id, or a number
        of the kit, which needs the kit's `meta.mat` beside it. Raises UserError for a damaged one.
    """
    if is_devkit(str(file)):
        if not file.exists():
            raise UserError(f"{file}: no such file: correct the path")
        found = _of_archive(file) if file.is_file() else _of_folder(file)
    elif file.suffix.lower() == ".txt" and _is_column(file):
        found = _of_folder(file.parent) | {_TRUTH: _read(file, MAX_CLASS_FILE_BYTES)}
    else:
        return None
    if _TRUTH not in found:
        raise UserError(f"{file}: does not contain {_TRUTH}: download the development kit again")
    lines = found[_TRUTH].removeprefix(_MARK).decode("ascii", "replace").rstrip().splitlines()
    return _rows(file, [line.strip() for line in lines], found.get(_META))


def _rows(file: Path, labels: list[str], meta: bytes | None) -> Iterator[tuple[str, str, str]]:
    wnids: dict[str, str] | None = None
    for number, label in enumerate(labels, 1):
        line = f"{file}: line {number}"
        if not re.fullmatch(_WNID, label):
            if not re.fullmatch(_NUMBER, label):
                raise UserError(
                    f"{line}: {label!r} is not one class number or WordNet id, as each line of this list "
                    "must be: correct the line"
                )
            if wnids is None:
                if meta is None:
                    raise UserError(
                        f"{line}: {label!r} is a class number of ImageNet's development kit: put the kit's "
                        f"{_META} beside the list"
                    )
                wnids = _wnids(file, meta)
            if label not in wnids:
                raise UserError(f"{line}: {label!r} is none of the classes in {_META}: correct the line")
            label = wnids[label]
        yield f"ILSVRC2012_val_{number:08d}", label, line


def _wnids(file: Path, meta: bytes) -> dict[str, str]:
    """The WordNet id of each class by the kit's number, from `meta.mat`."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{file}: needs scipy to read {_META}: run `pip install scipy`") from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = [synset for synset in synsets if not synset["num_children"]]
        wnids = {str(int(synset["ILSVRC2012_ID"])): str(synset["WNID"]) for synset in leaves}
        if not all(re.fullmatch(_WNID, wnid) for wnid in wnids.values()):
            raise ValueError("a WNID is not a WordNet id")
    except Exception as error:  # scipy raises all kinds of errors for damaged files
        reason = in_one_line(error, with_type=True)
        raise UserError(
            f"{file}: its {_META} cannot be read ({reason}): download the development kit again"
        ) from None
    return wnids


def _is_column(file: Path) -> bool:
    """Whether the first line is a class number or a WordNet id alone."""
    try:
        with open_regular(file) as stream:
            first = stream.read(32).removeprefix(_MARK).split(b"\n")[0].strip()
    except OSError:
        return False  # reading it as a list names the reason
    return re.fullmatch(f"{_NUMBER}|{_WNID}".encode(), first) is not None


def _of_folder(folder: Path) -> dict[str, bytes]:
    """The files of the kit in a folder or in its `data`."""
    paths = [path for name in _LIMITS for path in (folder / "data" / name, folder / name)]
    return {path.name: _read(path, _LIMITS[path.name]) for path in paths if path.is_file()}


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_bytes(path, limit)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): correct the path") from None


def _of_archive(file: Path) -> dict[str, bytes]:
    """The files of the kit in its archive."""
    found = {}
    with open_regular(file) as stream:
        tar = Tar(str(file), stream, strict=False)
        for member in tar:
            name = os.path.basename(member.name)
            if name in _LIMITS and member.target is None:
                if member.size > _LIMITS[name]:
                    raise UserError(f"{file}: {name} has more than {_LIMITS[name]} bytes: download it again")
                found[name] = tar.content(member.size)
    return found
