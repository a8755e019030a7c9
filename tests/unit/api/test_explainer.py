"""One image without a transport: from a query to what the transport's encoder makes of the answer."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from fleets import SPEC, Rig, config
from heatlens_server.api.answer import Answer
from heatlens_server.api.checks import Limits
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.query import Image, MapSize, Options, Query, Tensor
from heatlens_server.core.errors import InvalidArgument, ModelLoadError, ModelNotFound, QueueFull
from heatlens_server.core.events import Observer
from heatlens_server.core.targets import TopK

IMAGE = Image(pixels=Tensor("UINT8", (2, 2, 3), bytes(12)))


def limits(max_message_bytes: int = 1 << 20) -> Limits:
    return Limits(
        max_message_bytes, max_image_pixels=100, max_queue_length=1, max_targets=1, max_streams=1, max_in_flight=1
    )


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    with ThreadPoolExecutor(1) as threads:
        made = Rig(threads)
        await made.fleet.load(config("a"))
        yield made
        assert await made.fleet.close(timeout_s=20)


def encoded(answer: Answer) -> tuple[Answer, str]:
    return answer, threading.current_thread().name


async def explained(rig: Rig, query: Query, **limit: int) -> tuple[Answer, str]:
    return await Explainer(rig.fleet, limits(**limit), Observer()).explain(query, encoded, timeout_s=None)


@pytest.mark.parametrize(
    ("map_size", "shape", "is_here"),
    [(MapSize.LAYER, (1, 1), True), (MapSize.INPUT, (1, 1), True), (MapSize.SOURCE, (4, 4), False)],
)
async def test_an_answer_is_made_here_unless_maps_are_placed_on_the_source(rig, map_size, shape, is_here):
    image = Image(pixels=Tensor("UINT8", (4, 4, 3), bytes(48)))
    answer, thread = await explained(rig, Query("a", image, Options(map_size=map_size)))
    assert (answer.model, answer.explanations[0].class_score.logit, answer.timing.batch_size) == ("a", 1.0, 1)
    assert answer.explanations[0].map_values.shape == shape
    assert (thread == threading.current_thread().name) == is_here


async def test_what_cannot_be_answered_is_refused_before_the_model_runs(rig):
    with pytest.raises(ModelNotFound):
        await explained(rig, Query("b", IMAGE, Options()))
    with pytest.raises(InvalidArgument, match="image: an image is required"):
        await explained(rig, Query("a", None, Options()))
    with pytest.raises(InvalidArgument, match=r"image\.encoded: not a JPEG"):
        await explained(rig, Query("a", Image(encoded=b"nothing"), Options()))
    with pytest.raises(InvalidArgument, match="map_size: 1 maps of this size") as raised:
        await explained(rig, Query("a", IMAGE, Options(map_size=MapSize.SOURCE)), max_message_bytes=64 * 1024)
    assert raised.value.reason == "ANSWER_TOO_LARGE"
    assert not rig.engines[0].entered.is_set()


async def test_the_answers_of_images_that_share_a_message_fit_in_it_together(rig):
    image = Image(pixels=Tensor("UINT8", (10, 10, 3), bytes(300)))
    one = Query("a", image, Options(map_size=MapSize.SOURCE))
    room = 64 * 1024 + 2 * 400
    assert (await explained(rig, dataclasses.replace(one, images=2), max_message_bytes=room))[0].explanations
    with pytest.raises(InvalidArgument, match="map_size: 3 maps of this size"):
        await explained(rig, dataclasses.replace(one, images=3), max_message_bytes=room)


async def test_an_answer_is_made_in_its_turn(rig):
    turn, asked = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        await turn.wait()

    made = []
    explainer = Explainer(rig.fleet, limits(), Observer())
    answer = asyncio.create_task(explainer.explain(Query("a", IMAGE, Options()), made.append, timeout_s=20, turn=wait))
    async with asyncio.timeout(20):
        await asked.wait()
        assert not made
        turn.set()
        await answer
    assert len(made) == 1


async def test_a_call_is_refused_before_its_model_is_known_if_every_model_would(rig):
    explainer = Explainer(rig.fleet, limits(), Observer())
    await rig.fleet.load(config("b"))
    batchers = [rig.fleet.get(name).queue.batcher for name in ("a", "b")]
    entries = []
    for batcher in batchers:
        explainer.refuse_if_full("ipv4:127.0.0.1:1")
        while batcher.refusal() is None:
            entries.append((batcher, batcher.admit(TopK(1), SPEC, deadline=None, resolve=lambda outcome: None)))
    with pytest.raises(QueueFull):
        explainer.refuse_if_full("ipv4:127.0.0.1:1")
    # One that cannot answer has something else to say.
    rig.errors["c"] = ModelLoadError("no")
    await rig.fleet.load(config("c"))
    explainer.refuse_if_full("ipv4:127.0.0.1:1")
    for batcher, entry in entries:
        assert batcher.withdraw(entry)
