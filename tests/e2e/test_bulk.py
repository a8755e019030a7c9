"""Tables of images explained in process, and by actors of Ray Data."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from heatlens import Client
from heatlens_server.bulk import COLUMNS, Explainer
from heatlens_server.core.errors import ConfigError, InvalidArgument, ModelNotFound
from server_process import SUPPORT, start_server_process, wait_settled
from server_toml import model_toml, server_toml

COUNT = 8


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bulk") / "server.toml"
    path.write_text(server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=4)))
    return path


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    chance = np.random.default_rng(0)
    photos = [chance.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(COUNT)]
    return [cv2.imencode(".png", photo)[1].tobytes() for photo in photos]


@pytest.fixture
def explainer(config) -> Iterator[Explainer]:
    made = Explainer(config, top_k=2, method="layer-cam")
    yield made
    made.close()
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("explainer", "asyncio_"))]


def column(values: list) -> np.ndarray:
    made = np.empty(len(values), object)
    made[:] = values
    return made


def test_a_table_gets_the_answers_of_a_server(config, explainer, files, tmp_path):
    plain = start_server_process(tmp_path, config.read_text())
    try:
        wait_settled(plain.address)
        table = explainer({"n": np.arange(COUNT), "image": column(files)})
        assert set(table) == {"n", *COLUMNS}
        with Client(plain.address) as client:
            for row, file in enumerate(files):
                result = client.explain(file, top_k=2, method="layer-cam")
                assert (table["values"][row], table["boxes"][row], table["areas"][row]) == (None, None, [0.0, 0.0])
                assert table["class_ids"][row] == [one.class_id for one in result.explanations]
                assert table["probabilities"][row] == pytest.approx(
                    [one.probability for one in result.explanations], abs=1e-5
                )
                for stored, one in zip(table["maps"][row], result.explanations, strict=True):
                    shape = table["map_height"][row], table["map_width"][row]
                    values = np.frombuffer(stored, "<f2").reshape(shape)
                    assert np.abs(values - one.heatmap.values).max() < 1e-3
    finally:
        plain.process.kill()
        plain.process.wait()


def test_paths_and_pixels_give_what_bytes_give(explainer, files, tmp_path):
    paths = [str(tmp_path / f"{row}.png") for row in range(COUNT)]
    for path, file in zip(paths, files, strict=True):
        Path(path).write_bytes(file)
    pixels = np.stack([cv2.imread(path)[..., ::-1] for path in paths])
    tables = [explainer({"image": images}) for images in (column(files), column(paths), pixels)]
    assert list(tables[1]["image"]) == paths
    assert all(list(table["maps"]) == list(tables[0]["maps"]) for table in tables)


def test_one_bad_image_is_a_row_with_its_error(explainer, files):
    table = explainer({"image": column([files[0], b"no image", "/none.png"])})
    assert list(table["reason"]) == [None, "IMAGE_UNDECODABLE", "IMAGE_UNREADABLE"]
    assert table["class_ids"][0]
    assert list(table["class_ids"][1:]) == [None, None]


def test_what_no_image_could_be_explained_with_is_raised(config, files):
    with pytest.raises(ConfigError, match="map_type: expected one of float16"):
        Explainer(config, map_type="jpeg")
    with pytest.raises(ConfigError, match="method: there is no 'none'"):
        Explainer(config, method="none")
    with pytest.raises(ModelNotFound):
        Explainer(config, model="none")
    made = Explainer(config, layers=["none"])
    with pytest.raises(InvalidArgument, match="layers"):
        made({"image": column(files)})
    with pytest.raises(KeyError):
        made({"picture": column(files)})
    made.close()


def test_its_columns_are_those_of_the_tables_that_heatlens_batch_writes():
    from heatlens._batch.table import SCHEMA  # noqa: PLC0415 - an extra

    assert set(COLUMNS) == set(SCHEMA.names) - {"path"}


PROGRAM = """
import sys
import ray
from heatlens_server.bulk import Explainer
ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
photos = ray.data.read_parquet(sys.argv[2])
table = photos.map_batches(
    Explainer, fn_constructor_kwargs={"config": sys.argv[1]}, concurrency=1, batch_size=4, num_cpus=0.5
)
table.write_parquet(sys.argv[3])
"""


@pytest.mark.timeout(240)
def test_actors_of_ray_data_write_the_same_table(config, explainer, files, tmp_path):
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    pq.write_table(pa.table({"n": list(range(COUNT)), "image": files}), tmp_path / "in.parquet")
    arguments = [config, tmp_path / "in.parquet", tmp_path / "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = sorted(pq.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["n"])
    expected = explainer({"image": column(files)})
    assert [row["n"] for row in rows] == list(range(COUNT))
    for row, class_ids in zip(rows, expected["class_ids"], strict=True):
        assert row["class_ids"][0] == class_ids[0]
        assert row["error"] is None
