"""ExplainService: validate, hand to the model's lane, encode."""

import asyncio
from collections.abc import AsyncIterator

import grpc.aio

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.errors import Unimplemented
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import FittedImage, fit
from heatlens_server.models.registry import Registry
from heatlens_server.rpc.encode import check_answer_size, encode
from heatlens_server.rpc.limits import Limits
from heatlens_server.rpc.validation import ExplainCommand, parse_explain
from heatlens_server.serving.served import ServedModel


class ExplainServicer(explain_pb2_grpc.ExplainServiceServicer):
    """Explains images with the models of a registry."""

    def __init__(self, registry: Registry[ServedModel], limits: Limits) -> None:
        """Serve.

        Args:
            registry: the models.
            limits: what requests are checked against.
        """
        self._registry = registry
        self._limits = limits

    async def Explain(  # noqa: N802 - the contract's name
        self, request: pb.ExplainRequest, context: grpc.aio.ServicerContext[pb.ExplainRequest, pb.ExplainResponse]
    ) -> pb.ExplainResponse:
        """Explain one image."""
        model = self._registry.get(request.model)
        command = parse_explain(request, model, self._limits)
        explained = await model.lane.explain(
            lambda: self._prepare(command, model),
            command.target,
            command.spec,
            timeout_s=context.time_remaining(),
        )
        if command.place_on_source:
            # Not the preparers' threads: a finished answer does not queue behind images that are yet to be decoded.
            return await asyncio.to_thread(encode, explained, command, model)
        return encode(explained, command, model)

    async def StreamExplain(  # noqa: N802 - the contract's name
        self,
        request_iterator: AsyncIterator[pb.StreamExplainRequest],  # noqa: ARG002 - not served yet
        context: grpc.aio.ServicerContext[pb.StreamExplainRequest, pb.StreamExplainResponse],  # noqa: ARG002
    ) -> AsyncIterator[pb.StreamExplainResponse]:
        """Not served yet."""
        raise Unimplemented("StreamExplain is not served by this version; call Explain for each frame")
        yield pb.StreamExplainResponse()

    def _prepare(self, command: ExplainCommand, model: ServedModel) -> FittedImage:
        """Decode and fit; runs on a preparer thread."""
        image = command.image
        if isinstance(image, bytes):
            image = decode_image(image, max_pixels=self._limits.max_image_pixels)
        fitted = fit(image, model.preprocess)
        check_answer_size(command, fitted, self._limits)
        return fitted
