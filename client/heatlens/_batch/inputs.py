"""Which images a batch explains: folders, lists and Parquet files, read as they are needed."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from heatlens._batch.run import Item
from heatlens._exceptions import InvalidArgumentError
from heatlens._video.inputs import SERVER_SUFFIXES, natural_key

LIST_SUFFIXES = (".txt", ".lst")
_COLUMNS = ("path", "image", "bytes", "file", "file_path", "image_path")
_ROWS = 64
"""Rows of a Parquet file that are read at once: each may hold a photo."""


def items_of(inputs: Sequence[str], column: str | None) -> Iterator[Item]:
    """Yield the images that inputs stand for, always in the same order.

    Args:
        inputs: folders, with all that is in them; lists of paths, a line each (.txt, .lst); Parquet files with a column
            of paths or of bytes; anything else is an image.
        column: of Parquet files; None: the first of the usual names.

    Raises:
        InvalidArgumentError: a Parquet file lacks the column, or it holds neither text nor bytes; a list is no text.
        OSError: an input is not there or cannot be read.
    """
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            yield from _in_folder(path)
        elif path.suffix.lower() in LIST_SUFFIXES:
            yield from _in_list(path)
        elif path.suffix.lower() == ".parquet":
            yield from _in_parquet(path, column)
        elif path.exists():
            yield Item(text, path)
        else:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)


def count_of(inputs: Sequence[str]) -> int:
    """Count what `items_of` would yield, without reading images.

    Raises:
        InvalidArgumentError: a file is no Parquet file.
        OSError: an input cannot be read.
    """
    count = 0
    for text in inputs:
        path = Path(text)
        if path.suffix.lower() == ".parquet" and not path.is_dir():
            with _opened(path) as file:
                count += file.metadata.num_rows
        else:
            count += sum(1 for _ in items_of([text], None))
    return count


def _in_list(path: Path) -> Iterator[Item]:
    try:
        # With or without the mark that Windows' editors put first.
        with path.open(encoding="utf-8-sig") as lines:
            yield from (Item(line, Path(line)) for raw in lines if (line := raw.strip()))
    except UnicodeDecodeError as error:
        raise InvalidArgumentError.of("INPUT", f"{path} is no list of paths in UTF-8: {error.reason}") from None


def _in_folder(folder: Path) -> Iterator[Item]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort(key=lambda name: natural_key(Path(name)))
        images = (Path(name) for name in names if Path(name).suffix.lower() in SERVER_SUFFIXES)
        for name in sorted(images, key=natural_key):
            path = Path(parent) / name
            yield Item(str(path), path)


def _opened(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InvalidArgumentError.of("INPUT", f"{path} is no Parquet file: {error}") from None


def _in_parquet(path: Path, column: str | None) -> Iterator[Item]:
    with _opened(path) as file:
        names = file.schema_arrow.names
        known = [name for name in _COLUMNS if name in names] if column is None else [column]
        if not known or known[0] not in names:
            raise InvalidArgumentError.of("--column", f"{path} has the columns {', '.join(names)}: name one of them")
        name = known[0]
        kind = file.schema_arrow.field(name).type
        # As datasets keep images: a struct of the file's bytes and its path.
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not (nested or pa.types.is_string(kind) or pa.types.is_large_string(kind) or _is_binary(kind)):
            raise InvalidArgumentError.of("--column", f"{name} of {path} is {kind}, neither text nor bytes")
        row = 0
        for batch in file.iter_batches(batch_size=_ROWS, columns=[name]):
            for value in batch.column(0).to_pylist():
                content = value.get("bytes") if nested and value is not None else value
                if isinstance(content, str):
                    yield Item(content, Path(content))
                else:
                    yield Item(f"{path}:{row}", content)
                row += 1


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
