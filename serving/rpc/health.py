"""The health protocol of gRPC (grpc.health.v1), answered from the service's own state.

"" asks after the whole server. No key is needed.
"""

from __future__ import annotations

import asyncio
from typing import Any

from grpc_health.v1 import health_pb2 as pb

from jaxserve.errors import NotFoundError
from jaxserve.serving.rpc.call import Call, Method
from jaxserve.serving.service import Service, State

SERVICE: Any = pb.DESCRIPTOR.services_by_name["Health"]

POLL_S = 0.1
"""A watcher learns of a change after this time at the latest."""

_Status = pb.HealthCheckResponse.ServingStatus


class Health:
    """Tells whether requests are taken.

    Args:
        names: the services that can be asked after, besides "".
    """

    def __init__(self, service: Service, names: tuple[str, ...]) -> None:
        self._service = service
        self._names = ("", *names)

    def methods(self) -> dict[str, Method]:
        """Returns what serves each method of the definition."""
        methods: dict[str, Method] = {"Check": self.check, "Watch": self.watch}
        if "List" in SERVICE.methods_by_name:  # since grpcio-health-checking 1.73
            methods["List"] = self.list
        return methods

    async def check(self, message: pb.HealthCheckRequest, call: Call) -> pb.HealthCheckResponse:
        """Returns the state of a service."""
        if message.service not in self._names:
            raise NotFoundError(f"there is no service {message.service!r:.80} here")
        return pb.HealthCheckResponse(status=self._status(message.service))

    async def watch(self, message: pb.HealthCheckRequest, call: Call) -> None:
        """Sends the state of a service, and again whenever it changes, until the caller leaves."""
        told: _Status | None = None
        while not call.context.done():
            now = self._status(message.service)
            if now != told:
                await call.send(pb.HealthCheckResponse(status=now))
                told = now
            await asyncio.sleep(POLL_S)

    async def list(self, message: Any, call: Call) -> Any:
        """Returns the state of every service."""
        answer = pb.HealthListResponse()  # pyright: ignore[reportAttributeAccessIssue]
        for name in self._names:
            answer.statuses[name].status = self._status(name)
        return answer

    def _status(self, name: str) -> _Status:
        if name not in self._names:
            return pb.HealthCheckResponse.SERVICE_UNKNOWN
        if self._service.state is State.READY:
            return pb.HealthCheckResponse.SERVING
        return pb.HealthCheckResponse.NOT_SERVING
