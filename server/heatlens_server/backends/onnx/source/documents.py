"""Metadata and the files beside a model, read within limits: they are as untrusted as the model itself."""

import ast
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.labels import labels_of
from heatlens_server.core.preprocess import Interpolation
from heatlens_server.core.tasks import Task

T = TypeVar("T")

MAX_BYTES = 4 << 20
"""The most that is read of a file, or of an entry of metadata: the names of 20,000 classes are 1 MB."""

_MAX_YAML_BYTES = 256 << 10
"""PyYAML takes seconds for more."""

_MAX_DEPTH = 32
LONGEST_PX = 8192
"""Of the sides of inputs, as in the configuration."""

_LARGEST = 1e9

_PIL_FILTERS = (Interpolation.NEAREST, Interpolation.LANCZOS, Interpolation.BILINEAR, Interpolation.BICUBIC)
"""By the number of PIL.Image.Resampling."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a document tells.

    Attributes:
        values: fields of a PreprocessSpec by name; None stands for what it does not tell, and a mean or std of one
            value for every channel.
        labels: class names; empty if it tells none.
        task: what the model does; None if it does not tell.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    task: Task | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A mapping of a document, whose entries are checked as they are read.

    Values may be written as text, as all of ONNX's metadata are: "[224, 224]".

    Attributes:
        origin: what it is a part of, for people: "'config.json'".
        values: the entries.
        path: of its keys in the document, with a dot at the end; empty for the document itself.

    Raises:
        ModelLoadError: from every method, if the entry is of another type or out of range; names origin and key.
    """

    origin: str
    values: Mapping[Any, object]
    path: str = ""

    def __contains__(self, key: str) -> bool:
        """Whether there is such an entry, and it is not null."""
        return self.values.get(key) is not None

    def wrong(self, key: str, what: str) -> ModelLoadError:
        """The error for an entry."""
        return ModelLoadError(f"{self.origin}: {self.path}{key} {what}")

    def section(self, key: str) -> "Section | None":
        """An entry that is a mapping."""
        value = self._value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(key, "must be a mapping")
        return Section(self.origin, value, f"{self.path}{key}.")

    def sections(self, key: str) -> "Iterator[Section]":
        """The mappings of an entry that is a list of them; what is no mapping is left out."""
        value = self._value(key)
        for place, item in enumerate(value if isinstance(value, list) else []):
            if isinstance(item, Mapping):
                yield Section(self.origin, item, f"{self.path}{key}[{place}].")

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """An entry of finite numbers, or of one."""
        value = self._value(key)
        if value is None:
            return None
        items = value if isinstance(value, list | tuple) else [value]
        found = tuple(float(item) for item in items if _is_number(item))
        if not items or len(found) < len(items):
            raise self.wrong(key, "must be finite numbers")
        return found

    def number(self, key: str) -> float | None:
        """An entry of one finite number."""
        found = self.numbers(key)
        if found is not None and len(found) != 1:
            raise self.wrong(key, "must be one number")
        return None if found is None else found[0]

    def fraction(self, key: str) -> float | None:
        """An entry of a number in (0, 1]."""
        found = self.number(key)
        if found is not None and not 0 < found <= 1:
            raise self.wrong(key, "must be in (0, 1]")
        return found

    def size_px(self, key: str) -> tuple[int, int] | None:
        """An entry of one side or of (height, width)."""
        found = self.numbers(key)
        return None if found is None else self.as_size_px(key, found)

    def as_size_px(self, key: str, sides: tuple[float, ...]) -> tuple[int, int]:
        """Numbers as (height, width): one of them is both."""
        height_px, width_px = (sides * 2)[:2]
        if len(sides) > 2 or not all(side == int(side) and 1 <= side <= LONGEST_PX for side in sides):
            raise self.wrong(key, f"must be a size, each side from 1 to {LONGEST_PX} px")
        return int(height_px), int(width_px)

    def shorter_or_exact_px(self, key: str) -> int | tuple[int, int] | None:
        """An entry of a shorter side or of an exact (height, width)."""
        sides = self.numbers(key)
        if sides is None:
            return None
        size_px = self.as_size_px(key, sides)
        return size_px[0] if len(sides) == 1 else size_px

    def interpolation(self, key: str) -> Interpolation | None:
        """An entry of a name or of Pillow's number; None also for those that have no equal here, as "random"."""
        value = self.values.get(key)
        if isinstance(value, int):
            return _PIL_FILTERS[value] if 0 <= value < len(_PIL_FILTERS) else None
        return {item.value: item for item in Interpolation}.get(self.text(key).lower())

    def choice(self, key: str, choices: Mapping[str, T]) -> T | None:
        """An entry that is one of several words, whatever its case."""
        word = self.text(key).lower()
        if word and word not in choices:
            raise self.wrong(key, f"must be one of {', '.join(choices)}")
        return choices[word] if word else None

    def flag(self, key: str, default: bool = False) -> bool:
        """An entry that is true or false."""
        value = self.values.get(key)
        if value is None:
            return default
        if str(value).lower() not in {"true", "false"}:
            raise self.wrong(key, "must be true or false")
        return str(value).lower() == "true"

    def text(self, key: str) -> str:
        """An entry of text; empty if there is none."""
        value = self.values.get(key)
        if not isinstance(value, str | None):
            raise self.wrong(key, "must be text")
        return value or ""

    def labels(self, key: str) -> tuple[str, ...]:
        """An entry of class names: a list, or a mapping from class ids; empty if there is none."""
        value = self._value(key)
        try:
            return () if value is None else labels_of(list(value) if isinstance(value, tuple) else value)
        except ValueError as error:
            raise self.wrong(key, f"must be the names of classes: {error}") from error

    def _value(self, key: str) -> object:
        value = self.values.get(key)
        if not isinstance(value, str):
            return value
        try:
            return _parsed(value)
        except ValueError as error:
            raise self.wrong(key, f"cannot be read: {error}") from error


def read_beside(path: Path) -> Section | None:
    """Read a JSON or YAML file.

    Returns:
        What it holds; None if there is no such file, it is no mapping, or YAML cannot be read here.

    Raises:
        ModelLoadError: it is too large or too deep, or it is broken.
    """
    origin = repr(path.name)
    if not path.is_file() or (path.suffix == ".yml" and not can_read_yaml()):
        return None
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ModelLoadError(f"{origin} cannot be read ({type(error).__name__})") from error
    try:
        text = content.decode("utf-8-sig")
        value = _yaml(text) if path.suffix == ".yml" else _json(text)
    except ValueError as error:
        raise ModelLoadError(f"{origin} cannot be read: {error}") from error
    return Section(origin, value) if isinstance(value, Mapping) else None


def can_read_yaml() -> bool:
    """Whether PyYAML is installed, which other libraries bring along."""
    return importlib.util.find_spec("yaml") is not None


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _parsed(text: str) -> object:
    """The value of a text as JSON or as a literal of Python's, as ultralytics writes them.

    Raises:
        ValueError: it is neither, or it is too large or too deep.
    """
    try:
        return _json(text)
    except json.JSONDecodeError:
        pass
    try:
        return ast.literal_eval(text.strip())
    # What the documentation of literal_eval names for text that is no literal, or is too complex.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("it is neither JSON nor a literal") from None


def _json(text: str) -> object:
    _check(text)
    return json.loads(text)


def _yaml(text: str) -> object:
    _check(text, _MAX_YAML_BYTES)
    yaml = importlib.import_module("yaml")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"it is no YAML ({type(error).__name__})") from None


def _check(text: str, most_bytes: int = MAX_BYTES) -> None:
    """Refuse what takes much memory or deep recursion to parse.

    Raises:
        ValueError: it is too large or too deep.
    """
    if len(text) > most_bytes:
        raise ValueError(f"it is larger than {most_bytes >> 10} KB")
    depth = 0
    for character in text:
        if character in "[{(":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels")
        elif character in "]})":
            depth -= 1
