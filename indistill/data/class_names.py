"""Class names: the order in which they are numbered, the files that list them, and whether two lists agree.

A label is the index of its class in a list of names. `indistill shards pack` saves that list in
`dataset.json` beside the shards; exports and stored targets contain a copy.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from indistill import config
from indistill.config import UserError, printable
from indistill.config.files import read_bytes, read_json, replace_text
from indistill.config.limits import MAX_CLASS_FILE_BYTES, MAX_CLASSES
from indistill.config.metric_names import eval_key
from indistill.config.records import first_problem
from indistill.config.run_dir import RunDir
from indistill.data import encodings, remote
from indistill.data.braces import expand_braces
from indistill.data.folders import class_folders
from indistill.data.samples import MOST_SHOWN, shown
from indistill.data.urls import without_file
from indistill.data.wildcards import expand_wildcards

log = logging.getLogger(__name__)

RECORD = "dataset.json"  # beside packed shards
_WORDNET_LINE = re.compile(r"n\d{8} ")


class DatasetRecord(BaseModel):
    """What is read of `dataset.json`: other keys are for people."""

    model_config = ConfigDict(strict=True)

    plan: str = ""  # hash of the source and the options, by which an interrupted packing continues
    classes: list[str] | None = None  # in the order of the labels; None: labels are numbers without names


class Names(NamedTuple):
    """A list of class names in the order of the labels, and its source, for messages."""

    where: str
    names: list[str]


def in_order(names: Iterable[str]) -> list[str]:
    """Sort the distinct names by label: as text or, if all of them are numbers, by number.

    Text order is that of torchvision's `ImageFolder`, which would give the classes 0, 1, 2, 10 the labels 0,
    1, 3, 2.
    """
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)


def folders_in(folder: Path) -> list[str]:
    """Names of the class folders in a folder, in the order of their labels."""
    return in_order(class_folders(folder))


# --- lists that are given -----------------------------------------------------------------------------------
def read(path: str | Path, encoding: str | None = None) -> list[str]:
    """Read the class names for `shards pack --classes` from a file or folder, in the order of the labels.

    A file is text with one name per line, or JSON: a list, a mapping from name to label, or a `dataset.json`.
    A folder contains one folder per class, or shards with their `dataset.json`. `encoding` is that of a file
    that is not UTF-8, as when a list in another encoding is packed. Raises UserError for anything else.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / RECORD).is_file():
            names = folders_in(path)
            if not names:
                raise UserError(
                    f"{path}: has neither class folders nor {RECORD}: name a file or folder with classes"
                )
            return names
        path = path / RECORD
    text = _text_of(path, encoding)
    if path.suffix.lower() == ".json":
        names = _from_json(text, path)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: holds no class names: write one per line, or name another file")
    for twice, number in Counter(names).items():
        if number > 1:
            raise UserError(
                f"{path}: names the class {twice!r} twice: remove one of them, because each class has one "
                "label"
            )
    return names


def _text_of(path: Path, encoding: str | None) -> str:
    try:
        try:
            return encodings.read_text(path, MAX_CLASS_FILE_BYTES, None)
        except UserError:
            if encoding is None:
                raise
            return encodings.read_text(path, MAX_CLASS_FILE_BYTES, encoding)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"{path}: cannot be read ({reason}): name a file or folder with classes") from None


def read_numbers(path: str) -> dict[str, int]:
    """Read the label of each class name for `data.label.map`; in JSON, several names may have the same label.

    A text file with lines such as `n01440764 tench, Tinca tinca`, ImageNet's, lists the WordNet ids. Raises
    UserError for anything else, and if a label between others has no name.
    """
    if path.lower().endswith(".json") and os.path.isfile(path):
        content = _parse(_text_of(Path(path), None), Path(path))
        if isinstance(content, dict) and not {"classes", "plan"} & content.keys():
            labels = [*content.values()]
            if not labels or not all(type(label) is int and 0 <= label < MAX_CLASSES for label in labels):
                raise UserError(
                    f"{path}: does not have a label, 0 or more and below {MAX_CLASSES}, for each class name: "
                    "correct the file"
                )
            used = set(labels)
            if max(used) >= len(used):
                absent = next(label for label in range(len(used)) if label not in used)
                raise UserError(
                    f"{path}: no class has the label {absent}, and others have larger ones: add the class"
                )
            return content
    names = read(path)
    if all(_WORDNET_LINE.match(name) for name in names):
        names = [name.partition(" ")[0] for name in names]
    return {name: label for label, name in enumerate(names)}


def _from_json(text: str, path: Path) -> list[str]:
    """The names in a JSON file with the content `text`."""
    content = _parse(text, path)
    if isinstance(content, dict) and ("classes" in content or "plan" in content):
        content = content.get("classes")
        if content is None:
            raise UserError(
                f"{path}: holds no class names, because its shards have numbers as labels: name another file"
            )
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict):
        labels = sorted(str(label) for label in content.values() if isinstance(label, (int, str)))
        if labels == sorted(str(label) for label in range(len(content))):
            return sorted(content, key=lambda name: int(content[name]))
    raise UserError(
        f"{path}: is neither a list of class names, nor a mapping from each name to its label "
        f"(0, 1, 2, ...), nor a {RECORD}: name another file"
    )


def _parse(text: str, path: Path) -> Any:
    try:
        return read_json(text)
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}): correct the file") from None


# --- lists beside shards ------------------------------------------------------------------------------------
def beside(urls: str | Sequence[str], root: str | None = None) -> list[Names]:
    """The lists in the `dataset.json` of the folders of these shards; folders without one are skipped.

    urls, root: as for `ShardSet`; the shards themselves need not exist.
    """
    patterns = [urls] if isinstance(urls, str) else urls
    folders = dict.fromkeys(folder for url in patterns for folder in _folders(url, root))
    lists = [list_in(folder) for folder in folders]
    return [names for names in lists if names is not None]


def _folders(url: str, root: str | None) -> Iterator[str]:
    """Yield the folders of the shards that a pattern names; of a remote one, the URL with its query."""
    try:
        expanded = expand_braces(url)
    except UserError:  # shards.expand raises it, too
        return
    for path in expanded:
        path = without_file(path)
        if not remote.is_remote(path):
            path = os.path.join(without_file(root or ""), path)
        if path.startswith("pipe:"):
            continue
        if remote.is_remote(path):
            address, _, query = path.partition("?")
            yield address.rpartition("/")[0] + "/?" + query
        else:
            pattern = os.path.dirname(path)
            yield from [pattern] if os.path.isdir(pattern or ".") else expand_wildcards(pattern)


def list_in(folder: str) -> Names | None:
    """The list in the `dataset.json` of a folder or URL, if any. Raises UserError for invalid JSON."""
    if remote.is_remote(folder):
        address, _, query = folder.partition("?")
        where = f"{address}{RECORD}" + (f"?{query}" if query else "")
        text = remote.read_if_there(where)
    else:
        path = Path(folder, RECORD)
        where = str(path)
        text = _read_if_there(path)
    if text is None:
        return None
    try:
        content = read_json(text)
    except ValueError:
        if remote.is_remote(folder):  # some servers answer with a page where there is no file
            log.warning("%s: is not valid JSON, and is left aside", printable(where))
            return None
        raise UserError(
            f"{where}: is not valid JSON: pack the shards again, or delete the file if it is not theirs"
        ) from None
    return of_record(content, where)


def _read_if_there(path: Path) -> bytes | None:
    try:
        return read_bytes(path, MAX_CLASS_FILE_BYTES)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): delete it if it is not yours") from None


def of_record(content: Any, where: str) -> Names | None:
    """The list in the parsed content of a `dataset.json`, if any. Raises UserError for a damaged one."""
    try:
        names = DatasetRecord.model_validate(content).classes
    except ValidationError as error:
        if not isinstance(content, dict) or "plan" not in content:
            return None  # another tool wrote the file
        reason = first_problem(error)
        raise UserError(f"{where}: damaged ({reason}): pack the shards again, or delete the file") from None
    return None if names is None else Names(where, names)


# --- whether they agree -------------------------------------------------------------------------------------
def difference(one: Names, reference: Names) -> str | None:
    """Describe how the labels of `one` contradict those of `reference`; None if they do not.

    A list may be the beginning of the reference, because its classes then have the same labels there.
    """
    ours = one.names
    theirs = reference.names
    if ours == theirs[: len(ours)]:
        return None
    label = next(i for i, name in enumerate(ours) if i >= len(theirs) or name != theirs[i])
    other = f"it is {theirs[label]!r}" if label < len(theirs) else "there is no such label"
    parts = [f"label {label} is {ours[label]!r} in {one.where}, in {reference.where} {other}"]
    known, expected = set(ours), set(theirs)
    if lacking := [name for name in theirs if name not in known]:
        parts.append(f"only the latter has {shown(lacking)}")
    if added := [name for name in ours if name not in expected]:
        parts.append(f"only the former has {shown(added)}")
    return "; ".join(parts)


def table(names: Sequence[str]) -> str:
    """List `label = name` of each class on one line, without the middle of a long list."""
    pairs = [f"{label} = {printable(name)}" for label, name in enumerate(names)]
    if len(pairs) > 4 * MOST_SHOWN:
        left_out = f"... ({len(pairs) - 3 * MOST_SHOWN} more) ..."
        pairs = [*pairs[: 2 * MOST_SHOWN], left_out, *pairs[-MOST_SHOWN:]]
    return ", ".join(pairs)


def merged(lists: Sequence[Names], owner: str) -> Names | None:
    """The longest list, if any. Raises UserError, naming their `owner`, if they contradict each other."""
    if not lists:
        return None
    longest = max(lists, key=lambda one: len(one.names))
    for one in lists:
        if problem := difference(one, longest):
            remedy = "pack each part with the same `indistill shards pack --classes FILE`"
            raise UserError(f"{owner}: its parts have different classes: {problem}: {remedy}")
    return longest


def of_training(section: config.Data) -> Names | None:
    """The class names of data.train, if known. Raises UserError if its folders contradict each other."""
    if section.label is None:
        return merged(beside(section.train, section.root), "data.train")
    if section.label.map is None:
        return None
    labels = read_numbers(section.label.map)
    names = sorted(labels, key=lambda name: labels[name])
    return Names(section.label.map, names) if len(set(labels.values())) == len(names) else None


def _of_shards(urls: str | Sequence[str], section: config.Data) -> list[Names]:
    """The lists beside shards of a config, if these have the labels that the lists are of."""
    return beside(urls, section.root) if section.label is None else []


def check(section: config.Data) -> Names | None:
    """The class names of data.train, if known, and if labels are read.

    Raises UserError if data.eval numbers its classes differently, unless a label map translates them.
    """
    reference = of_training(section) if section.num_classes else None
    if reference is not None:
        _check_eval_sets(section, reference)
    return reference


def check_bank(settings: config.Config) -> None:
    """Raise UserError if the bank of `evaluate` numbers its classes otherwise than data.train, or data.eval.

    Without classes (`data.num_classes: 0`), another bank has nothing to do with data.train.
    """
    section, bank = settings.data, settings.evaluate.bank
    reference = of_training(section) if bank is None or section.num_classes else None
    for names in [] if bank is None else _of_shards(bank, section):
        reference = reference or names
        remedy = f"pack it again with `shards pack --classes {reference.where}`"
        refuse_difference(names, reference, f"evaluate.bank: {names.where}", remedy)
    if reference is not None:
        _check_eval_sets(section, reference)


def _check_eval_sets(section: config.Data, reference: Names) -> None:
    for name, one in section.eval_sets.items():
        key = eval_key(name)
        remedy = f"pack {key} again with `shards pack --classes {reference.where}`"
        for names in [] if one.label_map else _of_shards(one.shards, section):
            refuse_difference(names, reference, key, remedy)


def read_label_map(path: str, section: config.Data, bank: str | list[str] | None = None) -> list[int]:
    """Read the label in data.train of each class that a file lists, by its name there or by its label.

    Without classes (`data.num_classes: 0`), it is the label in `bank`, the shards of `evaluate.bank`. Raises
    UserError, naming the class, for one that is not there.
    """
    names = read(path)
    of_bank = bank is not None and not section.num_classes
    training = merged(_of_shards(bank or [], section), "evaluate.bank") if of_bank else of_training(section)
    labels = {} if training is None else {name: label for label, name in enumerate(training.names)}
    known = [] if training is None else [f"the names in {training.where}"]
    if training is None or not all(map(str.isdecimal, training.names)):  # else numbers are names
        count = section.num_classes or MAX_CLASSES  # of a headless student, the bank has to have the classes
        numbers = {name: int(name) for name in names if name.isdecimal() and len(name) < 9}
        labels = {name: label for name, label in numbers.items() if label < count} | labels
        known = [f"the data.num_classes, 0 to {count - 1}", *known]
    for name in names:
        if name not in labels:
            raise UserError(
                f"{path}: the class {name!r} is none of {', or of '.join(known)}: correct the file"
            )
    return [labels[name] for name in names]


def check_weights(weights: Names | None, section: config.Data, role: str) -> None:
    """Raise UserError if weights were made for other classes than the data that they are compared with.

    The teacher is compared with data.train; an evaluated network with data.eval, or data.train if that has no
    names.
    """
    if weights is None or not section.num_classes:
        return
    lists: list[tuple[str, Names]] = []
    if role != "teacher":
        sets = section.eval_sets.items()
        own = [(eval_key(name), one.shards) for name, one in sets if one.label_map is None]
        lists = [(key, names) for key, shards in own for names in _of_shards(shards, section)]
    if not lists and (training := of_training(section)) is not None:
        lists = [("data.train", training)]
    for key, names in lists:
        remedy = f"use weights made for these classes, or pack {key} with `shards pack --classes`"
        refuse_difference(names, weights, key, remedy)


def refuse_difference(names: Names, reference: Names, owner: str, remedy: str) -> None:
    """Raise UserError, naming the classes, if `names`, the list of `owner`, contradicts the reference."""
    if problem := difference(names, reference):
        raise UserError(f"{owner}: its classes are not those of {reference.where}: {problem}: {remedy}")


# --- lists of networks --------------------------------------------------------------------------------------
def keep(names: Names | None, run_dir: Path) -> None:
    """Save the names of a run's classes in its directory.

    Raises UserError if the run began with other classes.
    """
    if names is None:
        return
    record = RunDir(run_dir).classes
    if record.is_file():
        saved = Names(str(record), read(record))
        refuse_difference(names, saved, "data.train", "restore the data, or choose another run_dir")
    replace_text(record, json.dumps(names.names, indent=1) + "\n")


def of_weights(path: str | Path) -> Names | None:
    """The list that a run saved beside its weights or above its checkpoints, if any."""
    folder = Path(path).absolute().parent
    for file in (RunDir(folder).classes, RunDir(folder.parent.parent).classes):
        if file.is_file():
            return Names(str(file), read(file))
    return None


def of_pretrained(record: dict[str, Any] | None, name: str) -> Names | None:
    """The list in timm's record of a pretrained network (`pretrained_cfg`), if there is one."""
    names = (record or {}).get("label_names")
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names) or not names:
        return None
    return Names(name, list(names))
