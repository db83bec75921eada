"""What every HTTP request passes before it is parsed: limits, its key, the gate.

    app = Guard(app, options, Gate.of(options), keys, service)

In this order: request id, headers, key, origin and content type, length of the body, the gate, the
state of the service, and only then the body itself, which is read to its end or refused.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.errors import TooLargeError, UnauthenticatedError, UsageError
from jaxserve.serving import logs, tracing
from jaxserve.serving.gate import Gate
from jaxserve.serving.http.call import Call, ClientGoneError, set_call
from jaxserve.serving.http.errors import JSON, Description, HttpError, describe
from jaxserve.serving.http.limits import RequestLimits
from jaxserve.serving.keys import Caller, Keys
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service, check_ready

_log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/health/ready", "/v2/health/live", "/v2/health/ready"})
"""Routes that need no key."""
METRICS_PATH = "/metrics"

REQUEST_ID = b"x-request-id"

_BODYLESS = frozenset({"GET", "HEAD", "OPTIONS"})
_SOUND_ID = re.compile(r"[\w.:\-]{1,128}", re.ASCII)


class Guard:
    """ASGI middleware; see the module.

    Args:
        app: what requests go to that pass.
        keys: those that callers need; None lets everyone in.
        gate: counts what is under way; shared with other servers of the same service.
        service: which must be ready for a body to be read; None reads it in any case.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        gate: Gate,
        keys: Keys | None,
        service: Service | None = None,
        limits: RequestLimits | None = None,
    ) -> None:
        self._app, self._options, self._gate, self._keys = app, options, gate, keys
        self._service = service
        self._limits = limits or RequestLimits()
        self._open = OPEN_PATHS | ({METRICS_PATH} if options.open_metrics else frozenset())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        visit = _Visit(scope, headers, send)
        try:
            await self._admit(visit, receive)
        except ClientGoneError:
            visit.status = visit.status or 499
        except Exception as error:
            await visit.refuse(describe(error))
        finally:
            visit.log(self._options.log_prompts)

    async def _admit(self, visit: _Visit, receive: Receive) -> None:
        """Lets a request through, or raises."""
        scope, headers = visit.scope, visit.headers
        self._check_headers(scope)
        if scope["path"] not in self._open:
            visit.caller = self._caller(headers)
        caller = visit.caller
        if scope["method"] in _BODYLESS:
            # What is got may be asked about, too; the server leaves such an answer's body out.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method}
            set_call(scope, Call(visit.request_id, caller.name, caller.salt))
            await self._app(scope, receive, visit.send)
            return
        _check_origin(headers, self._options.cors_origins)
        _check_content(headers)
        length = _length(headers)
        with self._gate.enter(self._options.max_body_bytes if length is None else length):
            if self._service is not None:
                check_ready(self._service)
            visit.body = await self._read(receive)
            call = Call(visit.request_id, caller.name, caller.salt, visit.body, visit.notes)
            set_call(scope, call)
            caller_span = headers.get(b"traceparent", b"").decode("ascii", "replace")
            with tracing.parent(caller_span), logs.request_id(visit.request_id):
                await self._app(scope, receive, visit.send)

    def _check_headers(self, scope: Scope) -> None:
        headers, limits = scope["headers"], self._limits
        size = sum(len(name) + len(value) for name, value in headers)
        size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
        if size > limits.max_header_bytes or len(headers) > limits.max_headers:
            raise HttpError(
                431,
                f"{len(headers)} headers with {size} bytes exceed the limits of "
                f"{limits.max_headers} headers and {limits.max_header_bytes} bytes",
                "headers_too_large",
            )

    def _caller(self, headers: dict[bytes, bytes]) -> Caller:
        """Returns whose key a request has.

        Raises:
            UnauthenticatedError: there are keys, and it has none of them.
        """
        if self._keys is None:
            return Caller()
        return self._keys.caller(
            _as_bearer(headers.get(b"authorization", b"").decode("utf-8", "surrogateescape"))
        )

    async def _read(self, receive: Receive) -> bytes:
        """Returns a body.

        Raises:
            TooLargeError: it is longer than any that is read.
            HttpError: it takes too long.
            ClientGoneError: it never ends.
        """
        most, pieces, size, more = self._options.max_body_bytes, [], 0, True
        try:
            async with asyncio.timeout(self._limits.body_timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    more = message.get("more_body", False)
                    if size > most:
                        raise TooLargeError(f"the body exceeds {most:,} bytes, the limit here")
        except TimeoutError:
            limit_s = self._limits.body_timeout_s
            close = {"connection": "close"}
            raise HttpError(
                408, f"the body did not arrive within {limit_s:g} s", "body_timeout", close
            ) from None
        return b"".join(pieces)


class _Visit:
    """A request on its way; the guard alone writes it."""

    def __init__(self, scope: Scope, headers: dict[bytes, bytes], send: Send) -> None:
        self.scope, self.headers, self.caller = scope, headers, Caller()
        # As it was sent: a decoded one could have line breaks.
        self.path = scope.get("raw_path", b"").decode("ascii", "replace") or scope["path"]
        self.status, self.body = 0, b""
        self.notes: dict[str, str] = {}
        asked = headers.get(REQUEST_ID, b"").decode("latin-1")
        self.request_id = asked if _SOUND_ID.fullmatch(asked) else uuid.uuid4().hex
        self._send, self._began_s = send, time.perf_counter()

    async def send(self, message: Message) -> None:
        """Sends, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message["headers"],
                (REQUEST_ID, self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self._send(message)

    async def refuse(self, told: Description) -> None:
        """Answers with an error, unless an answer has begun."""
        if self.status:
            return
        headers = dict(told.headers)
        if told.status == 401:
            # A browser that asks for the page shows a dialogue for the key.
            page = self.scope["path"] in ("/", "/docs")
            headers["www-authenticate"] = 'Basic realm="jaxserve"' if page else "Bearer"
        headers |= {"content-type": JSON, "content-length": str(len(told.body))}
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": told.status, "headers": raw})
        await self.send({"type": "http.response.body", "body": told.body})

    def log(self, with_body: bool) -> None:
        """Logs the request; its body only where the operator asked for that."""
        seconds = time.perf_counter() - self._began_s
        method, path = self.scope["method"], self.path
        extra = {
            "request_id": self.request_id,
            "client": self.caller.name,
            "method": method,
            "path": path,
            "status": self.status,
            "seconds": round(seconds, 6),
            **self.notes,
        }
        if with_body:
            extra["body"] = self.body.decode("utf-8", "replace")
        level = logging.DEBUG if path in OPEN_PATHS and self.status == 200 else logging.INFO
        _log.log(level, "%s %s %d", method, path, self.status, extra=extra)


def _as_bearer(authorization: str) -> str:
    """Returns a browser's user and password as the key that the password is."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return authorization
    try:
        return "Bearer " + base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        raise UnauthenticatedError("the Authorization header is malformed") from None


def _check_origin(headers: dict[bytes, bytes], allowed: tuple[str, ...]) -> None:
    """Checks that no other site's page sends this through a browser.

    Raises:
        HttpError: one does.
    """
    site = headers.get(b"sec-fetch-site", b"same-origin")
    origin = headers.get(b"origin", b"").decode("latin-1")
    if site in (b"cross-site", b"same-site") and origin not in allowed:
        raise HttpError(403, "pages of other sites may not call this server", "origin_not_allowed")


def _check_content(headers: dict[bytes, bytes]) -> None:
    """Checks that the body says to be JSON, or says nothing.

    Raises:
        HttpError: it says to be something else.
    """
    kind, _, options = headers.get(b"content-type", b"application/json").partition(b";")
    kind = kind.strip().lower()
    if not (kind == b"application/json" or kind.endswith(b"+json")):
        raise HttpError(
            415,
            f"content-type {kind.decode('latin-1')!r:.60} is not read; use application/json",
            "unsupported_media_type",
        )
    charset = re.search(rb'charset="?([\w\-]+)', options.lower())
    if charset is not None and charset[1] not in (b"utf-8", b"utf8"):
        raise HttpError(415, "bodies are UTF-8", "unsupported_media_type")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HttpError(415, "compressed bodies are not read", "unsupported_media_type")


def _length(headers: dict[bytes, bytes]) -> int | None:
    """Returns the length that a body says to have."""
    stated = headers.get(b"content-length")
    if stated is None:
        return None if b"transfer-encoding" in headers else 0
    if not stated.isdigit() or len(stated) > 18:
        raise UsageError("content-length is not a number")
    return int(stated)
