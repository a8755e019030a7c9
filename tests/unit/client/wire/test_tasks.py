"""Answers of tasks other than classification, measures, and what runs each method."""

import json
from dataclasses import asdict, fields

import numpy as np
import pytest

from heatlens import Faithfulness, InternalError, PixelBox
from heatlens._wire.answers import models_of, result_of
from heatlens._wire.names import METRICS
from heatlens.v1 import explain_pb2, faithfulness_pb2, method_pb2, model_pb2


def tensor(data, data_type=explain_pb2.DATA_TYPE_FLOAT32, shape=None):
    return explain_pb2.Tensor(
        data_type=data_type, shape=data.shape if shape is None else shape, data=np.ascontiguousarray(data).tobytes()
    )


def test_results_of_tasks():
    plain = explain_pb2.ExplainResponse(explanations=[explain_pb2.Explanation(map=tensor(np.ones((1, 1), "<f4")))])
    (explanation,) = result_of(plain, placed=False).explanations
    assert (explanation.area, explanation.box, explanation.faithfulness) == (0, None, None)
    assert explanation.predicted_mask is None
    assert result_of(plain, placed=False).predicted_mask is None
    assert result_of(plain, placed=False).embedding is None

    told = explain_pb2.ExplainResponse(
        explanations=[
            explain_pb2.Explanation(
                map=tensor(np.ones((1, 1), "<f4")),
                area=0.25,
                box=explain_pb2.PixelBox(left=1, top=2, right=3, bottom=4),
                faithfulness=faithfulness_pb2.Faithfulness(deletion=0.0, road_combined=0.5),
                predicted_mask=tensor(np.array([[0, 1, 255]], np.uint8), explain_pb2.DATA_TYPE_UINT8),
            )
        ],
        predicted_mask=tensor(np.array([[1, 255]], np.uint8), explain_pb2.DATA_TYPE_UINT8),
        embedding=tensor(np.array([1, 2, 3], "<f4")),
    )
    result = result_of(told, placed=False)
    (explanation,) = result.explanations
    assert explanation.area == 0.25
    assert explanation.box == PixelBox(1, 2, 3, 4)
    assert explanation.faithfulness == Faithfulness(deletion=0.0, road_combined=0.5)
    assert explanation.faithfulness.by_metric() == {"deletion": 0.0, "road-combined": 0.5}
    assert explanation.predicted_mask.tolist() == [[0, 1, 255]]
    assert not explanation.predicted_mask.flags.writeable
    assert result.predicted_mask.tolist() == [[1, 255]]
    assert result.predicted_mask.dtype == np.uint8
    assert result.embedding.tolist() == [1, 2, 3]
    assert not result.predicted_mask.flags.writeable
    assert not result.embedding.flags.writeable


def test_values_have_no_probability():
    map_ = tensor(np.ones((1, 1), "<f4"))
    response = explain_pb2.ExplainResponse(
        explanations=[explain_pb2.Explanation(class_id=1, map=map_, value=0.0)],
        predictions=[explain_pb2.ClassScore(class_id=0, value=-2.5), explain_pb2.ClassScore(logit=1, probability=0.5)],
    )
    result = result_of(response, placed=False)
    (explanation,) = result.explanations
    value, classes = result.predictions
    assert (explanation.value, value.value, classes.value) == (0.0, -2.5, None)
    assert np.isnan([explanation.logit, explanation.probability, value.logit, value.probability]).all()
    assert (classes.logit, classes.probability) == (1, 0.5)


def test_every_metric_has_a_field():
    assert [field.name for field in fields(Faithfulness)] == [name.replace("-", "_") for name in METRICS]
    measured = faithfulness_pb2.Faithfulness(**{field.name: 0.5 for field in fields(Faithfulness)})
    response = explain_pb2.ExplainResponse(
        explanations=[explain_pb2.Explanation(map=tensor(np.ones((1, 1), "<f4")), faithfulness=measured)]
    )
    read = result_of(response, placed=False).explanations[0].faithfulness
    assert read.by_metric() == dict.fromkeys(METRICS, 0.5)


@pytest.mark.parametrize(
    "broken",
    [
        {"predicted_mask": tensor(np.zeros((2, 2), "<f4"))},
        {"predicted_mask": tensor(np.zeros(2, np.uint8), explain_pb2.DATA_TYPE_UINT8)},
        {"embedding": tensor(np.zeros((2, 2), "<f4"))},
        {"embedding": tensor(np.zeros(2, "<f4"), shape=[3])},
    ],
)
def test_broken_masks_and_embeddings_are_the_servers_fault(broken):
    with pytest.raises(InternalError) as caught:
        result_of(explain_pb2.ExplainResponse(**broken), placed=False)
    assert caught.value.reason == "INVALID_RESPONSE"


def test_what_runs_each_method():
    support = [
        model_pb2.MethodSupport(method=method_pb2.METHOD_GRAD_CAM, engine="onnxruntime"),
        model_pb2.MethodSupport(method=method_pb2.METHOD_SCORE_CAM, engine="torch", in_steps=True),
        model_pb2.MethodSupport(method=999, engine="torch"),
    ]
    (model,) = models_of(model_pb2.ListModelsResponse(models=[model_pb2.Model(name="m", method_support=support)]))
    assert model.method_engines == {"grad-cam": "onnxruntime", "score-cam": "torch", "method-999": "torch"}
    assert model.methods_in_steps == ("score-cam",)
    hash(model)
    assert json.loads(json.dumps(asdict(model)))["method_engines"]["grad-cam"] == "onnxruntime"


@pytest.mark.parametrize(
    ("name", "task", "left_out"),
    [
        (None, "multi-label-classification", set()),
        (None, "segmentation", {"class-sensitivity"}),
        ("boxes", "detection", {"class-sensitivity"}),
        ("boxes", "regression", {"class-sensitivity", "deletion", "insertion", "average-drop", "increase"}),
        ("gone", "segmentation", set()),
    ],
)
async def test_all_metrics_are_those_of_the_model(connect, peer, name, task, left_out):
    models = [model_pb2.Model(name="other", task="classification"), model_pb2.Model(name="boxes", task=task)]
    peer.models = model_pb2.ListModelsResponse(models=models, default_model="boxes" if name is None else "other")
    await connect().explain(b"x", model=name, faithfulness="all")
    asked = set(peer.requests[0].options.faithfulness.metrics)
    assert set(METRICS.values()) - asked == {METRICS[metric] for metric in left_out}
    assert len(asked) == len(METRICS) - len(left_out)
