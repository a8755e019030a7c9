"""Tables of images explained in process, and by actors of Ray Data."""

import os
import re
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
from server_process import start_server_process, wait_settled
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


SETUP = """
import ray
ray.data.DataContext.get_current().read_op_min_num_blocks = 1
ray.init(num_cpus=6, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
"""


@pytest.mark.timeout(240)
def test_the_program_for_ray_data_explains_a_folder_and_a_parquet_file(files, tmp_path):
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415 - an extra

    page = (Path(__file__).parents[2] / "docs/batch.md").read_text()
    (program,) = re.findall(r"^```text\n(import ray\n.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "server.toml").write_text('[[models]]\nname = "a"\nsource = "embedded:efficientnet_lite0"\n')
    for name in ("photos", "dataset"):
        (tmp_path / name).mkdir()
    for row, file in enumerate(files):
        (tmp_path / f"photos/{row}.png").write_bytes(file)
    pq.write_table(pa.table({"n": list(range(COUNT)), "image": files}), tmp_path / "dataset/in.parquet")
    done = subprocess.run(
        [sys.executable, "-c", SETUP + program],
        cwd=tmp_path,
        env={**os.environ, "RAY_prestart_worker_first_driver": "0"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = Explainer(tmp_path / "server.toml", method="layer-cam")
    class_ids = list(expected({"image": column(files)})["class_ids"])
    expected.close()
    for folder, key in (("audit", "path"), ("audit-dataset", "n")):
        rows = sorted(pq.read_table(tmp_path / folder).to_pylist(), key=lambda row: row[key])
        assert [row["class_ids"] for row in rows] == class_ids
        assert {row["error"] for row in rows} == {None}
