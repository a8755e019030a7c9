"""What happens on the channel: retries, pushback, deadlines, tokens, cancellation. Both clients, a scripted server."""

import asyncio
import io
import threading
import time

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from PIL import Image

import heatlens
from heatlens import Retry
from heatlens._wire.names import METHODS
from heatlens.v1 import method_pb2, model_pb2
from stream_adapters import SyncClientAdapter

FAST = Retry(initial_backoff_s=0.01, max_backoff_s=0.02)


def error_info(reason, **metadata):
    return error_details_pb2.ErrorInfo(reason=reason, domain="heatlens", metadata=metadata)


async def test_explain_returns_values_not_messages(connect, peer, pixels):
    result = await connect().explain(pixels, top_k=2, method="grad-cam", layers="layer4", top_predictions=3)
    assert (result.model, result.model_version) == ("tiny", "1")
    explanation = result.explanations[0]
    assert (explanation.class_id, explanation.label) == (3, "cat")
    assert (explanation.logit, explanation.probability) == (2.5, 0.75)
    np.testing.assert_array_equal(explanation.heatmap.values, np.float32([[0, 0.5], [0.25, 1]]))
    (request,) = peer.requests
    assert request.options.top_k == 2
    assert request.options.method == method_pb2.METHOD_GRAD_CAM
    assert list(request.options.layers) == ["layer4"]
    assert request.options.top_predictions == 3
    assert request.image.pixels.data == pixels.tobytes()


async def test_image_file_is_sent_as_it_is(connect, peer, tmp_path):
    path = tmp_path / "image.bin"
    path.write_bytes(b"whatever is in there")
    client = connect()
    await client.explain(path)
    await client.explain(str(path))
    assert [request.image.encoded for request in peer.requests] == [b"whatever is in there"] * 2


async def test_files_and_images_of_pillow_are_sent(connect, peer, pixels):
    client = connect()
    await client.explain(io.BytesIO(b"whatever"), class_ids="tabby")
    await client.explain(Image.fromarray(pixels), reference=io.BytesIO(b"other"))
    first, second = peer.requests
    assert first.image.encoded == b"whatever"
    assert list(first.options.class_ids.labels) == ["tabby"]
    assert second.image.pixels.data == pixels.tobytes()
    assert second.options.reference_image.encoded == b"other"


async def test_wrong_options_are_named_as_python_does(connect, pixels):
    client = connect()
    name = "Client" if isinstance(client, SyncClientAdapter) else "AsyncClient"
    with pytest.raises(TypeError, match=rf"^{name}\.explain\(\) got an unexpected keyword argument 'topk'$"):
        await client.explain(pixels, topk=3)
    with pytest.raises(TypeError, match=rf"^{name}\.stream\(\) got an unexpected keyword argument 'mask'$"):
        client.stream(mask=pixels)


async def test_missing_file_is_the_builtin_error(connect, peer, tmp_path):
    with pytest.raises(FileNotFoundError):
        await connect().explain(tmp_path / "missing.jpg")
    assert peer.requests == []


async def test_wrong_arguments_never_reach_the_server(connect, peer, pixels):
    client = connect()
    with pytest.raises(heatlens.InvalidArgumentError) as caught:
        await client.explain(pixels, top_k=1, class_ids=[1])
    assert caught.value.field_violations[0].field == "class_ids"
    with pytest.raises(heatlens.InvalidArgumentError, match="timeout"):
        await client.explain(pixels, timeout=0)
    assert peer.requests == []


@pytest.mark.parametrize(
    ("code", "times", "size_bytes"),
    [
        ("UNAVAILABLE", 3, 10),
        ("RESOURCE_EXHAUSTED", 1, 10),
        ("CANCELLED", 1, 10),
        # gRPC's own retry buffer is 256 KiB.
        ("UNAVAILABLE", 1, 3_000_000),
    ],
)
async def test_what_may_pass_is_retried(connect, peer, code, times, size_bytes):
    peer.fail(grpc.StatusCode[code], times=times)
    await connect(retry=FAST).explain(b"x" * size_bytes)
    assert len(peer.requests) == times + 1


@pytest.mark.parametrize(
    ("code", "retry"),
    [
        ("UNAVAILABLE", Retry(max_attempts=1)),
        *((code, FAST) for code in ("INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL", "FAILED_PRECONDITION")),
    ],
)
async def test_what_is_not_retried(connect, peer, pixels, code, retry):
    peer.fail(grpc.StatusCode[code])
    with pytest.raises(heatlens.HeatlensError) as caught:
        await connect(retry=retry).explain(pixels)
    assert caught.value.code == code
    assert len(peer.requests) == 1


async def test_pushback_sets_the_wait(connect, peer, pixels):
    peer.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, trailing=[("grpc-retry-pushback-ms", "30")])
    started = time.monotonic()
    await connect(retry=Retry(initial_backoff_s=20, max_backoff_s=20)).explain(pixels)
    assert 0.03 <= time.monotonic() - started < 10
    assert len(peer.requests) == 2


async def test_negative_pushback_stops_retries(connect, peer, pixels):
    peer.fail(grpc.StatusCode.UNAVAILABLE, trailing=[("grpc-retry-pushback-ms", "-1")])
    with pytest.raises(heatlens.UnavailableError) as caught:
        await connect(retry=FAST).explain(pixels)
    assert caught.value.retry_after_s is None
    assert len(peer.requests) == 1


async def test_error_carries_the_details(connect, peer, pixels):
    peer.fail(
        grpc.StatusCode.INVALID_ARGUMENT,
        "options.top_k: 9 is more than 5",
        error_info("INVALID_OPTION", limit="5"),
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field="options.top_k", description="9 is more than 5")
            ]
        ),
        trailing=[("x-request-id", "abc")],
    )
    with pytest.raises(heatlens.InvalidArgumentError) as caught:
        await connect().explain(pixels)
    error = caught.value
    # In the words of the SDK.
    assert str(error) == error.message == "top_k: 9 is more than 5"
    assert error.code is heatlens.StatusCode.INVALID_ARGUMENT
    assert error.reason == "INVALID_OPTION"
    assert error.metadata == {"limit": "5"}
    assert error.request_id == "abc"
    assert error.field_violations == (heatlens.FieldViolation("top_k", "9 is more than 5"),)
    assert error.__cause__ is None
    assert error.__suppress_context__


async def test_retry_info_is_when_to_come_back(connect, peer, pixels):
    peer.fail(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "full",
        error_info("QUEUE_FULL"),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000)),
    )
    with pytest.raises(heatlens.ResourceExhaustedError) as caught:
        await connect(retry=Retry(max_attempts=1)).explain(pixels)
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_after_s == 1.5


async def test_internal_error_names_the_request(connect, peer, pixels):
    peer.fail(grpc.StatusCode.INTERNAL, "internal error", error_details_pb2.RequestInfo(request_id="r-1"))
    with pytest.raises(heatlens.InternalError) as caught:
        await connect().explain(pixels)
    assert caught.value.request_id == "r-1"
    assert caught.value.reason == "INTERNAL"


async def test_request_id_is_sent_and_kept(connect, peer, pixels):
    peer.fail(grpc.StatusCode.UNKNOWN)
    with pytest.raises(heatlens.InternalError) as caught:
        await connect().explain(pixels)
    assert caught.value.request_id == peer.metadata[0]["x-request-id"]
    assert caught.value.code is heatlens.StatusCode.UNKNOWN


async def test_damaged_details_are_no_obstacle(connect, peer, pixels):
    def reply(request, context):
        context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff\xff")])
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    peer.replies.appendleft(reply)
    with pytest.raises(heatlens.NotFoundError, match="gone"):
        await connect().explain(pixels)


async def test_deadline(connect, peer, pixels):
    release = threading.Event()
    peer.replies.appendleft(lambda request, context: release.wait(10) and peer.answer())
    try:
        with pytest.raises(heatlens.DeadlineExceededError) as caught:
            await connect(timeout=None).explain(pixels, timeout=0.05)
    finally:
        release.set()
    assert caught.value.request_id


async def test_timeout_none_means_no_deadline(connect, peer, pixels):
    remaining = []
    peer.replies.appendleft(lambda request, context: remaining.append(context.time_remaining()) or peer.answer())
    peer.replies.appendleft(lambda request, context: remaining.append(context.time_remaining()) or peer.answer())
    client = connect(timeout=5)
    await client.explain(pixels)
    await client.explain(pixels, timeout=None)
    assert 0 < remaining[0] < 6
    # Synchronous servers say "no deadline" as an astronomical number.
    assert remaining[1] is None or remaining[1] > 1e9


async def test_token_is_sent_to_loopback_in_plaintext(connect, peer, pixels):
    await connect(token="s3cret").explain(pixels)
    assert peer.metadata[0]["authorization"] == "Bearer s3cret"


async def test_no_token_no_header(connect, peer, pixels):
    await connect().explain(pixels)
    assert "authorization" not in peer.metadata[0]
    assert peer.metadata[0]["user-agent"].startswith(f"heatlens-python/{heatlens.__version__} ")


async def test_too_large_is_refused_at_once(connect, peer):
    with pytest.raises(heatlens.InvalidArgumentError, match="max_message_bytes is 1000") as caught:
        await connect(max_message_bytes=1000).explain(b"x" * 1001)
    assert caught.value.reason == "MESSAGE_TOO_LARGE"
    assert peer.requests == []


async def test_too_large_for_the_server_only_is_typed(connect, peer):
    # The peer takes 32 MiB.
    with pytest.raises(heatlens.ResourceExhaustedError):
        await connect(max_message_bytes=64 << 20, retry=Retry(max_attempts=1)).explain(b"x" * (33 << 20))


async def test_nobody_there(connect, pixels):
    with pytest.raises(heatlens.UnavailableError):
        await connect("127.0.0.1:1", retry=Retry(max_attempts=1)).explain(pixels)


async def test_wait_for_ready_waits_until_the_timeout(connect, pixels):
    with pytest.raises(heatlens.DeadlineExceededError):
        await connect("127.0.0.1:1", wait_for_ready=True).explain(pixels, timeout=0.1)


async def test_closed_client_says_so(connect, pixels):
    client = connect()
    await client.explain(pixels)
    await client.close()
    await client.close()
    with pytest.raises(heatlens.FailedPreconditionError) as caught:
        await client.explain(pixels)
    assert caught.value.reason == "CLIENT_CLOSED"


async def test_close_ends_open_calls_with_our_error(connect, peer, pixels):
    arrived, release = threading.Event(), threading.Event()
    peer.replies.appendleft(lambda request, context: arrived.set() or (release.wait(10) and peer.answer()))
    client = connect()
    call = asyncio.create_task(client.explain(pixels))
    assert await asyncio.to_thread(arrived.wait, 10)
    await client.close()
    with pytest.raises(heatlens.CallCancelledError):
        await call
    release.set()


async def test_health(connect, peer):
    client = connect()
    assert await client.health() is heatlens.Health.SERVING
    peer.health.set("heatlens.v1.ExplainService/tiny", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert await client.health("tiny") is heatlens.Health.NOT_SERVING
    with pytest.raises(heatlens.NotFoundError, match="no model named 'other'") as caught:
        await client.health("other")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert caught.value.request_id


async def test_models(connect, peer):
    peer.models = model_pb2.ListModelsResponse(
        models=[
            model_pb2.Model(
                name="tiny",
                state=model_pb2.Model.STATE_READY,
                class_count=10,
                methods=[method_pb2.METHOD_GRAD_CAM, 999],
                default_method=method_pb2.METHOD_GRAD_CAM,
                layers=["a", "b"],
                max_queue_delay=Duration(nanos=2_000_000),
            ),
            model_pb2.Model(name="broken", state=model_pb2.Model.STATE_FAILED, state_message="no weights"),
        ],
        default_model="tiny",
    )
    tiny, broken = await connect().models()
    assert tiny.is_default
    assert not broken.is_default
    assert tiny.state is heatlens.ModelState.READY
    assert tiny.methods == ("grad-cam", "method-999")
    assert tiny.default_method == "grad-cam"
    assert tiny.layers == ("a", "b")
    assert tiny.max_queue_delay_ms == 2.0
    assert (broken.state, broken.state_message) == (heatlens.ModelState.FAILED, "no weights")
    assert broken.default_method == ""


async def test_server_info(connect, peer):
    peer.info = model_pb2.GetServerInfoResponse(
        version="1.2.3", max_targets=5, max_message_bytes=1 << 24, max_streams=3
    )
    info = await connect().server_info()
    assert (info.version, info.max_targets, info.max_message_bytes) == ("1.2.3", 5, 1 << 24)
    assert info.max_streams == 3


async def test_async_client_belongs_to_one_event_loop(peer, pixels):
    async with heatlens.AsyncClient(peer.address) as client:
        await client.explain(pixels)

        def elsewhere():
            with pytest.raises(heatlens.FailedPreconditionError) as caught:
                asyncio.run(client.explain(pixels))
            return caught.value.reason

        assert await asyncio.to_thread(elsewhere) == "WRONG_EVENT_LOOP"


async def test_cancelling_a_task_is_not_our_error(peer, pixels):
    arrived, release = threading.Event(), threading.Event()
    peer.replies.appendleft(lambda request, context: arrived.set() or (release.wait(10) and peer.answer()))
    async with heatlens.AsyncClient(peer.address) as client:
        call = asyncio.create_task(client.explain(pixels))
        assert await asyncio.to_thread(arrived.wait, 10)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        release.set()


def test_sync_context_manager_closes(peer, pixels):
    with heatlens.Client(peer.address) as client:
        assert client.explain(pixels).timing.batch_size == 0
    with pytest.raises(heatlens.FailedPreconditionError):
        client.explain(pixels)


def test_every_method_name_follows_the_enum():
    assert METHODS["grad-cam-plus-plus"] == method_pb2.METHOD_GRAD_CAM_PLUS_PLUS
    assert len(METHODS) == len(method_pb2.Method.keys()) - 1
