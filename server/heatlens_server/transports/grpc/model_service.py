"""ModelService: what is served, and within which limits."""

from datetime import timedelta
from importlib.metadata import version

import grpc.aio

from heatlens.v1 import model_pb2 as pb
from heatlens.v1 import model_pb2_grpc
from heatlens_server.api.limits import Limits
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.fleet.registry import ModelState, Registry, Slot
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.transports.grpc.names import METHOD_TO_PROTO

_STATES = {
    ModelState.LOADING: pb.Model.STATE_LOADING,
    ModelState.READY: pb.Model.STATE_READY,
    ModelState.FAILED: pb.Model.STATE_FAILED,
}


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    """Describes the models of a registry and the server's limits."""

    def __init__(
        self, registry: Registry[ServedModel], limits: Limits, *, max_batch_size: int, max_delay_s: float
    ) -> None:
        """Serve.

        Args:
            registry: the models.
            limits: as requests are checked.
            max_batch_size: the largest of any model.
            max_delay_s: the longest batching window of any model, in seconds.
        """
        self._registry = registry
        self._info = pb.GetServerInfoResponse(
            version=version("heatlens"),
            max_message_bytes=limits.max_message_bytes,
            max_image_pixels=limits.max_image_pixels,
            max_queue_length=limits.max_queue_length,
            max_targets=limits.max_targets,
            max_in_flight=limits.max_in_flight,
            max_streams=limits.max_streams,
            max_batch_size=max_batch_size,
            max_queue_delay=timedelta(seconds=max_delay_s),
        )

    async def ListModels(  # noqa: N802 - the contract's name
        self,
        request: pb.ListModelsRequest,  # noqa: ARG002 - empty
        context: grpc.aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],  # noqa: ARG002 - unused
    ) -> pb.ListModelsResponse:
        """List the models, in the order of the configuration."""
        return pb.ListModelsResponse(
            models=[_model(slot) for slot in self._registry.slots], default_model=self._registry.default
        )

    async def GetServerInfo(  # noqa: N802 - the contract's name
        self,
        request: pb.GetServerInfoRequest,  # noqa: ARG002 - empty
        context: grpc.aio.ServicerContext[pb.GetServerInfoRequest, pb.GetServerInfoResponse],  # noqa: ARG002 - unused
    ) -> pb.GetServerInfoResponse:
        """Return the version and every limit in force."""
        return self._info


def _model(slot: Slot[ServedModel]) -> pb.Model:
    served = slot.value
    if served is None:
        return pb.Model(name=slot.name, state=_STATES[slot.state], state_message=slot.message)
    capabilities = served.capabilities
    return pb.Model(
        name=slot.name,
        version=served.version,
        state=_STATES[slot.state],
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
