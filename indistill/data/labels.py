"""Labels as other people's shards have them (`data.label`): text or JSON, numbers or names of classes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from indistill import config
from indistill.config import UserError
from indistill.config.files import read_json
from indistill.config.limits import MAX_LABEL_BYTES, MAX_LABEL_JSON_BYTES
from indistill.data import class_names
from indistill.data.samples import Labels, shown

_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_BETWEEN_NUMBERS = re.compile(r"[\s,;|]+")
_BETWEEN_NAMES = re.compile(r"\s*[,;|\t]\s*")


class _Member(Labels):
    """Reads what a member says that `data.label` names."""

    alone = True  # a .json or .txt without an image belongs to something else

    def __init__(self, section: config.Label) -> None:
        self.section = section
        self.extension = section.key
        self.most_bytes = MAX_LABEL_JSON_BYTES if section.key == "json" else MAX_LABEL_BYTES
        self.missing = missing(section)

    def text(self, key: str, content: bytes) -> str | None:
        """The number or name of a class; None for no label. Raises ValueError for anything else."""
        name = f"{key}.{self.extension}"
        try:
            if len(content) > self.most_bytes:
                raise ValueError(f"has more than {self.most_bytes} bytes, so it holds no label")
            if self.section.field is not None:
                return _text(_field(read_json(content), self.section.field))
            lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
            return _text([line for line in lines if line])
        except UnicodeDecodeError:
            raise ValueError(f"{name} is not text in UTF-8") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not valid JSON ({error})") from None
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None


class Texts(_Member):
    """The labels of an index: positions in the list of all texts, which need no class list to be read."""

    def __init__(self, section: config.Label) -> None:
        super().__init__(section)
        self.known: dict[str, int] = {}

    def read(self, key: str, content: bytes) -> int:
        text = self.text(key, content)
        return -1 if text is None else self.known.setdefault(text, len(self.known))


class Classes(_Member):
    """The class of each text, by the file `data.label.map`; without one, texts are numbers.

    Raises UserError for a file that does not have the classes of `data.num_classes`.
    """

    def __init__(self, section: config.Label, num_classes: int) -> None:
        super().__init__(section)
        self.map = None if section.map is None else class_names.read_numbers(section.map)
        if self.map is not None and num_classes and (count := max(self.map.values()) + 1) != num_classes:
            raise UserError(
                f"data.label.map: {section.map} has {count} classes, data.num_classes is {num_classes}: "
                "complete the file, or correct data.num_classes"
            )

    @property
    def fingerprint(self) -> str:
        """A hash of the class list, if there is one."""
        return hashlib.sha256(repr(self.map and sorted(self.map.items())).encode()).hexdigest()

    def read(self, key: str, content: bytes) -> int:
        text = self.text(key, content)
        try:
            return -1 if text is None else self.number(text)
        except ValueError as error:
            raise ValueError(f"sample '{key}' {error}") from None

    def number(self, text: str) -> int:
        """The label of a text. Raises ValueError if it is none of the classes, or several."""
        if self.map is None:
            if _NUMBER.fullmatch(text):
                return int(text)
            parts = _BETWEEN_NUMBERS.split(text.strip("[]() "))
            if len(parts) > 1 and all(map(_NUMBER.fullmatch, parts)):
                raise ValueError(_several(parts))
            raise ValueError(
                f"has the label {text!r}, which is no number: name a list of the classes in data.label.map"
            )
        if text in self.map:
            return self.map[text]
        parts = _BETWEEN_NAMES.split(text)
        if len(parts) > 1 and all(part in self.map for part in parts):
            raise ValueError(_several(parts))
        raise ValueError(
            f"has the label {text!r}, which is no class in {self.section.map}: add it to the file"
        )


def missing(section: config.Label) -> str:
    """What an image without label lacks, for messages."""
    return f"{section.key} with the key {section.field!r}" if section.field else section.key


def of_section(section: config.Data) -> Classes | None:
    """How the labels of a config's shards are read; None: as numbers in KEY.cls."""
    return None if section.label is None else Classes(section.label, section.num_classes)


def _field(content: Any, field: str) -> Any:
    """The value of a key in the content of a JSON file, or of keys in each other; None if it has none."""
    if not isinstance(content, dict):
        raise ValueError(f"has no keys, of which {field!r} (data.label.field) could be one")
    if field in content or "." not in field:
        return content.get(field)
    first, _, rest = field.partition(".")
    inner = content.get(first)
    return None if inner is None else _field(inner, rest)


def _text(value: Any) -> str | None:
    """A label in JSON as text. Raises ValueError for several labels, and for what is no label."""
    if isinstance(value, list):
        if len(value) > 1:
            raise ValueError(_several(list(map(str, value))))
        value = value[0] if value else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas writes integers like this after an empty cell
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"has {str(value)[:100]!r} for a label: a label is a number or a name")
    text = str(value).strip()
    if len(text) > MAX_LABEL_BYTES:
        raise ValueError(f"has a label of more than {MAX_LABEL_BYTES} characters (MAX_LABEL_BYTES)")
    return text or None


def _several(names: list[str]) -> str:
    return (
        f"has several labels ({shown(names)}), but an image has one, because losses for several are not "
        "built yet: keep one of them"
    )
