"""Find the images in a folder of class folders, and name what is left out."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from indistill.config import UserError, printable
from indistill.data.samples import IMAGE_EXTENSIONS, shown

# Folders that operating systems, archives and network storage add.
_OF_SYSTEMS = {
    "__MACOSX",
    "lost+found",
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
}


def note(text: str) -> None:
    """Print a line about what is packed on stderr."""
    print(f"indistill: {printable(text)}", file=sys.stderr, flush=True)


def hidden(name: str) -> bool:
    """Whether a file or folder belongs to the system or a program, and so to no data set."""
    return name.startswith(".") or name in _OF_SYSTEMS


def extension(path: str) -> str:
    """The extension of a file in lower case, without its dot."""
    return os.path.splitext(path)[1][1:].lower()


def is_image(name: str) -> bool:
    """Whether a file is packed, by its name."""
    return not hidden(name) and extension(name) in IMAGE_EXTENSIONS


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in a folder. Raises UserError for a link that may have been one."""
    names = []
    for entry in os.scandir(folder):
        if hidden(entry.name):
            continue
        if entry.is_symlink() and not os.path.exists(entry.path):
            raise UserError(
                f"{entry.path}: is a link that leads nowhere, and without it other classes would get its "
                "label: restore what it leads to, or delete it"
            )
        if os.path.isdir(entry.path):
            names.append(entry.name)
    return names


def first_with_images(folder: Path) -> str | None:
    """Name of a class folder that contains an image, if there is one."""
    for name in sorted(class_folders(folder)):
        if any(is_image(file) for _, _, files in os.walk(folder / name) for file in files):
            return name
    return None


class Walk:
    """Finds images below a folder, through links as timm and torchvision do, and keeps what it leaves out.

    follow_links: also follow links that lead out of the folder.
    """

    def __init__(self, folder: Path, follow_links: bool) -> None:
        self.folder = folder
        self.others = 0  # files that are not images
        self._root = os.path.realpath(folder)
        self._follow_links = follow_links
        self._left_out: defaultdict[str, list[str]] = defaultdict(list)  # reason -> paths in the folder

    def classes(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The paths of the images in each class folder, in order."""
        for entry in _sorted_entries(self.folder):
            if hidden(entry.name):
                self._leave_out("hidden", entry.path)
            elif is_image(entry.name) and entry.is_file():
                self._leave_out("outside of classes", entry.path)
        found = {}
        for name in names:
            path = os.path.join(self.folder, name)
            found[name] = [] if os.path.islink(path) and not self._followed(path) else self.below(name)
        self._left_out["empty"] = [name for name, images in found.items() if not images]
        return found

    def below(self, name: str = "") -> list[str]:
        """The paths of all images below a folder in this one, in order.

        A folder to which several links lead is entered once, so that links in a circle come to an end.
        """
        images: list[str] = []
        seen: set[str] = set()
        pending = [os.path.join(self.folder, name)]
        linked: list[str] = []  # entered last: a folder's own path comes before links to it
        while pending or linked:
            path = pending.pop() if pending else linked.pop(0)
            real = os.path.realpath(path)
            if real in seen:
                self._leave_out("again", path)
                continue
            seen.add(real)
            for entry in _sorted_entries(path):
                if hidden(entry.name):
                    self._leave_out("hidden", entry.path)
                elif entry.is_symlink() and not self._followed(entry.path):
                    continue
                elif entry.is_dir():
                    (linked if entry.is_symlink() else pending).append(entry.path)
                elif entry.is_file() and is_image(entry.name):
                    images.append(entry.path)
                else:
                    self.others += entry.is_file()
        return sorted(images, key=lambda path: path.split(os.sep))

    @property
    def ignored(self) -> int:
        """The number of files that are not images, and of names that belong to no data set."""
        return self.others + len(self._left_out["hidden"])

    def links_out(self) -> str | None:
        """Describe the links that lead out of the folder, if there are any."""
        return next((text for text in self.notes() if "lead out" in text), None)

    def print_notes(self) -> None:
        """Print on stderr what was left out."""
        for text in self.notes():
            note(text)

    def notes(self) -> Iterator[str]:
        """Describe what was left out, one line for each reason."""
        for reason, text, remedy in (
            ("outside", "links that lead out of it, left out", ": set --follow-links to pack them"),
            ("nowhere", "links that lead nowhere, left out", ": restore what they lead to, or delete them"),
            ("again", "links to a folder that contains them or is packed already, left out", ""),
            ("outside of classes", "images in none of the class folders, left out", ""),
            ("empty", "class folders without an image that is packed, which keep their labels", ""),
            ("hidden", "names that begin with a dot or belong to the system, left out", ""),
        ):
            if paths := self._left_out[reason]:
                yield f"{self.folder}: {text}: {len(paths)} ({shown(paths)}){remedy}"

    def _followed(self, link: str) -> bool:
        """Whether a link is followed; one that is not is kept for `notes`."""
        real = os.path.realpath(link)
        if not os.path.exists(link):
            self._leave_out("nowhere", link)
        elif not self._follow_links and not _contains(self._root, real):
            self._leave_out("outside", link)
        elif _contains(real, os.path.dirname(link)):
            self._leave_out("again", link)
        else:
            return True
        return False

    def _leave_out(self, reason: str, path: str) -> None:
        self._left_out[reason].append(os.path.relpath(path, self.folder))


def _sorted_entries(path: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _contains(folder: str, path: str) -> bool:
    """Whether a real path is a folder or below it; `folder` has no links."""
    real = os.path.realpath(path)
    return real == folder or real.startswith(os.path.join(folder, ""))
