"""Through a server: one logit for two classes, values, softmax at the end, and scores inside of an object."""

import json

import numpy as np
import pytest

from heatlens import Client, InvalidArgumentError
from server_process import start_server_process, wait_settled
from server_toml import server_toml
from video_files import one_line

MODEL = """
[[models]]
name = "{name}"
source = "python:output_networks:{factory}"
layers = ["net.body"]
engine = "{engine}"
preprocess = {{ resize_px = 64, crop_px = 64 }}
{further}
"""


def head(name, factory=None, *, engine="torch", further=""):
    return MODEL.format(name=name, factory=factory or name, engine=engine, further=further)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    server = start_server_process(
        tmp_path_factory.mktemp("heads"),
        server_toml(
            head("logits"),
            head("softmax"),
            head("entries"),
            head("one_logit"),
            head("exported", "one_sigmoid", engine="onnxruntime"),
            head("values", "logits", further='task = "regression"'),
        ),
    )
    try:
        wait_settled(server.address)
        yield server.address
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def client(address):
    with Client(address) as client:
        yield client


def same(one, other):
    for a, b in zip(one.explanations, other.explanations, strict=True):
        assert (a.class_id, a.value) == (b.class_id, b.value)
        assert a.probability == pytest.approx(b.probability, abs=1e-5)
        np.testing.assert_allclose(a.heatmap.values, b.heatmap.values, atol=1e-4)


@pytest.mark.parametrize("name", ["softmax", "entries"])
def test_other_forms_answer_as_logits_do(client, chelsea_path, name):
    options = {"top_k": 3, "method": "hi-res-cam"}
    same(client.explain(chelsea_path, model=name, **options), client.explain(chelsea_path, model="logits", **options))
    models = {model.name: model for model in client.models()}
    said = [line for line in models["softmax"].assumptions if 'outputs = "logits"' in line]
    assert (len(said), len(models["softmax"].assumptions) - len(models["logits"].assumptions)) == (1, 1)
    assert {each.name: each.activation for each in models.values()} == {
        "logits": "softmax",
        "softmax": "softmax",
        "entries": "softmax",
        "one_logit": "sigmoid",
        "exported": "sigmoid",
        "values": "none",
    }


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_both_sides_of_one_logit(client, chelsea_path, engine):
    model = "one_logit" if engine == "torch" else "exported"
    info = {each.name: each for each in client.models()}[model]
    assert (info.task, info.class_count, info.engine) == ("binary-classification", 2, engine)
    result = client.explain(chelsea_path, model=model, class_ids=[1, 0], method="hi-res-cam", top_predictions=2)
    positive, negative = result.explanations
    assert positive.logit == pytest.approx(-negative.logit)
    assert positive.probability == pytest.approx(1 / (1 + np.exp(-positive.logit)), abs=1e-5)
    assert positive.probability + negative.probability == pytest.approx(1, abs=1e-5)
    assert sum(score.probability for score in result.predictions) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(positive.heatmap.values, negative.heatmap.values)
    # What speaks for the one side is not what speaks for the other.
    by_probability = client.explain(
        chelsea_path, model=model, class_ids=0, method="hi-res-cam", target_score="probability"
    )
    assert not by_probability.explanations[0].heatmap.is_flat


def test_values(client, chelsea_path):
    options = {"model": "values", "class_ids": [4, 1], "method": "hi-res-cam"}
    rises = client.explain(chelsea_path, **options, top_predictions=3, faithfulness=["road-combined", "sparseness"])
    falls = client.explain(chelsea_path, **options, direction="decrease")
    logits = client.explain(chelsea_path, model="logits", class_ids=[4, 1], method="hi-res-cam")
    for one, other, logit in zip(rises.explanations, falls.explanations, logits.explanations, strict=True):
        assert one.value == other.value == pytest.approx(logit.logit, rel=1e-5)
        assert np.isnan([one.logit, one.probability]).all()
        np.testing.assert_allclose(one.heatmap.values, logit.heatmap.values, atol=1e-4)
        assert not np.allclose(one.heatmap.values, other.heatmap.values)
        assert set(one.faithfulness.by_metric()) == {"road-combined", "sparseness"}
    assert [score.class_id for score in rises.predictions] == [0, 1, 2]
    assert rises.predictions[1].value == rises.explanations[1].value
    assert client.explain(chelsea_path, model="values").explanations[0].class_id == 0
    with pytest.raises(InvalidArgumentError, match="values have no order"):
        client.explain(chelsea_path, model="values", top_k=2)
    with pytest.raises(InvalidArgumentError, match="is for models of regression"):
        client.explain(chelsea_path, model="logits", direction="decrease")


def test_values_in_streams_and_on_the_command_line(client, address, run, chelsea_path, chelsea, tmp_path):
    with client.stream(model="values", class_ids=[4], smooth=0.5) as stream:
        answers = [answer.result.explanations[0] for answer in stream.map([chelsea] * 3)]
    assert len({answer.value for answer in answers}) == 1
    asked = ("--model", "values", "--class", 4, "--direction", "decrease", "--server", address)
    text = run("explain", chelsea_path, *asked, "-o", tmp_path).stdout
    assert f"{answers[0].value:.4g}" in text
    assert "%" not in text
    (told,) = json.loads(one_line(run("explain", chelsea_path, *asked, "--json").stdout))["explanations"]
    assert (told["logit"], told["probability"]) == (None, None)
    assert told["value"] == pytest.approx(answers[0].value)
    done = run("video", chelsea_path, *asked, "-o", tmp_path / "film.mp4", "--json", "-")
    (shown,) = [json.loads(line) for line in done.stdout.splitlines() if "explanations" in line]
    (one,) = shown["explanations"]
    assert (one["class_id"], one["probability"]) == (4, None)
    # Frames are sent as JPEG.
    assert one["value"] == pytest.approx(answers[0].value, rel=0.05)
