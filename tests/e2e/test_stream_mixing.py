"""Many streams and many callers at once: every answer belongs to its frame, and says what the network says of it."""

import asyncio
from dataclasses import dataclass

import numpy as np
import torch

import tiny_models
from heatlens import AsyncClient
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import distinct, map_of, pixels
from observed_server import observed_server
from raw_stream import RawStream, own_channel
from server_toml import MEAN, STD, model_toml, server_toml

Stub = explain_pb2_grpc.ExplainServiceStub

TOML = server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=16), log_level="warning")

PER_CALLER = 8
CALLERS = 32
LOGIT_TOLERANCE = 1e-4
# More would be explained in steps, each image alone.
CLASSES = list(range(8))
OPTIONS = pb.ExplainOptions(class_ids=pb.ClassIds(values=CLASSES))


@dataclass(frozen=True, slots=True, eq=False)
class Expected:
    """All logits float32 (C,), and the raw Grad-CAM map of each class, float32 (C, h, w)."""

    logits: np.ndarray
    raws: np.ndarray


def expected(images: list[np.ndarray]) -> list[Expected]:
    """Explain images of the network's input size, uint8 RGB (64, 64, 3), one by one.

    Grad-CAM, Selvaraju et al. 2017, arXiv:1610.02391, eq. 1 and 2, at the layer `body`.
    """
    model = tiny_models.tiny_mlp().eval()
    return [explained(model, image) for image in images]


def explained(model: torch.nn.Module, image: np.ndarray) -> Expected:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    x = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - mean) / std
    activation = model.body(model.stem(x)).detach().requires_grad_()
    logits = model.head(activation.clone())[0, CLASSES]
    raws = []
    for logit in logits:
        (gradient,) = torch.autograd.grad(logit, activation, retain_graph=True)
        weights = gradient.mean((2, 3), keepdim=True)
        raws.append(torch.relu((weights * activation).sum(1))[0].detach().numpy())
    return Expected(logits.detach().numpy(), np.stack(raws))


# Images, each with what the network says about it.
Cases = list[tuple[np.ndarray, Expected]]


def told_apart(count: int) -> Cases:
    """Images of which any two are told apart by their logits."""
    images = distinct(count)
    wanted = expected(images)
    logits = np.stack([want.logits for want in wanted])
    for i, row in enumerate(logits):
        assert (np.abs(logits[i + 1 :] - row).max(1, initial=0) > 10 * LOGIT_TOLERANCE).all()
    return list(zip(images, wanted, strict=True))


def assert_says(logits: list[float], raws: list[np.ndarray], want: Expected) -> None:
    """The scores and the raw maps of all classes are those of one image."""
    np.testing.assert_allclose(logits, want.logits, atol=LOGIT_TOLERANCE)
    np.testing.assert_allclose(np.stack(raws), want.raws, atol=1e-3 * want.raws.max())


def assert_is(answer: pb.ExplainResponse, want: Expected) -> None:
    assert [e.class_id for e in answer.explanations] == CLASSES
    raws = [map_of(e) * e.map_scale + e.map_offset for e in answer.explanations]
    assert_says([e.logit for e in answer.explanations], raws, want)


async def raw_stream(stub: Stub, own: Cases, window: int) -> int:
    """The largest batch that one of its frames was in; so do the others."""
    largest = 0
    stream = RawStream(stub)
    await stream.open(options=OPTIONS, max_in_flight=window)

    async def send() -> None:
        for i, (image, _) in enumerate(own):
            await stream.send(i, image)

    async with asyncio.TaskGroup() as group:
        group.create_task(send())
        for i, (_, want) in enumerate(own):
            answer = await stream.answer()
            assert (answer.frame_id, answer.WhichOneof("payload")) == (i, "result")
            assert_is(answer.result, want)
            largest = max(largest, answer.result.timing.batch_size)
    assert await stream.finish() == []
    return largest


async def sdk_stream(client: AsyncClient, own: Cases, window: int) -> int:
    sizes = []
    async with client.stream(class_ids=CLASSES, max_in_flight=window) as stream:
        async for item in stream.map(image for image, _ in own):
            image, want = own[len(sizes)]
            assert item.frame is image
            explanations = item.result.explanations
            assert [e.class_id for e in explanations] == CLASSES
            assert_says([e.logit for e in explanations], [e.heatmap.raw() for e in explanations], want)
            sizes.append(item.result.timing.batch_size)
    assert len(sizes) == len(own)
    return max(sizes)


async def caller(stub: Stub, own: Cases) -> int:
    largest = 0
    for image, want in own:
        answer = await stub.Explain(pb.ExplainRequest(image=pixels(image), options=OPTIONS))
        assert_is(answer, want)
        largest = max(largest, answer.timing.batch_size)
    return largest


async def test_thirty_two_streams_and_thirty_two_callers_each_get_their_own_answers(tmp_path):
    cases = told_apart(2 * CALLERS * PER_CALLER)
    shares = [cases[n * PER_CALLER : (n + 1) * PER_CALLER] for n in range(2 * CALLERS)]
    with observed_server(tmp_path, TOML) as server:
        async with own_channel(server.address) as channel, AsyncClient(server.address) as client:
            stub = Stub(channel)
            works = [caller(stub, own) for own in shares[:CALLERS]]
            for n, own in enumerate(shares[CALLERS:]):
                window = (1, 2, 5, 64)[n // 2 % 4]
                works.append(sdk_stream(client, own, window) if n % 2 else raw_stream(stub, own, window))
            largest = await asyncio.gather(*works)
        # A batch is cut short where its classes would take too long, so now and then somebody is alone in all of his.
        assert sum(size > 1 for size in largest) >= 0.75 * len(largest), "most shared batches with others"
        server.until(lambda held: held.balanced)
        assert server.stop() == 0
