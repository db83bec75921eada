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
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.errors import DeadlineError, JaxserveError, UsageError
from jaxserve.serving.gate import Gate
from jaxserve.serving.keys import Caller, Keys
from jaxserve.serving.status import public_message, retry_after_s, status_of

_log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
ERROR_TYPE = "x-error-type"
PUSHBACK_MS = "grpc-retry-pushback-ms"
"""When to try again, as gRPC's own clients read it; below 0 they do not."""
RETRIED = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")

MAX_ID_CHARS = 128
MAX_DETAILS_BYTES = 1500
"""Longest text of an error: it travels as a header, percent-encoded."""


@dataclass(slots=True)
class Call:
    """One call under way.

    Attributes:
        context: of gRPC.
        caller: whose key it came with.
        request_id: what logs and metadata call it.
    """

    context: grpc.aio.ServicerContext[Any, Any]
    caller: Caller
    request_id: str

    def engine_id(self, request_id: str) -> str:
        """Returns what the engine calls a request of this caller; callers do not meet there."""
        return f"{self.caller.name}/{request_id}" if self.caller.name else request_id

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
    """

    def __init__(
        self,
        keys: Keys | None,
        gate: Gate,
        timeout_s: float | None = None,
        log_level: int = logging.INFO,
    ) -> None:
        self._keys = keys
        self._gate = gate
        self._timeout_s = timeout_s
        self._log_level = log_level

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
            response_serializer=lambda answer: answer.SerializeToString(),
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
        began = time.monotonic()
        metadata = _texts(context)
        call = Call(context, Caller(), "")
        status = "OK"
        try:
            call.request_id = checked_id(metadata.get(REQUEST_ID, "")) or uuid.uuid4().hex
            call.caller = authenticate(self._keys, metadata)
            with self._gate.enter(len(body)):
                request = parse(kind, body)
                call.request_id = _own_id(request) or call.request_id
                context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                async with asyncio.timeout(self._timeout_s):
                    return await method(request, call)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except TimeoutError:
            status = "DEADLINE_EXCEEDED"
            await refuse(
                call,
                DeadlineError(
                    f"the request took longer than {self._timeout_s} s, the longest here; "
                    "ask for fewer tokens"
                ),
            )
        except Exception as error:
            status = status_of(error).grpc
            if status == "INTERNAL":
                _log.exception("request %s failed", call.request_id)
            await refuse(call, error)
        finally:
            _log.log(
                self._log_level,
                "%s %s",
                said.full_name,
                status,
                extra={
                    "request_id": call.request_id,
                    "client": call.caller.name,
                    "method": said.full_name,
                    "status": status,
                    "seconds": round(time.monotonic() - began, 6),
                },
            )


def authenticate(keys: Keys | None, metadata: Mapping[str, str]) -> Caller:
    """Returns who calls.

    Raises:
        UnauthenticatedError: there are keys, and the metadata names none of them.
    """
    return Caller() if keys is None else keys.caller(metadata.get("authorization"))


def parse(kind: type[Message], body: bytes) -> Message:
    """Returns a message.

    Raises:
        UsageError: the bytes are none, or have a field that this version does not know.
    """
    try:
        message = kind.FromString(body)
    except DecodeError as error:
        raise UsageError(f"{len(body)} bytes are no {kind.DESCRIPTOR.name}: {error}") from None
    refuse_unknown(message)
    return message


def refuse_unknown(message: Message) -> None:
    """Checks that a message says nothing that would be passed over.

    Raises:
        UsageError: it, or one in it, has a field that this version does not know.
    """
    if len(unknown := UnknownFieldSet(message)):
        raise UsageError(
            f"{message.DESCRIPTOR.full_name} has no field {unknown[0].field_number} here; "
            "leave it out, or ask a server that knows it"
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if isinstance(value, Message):
            refuse_unknown(value)
            continue
        is_map = field.message_type.GetOptions().map_entry
        for item in value.values() if is_map else value:
            if isinstance(item, Message):
                refuse_unknown(item)


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


def checked_id(request_id: str) -> str:
    """Returns a request's id, which goes into headers and logs as it is.

    Raises:
        UsageError: it is too long, or has characters that do not belong there.
    """
    if len(request_id) > MAX_ID_CHARS:
        raise UsageError(
            f"a request id of {len(request_id)} characters; at most {MAX_ID_CHARS} are allowed"
        )
    if not all("!" <= char <= "~" for char in request_id):
        raise UsageError("a request id must consist of printable ASCII characters without spaces")
    return request_id


def _own_id(request: Message) -> str:
    """Returns the id that a message gives its request, if it does."""
    for name in ("request_id", "id"):
        if name in request.DESCRIPTOR.fields_by_name:
            return checked_id(getattr(request, name))
    return ""


def _texts(context: grpc.aio.ServicerContext[Any, Any]) -> dict[str, str]:
    """Returns the metadata of a call that is text."""
    return {
        key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)
    }
