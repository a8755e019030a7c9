"""ExplainService: validate, hand to the model's queue, encode."""

from collections.abc import AsyncIterator

import grpc.aio

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.limits import Limits
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.api.stream.session import StreamSession
from heatlens_server.api.validation import parse_explain
from heatlens_server.fleet.fleet import Fleet


class ExplainServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Explains images and streams of frames with the models of a fleet."""

    def __init__(self, fleet: Fleet, limits: Limits, open_streams: OpenStreams) -> None:
        """Serve.

        Args:
            fleet: the models.
            limits: what requests are checked against.
            open_streams: where open streams are.
        """
        self._fleet = fleet
        self._limits = limits
        self._open_streams = open_streams

    async def Explain(  # noqa: N802 - the contract's name
        self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext[pb.ExplainRequest, pb.ExplainResponse]
    ) -> pb.ExplainResponse:
        """Explain one image."""
        with self._fleet.use(request.model) as model:
            command = parse_explain(request, model, self._limits)
            explainer = Explainer(model, command.plan, self._limits)
            await explainer.ensure()
            ticket = explainer.submit(command.image, timeout_s=context.time_remaining())
            return await explainer.answer(await ticket.result())

    async def StreamExplain(  # type: ignore[override]  # noqa: N802 - a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterator[pb.StreamExplainRequest],
        context: grpc.aio.ServicerContext[pb.StreamExplainRequest, pb.StreamExplainResponse],
    ) -> None:
        """Explain the frames of a stream."""
        session = StreamSession(
            self._fleet, self._limits, self._open_streams, requests=request_iterator, write=context.write
        )
        with self._open_streams.admit(session):
            await session.run()
