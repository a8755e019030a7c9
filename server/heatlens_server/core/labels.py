"""Class names, from a file."""

import json
from pathlib import Path

from heatlens_server.core.errors import ModelLoadError


def read_labels(path: Path, class_count: int) -> tuple[str, ...]:
    """Read one name per class from a file.

    Args:
        path: UTF-8; one name per line, a JSON list of names, or a JSON object from class id to name.
        class_count: how many names there must be; 0 for any number.

    Returns:
        The names, by class id.

    Raises:
        ModelLoadError: the file is unreadable, or its names are not one per class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = labels_of(json.loads(text)) if text.lstrip()[:1] in {"[", "{"} else _parse_lines(text)
    except OSError as error:
        raise ModelLoadError(f"labels file {path.name!r} cannot be read") from error
    # JSON's and UTF-8's decoding errors are ValueErrors.
    except ValueError as error:
        raise ModelLoadError(f"labels file {path.name!r}: {error}") from error
    if class_count and len(labels) != class_count:
        raise ModelLoadError(
            f"labels file {path.name!r} has {len(labels)} names, but the model has {class_count} classes"
        )
    return labels


def labels_of(content: object) -> tuple[str, ...]:
    """The names of a list, or of a mapping from class ids, as of JSON.

    Raises:
        ValueError: they are no names, or a class id is missing.
    """
    if isinstance(content, dict):
        try:
            by_id = {int(key): name for key, name in content.items()}
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError("the keys must be class ids") from error
        missing = next((class_id for class_id in range(len(by_id)) if class_id not in by_id), None)
        if missing is not None:
            raise ValueError(f"class id {missing} is missing")
        content = [by_id[class_id] for class_id in range(len(by_id))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("the names must be strings")
    return tuple(content)


def _parse_lines(text: str) -> tuple[str, ...]:
    labels = tuple(line.strip() for line in text.rstrip().splitlines())
    if "" in labels:
        raise ValueError(f"line {labels.index('') + 1} is empty")
    return labels
