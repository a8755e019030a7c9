"""How an evaluation is shown: ranks, table, chart."""

from dataclasses import replace

import cv2
import pytest

from heatlens import Evaluation, MethodScores
from heatlens._evaluation.metrics import BETTER
from heatlens._wire.names import METRICS


@pytest.fixture
def evaluation():
    def row(method, *means):
        metrics = ("deletion", "insertion", "model-randomisation")
        return MethodScores(
            method=method,
            means=dict(zip(metrics, means, strict=True)),
            standard_errors=dict.fromkeys(metrics, 0.01),
            values={metric: (mean, mean) for metric, mean in zip(metrics, means, strict=True)},
        )

    return Evaluation(
        model="tiny",
        model_version="1",
        metrics=("deletion", "insertion", "model-randomisation"),
        images=("a.jpg", "b.jpg"),
        rows=(row("grad-cam", 0.1, 0.6, -0.3), row("layer-cam", 0.2, 0.7, 0.1), row("random-cam", 0.15, 0.5, 0.2)),
        failures=(),
    )


def test_ranks(evaluation):
    def ranked(metric):
        return [row.method for row in evaluation.ranked(metric)]

    assert ranked("deletion") == ["grad-cam", "random-cam", "layer-cam"]
    assert ranked("insertion") == ["layer-cam", "grad-cam", "random-cam"]
    assert ranked("model-randomisation") == ["layer-cam", "random-cam", "grad-cam"]
    layer_cam = evaluation.rows[1]
    beats = {metric: evaluation.beats_floor(layer_cam, metric) for metric in evaluation.metrics}
    assert beats == {"deletion": False, "insertion": True, "model-randomisation": True}
    assert replace(evaluation, rows=evaluation.rows[:2]).beats_floor(layer_cam, "deletion") is None


def test_table(evaluation):
    lines = evaluation.table().splitlines()
    assert lines[0].split() == ["deletion", "insertion", "model-randomisation"]
    assert "lower is better" in lines[1]
    assert "near 0 is better" in lines[1]
    assert " ".join(lines[2].split()) == "grad-cam 0.100 ± 0.010 * 0.600 ± 0.010 -0.300 ± 0.010"
    assert " ".join(lines[3].split()) == "layer-cam 0.200 ± 0.010 0.700 ± 0.010 * 0.100 ± 0.010 *"
    narrow = evaluation.table(width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    for row in evaluation.rows:
        assert narrow.count(row.method) == 3


def test_ties_share_a_star_and_the_floor_has_none(evaluation):
    grad_cam, layer_cam, floor = evaluation.rows

    def starred(metric, *means):
        rows = [
            replace(row, means={metric: mean}, standard_errors={metric: 0.01})
            for row, mean in zip((grad_cam, layer_cam, floor), means, strict=True)
        ]
        lines = replace(evaluation, metrics=(metric,), rows=tuple(rows)).table().splitlines()
        return [line.split()[0] for line in lines if line.endswith("*")]

    assert starred("deletion", 0.1, 0.1 + 1e-9, 0.2) == ["grad-cam", "layer-cam"]
    assert starred("model-randomisation", -0.1, 0.1, 0.2) == ["grad-cam", "layer-cam"]
    assert starred("deletion", 0.3, 0.4, 0.2) == []
    assert starred("increase", 1.0, 1.0, 1.0) == []
    assert starred("sparseness", 0.9, 0.5, 0.2) == []
    alone = replace(evaluation, rows=(grad_cam, layer_cam))
    assert alone.table().count("*") == 3


def test_chart(evaluation, tmp_path):
    evaluation.chart(tmp_path / "chart.png")
    picture = cv2.imread(str(tmp_path / "chart.png"))
    assert picture.shape[1] > 2 * picture.shape[0]
    colors = {tuple(pixel) for pixel in picture.reshape(-1, 3)[:, ::-1].tolist()}
    # Better than the floor, no better, and the floor itself.
    assert {(0x3B, 0x6F, 0xB6), (0xB4, 0xC8, 0xE4), (0x8A, 0x8A, 0x8A)} <= colors
    with pytest.raises(FileNotFoundError):
        evaluation.chart(tmp_path / "missing" / "chart.png")


def test_every_metric_has_a_direction():
    assert list(BETTER) == list(METRICS)
