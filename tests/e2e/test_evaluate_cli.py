"""`heatlens evaluate` and `explain --faithfulness` on a real server: what is measured is what the model does."""

import json

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from heatlens import Client, evaluate
from heatlens._cli.commands import app
from heatlens._wire.names import METRICS

METHODS = ("grad-cam", "score-cam", "random-cam")


@pytest.fixture(scope="module")
def photos(tmp_path_factory, chelsea):
    """Two views of the cat, as files."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "whole.png", folder / "part.png"]
    for path, pixels in zip(paths, (chelsea, chelsea[50:, 100:400]), strict=True):
        path.write_bytes(cv2.imencode(".png", np.ascontiguousarray(pixels)[..., ::-1])[1].tobytes())
    return paths


@pytest.fixture
def run(server, monkeypatch):
    monkeypatch.delenv("HEATLENS_TOKEN", raising=False)
    return lambda command, *options: CliRunner().invoke(app, [command, "-s", server.address, *map(str, options)])


def test_evaluate(run, photos, tmp_path):
    done = run("evaluate", *photos, "--model", "tiny_mlp", "--methods", "grad-cam,score-cam", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [row["method"] for row in report["methods"]] == list(METHODS)
    for row in report["methods"]:
        assert list(row["metrics"]) == list(METRICS)
        for metric, measured in row["metrics"].items():
            low = -1 if metric.startswith(("road", "model", "class")) else 0
            assert len(measured["values"]) == 2
            assert all(low <= value <= 1 for value in measured["values"]), metric
    # It knows no class: its map is the same whatever is explained.
    assert report["methods"][-1]["metrics"]["class-sensitivity"]["mean"] == pytest.approx(1, abs=1e-6)
    assert report["methods"][0]["metrics"]["class-sensitivity"]["mean"] < 0.99
    assert cv2.imread(str(tmp_path / "out" / "evaluation.png")) is not None
    assert all(method in done.stdout for method in METHODS)


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        (["--principal-component"], {"eigen-cam", "fem", "full-grad"}),
        (["--layer", "stem"], {"cam"}),
        (["--target-score", "logit"], {"finer-cam"}),
        (["--aggregation", "mean"], {"refine-cam"}),
    ],
)
def test_methods_that_refuse_an_option_are_left_out(run, photos, options, left_out):
    done = run("evaluate", photos[0], "--metrics", "sparseness", "--json", *options)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert left_out <= report["left_out"].keys()
    assert all(f"left out {method}: " in done.stderr for method in report["left_out"])
    compared = [row["method"] for row in report["methods"]]
    assert {"grad-cam", "layer-cam"} < set(compared)
    assert compared[-1] == "random-cam"
    done = run("evaluate", photos[0], "--layer", "nope", "--metrics", "sparseness")
    assert done.exit_code == 1
    assert "unknown layer 'nope'" in done.stderr


def test_a_file_that_is_no_image_is_left_out(run, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    done = run(
        "evaluate", photos[0], tmp_path / "broken.jpg", "--methods", "grad-cam", "--metrics", "deletion", "--json"
    )
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["images"] == [str(photos[0])]
    assert "broken.jpg" in done.stderr
    assert "IMAGE_UNDECODABLE" in done.stderr


def test_one_image_alone_and_among_others_is_the_same(server, photos):
    """Measures do not depend on what else the server runs meanwhile."""
    metrics = ["deletion", "insertion", "road-combined", "sparseness"]
    with Client(server.address) as client:
        together = evaluate(client, photos, methods=["grad-cam", "layer-cam"], metrics=metrics)
        for index, photo in enumerate(photos):
            result = client.explain(photo, method="layer-cam", faithfulness=metrics)
            alone = result.explanations[0].faithfulness.by_metric()
            row = next(row for row in together.rows if row.method == "layer-cam")
            assert alone == pytest.approx({metric: row.values[metric][index] for metric in metrics}, abs=1e-4)


def test_deletion_and_insertion_of_one_image(run, photos):
    done = run("explain", photos[0], "--faithfulness", "deletion,insertion", "--json")
    assert done.exit_code == 0, done.output
    measured = json.loads(done.stdout)["explanations"][0]["faithfulness"]
    assert set(measured) == {"deletion", "insertion"}
    assert all(0 < value < 1 for value in measured.values())
