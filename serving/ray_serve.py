"""Replicas of a model under Ray Serve, which places, restarts and scales them.

    handle = serve.run(application(Start("tiny"), num_replicas=2))
    for delta in handle.options(stream=True).generate.remote("def f(", max_tokens=8):
        print(delta["text"], end="")

Each replica has an engine, answers calls of its handle and serves the HTTP routes of `jaxserve
serve` behind Ray's proxy. `Router` chooses the replica of a request: the one whose prefix cache
probably holds the beginning of its prompt, or the one with most free pages.

Needs `pip install 'jaxserve[ray]'`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

try:
    from ray import serve  # pyright: ignore[reportMissingImports]
    from ray.serve.config import (  # pyright: ignore[reportMissingImports]
        AutoscalingConfig,
        AutoscalingPolicy,
        RequestRouterConfig,
    )
    from ray.serve.request_router import RequestRouter  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        "replicas under Ray Serve need ray[serve], 2.60 or later: pip install 'jaxserve[ray]'"
    ) from error

from jaxserve.serving.answer import Answer
from jaxserve.serving.model_files import ModelFiles, name_of
from jaxserve.serving.ray_routing import (
    Beginnings,
    Standing,
    part_of_session,
    parts_of,
    ranked,
    wanted_replicas,
)
from jaxserve.serving.recovery import Recovery
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service, State
from jaxserve.serving.wire import Start

STATS_S = 1.0
"""Seconds between two reports of a replica."""
START_S = 600.0
HEADROOM = 4
"""So many times the requests that a replica should have may be sent to it at once."""


class Replica:
    """One model on the devices of one replica; its engine has a process of its own."""

    async def __init__(
        self, start: Start, options: ServerOptions, start_s: float = START_S
    ) -> None:
        """Starts the engine; Ray sends nothing before that is done.

        Args:
            start: what to serve.
            options: of the HTTP routes.
            start_s: how long a lost engine may take to be back.
        """
        self._service = self._make(start, options)
        self._recovery = Recovery(start_s)
        self._options = options
        self._http: Any = None
        await self._service.start()

    def _make(self, start: Start, options: ServerOptions) -> Service:
        """Returns the service, not started."""
        from jaxserve.serving.supervisor import RemoteService

        files = ModelFiles.find(start.model, start.dtype)
        name = options.model_name
        return RemoteService(start, files.intake(name), files.card(name))

    async def generate(
        self, prompt: str | Sequence[int], **sampling: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Yields what a completion gains, as a `Delta` with plain values.

        Args:
            prompt: text, or token ids.
            sampling: fields of `SamplingParams`.

        Raises:
            JaxserveError: as of `Service.submit` and of `Answer`.
        """
        request = self._service.intake.request(prompt, SamplingParams.create(**sampling))
        async with await Answer.open(self._service, request) as answer:
            async for delta in answer:
                yield {
                    "sample_index": delta.sample_index,
                    "text": delta.text,
                    "token_ids": list(delta.token_ids),
                    "finish_reason": delta.finish_reason,
                }

    async def http(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request of Ray's proxy as `jaxserve serve` would."""
        if self._http is None:
            from jaxserve.serving.http.app import create_app

            self._http = create_app(self._service, self._options)
        await self._http(scope, receive, send)

    async def record_routing_stats(self) -> dict[str, float]:
        """Returns what the router reads; a replica without engine has no free page."""
        if self._service.state is not State.READY:
            return {"free": 0.0, "waiting": 0}
        load = await self._service.load()
        return {"free": load.free_pages / load.total_pages, "waiting": load.waiting}

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns what `scale` reads."""
        if self._service.state is not State.READY:
            return {"kv_use": 0.0}
        load = await self._service.load()
        return {"kv_use": 1.0 - load.free_pages / load.total_pages}

    async def check_health(self) -> None:
        """Raises when a lost engine is not back in time: Ray then replaces the replica."""
        service = self._service
        restarts = getattr(service, "restarts", 0)  # of a service whose engine can be lost
        if self._recovery.given_up(service.failed, restarts, time.monotonic()):
            raise RuntimeError(service.reason)

    async def __del__(self) -> None:
        if hasattr(self, "_service"):
            await self._service.stop()


class Router(RequestRouter):
    """Sends a prompt to where its beginning probably is, or where most pages are free."""

    def initialize_state(self, **_: Any) -> None:
        """Starts without knowledge."""
        self._known = Beginnings()

    async def choose_replicas(
        self, candidate_replicas: Sequence[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """Returns the replicas in the order in which they are tried."""
        by_name = {_name(replica.replica_id): replica for replica in candidate_replicas}
        standings = {name: self._standing(replica) for name, replica in by_name.items()}
        if pending_request is not None:  # Ray waits a little before it asks again
            pending_request.routing_context.should_backoff = True
        parts = _parts(pending_request)
        return [[by_name[name]] for name in ranked(self._known.held(parts), standings, parts)]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Remembers where a prompt went."""
        self._known.note(_parts(pending_request), _name(replica_id))

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Forgets a replica."""
        super().on_replica_actor_died(replica_id)
        self._known.forget(_name(replica_id))

    def _standing(self, replica: Any) -> Standing:
        stats = replica.routing_stats or {}
        under_way = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return Standing(stats.get("free", 1.0), int(stats.get("waiting", 0)), under_way)


def _name(replica_id: Any) -> str:
    return str(replica_id.unique_id)


def _parts(pending_request: Any) -> list[bytes]:
    """Returns the beginnings of a request; of one over HTTP its session, if it names one."""
    if pending_request is None:
        return []
    prompt = next(iter(pending_request.args), pending_request.kwargs.get("prompt"))
    if isinstance(prompt, str | list | tuple):
        return parts_of(prompt)
    session = getattr(pending_request.metadata, "session_id", "")
    return part_of_session(session) if session else []


def scale(context: Any) -> tuple[float, dict[str, Any]]:
    """Returns how many replicas there should be, for Ray's autoscaler."""
    kv_uses = list((context.aggregated_metrics or {}).get("kv_use", {}).values())
    each = context.config.get_target_ongoing_requests()
    current = context.current_num_replicas
    return wanted_replicas(current, context.total_num_requests, each, kv_uses), {}


def _forward() -> Any:
    """Returns an ASGI application that hands on to the replica it runs in."""

    async def forward(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":  # nothing to do, and the replica is not known yet
            while (await receive())["type"] != "lifespan.shutdown":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        await serve.get_replica_context().servable_object.http(scope, receive, send)

    return forward


def application(
    start: Start,
    options: ServerOptions | None = None,
    *,
    replica: type[Replica] = Replica,
    num_replicas: int | None = None,
    max_replicas: int = 4,
    requests_each: int = 32,
    actor: Mapping[str, Any] | None = None,
    start_s: float = START_S,
) -> Any:
    """Returns the application of a model, for `serve.run`.

    Args:
        options: of the HTTP routes; addresses and TLS are those of Ray's proxy.
        replica: what serves.
        num_replicas: how many; None scales between 1 and `max_replicas`.
        requests_each: how many requests a replica should have under way.
        start_s: how long a lost engine may take to be back before its replica is replaced.
        actor: what a replica takes of a node, as `ray_actor_options`: {"resources": {"TPU": 4}}.
    """
    sized: dict[str, Any] = {"num_replicas": num_replicas}
    if num_replicas is None:
        sized = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=1,
                max_replicas=max_replicas,
                target_ongoing_requests=requests_each,
                policy=AutoscalingPolicy(policy_function=f"{__name__}:{scale.__name__}"),
            )
        }
    made = serve.deployment(
        name="jaxserve",
        max_ongoing_requests=HEADROOM * requests_each,
        ray_actor_options=dict(actor or {}),
        request_router_config=RequestRouterConfig(
            request_router_class=f"{__name__}:{Router.__name__}",
            request_routing_stats_period_s=STATS_S,
        ),
        **sized,
    )(serve.ingress(_forward)(replica))
    return made.bind(start, options or ServerOptions(model_name=name_of(start.model)), start_s)
