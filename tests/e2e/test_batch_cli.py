"""`heatlens batch` against a real server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heatlens import Client

COMMAND = Path(sys.executable).parent / "heatlens"

COUNT = 24


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(COUNT):
        cv2.imwrite(str(folder / f"{number}.png"), chance.integers(0, 256, (64, 64, 3), np.uint8))
    (folder / "5.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def run_batch(run, server):
    return lambda *arguments, **options: run("batch", "--server", server.address, *arguments, **options)


def test_a_folder_becomes_a_table(run_batch, server, photos, tmp_path):
    out = tmp_path / "out.parquet"
    done = run_batch(photos, "-o", out, "--top-k", 2, "--method", "layer-cam")
    assert done.stdout == f"{out}: {COUNT} images, 1 failed\n"
    assert "5.png" in done.stderr
    rows = pq.read_table(out).to_pylist()
    assert [row["path"] for row in rows] == [str(photos / f"{number}.png") for number in range(COUNT)]
    assert [row["path"] for row in rows if row["error"]] == [str(photos / "5.png")]
    row = rows[7]
    with Client(server.address) as client:
        result = client.explain(row["path"], top_k=2, method="layer-cam")
    assert row["class_ids"] == [one.class_id for one in result.explanations]
    for stored, one in zip(row["maps"], result.explanations, strict=True):
        values = np.frombuffer(stored, "<f2").reshape(row["map_height"], row["map_width"])
        assert np.abs(values - one.heatmap.values).max() < 1e-3
    assert (row["source_width_px"], row["source_height_px"]) == (64, 64)


def test_paths_and_bytes_of_a_table_give_what_the_folder_gives(run_batch, photos, tmp_path):
    files = [photos / f"{number}.png" for number in range(COUNT)]
    pq.write_table(pa.table({"photo": [path.read_bytes() for path in files]}), tmp_path / "bytes.parquet")
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    run_batch(photos, "-o", tmp_path / "a.parquet", "--map-type", "uint8")
    run_batch(tmp_path / "list.txt", "-o", tmp_path / "b.parquet", "--map-type", "uint8")
    run_batch(tmp_path / "bytes.parquet", "-o", tmp_path / "c.parquet", "--column", "photo", "--map-type", "uint8")
    first, *others = (
        pq.read_table(tmp_path / name).drop_columns(["path", "error"])
        for name in ("a.parquet", "b.parquet", "c.parquet")
    )
    assert all(other.equals(first) for other in others)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_batch_goes_on_and_ends_as_if_nothing_had_been(run_batch, server, photos, tmp_path, number):
    run_batch(photos, "-o", tmp_path / "whole.parquet")
    listed = [*(photos / f"{index}.png" for index in range(COUNT))] * 60
    (tmp_path / "list.txt").write_text("\n".join(map(str, listed)))
    out = tmp_path / "out.parquet"
    command = [COMMAND, "batch", "--server", server.address, tmp_path / "list.txt", "-o", out, "--map-type", "none"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "80"}) as process:
        parts = tmp_path / "out.parquet.parts"
        deadline = time.monotonic() + 100
        while not list(parts.glob("part-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number != signal.SIGKILL:
        assert "interrupted after" in said
    assert not out.exists()
    kept = sum(pq.read_metadata(part).num_rows for part in parts.glob("part-*"))
    assert 1000 <= kept < len(listed)
    done = run_batch(tmp_path / "list.txt", "-o", out, "--map-type", "none")
    assert f"{kept} images are done already" in done.stderr
    rows = pq.read_table(out)
    assert rows.column("path").to_pylist() == [str(path) for path in listed]
    expected = pq.read_table(tmp_path / "whole.parquet").column("class_ids").to_pylist() * 60
    assert rows.column("class_ids").to_pylist() == expected


def test_inputs_that_changed_are_not_gone_on_with(run_batch, photos, tmp_path):
    out = tmp_path / "out.parquet"
    run_batch(photos, "-o", out)
    # As an interruption leaves it.
    (tmp_path / "out.parquet.parts").mkdir()
    out.rename(tmp_path / "out.parquet.parts" / "part-000000.parquet")
    for number in range(5):
        (photos / f"{number}.png").unlink()
    done = run_batch(photos, "-o", out, exit_code=1)
    assert "the inputs are not what they were" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "no-such"], "after 0 of 24 images: method"),
        (["--model", "no-such"], "after 0 of 24 images: "),
        (["--concurrency", "0"], "--concurrency"),
        (["--map-type", "jpeg"], "--map-type"),
    ],
)
def test_what_no_image_could_be_explained_with_ends_at_once(run_batch, photos, tmp_path, arguments, message):
    done = run_batch(photos, "-o", tmp_path / "out.parquet", *arguments, exit_code=2 if "-" in message else 1)
    assert message in done.stderr


def test_nobody_there_and_no_images(run, photos, tmp_path):
    out = tmp_path / "out.parquet"
    done = run("batch", "--server", "127.0.0.1:1", photos, "-o", out, "--timeout", 1, exit_code=1)
    assert "the same command, without --overwrite, goes on" in done.stderr
    (tmp_path / "empty").mkdir()
    assert "no images there" in run("batch", tmp_path / "empty", "-o", out, exit_code=1).stderr


def test_an_input_is_not_written_over_and_a_folder_is_no_file(run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = photos / "1.png"
    before = photo.read_bytes()
    assert "is an INPUT as well" in run("batch", photo, "-o", photo, "--overwrite", exit_code=2).stderr
    assert photo.read_bytes() == before
    for name in (".", "photos"):
        assert "expected the name of a file" in run("batch", photo, "-o", name, "--overwrite", exit_code=2).stderr


def test_a_batch_of_nothing_but_errors_fails(run_batch, photos, tmp_path):
    done = run_batch(photos / "5.png", "-o", tmp_path / "out.parquet", exit_code=1)
    assert "1 images, 1 failed" in done.stdout
    assert "No such file" in run_batch(tmp_path / "none.png", "-o", tmp_path / "out.parquet", exit_code=1).stderr
