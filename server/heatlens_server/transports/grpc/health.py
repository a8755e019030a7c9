"""grpc.health.v1: for the server as a whole, per service and per model.

* "" and each heatlens service: SERVING once no model is loading for the first time and at least one is ready.
* "heatlens.v1.ExplainService/<model>": SERVING once that model is ready; SERVICE_UNKNOWN once it is unloaded.
"""

import asyncio

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from heatlens.v1 import explain_pb2, model_pb2
from heatlens_server.fleet.fleet import Fleet, ModelState

SERVICES = tuple(
    service.full_name
    for file in (explain_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

EXPLAIN_SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The health service of a server."""

    def __init__(self) -> None:
        """Everything is unknown until `update`."""
        self._servicer = health_aio.HealthServicer()
        # One update at a time: else an earlier one could overwrite what a later one says.
        self._updating = asyncio.Lock()
        self._models: set[str] = set()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def update(self, fleet: Fleet) -> None:
        """Publish the states of the models. Does nothing after `drain`."""
        async with self._updating:
            states = {status.name: status.state for status in fleet}
            is_settled = ModelState.LOADING not in states.values()
            overall = _SERVING if is_settled and ModelState.READY in states.values() else _NOT_SERVING
            for service in ("", *SERVICES):
                await self._servicer.set(service, overall)
            for name in self._models - set(states):
                await self._servicer.set(f"{EXPLAIN_SERVICE}/{name}", _UNKNOWN)
            for name, state in states.items():
                status = _SERVING if state is ModelState.READY else _NOT_SERVING
                await self._servicer.set(f"{EXPLAIN_SERVICE}/{name}", status)
            self._models = set(states)

    async def drain(self) -> None:
        """Everything is NOT_SERVING from now on; watchers are told."""
        await self._servicer.enter_graceful_shutdown()
