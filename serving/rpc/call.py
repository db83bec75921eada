"""What every call passes: its key, the gate, parsing, and the way back of its errors.

    desk = Desk(keys, gate, options.request_timeout_s)
    handler = desk.service(DESCRIPTOR.services_by_name["Inference"], {"Generate": generate, ...})
    server.add_generic_rpc_handlers((handler,))

A method takes a parsed message and a `Call`. It returns the answer, or sends messages by
`call.send` where the answer is a stream. What it raises becomes a status with the request's id in
the trailing metadata.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.text_format import MessageToString

from jaxserve.errors import DeadlineError, JaxserveError
from jaxserve.serving import logs, tracing
from jaxserve.serving.gate import Gate
from jaxserve.serving.keys import Caller, Keys
from jaxserve.serving.rpc.parse import is_sound, own_id, parse
from jaxserve.serving.status import public_message, retry_after_s, status_of

_log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
ERROR_TYPE = "x-error-type"
PUSHBACK_MS = "grpc-retry-pushback-ms"
"""When to try again, as gRPC's own clients read it; below 0 they do not."""
RETRIED = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

MAX_DETAILS_BYTES = 1500
"""Longest text of an error: it travels as a header, percent-encoded."""


@dataclass(slots=True)
class Call:
    """One call under way.

    Attributes:
        context: of gRPC.
        caller: whose key it came with.
        request_id: what logs and metadata call it.
        own_id: what the message calls its request, or a name that was drawn; the name that logs
            know may come from a proxy, which gives it to several calls.
    """

    context: grpc.aio.ServicerContext[Any, Any]
    caller: Caller
    request_id: str
    own_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def engine_id(self, own_id: str | None = None) -> str:
        """Returns what the engine calls a request of this caller; callers do not meet there.

        Args:
            own_id: None is that of this call.
        """
        name = self.own_id if own_id is None else own_id
        return f"{self.caller.name}/{name}" if self.caller.name else name

    async def send(self, message: Message) -> None:
        """Sends one message of a stream, once the connection takes it."""
        await self.context.write(message)

    def time_left_s(self) -> float | None:
        """Returns the seconds until the caller waits no longer; None if it always will."""
        return self.context.time_remaining()


Method = Callable[[Any, Call], Awaitable[Message | None]]


class Desk:
    """Where calls come in.

    Args:
        keys: those that callers need; None lets everyone in.
        gate: counts what is under way, before anything is parsed.
        timeout_s: longest time of a call.
        log_level: of the line that each call leaves.
        log_prompts: the line tells what was asked.
    """

    def __init__(
        self,
        keys: Keys | None,
        gate: Gate,
        timeout_s: float | None = None,
        log_level: int = logging.INFO,
        log_prompts: bool = False,
    ) -> None:
        self._keys = keys
        self._gate = gate
        self._timeout_s = timeout_s
        self._log_level = log_level
        self._log_prompts = log_prompts

    def service(
        self, service: ServiceDescriptor, methods: Mapping[str, Method]
    ) -> grpc.GenericRpcHandler:
        """Returns the handler of a service's calls.

        Args:
            service: what the definition says of it.
            methods: what serves each of its methods, by name.
        """
        missing = set(service.methods_by_name) ^ set(methods)
        assert not missing, f"{service.full_name}: {sorted(missing)} are not both said and served"
        handlers = {
            name: self._handler(service.methods_by_name[name], method)
            for name, method in methods.items()
        }
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def conversation(
        self,
        service: str,
        name: str,
        method: Callable[[AsyncIterator[Any], Any], AsyncIterator[Message]],
        kind: type[Message],
    ) -> grpc.GenericRpcHandler:
        """Returns the handler of a service whose one method is a stream both ways.

        Args:
            method: takes the requests and the context.
            kind: of the requests.
        """

        async def handle(
            requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
        ) -> None:
            call = Call(context, Caller(), uuid.uuid4().hex)
            try:
                call.caller = authenticate(self._keys, _texts(context))
                with self._gate.enter():
                    async for answer in method(requests, context):
                        await call.send(answer)
            except JaxserveError as error:
                await refuse(call, error)

        handler = grpc.stream_stream_rpc_method_handler(
            handle,
            request_deserializer=kind.FromString,
            response_serializer=_serialized,
        )
        return grpc.method_handlers_generic_handler(service, {name: handler})

    def _handler(self, said: MethodDescriptor, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        """Returns a handler that is given the bytes of the request, not yet parsed."""
        kind: type[Message] = GetMessageClass(said.input_type)

        async def handle(body: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            return await self._handle(said, kind, method, body, context)

        make = (
            grpc.unary_stream_rpc_method_handler
            if said.server_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        serialize = GetMessageClass(said.output_type).SerializeToString
        return make(handle, request_deserializer=None, response_serializer=serialize)

    async def _handle(
        self,
        said: MethodDescriptor,
        kind: type[Message],
        method: Method,
        body: bytes,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> Message | None:
        record = _Record(said.full_name)
        call = Call(context, Caller(), uuid.uuid4().hex)
        try:
            metadata = _texts(context)
            if is_sound(asked := metadata.get(REQUEST_ID, "")):
                call.request_id = asked
            call.caller = authenticate(self._keys, metadata)
            with self._gate.enter(len(body)):
                request = parse(kind, body)
                if named := own_id(request):
                    call.request_id = call.own_id = named
                if self._log_prompts:
                    record.body = MessageToString(request, as_utf8=True, as_one_line=True)
                context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                caller_span = metadata.get("traceparent", "")
                with tracing.parent(caller_span), logs.request_id(call.request_id):
                    return await self._in_time(method(request, call))
        except asyncio.CancelledError:
            record.status = "CANCELLED"
            raise
        except Exception as error:
            record.status = status_of(error).grpc
            if record.status == "INTERNAL":
                _log.exception("a call failed", extra={"request_id": call.request_id})
            await refuse(call, error)
        finally:
            record.write(self._log_level, call)

    async def _in_time(self, work: Awaitable[Message | None]) -> Message | None:
        """Returns what the work gives.

        Raises:
            DeadlineError: it takes longer than calls may.
        """
        limit = asyncio.timeout(self._timeout_s)
        try:
            async with limit:
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineError(
                f"the request took longer than {self._timeout_s} s, the longest here; "
                "ask for fewer tokens"
            ) from None


@dataclass(slots=True)
class _Record:
    """What the log says of a call."""

    method: str
    status: str = "OK"
    body: str | None = None
    began_s: float = field(default_factory=time.monotonic)

    def write(self, level: int, call: Call) -> None:
        """Writes the line."""
        seconds = round(time.monotonic() - self.began_s, 6)
        extra: dict[str, Any] = {"request_id": call.request_id, "client": call.caller.name}
        extra |= {"method": self.method, "status": self.status, "seconds": seconds}
        if self.body is not None:
            extra["body"] = self.body
        _log.log(level, "%s %s", self.method, self.status, extra=extra)


def _serialized(message: Message) -> bytes:
    return message.SerializeToString()


def authenticate(keys: Keys | None, metadata: Mapping[str, str]) -> Caller:
    """Returns who calls.

    Raises:
        UnauthenticatedError: there are keys, and the metadata names none of them.
    """
    return Caller() if keys is None else keys.caller(metadata.get("authorization"))


async def refuse(call: Call, error: BaseException) -> None:
    """Ends a call with the status of an error; raises what tells gRPC so."""
    status = status_of(error)
    metadata = [(REQUEST_ID, call.request_id), (ERROR_TYPE, status.code)]
    if status.grpc in RETRIED:
        after = retry_after_s(error)
        metadata.append((PUSHBACK_MS, "-1" if after is None else str(math.ceil(after * 1000))))
    encoded = public_message(error).encode("utf-8", "replace")[:MAX_DETAILS_BYTES]
    details = encoded.decode("utf-8", "ignore")
    await call.context.abort(grpc.StatusCode[status.grpc], details, tuple(metadata))


def _texts(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Returns the metadata of a call that is text."""
    return {
        key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
    }
