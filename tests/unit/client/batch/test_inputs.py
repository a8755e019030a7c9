"""What a batch's inputs stand for."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heatlens import InvalidArgumentError
from heatlens._batch.inputs import count_of, items_of


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b/img10.png", "b/img2.JPG", "a.webp", "notes.md", "c/d/e.dcm"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path


def paths(*inputs: str, column: str | None = None) -> list[str]:
    found = [item.path for item in items_of(inputs, column)]
    assert count_of(inputs) == len(found)
    return found


def parquet(name: str, **columns) -> str:
    pq.write_table(pa.table(columns), name)
    return name


def test_a_folder_is_all_images_in_it_and_below_in_the_order_of_their_numbers(folder):
    assert paths(".") == ["a.webp", "b/img2.JPG", "b/img10.png", "c/d/e.dcm"]


def test_a_list_is_a_path_a_line(folder):
    Path("list.txt").write_text("a.webp\n\n  b/img2.JPG \ngone.png\n")
    assert paths("list.txt", "a.webp") == ["a.webp", "b/img2.JPG", "gone.png", "a.webp"]


def test_a_list_of_windows_is_one_too_and_other_text_is_refused(folder):
    Path("list.txt").write_bytes("\ufeffa.webp\r\nb/img2.JPG\r\n".encode())
    assert paths("list.txt") == ["a.webp", "b/img2.JPG"]
    Path("list.txt").write_bytes("a.webp".encode("utf-16"))
    with pytest.raises(InvalidArgumentError, match=r"list\.txt is no list of paths in UTF-8"):
        count_of(["list.txt"])


def test_what_is_not_there_is_refused_and_so_is_a_folder_that_cannot_be_read(folder, monkeypatch):
    with pytest.raises(FileNotFoundError):
        count_of(["gone.png"])

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    # Tests may run as root, who reads everything.
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        count_of(["b"])


def test_a_column_of_categories_has_paths_too(folder):
    assert paths(parquet("p.parquet", path=pa.array(["x.png", "y.png", "x.png"]).dictionary_encode())) == [
        "x.png",
        "y.png",
        "x.png",
    ]


def test_a_table_has_paths_or_bytes(folder):
    assert paths(parquet("p.parquet", n=[1, 2], path=["x.png", "y.png"])) == ["x.png", "y.png"]
    items = list(items_of([parquet("q.parquet", image=[b"one", None])], None))
    assert [(item.path, item.image) for item in items] == [("q.parquet:0", b"one"), ("q.parquet:1", None)]
    # As datasets keep images.
    items = list(items_of([parquet("r.parquet", photo=[{"bytes": b"two", "path": "z.png"}, None])], "photo"))
    assert [(item.path, item.image) for item in items] == [("r.parquet:0", b"two"), ("r.parquet:1", None)]


@pytest.mark.parametrize(
    ("columns", "column", "message"),
    [
        ({"n": [1]}, None, "has the columns n: name one"),
        ({"path": ["x"]}, "photo", "has the columns path: name one"),
        ({"n": [1]}, "n", "is int64, neither text nor bytes"),
    ],
)
def test_a_table_without_images_is_refused(folder, columns, column, message):
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        paths(parquet("p.parquet", **columns), column=column)
    assert caught.value.field_violations[0].field == "--column"


def test_no_table_is_refused(folder):
    Path("p.parquet").write_bytes(b"no")
    with pytest.raises(InvalidArgumentError, match=r"p\.parquet is no Parquet file"):
        count_of(["p.parquet"])
    with pytest.raises(FileNotFoundError):
        count_of(["gone.parquet"])
