"""What server and engine process say to each other: msgspec messages in length-prefixed frames.

    sock.sendall(frame(Abort("r1")))
    reader = FrameReader(FROM_SERVER)
    for message in reader.feed(sock.recv(1 << 16)): ...

A frame is its length in 4 bytes, little-endian, and one message in MessagePack. Nothing that comes
over the wire is ever run: no pickle.
"""

from __future__ import annotations

import struct
from typing import Any, Generic, TypeVar

import msgspec

from jaxserve import errors
from jaxserve.errors import JaxserveError
from jaxserve.partitioning.layout_file import Layout
from jaxserve.serving.metrics import MetricsSnapshot
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, TokenEvent

MAX_FRAME_BYTES = 1 << 28
M = TypeVar("M")
_LENGTH = struct.Struct("<I")


class WireError(JaxserveError):
    """The other side sent what is no message."""


# From the server.


class Start(msgspec.Struct, frozen=True, tag=True):
    """Which engine to make; the first message.

    Attributes:
        model: as `ModelFiles.find` takes it; so is `dtype`.
        backend: kernels.
        options: sizes.
        log_json: log lines are JSON objects.
        launched_s: `time.monotonic()` when the process was launched.
        layout: what lies where on a mesh; None takes one device.
        devices: as `use_devices` takes them.
        quantize: as `model_files.quantization` takes it.
        kv_dtype: as `model_files.kv_rounding` takes it.
        group: the processes that serve the model together, and which of them this is.
    """

    model: str
    dtype: str | None = None
    backend: str = "xla"
    options: EngineOptions = EngineOptions()
    log_json: bool = True
    launched_s: float = 0.0
    layout: Layout | None = None
    devices: str | None = None
    quantize: str | None = None
    kv_dtype: str | None = None
    group: Group | None = None


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Asks for the admission of a request; answered by `Admitted` or `Refused`."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Ends a request."""

    request_id: str


class Finish(msgspec.Struct, frozen=True, tag=True):
    """Ends one sample, cut to `num_tokens`."""

    request_id: str
    sample_index: int
    num_tokens: int


class Trace(msgspec.Struct, frozen=True, tag=True):
    """Asks for a trace of the next seconds; answered by `Traced`."""

    number: int
    seconds: float


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Asks for a `Beat` with metrics at once."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends the engine and its process."""


# From the engine.


class Phase(msgspec.Struct, frozen=True, tag=True):
    """A phase of the start begins."""

    name: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Requests are taken from now on.

    Attributes:
        info: versions, capacity, memory plan.
        startup_seconds: by phase.
    """

    info: dict[str, Any]
    startup_seconds: dict[str, float]


class Lost(msgspec.Struct, frozen=True, tag=True):
    """The process ends because the group it belongs to is lost; `message` says how."""

    message: str


class Left(msgspec.Struct, frozen=True, tag=True):
    """The process ends because its group has ended in good order."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not be made, or has ended for good."""

    error: str
    message: str


class Admitted(msgspec.Struct, frozen=True, tag=True):
    """A request waits for its turn."""

    request_id: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request is not taken."""

    request_id: str
    error: str
    message: str
    retry_after_s: float = 1.0


class Started(msgspec.Struct, frozen=True, tag=True):
    """Requests get their first step now."""

    request_ids: list[str]


class Events(msgspec.Struct, frozen=True, tag=True):
    """What a step brought."""

    events: list[TokenEvent]


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life.

    Attributes:
        turn_s: how long the engine's loop has been at the same turn.
        limit_s: a turn of more is a stall.
        metrics: now and then.
    """

    turn_s: float
    limit_s: float
    metrics: MetricsSnapshot | None = None


class Traced(msgspec.Struct, frozen=True, tag=True):
    """Where a trace lies, or why there is none."""

    number: int
    folder: str | None = None
    message: str = ""


FromServer = Start | Submit | Abort | Finish | Trace | Measure | Stop
FromEngine = (
    Phase | Ready | Failed | Lost | Left | Admitted | Refused | Started | Events | Beat | Traced
)

FROM_SERVER: msgspec.msgpack.Decoder[FromServer] = msgspec.msgpack.Decoder(FromServer)
FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_ENCODER = msgspec.msgpack.Encoder()


def frame(message: FromServer | FromEngine) -> bytes:
    """Returns a message as it is sent."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameReader(Generic[M]):
    """Puts messages together from pieces of a stream. Its single writer is its caller."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M]) -> None:
        self._decoder = decoder
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Returns the messages that are whole now.

        Raises:
            WireError: a frame is too long or no message.
        """
        rest = self._rest
        rest += data
        messages: list[M] = []
        start = 0
        while len(rest) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(rest, start)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length:,} bytes; the limit is {MAX_FRAME_BYTES:,}")
            end = start + _LENGTH.size + length
            if len(rest) < end:
                break
            try:
                # A copy: a view would keep the buffer from shrinking.
                messages.append(self._decoder.decode(bytes(rest[start + _LENGTH.size : end])))
            except msgspec.MsgspecError as error:
                raise WireError(f"a frame that is no message: {error}") from error
            start = end
        del rest[:start]
        return messages


def error_fields(error: BaseException) -> tuple[str, str, float]:
    """Returns (type, message, seconds until a retry) of an error, for the other side.

    One that was not raised on purpose travels as a `GenerationError` without its words, which may
    hold paths; the log has them.
    """
    for kind in type(error).__mro__:
        if kind.__module__ == errors.__name__ and issubclass(kind, JaxserveError):
            return kind.__name__, str(error), getattr(error, "retry_after_s", 1.0)
    return "GenerationError", f"the engine failed ({type(error).__name__})", 1.0


def error_of(kind: str, message: str, retry_after_s: float = 1.0) -> JaxserveError:
    """Returns the error that the other side met."""
    found = getattr(errors, kind, None)
    if not (isinstance(found, type) and issubclass(found, JaxserveError)):
        found = errors.GenerationError
    error = found(message)
    if hasattr(error, "retry_after_s"):
        error.retry_after_s = retry_after_s  # pyright: ignore[reportAttributeAccessIssue]
    return error
