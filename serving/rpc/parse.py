"""From the bytes of a call to a message that says nothing we would pass over."""

from __future__ import annotations

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.errors import UsageError

MAX_ID_CHARS = 128


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
    for kind, value in message.ListFields():
        if kind.message_type is None:
            continue
        if isinstance(value, Message):
            refuse_unknown(value)
            continue
        is_map = kind.message_type.GetOptions().map_entry
        for item in value.values() if is_map else value:
            if isinstance(item, Message):
                refuse_unknown(item)


def own_id(request: Message) -> str:
    """Returns the id that a message gives its request, empty if it gives none.

    Raises:
        UsageError: it cannot go into headers and logs.
    """
    for name in ("request_id", "id"):
        if name in request.DESCRIPTOR.fields_by_name and (own_id := getattr(request, name)):
            if not is_sound(own_id):
                raise UsageError(
                    f"{name}: {len(own_id)} characters; it must have up to {MAX_ID_CHARS}, all of "
                    "them printable ASCII and no spaces"
                )
            return own_id
    return ""


def is_sound(request_id: str) -> bool:
    """Returns whether an id can go into headers and logs as it is."""
    return 1 <= len(request_id) <= MAX_ID_CHARS and all("!" <= char <= "~" for char in request_id)
