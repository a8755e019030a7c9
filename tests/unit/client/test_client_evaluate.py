"""Evaluation against a scripted server: what is asked, what fails, and what comes of it."""

import json
import signal
import subprocess
import sys
import threading
from unittest.mock import patch

import cv2
import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from typer.testing import CliRunner

import heatlens
from heatlens import Client, Retry, evaluate
from heatlens._cli import app
from heatlens._names import METHODS, METRICS
from heatlens.v1 import faithfulness_pb2, model_pb2

SERVED = ("grad-cam", "layer-cam", "random-cam", "score-cam")
ONE_PASS = ("grad-cam", "layer-cam", "random-cam")
# Deletion and all else of a method, less a tenth of the image's number.
QUALITY = {"grad-cam": 0.9, "layer-cam": 0.8, "random-cam": 0.5, "score-cam": 0.7}
NAMES = {number: name for name, number in METHODS.items()}


def image_of(number):
    return f"image number {number}".encode()


def number_of(request):
    return int(request.image.encoded.split()[-1])


@pytest.fixture
def served(peer):
    """The peer, serving a model whose maps are as faithful as QUALITY says."""

    def reply(request, context):
        peer.asked.append((number_of(request), NAMES[request.options.method]))
        values = {
            name.replace("-", "_"): QUALITY[NAMES[request.options.method]] - number_of(request) / 10
            for name, number in METRICS.items()
            if number in request.options.faithfulness.metrics
        }
        answer = peer.answer()
        answer.explanations[0].faithfulness.CopyFrom(faithfulness_pb2.Faithfulness(**values))
        return answer

    peer.asked = []
    peer.reply = reply
    peer.replies[0] = reply
    support = [
        model_pb2.MethodSupport(method=METHODS[name], engine="torch", in_steps=name == "score-cam") for name in SERVED
    ]
    model = model_pb2.Model(
        name="tiny",
        task="classification",
        state=model_pb2.Model.STATE_READY,
        methods=[METHODS[name] for name in SERVED],
        method_support=support,
    )
    peer.models = model_pb2.ListModelsResponse(models=[model], default_model="tiny")
    return peer


@pytest.fixture
def client(served):
    with Client(served.address, retry=Retry(max_attempts=1)) as client:
        yield client


def failing(served, *codes, on=2, reason="X", field=None, method=None):
    """Let one image fail, with one method or all."""

    def reply(request, context):
        if number_of(request) == on and method in {None, NAMES[request.options.method]}:
            details = [error_details_pb2.ErrorInfo(reason=reason, domain="heatlens")]
            if field is not None:
                violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="wrong")
                details.append(error_details_pb2.BadRequest(field_violations=[violation]))
            served.fail(codes[0], "no", *details)
            return served.replies.popleft()(request, context)
        return served.reply(request, context)

    served.replies[0] = reply


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
    options = served.requests[0].options
    assert served.requests[0].model == "tiny"
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


@pytest.fixture
def run(served, tmp_path):
    """Run `heatlens evaluate` on images 1 to 3 in files."""
    paths = [tmp_path / f"{number}.jpg" for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        path.write_bytes(image_of(number))

    def run(*options):
        command = ["evaluate", "--server", served.address, *options, *map(str, paths)]
        return CliRunner().invoke(app, command)

    return run


def test_command_prints_a_table_and_writes_files(run, tmp_path):
    done = run("--methods", "grad-cam, score-cam", "--metrics", "deletion,insertion", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["grad-cam", "score-cam", "random-cam"]
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["images"] == [str(tmp_path / f"{number}.jpg") for number in (1, 2, 3)]
    assert report["methods"][0]["metrics"]["deletion"]["mean"] == pytest.approx(0.7)
    assert cv2.imread(str(tmp_path / "out" / "evaluation.png")) is not None


def test_command_reports_failed_images(run, served, tmp_path):
    failing(served, grpc.StatusCode.INVALID_ARGUMENT, reason="IMAGE_UNDECODABLE", field="image.encoded")
    done = run("--json", "--metrics", "sparseness", "--methods", "all")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert len(report["images"]) == 2
    assert len(report["methods"]) == len(SERVED)
    assert report["failures"][0]["image"] == str(tmp_path / "2.jpg")
    assert f"{tmp_path / '2.jpg'}: no [IMAGE_UNDECODABLE" in done.stderr


def test_command_without_matplotlib(run, served, tmp_path):
    with patch("heatlens._cli.evaluate.find_spec", return_value=None):
        done = run("-o", str(tmp_path / "out"))
        assert done.exit_code == 1
        assert "pip install 'heatlens[plot]'" in done.stderr
        assert served.asked == []
        assert run("--metrics", "deletion").exit_code == 0


def test_command_tells_wrong_names(run):
    done = run("--methods", "grad-kam")
    assert done.exit_code == 1
    assert "methods: expected some of grad-cam" in done.stderr


# A process that was started in the background by some shells ignores SIGINT, and so do its children.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from heatlens._cli import app
app()
"""


def test_interrupt_does_not_wait_for_open_calls(served, tmp_path):
    arrived, release = threading.Event(), threading.Event()
    served.replies[0] = lambda request, context: arrived.set() or (release.wait(60) and served.answer())
    path = tmp_path / "1.jpg"
    path.write_bytes(image_of(1))
    command = [sys.executable, "-c", PROGRAM, "evaluate", "--server", served.address, str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert arrived.wait(20)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=20)
        assert process.returncode == 130, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
    finally:
        release.set()
        process.kill()
        process.communicate()
