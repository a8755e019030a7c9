"""The table of a batch: its rows, and what is left of it when it is interrupted."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from heatlens import InvalidArgumentError
from heatlens._batch.run import MapType
from heatlens._batch.table import _PART_ROWS, Table
from heatlens._results.geometry import PixelBox
from heatlens._results.heatmap import Heatmap
from heatlens._results.results import Explanation, Result, Timing

REGION = PixelBox(left=0, top=0, right=8, bottom=4)
VALUES = np.asarray([[0.0, 0.25], [0.5, 1.0]], np.float32)


def result(class_id: int = 3, **changes) -> Result:
    heatmap = Heatmap(VALUES, scale=2.0, offset=1.0, region=REGION, placed=False)
    explanation = Explanation(class_id, "cat", 2.5, 0.75, heatmap, **changes)
    return Result((explanation,), (), REGION, (8, 4), "tiny", "7", Timing(0.0, 0.0, 0.0, 1), warnings=("dark",))


def table(tmp_path, *, map_type=MapType.FLOAT16, overwrite=False, **options) -> Table:
    return Table(tmp_path / "out.parquet", options, map_type=map_type, overwrite=overwrite)


def rows(tmp_path) -> list[dict]:
    return pq.read_table(tmp_path / "out.parquet").to_pylist()


@pytest.mark.parametrize(("map_type", "kind", "scale"), [(MapType.FLOAT16, "<f2", 1), (MapType.UINT8, "u1", 255)])
def test_a_row_holds_the_answer_and_its_map(tmp_path, map_type, kind, scale):
    made = table(tmp_path, map_type=map_type)
    made.add("a.png", result(box=REGION, area=0.5))
    made.finish()
    (row,) = rows(tmp_path)
    values = np.frombuffer(row.pop("maps")[0], kind).reshape(row.pop("map_height"), row.pop("map_width"))
    assert np.array_equal(values, np.rint(VALUES * scale) if scale > 1 else VALUES)
    assert {name: value for name, value in row.items() if value is not None} == {
        "path": "a.png",
        "model": "tiny",
        "model_version": "7",
        "source_width_px": 8,
        "source_height_px": 4,
        "region": [0, 0, 8, 4],
        "class_ids": [3],
        "labels": ["cat"],
        "logits": [2.5],
        "probabilities": [0.75],
        "areas": [0.5],
        "boxes": [[0, 0, 8, 4]],
        "map_scales": [2.0],
        "map_offsets": [1.0],
        "warnings": ["dark"],
    }


def test_values_of_regression_and_no_maps(tmp_path):
    made = table(tmp_path, map_type=MapType.NONE)
    made.add("a.png", result(value=1.5))
    made.finish()
    (row,) = rows(tmp_path)
    assert (row["values"], row["maps"], row["map_height"]) == ([1.5], None, None)


def test_an_error_is_a_row(tmp_path):
    made = table(tmp_path)
    made.add("gone.png", FileNotFoundError(2, "No such file or directory", "gone.png"))
    made.add("bad.png", InvalidArgumentError.of("image", "no image", reason="IMAGE_UNDECODABLE"))
    made.finish()
    assert [(row["path"], row["reason"]) for row in rows(tmp_path)] == [
        ("gone.png", "IMAGE_UNREADABLE"),
        ("bad.png", "IMAGE_UNDECODABLE"),
    ]
    assert made.failed == made.done == 2


def test_what_was_written_outlives_an_interruption(tmp_path):
    first = table(tmp_path, model="m")
    for number in range(_PART_ROWS + 1):
        first.add(f"{number}.png", result(number) if number else OSError("gone"))
    # The last one is in no part yet.
    first.close()
    second = table(tmp_path, model="m")
    assert (second.done, second.failed, second.last_path) == (_PART_ROWS, 1, f"{_PART_ROWS - 1}.png")
    second.add("last.png", result(5))
    second.finish()
    found = rows(tmp_path)
    assert [row["path"] for row in found] == [*(f"{number}.png" for number in range(_PART_ROWS)), "last.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_a_batch_with_other_options_is_not_gone_on_with(tmp_path):
    first = table(tmp_path, model="m")
    first.add("a.png", result())
    first.flush()
    first.close()
    with pytest.raises(InvalidArgumentError, match=r"of a batch with other options, .*\"m\".*--overwrite"):
        table(tmp_path, model="n")
    assert table(tmp_path, model="n", overwrite=True).done == 0


def test_a_file_that_is_there_is_not_replaced_unasked(tmp_path):
    made = table(tmp_path)
    assert made.last_path is None
    made.add("a.png", result())
    made.finish()
    with pytest.raises(InvalidArgumentError, match="there already"):
        table(tmp_path)
    again = table(tmp_path, overwrite=True)
    # Until the new one is whole, the old one stays.
    assert len(rows(tmp_path)) == 1
    again.finish()
    assert rows(tmp_path) == []


def test_two_batches_do_not_write_one_table(tmp_path):
    first = table(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(InvalidArgumentError, match="another batch is writing"):
            table(tmp_path, overwrite=overwrite)
    first.close()
    first.close()
    table(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.parts"]


def test_a_damaged_part_is_said(tmp_path):
    first = table(tmp_path)
    first.add("a.png", result())
    first.flush()
    first.close()
    (tmp_path / "out.parquet.parts" / "part-000000.parquet").write_bytes(b"damaged")
    with pytest.raises(InvalidArgumentError, match=r"part-000000\.parquet is damaged; --overwrite begins anew"):
        table(tmp_path)
    table(tmp_path, overwrite=True).close()
