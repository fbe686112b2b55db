"""Read lists of images with their labels: CSV files, and the lists of ImageNet's validation images."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from indistill.config import UserError
from indistill.config.files import open_regular
from indistill.config.limits import MAX_CLASSES, MAX_CSV_LINE_CHARACTERS, MAX_CSV_ROWS
from indistill.data import encodings, imagenet
from indistill.data.folders import Walk, extension, is_image, note
from indistill.data.samples import IMAGE_EXTENSIONS, shown

_DELIMITERS = (",", ";", "\t", " ")  # the last one as in Caffe's lists
_WHOLE = re.compile(r"\d+(\.0*)?", re.ASCII)  # pandas writes integers like this after an empty cell
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?|nan", re.ASCII | re.IGNORECASE)
_WORDS = re.compile(r"([^\W\d]|[ _-])+")

_NO_DELIMITER = "\x1f"  # for lines that are paths as a whole

_Row = tuple[str, str | None, str]  # path or name of an image, label if the list has any, line for messages


def is_list(source: str) -> bool:
    """Whether a source of `shards pack` is a list, by its name; of the devkit, also by its content."""
    return source.lower().endswith((".csv", ".tsv", ".txt")) or imagenet.is_devkit(source)


def read(
    file: Path, given: Sequence[str] | None, walk: Walk | None, encoding: str | None
) -> tuple[list[tuple[str, int]], list[str] | None, int]:
    """Read the images (path, label) of a list, the class names, and the number of images that it lacks.

    file: lines of path,label with labels that are numbers, or else names in sorted order. Commas may be
        semicolons, tabs or single spaces. Or lines of a path alone (label -1), or a list of `imagenet`.
    given: the class names by label; None: those of the list, or None where labels are numbers.
    walk: the folder with the images. Names in the list need no extension then, and may be at any depth. By
        default paths are relative to the list.

    Raises UserError for anything else.
    """
    found = None if walk is None else _Images(walk)
    paths: list[str] = []
    names: list[str] = []  # of their classes, in a list with labels
    lines: list[str] = []  # of the file, for messages
    for name, label, line in _rows(file, encoding, found):
        path = _path_of(name, line, file.parent, found)
        if label == "":
            raise UserError(f"{line}: has no label: add it, or remove the line")
        if len(paths) == MAX_CSV_ROWS:
            raise UserError(f"{line}: is beyond {MAX_CSV_ROWS:,} images: split the file")
        paths.append(path)
        lines.append(line)
        if label is not None:
            names.append(label)
    if not paths:
        raise UserError(f"{file}: holds no path,label rows: add one for each image")
    ignored = 0 if found is None else found.report(paths)
    if not names:
        if given is not None:
            raise UserError(f"{file}: holds paths without labels: leave out --classes, or add the labels")
        return [(path, -1) for path in paths], None, ignored
    known = set(given or ())
    if all(map(_WHOLE.fullmatch, names)) and not known >= set(names):
        names = [name.partition(".")[0] for name in names]
    _refuse_several_labels(paths, names, lines, known)
    labels, classes = _number(names, lines, given)
    return [(path, labels[name]) for path, name in zip(paths, names)], classes, ignored


def label_in(given: Sequence[str], name: str, where: str) -> int:
    """The label of a class. Raises UserError if it is not among the `given` names."""
    try:
        return given.index(name)
    except ValueError:
        raise UserError(
            f"{where}: class {name!r} is not in --classes ({shown(given)}): add it, or leave it out"
        ) from None


# --- images -------------------------------------------------------------------------------------------------
class _Images:
    """The images below a folder, by name with and without extension."""

    def __init__(self, walk: Walk) -> None:
        self.folder = walk.folder
        self._walk = walk
        self._paths = walk.below()
        self._named: defaultdict[str, list[str]] = defaultdict(list)
        for path in self._paths:
            base = os.path.basename(path)
            for name in {base, os.path.splitext(base)[0]}:
                self._named[name].append(path)

    def named(self, name: str) -> list[str]:
        return self._named.get(name, [])

    def report(self, listed: Sequence[str]) -> int:
        """Name the images that are not listed on stderr; returns their number and that of other files."""
        known = set(map(os.path.realpath, listed))
        left_out = [path for path in self._paths if os.path.realpath(path) not in known]
        if left_out:
            names = shown([os.path.relpath(path, self.folder) for path in left_out])
            note(f"{self.folder}: images that are not in the list, left out: {len(left_out)} ({names})")
        self._walk.print_notes()
        return len(left_out) + self._walk.ignored


def _path_of(name: str, line: str, folder: Path, found: _Images | None) -> str:
    """The path of an image in a list. Raises UserError if there is none, or several."""
    path = os.path.join(folder if found is None else found.folder, name)
    if os.path.isfile(path) and extension(path) in IMAGE_EXTENSIONS:
        return path
    paths = [] if found is None else found.named(name)
    if len(paths) > 1:
        raise UserError(
            f"{line}: {name} is the name of {paths[0]} and {paths[1]}: write the path below the folder"
        )
    if not paths:
        where = "or set --images to the folder of the images" if found is None else "or --images"
        raise UserError(
            f"{line}: {path} is not an image file ({', '.join(IMAGE_EXTENSIONS)}): correct the path, {where}"
        )
    return paths[0]


# --- lines --------------------------------------------------------------------------------------------------
def _rows(file: Path, encoding: str | None, found: _Images | None) -> Iterator[_Row]:
    """The rows of a list."""
    if (truth := imagenet.ground_truth(file)) is not None:
        if found is None:
            raise UserError(f"{file}: names no images: set --images to the folder of the validation images")
        yield from truth
        return
    columns = 0  # of the first row
    for number, row in _csv_rows(file, encoding, found):
        line = f"{file}: line {number}"
        if len(row) != (columns or min(len(row), 2)):
            expected = "a path alone, as above" if columns == 1 else "path,label"
            raise UserError(f"{line}: holds {len(row)} columns instead of {expected}: correct the line")
        cells = [cell.strip().removeprefix("\ufeff") for cell in row]
        usual = [cell.lower() for cell in cells] == ["path", "label"][: len(cells)]
        if not columns and not usual and _is_header(cells, file.parent, found):
            note(f"{line}: is taken for the names of the columns ({', '.join(cells)})")
        elif not usual:
            name, *label = cells
            yield name, imagenet.class_of(label[0]) if label else None, line
        columns = len(row)


def _is_header(cells: Sequence[str], folder: Path, found: _Images | None) -> bool:
    """Whether the first row of a list names its columns: words, of which none is an image's name."""
    return all(map(_WORDS.fullmatch, cells)) and not _is_there(cells[0], folder, found)


def _is_there(name: str, folder: Path, found: _Images | None) -> bool:
    return os.path.exists(folder / name) or bool(found and found.named(name))


def _csv_rows(file: Path, encoding: str | None, found: _Images | None) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of each line of a CSV file, without empty lines."""

    def lines(stream: IO[str]) -> Iterator[str]:
        while line := stream.readline(MAX_CSV_LINE_CHARACTERS + 1):
            if len(line) > MAX_CSV_LINE_CHARACTERS:
                raise csv.Error(f"longer than {MAX_CSV_LINE_CHARACTERS:,} characters")
            yield line

    number = 0
    try:
        with encodings.errors_named(file, encoding), open_regular(file) as binary:
            encodings.check(file, binary.peek(4)[:4], encoding)
            stream = io.TextIOWrapper(binary, encoding=encoding or "utf-8-sig", newline="")
            all_lines = lines(stream)
            begin = list(itertools.islice(all_lines, 2))
            alone = _are_paths([line.strip() for line in begin], file.parent, found)
            delimiter = _NO_DELIMITER if alone else _delimiter(begin)
            reader = csv.reader(itertools.chain(begin, all_lines), delimiter=delimiter, strict=True)
            for row in reader:
                if any("\n" in cell or "\r" in cell for cell in row):  # of a quote that is not closed
                    raise csv.Error("a quote begins here and ends on a later line")
                number = reader.line_num
                if any(cell.strip() for cell in row):
                    yield number, row
    except csv.Error as error:
        raise UserError(f"{file}: line {number + 1}: {error}: correct the line") from None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file: correct the path") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}): correct the path") from None


def _are_paths(lines: Sequence[str], folder: Path, found: _Images | None) -> bool:
    """Whether the first lines of a file are paths as a whole, whatever commas and spaces are in them.

    The first one may name the column.
    """
    paths = lines[1:] if len(lines) > 1 and _WORDS.fullmatch(lines[0]) else lines
    return bool(paths) and all(is_image(path) and _is_there(path, folder, found) for path in paths)


def _delimiter(lines: Sequence[str]) -> str:
    """The delimiter by which the first lines of a CSV file have two cells, the first of them an image."""

    def fit(delimiter: str) -> tuple[int, int]:
        rows = list(csv.reader(lines, delimiter=delimiter))
        images = sum(extension(row[0].strip()) in IMAGE_EXTENSIONS for row in rows if row)
        return sum(len(row) == 2 for row in rows), images

    return max(_DELIMITERS, key=fit)


# --- labels -------------------------------------------------------------------------------------------------
def _number(
    names: Sequence[str], lines: Sequence[str], given: Sequence[str] | None
) -> tuple[dict[str, int], list[str] | None]:
    """The label of each name in a CSV file, and the class names by label (None: labels are numbers)."""
    numbers = all(name.isascii() and name.isdigit() for name in names)
    for name, line in zip(names, lines) if numbers else ():
        if len(name) > len(str(MAX_CLASSES)) or int(name) >= MAX_CLASSES:
            raise UserError(f"{line}: label {name} is not below {MAX_CLASSES:,}: correct the line")
    known = set(given or ())
    all_numbers = all(map(_NUMBER.fullmatch, names))
    for name, line in zip(names, lines):
        # -1 often means that there is no label. A class of another name may still begin with a number.
        number = _NUMBER.fullmatch(name) and not _WHOLE.fullmatch(name)
        if number and (all_numbers or name[0] == "-") and name not in known:
            raise UserError(
                f"{line}: label {name!r} is not a non-negative integer, as labels that are numbers must be: "
                "correct the line"
            )
    if given is None and numbers:
        return {name: int(name) for name in names}, None
    classes = sorted(set(names)) if given is None else list(given)
    labels = {name: label for label, name in enumerate(classes)}
    if numbers and not labels.keys() >= set(names):  # indices in the list, not names
        labels = {name: int(name) for name in names if int(name) < len(classes)}
    for name, line in zip(names, lines):
        if name not in labels:
            listed = shown(classes)
            raise UserError(
                f"{line}: class {name!r} is not in --classes ({listed}): add it, or remove the line"
            )
    return labels, classes


def _refuse_several_labels(
    paths: Sequence[str], names: Sequence[str], lines: Sequence[str], known: set[str]
) -> None:
    """Raise UserError, naming the line, if an image in a CSV file seems to have more than one label.

    The `known` names are single classes, even if they look like lists.
    """
    parts = {name: [name] if name in known else _parts(name) for name in set(names)}
    seen = Counter(part for parts_of_name in parts.values() for part in set(parts_of_name))
    first: dict[str, int] = {}
    for row, (path, name, line) in enumerate(zip(paths, names, lines)):
        several = len(parts[name]) > 1 and (
            any(mark in name for mark in ";|")
            or name[0] + name[-1] in ("[]", "()", "{}")
            # A comma may belong to a name, as in "tank, army tank", where not all parts occur in other
            # labels.
            or all(part.isdigit() or seen[part] > 1 for part in parts[name])
        )
        if several:
            raise UserError(
                f"{line}: {name!r} looks like several labels, but an image has one: keep one; if it is "
                "the name of one class, list it in a file for --classes"
            )
        earlier = first.setdefault(os.path.normpath(path), row)
        if names[earlier] != name:
            raise UserError(
                f"{line}: {path} has the label {name!r} here and {names[earlier]!r} above "
                f"({lines[earlier]}): an image has one label: keep one of the lines"
            )


def _parts(name: str) -> list[str]:
    """Split a label as if it were a list: at separators, or numbers at spaces."""
    inner = name[1:-1] if name[:1] + name[-1:] in ("[]", "()", "{}") else name
    parts = [part.strip(" '\"") for part in re.split(r"[;|,]", inner)]
    if len(parts) == 1 and re.fullmatch(r"\d+(\s+\d+)+", inner.strip()):
        parts = inner.split()
    return [part for part in parts if part]
