"""grpc.health.v1: for the server as a whole, per service and per model.

* "" and each heatlens service: SERVING once every model is settled and at least one is ready.
* "heatlens.v1.ExplainService/<model>": SERVING once that model is ready.
"""

from collections.abc import Sequence

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from heatlens.v1 import explain_pb2, model_pb2
from heatlens_server.fleet.registry import ModelState, Slot
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.transports.grpc.names import EXPLAIN_SERVICE

SERVICES = tuple(
    service.full_name
    for file in (explain_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """The health service of a server."""

    def __init__(self) -> None:
        """Everything is unknown until `update`."""
        self._servicer = health_aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def update(self, slots: Sequence[Slot[ServedModel]]) -> None:
        """Publish the states of the models. Does nothing after `drain`."""
        settled = all(slot.state is not ModelState.LOADING for slot in slots)
        ready = any(slot.state is ModelState.READY for slot in slots)
        overall = _SERVING if settled and ready else _NOT_SERVING
        for service in ("", *SERVICES):
            await self._servicer.set(service, overall)
        for slot in slots:
            status = _SERVING if slot.state is ModelState.READY else _NOT_SERVING
            await self._servicer.set(f"{EXPLAIN_SERVICE}/{slot.name}", status)

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on; watchers are told."""
        await self._servicer.enter_graceful_shutdown()
