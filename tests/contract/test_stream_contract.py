"""The same streams through the sync client, the async client and raw stubs: the contract is the wire's."""

import asyncio

import cv2
import numpy as np
import pytest

from callers import Refused
from heatlens import Client, UnavailableError
from messages import distinct
from server_process import wait_settled
from server_toml import server_toml


def jpeg(pixels):
    return cv2.imencode(".jpg", pixels[:, :, ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def pictures():
    """24 pictures that all look different."""
    return distinct(24)


@pytest.mark.parametrize("window", [1, 4, 64])
async def test_every_answer_belongs_to_its_frame(caller, pictures, window):
    granted, answers = await caller.stream(pictures, max_in_flight=window, top_k=2, top_predictions=3, map_size="input")
    assert granted == window
    assert [item.frame_id for item in answers] == list(range(len(pictures)))
    for picture, item in zip(pictures, answers, strict=True):
        alone = await caller.explain(picture, top_k=2, top_predictions=3, map_size="input")
        assert item.answer.class_ids == alone.class_ids
        assert item.answer.predictions == alone.predictions
        assert (item.answer.model, item.answer.model_version) == (alone.model, alone.model_version)
        assert item.answer.region == alone.region
        np.testing.assert_allclose(item.answer.logits, alone.logits, atol=1e-3)
        for values, expected in zip(item.answer.maps, alone.maps, strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-3)


async def test_a_frame_fails_alone_in_its_turn_as_a_call_would(caller, pictures):
    frames = [pictures[0], b"garbage", jpeg(pictures[1]), b"\xff\xd8\xff\xe0", pictures[2]]
    _, answers = await caller.stream(frames)
    assert [item.frame_id for item in answers] == list(range(5))
    assert [item.refused is None for item in answers] == [True, False, True, False, True]
    with pytest.raises(Refused) as alone:
        await caller.explain(b"garbage")
    for item in (answers[1], answers[3]):
        assert (item.refused.code, item.refused.reason) == ("INVALID_ARGUMENT", "IMAGE_UNDECODABLE")
        assert (item.refused.code, item.refused.reason) == (alone.value.code, alone.value.reason)
        assert item.refused.fields == [caller.field_name("frame.image.encoded")]


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"top_k": 10**6}, "config.options.top_k"),
        ({"class_ids": [1, 1]}, "config.options.class_ids.values[1]"),
        ({"layers": ["nope"]}, "config.options.layers[0]"),
        ({"top_predictions": 10**6}, "config.options.top_predictions"),
        ({"model": "tiny_mlp", "method": "cam"}, "config.options.method"),
    ],
)
async def test_wrong_options_are_named(caller, pictures, options, path):
    with pytest.raises(Refused) as caught:
        await caller.stream(pictures, **options)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caller.field_name(path) in caught.value.fields


@pytest.mark.parametrize(
    ("model", "code", "reason"),
    [("nope", "NOT_FOUND", "MODEL_NOT_FOUND"), ("broken", "FAILED_PRECONDITION", "MODEL_FAILED")],
)
async def test_models_that_cannot_answer(caller, pictures, model, code, reason):
    with pytest.raises(Refused) as caught:
        await caller.stream(pictures, model=model)
    assert (caught.value.code, caught.value.reason) == (code, reason)


async def test_the_window_in_force_is_told_and_limited(caller, server):
    with Client(server.address) as client:
        limit = client.server_info().max_in_flight
        (tiny,) = [model for model in client.models() if model.name == "tiny"]
    assert (await caller.stream([], max_in_flight=10**6))[0] == limit
    assert (await caller.stream([]))[0] == min(limit, 2 * tiny.max_batch_size)


async def test_an_empty_stream_has_no_answers(caller):
    assert (await caller.stream([], max_in_flight=3)) == (3, [])


async def test_every_third_frame(caller, pictures):
    _, answers = await caller.stream(pictures[:8], every=3)
    assert [item.skipped for item in answers] == [False, True, True] * 2 + [False, True]
    assert all(item.skipped == (item.answer is None) for item in answers)


async def test_at_most_so_many_frames_per_second(caller, pictures):
    _, answers = await caller.stream(pictures, max_fps=1e-3)
    assert [item.skipped for item in answers] == [False] + [True] * 23


async def test_smoothing_is_a_moving_average_of_raw_maps(caller, pictures):
    frames, weight = pictures[:6], 0.75
    options = {"class_ids": [3], "map_size": "input"}
    _, plain = await caller.stream(frames, **options)
    _, smooth = await caller.stream(frames, smooth=weight, **options)
    np.testing.assert_allclose(smooth[0].answer.raws[0], plain[0].answer.raws[0], atol=1e-3)
    _, still = await caller.stream([frames[0]] * 4, smooth=weight, **options)
    for item in still:
        np.testing.assert_allclose(item.answer.raws[0], plain[0].answer.raws[0], atol=1e-3)
        assert item.answer.maps[0].max() in {0.0, 1.0}


async def test_a_frame_that_waits_too_long_is_not_run(caller, pictures):
    _, answers = await caller.stream(pictures[:4], frame_timeout=1e-9)
    assert [item.refused.code for item in answers] == ["DEADLINE_EXCEEDED"] * 4


async def test_drop_oldest_answers_every_frame_in_order_and_explains_the_newest(caller, pictures):
    _, answers = await caller.stream(pictures * 4, max_in_flight=2, overflow="drop-oldest")
    assert [item.frame_id for item in answers] == list(range(96))
    assert answers[-1].answer is not None
    assert {item.refused.reason for item in answers if item.refused} <= {"FRAME_DROPPED"}
    alone = await caller.explain(pictures[-1])
    assert answers[-1].answer.class_ids == alone.class_ids
    np.testing.assert_allclose(answers[-1].answer.maps[0], alone.maps[0], atol=1e-3)


async def test_streams_and_calls_at_once_get_their_own_answers(caller, pictures):
    alone = [await caller.explain(picture, map_size="input") for picture in pictures]
    streams = [caller.stream(np.roll(pictures, i, axis=0), map_size="input") for i in range(3)]
    calls = [caller.explain(picture, map_size="input") for picture in pictures]
    (*streamed, called) = await asyncio.gather(*streams, asyncio.gather(*calls))
    for i, (_, answers) in enumerate(streamed):
        for item, expected in zip(answers, np.roll(np.arange(len(pictures)), i), strict=True):
            np.testing.assert_allclose(item.answer.maps[0], alone[expected].maps[0], atol=1e-3)
    for answer, expected in zip(called, alone, strict=True):
        np.testing.assert_allclose(answer.maps[0], expected.maps[0], atol=1e-3)


def test_jpeg_of_pixels_is_nearly_the_pixels(server, chelsea):
    with Client(server.address) as client:
        with client.stream(model="tiny", jpeg_quality=95, top_predictions=1) as stream:
            (coded,) = stream.map([chelsea])
        plain = client.explain(chelsea, model="tiny", top_predictions=1)
    assert coded.result.source_size == (451, 300)
    assert abs(coded.result.predictions[0].logit - plain.predictions[0].logit) < 0.1 * abs(plain.predictions[0].logit)


def test_a_drained_stream_says_where_to_go_on(launch, pictures):
    # A server process of its own: it is told to stop in mid-stream.
    running = launch(server_toml())
    wait_settled(running.address)
    items = []

    def watch(client):
        with client.stream(max_in_flight=4) as stream:
            for item in stream.map(pictures * 100):
                items.append(item)
                if len(items) == 10:
                    running.process.terminate()

    with Client(running.address) as client, pytest.raises(UnavailableError) as caught:
        watch(client)
    assert caught.value.reason == "SERVER_DRAINING"
    assert [item.frame_id for item in items] == list(range(len(items)))
    assert caught.value.last_frame_id == items[-1].frame_id
    # A frame that the server had read and did not run any more is not answered: it is to be sent again.
    assert not any(item.error for item in items)
    assert running.process.wait(20) == 0
