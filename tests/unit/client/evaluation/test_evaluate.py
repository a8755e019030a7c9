"""Evaluation against a scripted server: what is asked, what fails, and what comes of it."""

import io
import json
import threading

import grpc
import numpy as np
import pytest

import heatlens
from evaluation_peer import NAMES, ONE_PASS, failing, image_of, measuring, number_of, refusing
from heatlens import Client, Retry, evaluate
from heatlens._wire.names import METHODS, METRICS
from heatlens.v1 import model_pb2


@pytest.fixture
def served(peer):
    return measuring(peer)


@pytest.fixture
def client(served):
    with Client(served.address, retry=Retry(max_attempts=1)) as client:
        yield client


def test_every_method_explains_every_image(served, client):
    progress = []
    evaluation = evaluate(
        client,
        [image_of(1), image_of(3)],
        metrics=["insertion", "deletion"],
        on_progress=lambda done, total: progress.append((done, total)),
    )
    assert sorted(served.asked) == [(number, method) for number in (1, 3) for method in ONE_PASS]
    assert progress == [(done, 6) for done in range(1, 7)]
    assert evaluation.images == ("image 1", "image 2")
    assert (evaluation.model, evaluation.model_version) == ("tiny", "1")
    assert evaluation.metrics == ("deletion", "insertion")
    assert [row.method for row in evaluation.rows] == list(ONE_PASS)
    row = evaluation.rows[0]
    assert row.values["deletion"] == pytest.approx((0.8, 0.6))
    assert row.means["deletion"] == pytest.approx(0.7)
    assert row.standard_errors["deletion"] == pytest.approx(np.std([0.8, 0.6], ddof=1) / np.sqrt(2))
    assert evaluation.floor is evaluation.rows[-1]
    assert evaluation.failures == ()
    assert "3 methods on 2 images, 0 failed" in repr(evaluation)


def test_files_are_read_once_for_all_methods(served, client):
    evaluation = evaluate(client, [io.BytesIO(image_of(1)), io.BytesIO(image_of(3))], metrics="deletion")
    assert sorted(served.asked) == [(number, method) for number in (1, 3) for method in ONE_PASS]
    assert evaluation.images == ("image 1", "image 2")


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ("all", ("grad-cam", "layer-cam", "score-cam", "random-cam")),
        ("score-cam", ("score-cam", "random-cam")),
        (["random-cam", "layer-cam"], ("layer-cam", "random-cam")),
    ],
)
def test_the_floor_is_always_there(served, client, asked, used):
    evaluation = evaluate(client, [image_of(1)], methods=asked, metrics="deletion")
    assert tuple(row.method for row in evaluation.rows) == used


def test_options_are_sent_and_all_metrics_asked_for(served, client):
    evaluate(
        client,
        [image_of(1)],
        methods="grad-cam",
        layers=["a", "b"],
        target_score="probability",
        aggregation="max",
        augment=True,
        reference=[1.0, 2.0],
        min_score=0.25,
        top_k=2,
    )
    (request,) = (request for request in served.requests if request.options.method == METHODS["grad-cam"])
    options = request.options
    assert request.model == "tiny"
    assert list(options.faithfulness.metrics) == list(METRICS.values())
    assert list(options.layers) == ["a", "b"]
    assert (options.target_score, options.aggregation, options.top_k) == (2, 2, 2)
    assert options.smoothing.augmentation
    assert list(options.reference_embedding.shape) == [2]
    assert options.min_score == 0.25


def test_only_classifiers_are_sensitive_to_classes(served, client):
    served.models.models[0].task = "segmentation"
    evaluation = evaluate(client, [image_of(1)], methods="grad-cam")
    assert set(METRICS) - set(evaluation.metrics) == {"class-sensitivity"}


def test_several_explanations_count_as_their_mean(served, client):
    def reply(request, context):
        answer = served.reply(request, context)
        answer.explanations.append(answer.explanations[0])
        answer.explanations[1].faithfulness.deletion += 0.2
        return answer

    served.replies[0] = reply
    evaluation = evaluate(client, [image_of(1)], methods="grad-cam", metrics="deletion")
    assert evaluation.rows[0].values["deletion"] == pytest.approx((0.9,))


def test_calls_are_made_side_by_side(served, client):
    together = threading.Barrier(4)

    def reply(request, context):
        together.wait(20)
        return served.reply(request, context)

    served.replies[0] = reply
    evaluate(client, [image_of(number) for number in range(4)], methods="random-cam", metrics="deletion")


def test_a_failed_image_is_left_out_for_all_methods(served, client):
    failing(served, grpc.StatusCode.INVALID_ARGUMENT, field="image.encoded", method="layer-cam")
    evaluation = evaluate(client, [image_of(number) for number in (1, 2, 3)], metrics="deletion")
    assert evaluation.images == ("image 1", "image 3")
    assert all(len(row.values["deletion"]) == 2 for row in evaluation.rows)
    (failure,) = evaluation.failures
    assert (failure.image, failure.method) == ("image 2", "layer-cam")
    assert isinstance(failure.error, heatlens.InvalidArgumentError)


def test_a_missing_file_fails_alone(served, client, tmp_path):
    (tmp_path / "there").write_bytes(image_of(1))
    evaluation = evaluate(client, [tmp_path / "there", tmp_path / "gone"], metrics="deletion")
    assert evaluation.images == (str(tmp_path / "there"),)
    assert isinstance(evaluation.failures[0].error, FileNotFoundError)


def test_nothing_found_fails_that_image(served, client):
    def reply(request, context):
        answer = served.reply(request, context)
        if number_of(request) == 2:
            del answer.explanations[:]
        return answer

    served.replies[0] = reply
    evaluation = evaluate(client, [image_of(1), image_of(2)], metrics="deletion")
    assert evaluation.failures[0].error.reason == "NOTHING_FOUND"


def test_every_image_failed(served, client, tmp_path):
    failing(served, grpc.StatusCode.RESOURCE_EXHAUSTED)
    evaluation = evaluate(client, [image_of(2)], metrics="deletion")
    assert evaluation.images == ()
    assert np.isnan(evaluation.rows[0].means["deletion"])
    assert "-" in evaluation.table()
    assert json.loads(json.dumps(evaluation.as_dict(), allow_nan=False))
    with pytest.raises(heatlens.FailedPreconditionError, match="every image failed"):
        evaluation.chart(tmp_path / "chart.png")


@pytest.mark.parametrize(
    ("code", "field"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, "options.layers"),
        (grpc.StatusCode.UNAVAILABLE, None),
        (grpc.StatusCode.UNAUTHENTICATED, None),
        (grpc.StatusCode.FAILED_PRECONDITION, None),
    ],
)
def test_what_no_image_is_to_blame_for_ends_it(served, client, code, field):
    failing(served, code, field=field, on=1)
    with pytest.raises(heatlens.HeatlensError):
        evaluate(client, [image_of(number) for number in range(1, 40)], metrics="deletion")
    assert len(served.asked) < 39


@pytest.mark.parametrize("asked", [None, "all"])
def test_methods_that_refuse_the_options_are_left_out(served, client, asked):
    refusing(served, "layer-cam")
    evaluation = evaluate(client, [image_of(number) for number in range(1, 40)], methods=asked, metrics="all")
    assert [row.method for row in evaluation.rows] == [
        method for method in ("grad-cam", "score-cam", "random-cam") if asked or method in ONE_PASS
    ]
    assert len(evaluation.images) == 39
    assert evaluation.failures == ()
    assert evaluation.left_out == {"layer-cam": "not with layer-cam"}
    assert evaluation.as_dict()["left_out"] == dict(evaluation.left_out)
    # Once it refused it is not asked again, but for what was under way.
    assert [method for _, method in served.asked].count("layer-cam") < 20


@pytest.mark.parametrize(
    ("asked", "refused", "named"),
    [
        (["grad-cam", "layer-cam"], ["layer-cam"], "layer-cam"),
        (None, ["grad-cam", "layer-cam"], "layer-cam"),
        ("random-cam", ["random-cam"], "random-cam"),
    ],
)
def test_a_refusal_of_a_named_method_or_of_all_is_an_error(served, client, asked, refused, named):
    refusing(served, *refused)
    with pytest.raises(heatlens.InvalidArgumentError, match=f"^{named}: not with {named}$") as refusal:
        evaluate(client, [image_of(1)], methods=asked, metrics="deletion")
    assert refusal.value.reason == "INVALID_OPTION"
    assert refusal.value.field_violations[0].field == "layers[0]"


def test_the_floor_takes_what_it_can(served, client):
    options = {"layers": "a", "target_score": "contrast", "principal_component": True}
    evaluate(client, [image_of(1)], methods="grad-cam", **options)
    sent = {NAMES[request.options.method]: request.options for request in served.requests}
    assert (sent["grad-cam"].target_score, sent["grad-cam"].smoothing.principal_component) == (4, True)
    assert (sent["random-cam"].target_score, sent["random-cam"].smoothing.principal_component) == (0, False)
    assert list(sent["random-cam"].layers) == ["a"]
    refusing(served, "random-cam")
    evaluation = evaluate(client, [image_of(1)], methods="grad-cam", layers="a", metrics="deletion")
    assert (evaluation.floor, list(evaluation.left_out)) == (None, ["random-cam"])


def test_a_server_too_old_to_measure(served, client):
    served.replies[0] = served.answer()
    with pytest.raises(heatlens.UnimplementedError, match="did not measure deletion"):
        evaluate(client, [image_of(1)])


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("images", [], "images: expected at least one"),
        ("images", "cat.jpg", "images: expected a list of images, got str"),
        ("images", b"x", "images: expected a list"),
        ("methods", "eigen-cam", "methods: expected some of grad-cam, .*; got 'eigen-cam'"),
        ("methods", [], r"methods: expected some of .*; got \[\]"),
        ("metrics", ["roar"], "metrics: expected some of deletion, .*; got 'roar'"),
        ("max_in_flight", 0, "max_in_flight: expected an integer"),
        ("aggregation", "sum", "aggregation: expected one of"),
    ],
)
def test_wrong_arguments(served, client, argument, value, message):
    arguments = {"images": [image_of(1)], argument: value}
    with pytest.raises(heatlens.InvalidArgumentError, match=message):
        evaluate(client, arguments.pop("images"), **arguments)
    assert served.asked == []


def test_models_that_cannot_be_evaluated(served, client):
    with pytest.raises(heatlens.NotFoundError, match="no model 'huge'; it has tiny"):
        evaluate(client, [image_of(1)], model="huge")
    served.models.models[0].state = model_pb2.Model.STATE_LOADING
    with pytest.raises(heatlens.UnavailableError, match="loading"):
        evaluate(client, [image_of(1)])
    served.models.models[0].state = model_pb2.Model.STATE_FAILED
    served.models.models[0].state_message = "no weights"
    with pytest.raises(heatlens.FailedPreconditionError, match="no weights"):
        evaluate(client, [image_of(1)])
