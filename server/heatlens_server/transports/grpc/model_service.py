"""ModelService: what is served, and within which limits."""

from datetime import timedelta
from importlib.metadata import version

import grpc.aio

from heatlens.v1 import model_pb2 as pb
from heatlens.v1 import model_pb2_grpc
from heatlens_server.api.checks import Limits
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.fleet.fleet import Fleet, ModelState, ModelStatus
from heatlens_server.transports.grpc.requests import METHOD_TO_PROTO

_STATES = {
    ModelState.LOADING: pb.Model.STATE_LOADING,
    ModelState.READY: pb.Model.STATE_READY,
    ModelState.FAILED: pb.Model.STATE_FAILED,
}


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the models of a fleet and the server's limits."""

    def __init__(self, fleet: Fleet, limits: Limits) -> None:
        """Serve.

        Args:
            fleet: the models.
            limits: as requests are checked.
        """
        self._fleet = fleet
        self._limits = limits

    async def ListModels(  # noqa: N802 - the contract's name
        self,
        request: pb.ListModelsRequest,  # noqa: ARG002 - empty
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],  # noqa: ARG002 - unused
    ) -> pb.ListModelsResponse:
        """List the models, in the order of the configuration."""
        return pb.ListModelsResponse(
            models=[_model(status) for status in self._fleet], default_model=self._fleet.default
        )

    async def GetServerInfo(  # noqa: N802 - the contract's name
        self,
        request: pb.GetServerInfoRequest,  # noqa: ARG002 - empty
        context: grpc.aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],  # noqa: ARG002 - unused
    ) -> pb.GetServerInfoResponse:
        """Return the version and every limit in force."""
        limits = self._limits
        return pb.GetServerInfoResponse(
            version=version("heatlens"),
            max_message_bytes=limits.max_message_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_queue_length=limits.max_queue_length,
            max_targets=limits.max_targets,
            max_in_flight=limits.max_in_flight,
            max_streams=limits.max_streams,
            max_batch_size=self._fleet.max_batch_size,
            max_queue_delay=timedelta(seconds=self._fleet.max_delay_s),
        )


def _model(status: ModelStatus) -> pb.Model:
    served = status.served
    if served is None:
        return pb.Model(name=status.name, state=_STATES[status.state], state_message=status.message)
    capabilities = served.capabilities
    return pb.Model(
        name=status.name,
        version=served.version,
        state=_STATES[status.state],
        task=capabilities.task.value,
        input_height_px=capabilities.input_height_px,
        input_width_px=capabilities.input_width_px,
        class_count=capabilities.class_count,
        methods=[METHOD_TO_PROTO[method] for method in capabilities.requestable_methods],
        method_support=[_support(method, capabilities) for method in capabilities.requestable_methods],
        layers=capabilities.layers,
        engine=capabilities.engine_name,
        device=capabilities.device,
        precision=capabilities.precision,
        default_method=METHOD_TO_PROTO[served.default_method],
        max_batch_size=served.max_batch_size,
        max_queue_delay=timedelta(seconds=served.max_delay_s),
    )


def _support(method: Method, capabilities: Capabilities) -> pb.MethodSupport:
    preset = method.as_preset
    by_companion = preset.method in capabilities.fallback_methods or preset.score in capabilities.fallback_scores
    return pb.MethodSupport(
        method=METHOD_TO_PROTO[method],
        engine="torch" if by_companion else capabilities.engine_name,
        in_steps=preset.method.traits.in_steps,
    )
