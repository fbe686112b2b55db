"""Class names: in which order they are numbered, where they are written down, and whether two lists agree.

A label is the place of its class in a list of names. `indistill shards pack` keeps that list in `dataset.json`, beside
the shards; exports and stored targets hold a copy.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from braceexpand import braceexpand

from indistill import config
from indistill.config import UserError
from indistill.config.files import replace_text
from indistill.data import remote

RECORD = "dataset.json"  # of a packing
RUN_RECORD = "classes.json"  # of a run: the list of its training data
MOST_SHOWN = 5  # classes in a message


class Names(NamedTuple):
    """A list of class names in the order of the labels, and where it was found."""

    where: str
    names: list[str]


def in_order(names: Iterable[str]) -> list[str]:
    """The distinct names in the order of their labels: as text or, if all of them are numbers, by number.

    Text order is that of torchvision's `ImageFolder`. It would give the classes 0, 1, 2, 10 the labels 0, 1, 3, 2.
    """
    names = set(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def folders_in(folder: Path) -> list[str]:
    """Names of the class folders in a folder, in the order of their labels."""
    return in_order(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


# --- lists that are given --------------------------------------------------------------------------------------------
def read(path: str | Path) -> list[str]:
    """The names that `shards pack --classes` takes from a file or folder, in the order of the labels.

    A file is a text file with one name per line, or JSON: a list, a mapping from name to label, or a `dataset.json`. A
    folder holds one folder per class, or shards with their `dataset.json`. Raises UserError for anything else.
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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not a text file"
        raise UserError(f"{path}: cannot be read ({reason}): name a file or folder with classes") from None
    if path.suffix.lower() == ".json":
        names = _from_json(text, path)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UserError(f"{path}: holds no class names")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: names the class {twice!r} twice: each class has one label")
    return names


def _from_json(text: str, path: Path) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if isinstance(content, dict) and ("classes" in content or "plan" in content):
        content = content.get("classes")
        if content is None:
            raise UserError(f"{path}: holds no class names: its shards were packed with numbers as labels")
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if isinstance(content, dict) and sorted(map(str, content.values())) == sorted(
        map(str, range(len(content)))
    ):
        return sorted(content, key=lambda name: int(content[name]))
    raise UserError(
        f"{path}: is neither a list of class names, nor a mapping from each name to its label (0, 1, 2, ...), nor a "
        f"{RECORD}"
    )


# --- lists beside shards ---------------------------------------------------------------------------------------------
def beside(urls: str | Sequence[str], root: str | None = None) -> list[Names]:
    """The lists in the `dataset.json` of every folder that holds some of these shards; fewer if some have none.

    urls, root: as for `ShardSet`; the shards themselves need not be there.
    """
    patterns = [urls] if isinstance(urls, str) else urls
    found = (list_in(place) for place in dict.fromkeys(p for url in patterns for p in _folders(url, root)))
    return [names for names in found if names is not None]


def _folders(url: str, root: str | None) -> Iterator[str]:
    try:
        expanded = list(braceexpand(os.path.expanduser(url)))
    except ValueError:  # shards.expand says what is wrong with it
        return
    for path in expanded:
        path = path.removeprefix("file://")
        place = path if remote.is_remote(path) else os.path.join(root or "", path)
        if place.startswith("pipe:"):
            continue
        if remote.is_remote(place):
            yield place.partition("?")[0].rpartition("/")[0] + "/?" + place.partition("?")[2]
        else:
            pattern = os.path.dirname(place)
            yield from [pattern] if os.path.isdir(pattern or ".") else sorted(glob.glob(pattern))


def list_in(folder: str) -> Names | None:
    """The list that the `dataset.json` in a folder or below a URL holds, if any."""
    if remote.is_remote(folder):
        address, _, query = folder.partition("?")
        where = f"{address}{RECORD}" + (f"?{query}" if query else "")
        text = remote.read_if_there(where)
    else:
        path = Path(folder, RECORD)
        where, text = str(path), path.read_bytes() if path.is_file() else None
    if text is None:
        return None
    try:
        content = json.loads(text)
    except ValueError:
        raise UserError(
            f"{where}: is not valid JSON: pack the shards again, or delete it if it is not theirs"
        ) from None
    return of_record(content, where)


def of_record(content: Any, where: str) -> Names | None:
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None  # labels are numbers without names, or the file is of another tool
    return Names(where, names)


# --- whether they agree ----------------------------------------------------------------------------------------------
def difference(one: Names, reference: Names) -> str | None:
    """How the labels of `one` contradict those of `reference`, in words; None if they do not.

    A list may be the beginning of the reference: what it holds has the same labels there.
    """
    ours, theirs = one.names, reference.names
    if ours == theirs[: len(ours)]:
        return None
    label = next(i for i, name in enumerate(ours) if i >= len(theirs) or name != theirs[i])
    other = f"it is {theirs[label]!r}" if label < len(theirs) else "there is no such label"
    lacking = [name for name in theirs if name not in set(ours)]
    added = [name for name in ours if name not in set(theirs)]
    parts = [f"label {label} is {ours[label]!r} in {one.where}, in {reference.where} {other}"]
    parts += [f"only the latter has {shown(lacking)}"] if lacking else []
    parts += [f"only the former has {shown(added)}"] if added else []
    return "; ".join(parts)


def table(names: Sequence[str]) -> str:
    """The label of each class on one line, with the middle of a long list left out."""
    pairs = [f"{label} = {name}" for label, name in enumerate(names)]
    if len(pairs) > 4 * MOST_SHOWN:
        left_out = f"... ({len(pairs) - 3 * MOST_SHOWN} more) ..."
        pairs = [*pairs[: 2 * MOST_SHOWN], left_out, *pairs[-MOST_SHOWN:]]
    return ", ".join(pairs)


def shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(map(repr, names[:MOST_SHOWN])) + more


def merged(lists: Sequence[Names], owner: str) -> Names | None:
    """The longest list, if there is any. Raises UserError if they contradict each other."""
    if not lists:
        return None
    longest = max(lists, key=lambda found: len(found.names))
    for found in lists:
        if problem := difference(found, longest):
            remedy = "pack each part with the same `indistill shards pack --classes FILE`"
            raise UserError(f"{owner}: its parts have different classes: {problem}: {remedy}")
    return longest


def of_training(section: config.Data) -> Names | None:
    """The class names of data.train, where they are known. Raises UserError if its folders contradict each other."""
    return merged(beside(section.train, section.root), "data.train")


def check(section: config.Data) -> Names | None:
    """Return the class names of data.train, if known. Raises UserError if data.eval numbers its classes otherwise."""
    reference = of_training(section)
    if reference is not None and section.eval is not None:
        for found in beside(section.eval, section.root):
            refuse_difference(
                found,
                reference,
                "data.eval",
                f"pack data.eval again with `shards pack --classes {reference.where}`",
            )
    return reference


def check_weights(weights: Names | None, section: config.Data, role: str) -> None:
    """Raise UserError if weights were made for other classes than the data that their outputs are compared with.

    That is data.train for the teacher and, in an evaluation, data.eval, or data.train if that has no names.
    """
    if weights is None:
        return
    evaluated = role != "teacher" and section.eval is not None
    lists = beside(section.eval, section.root) if evaluated else []
    for found in lists or [of_training(section)]:
        if found is not None:
            key = "data.eval" if lists else "data.train"
            refuse_difference(
                found,
                weights,
                key,
                f"take weights made for these classes, or pack {key} with `shards pack --classes`",
            )


def refuse_difference(found: Names, reference: Names, owner: str, remedy: str) -> None:
    """Raise UserError, naming the classes, if `found`, the list of `owner`, contradicts the reference."""
    if problem := difference(found, reference):
        raise UserError(f"{owner}: its classes are not those of {reference.where}: {problem}: {remedy}")


# --- lists of networks -----------------------------------------------------------------------------------------------
def keep(names: Names | None, run_dir: Path) -> None:
    """Write the names of a run's classes into its directory. Raises UserError if it was begun with others."""
    if names is None:
        return
    record = run_dir / RUN_RECORD
    if record.is_file():
        kept, remedy = Names(str(record), read(record)), "restore the data, or choose another run_dir"
        refuse_difference(names, kept, "data.train", remedy)
    replace_text(record, json.dumps(names.names, indent=1) + "\n")


def of_weights(path: str | Path) -> Names | None:
    """The list that a run keeps beside its weights or above its checkpoints, if any."""
    folder = Path(path).absolute().parent
    for file in (folder / RUN_RECORD, folder.parent.parent / RUN_RECORD):
        if file.is_file():
            return Names(str(file), read(file))
    return None


def of_pretrained(record: dict[str, Any] | None, name: str) -> Names | None:
    """The list in timm's record of a pretrained network (`pretrained_cfg`), if it holds one."""
    names = (record or {}).get("label_names")
    return Names(name, list(names)) if isinstance(names, (list, tuple)) and names else None
