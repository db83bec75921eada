"""From the bytes of a body to a checked structure, with errors that name the field."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from jaxserve.errors import UsageError
from jaxserve.serving.http.errors import UNSUPPORTED, FieldError

MAX_DEPTH = 64
"""How deep arrays and objects may lie in one another."""

Struct = TypeVar("Struct", bound=msgspec.Struct)

_OPENING, _CLOSING, _QUOTE = b"[{", b"]}", ord('"')


def check_depth(body: bytes, most: int = MAX_DEPTH) -> None:
    """Checks how deep a JSON text is nested, without parsing it.

    Raises:
        UsageError: it is deeper than `most`.
    """
    if sum(map(body.count, (b"[", b"{"))) <= most:
        return
    # Without escaped characters every quote opens or closes a string.
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    chars = np.frombuffer(plain, np.uint8)
    outside = np.cumsum(chars == _QUOTE, dtype=np.int32) % 2 == 0
    steps = (np.isin(chars, list(_OPENING)) & outside).astype(np.int32)
    steps -= np.isin(chars, list(_CLOSING)) & outside
    depth = int(np.cumsum(steps).max(initial=0))
    if depth > most:
        raise UsageError(
            f"the body nests arrays and objects {depth} deep; at most {most} levels are read"
        )


def parse(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in a body.

    Raises:
        UsageError: it is no UTF-8, no JSON, nested too deep, or no object.
    """
    check_depth(body)
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise UsageError(f"the body is not UTF-8: {_first_bad_byte(body)}") from None
    except msgspec.ValidationError as error:
        raise UsageError(f"the body has a number that cannot be read: {error}") from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise UsageError(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError('the body must be a JSON object, as in {"prompt": "…"}')
    return cast("dict[str, Any]", value)


def read(
    body: bytes, kind: type[Struct], refused: Mapping[str, Sequence[Any]] | None = None
) -> Struct:
    """Returns a body as a structure.

    Args:
        kind: its fields are the only ones allowed.
        refused: fields that are known and not supported, each with the values that ask for
            nothing and are therefore let through; null always is.

    Raises:
        UsageError: the body is malformed, a field is unknown, of the wrong type or out of range,
            or a field of `refused` asks for something.
    """
    return convert(parse(body), kind, refused)


def convert(
    value: dict[str, Any],
    kind: type[Struct],
    refused: Mapping[str, Sequence[Any]] | None = None,
) -> Struct:
    """Returns an object as a structure; arguments and errors as `read`."""
    for name, neutral in (refused or {}).items():
        if (asked := value.pop(name, None)) is not None and asked not in neutral:
            raise FieldError(f"{name} is not supported yet; leave it out", name, UNSUPPORTED)
    known = kind.__struct_encode_fields__
    if unknown := [name for name in value if name not in known]:
        names = ", ".join(map(_short, unknown[:8]))
        raise FieldError(f"{names}: no such field; use {', '.join(known)}", unknown[0])
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _explained(str(error), value) from None


def _first_bad_byte(body: bytes) -> str:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"byte {error.start} begins no character"
    return "it has half a character"


def _explained(reason: str, value: Any) -> FieldError:
    """Returns the error of a field, with its place and value."""
    message, _, path = reason.partition(" - at ")
    if not path:
        missing = re.search(r"required field `(\w+)`", reason)
        return FieldError(reason, missing[1] if missing else None)
    # "`$.stop[1]`", or "`key` in `$.logit_bias`"
    place = path.rpartition("`$")[2].strip("`").removeprefix(".")
    found: Any = value
    for name, index in re.findall(r"\.?([A-Za-z_]\w*)|\[(\d+)\]", place):
        try:
            found = found[name] if name else found[int(index)]
        except (KeyError, IndexError, TypeError):
            return FieldError(f"{place}: {message}", place)
    return FieldError(f"{place}={_short(found)}: {message}", place or None)


def _short(value: Any) -> str:
    """Returns a value as an error shows it, never the whole of a long one."""
    if isinstance(value, str) and value.isidentifier() and len(value) <= 60:
        return value
    return reprlib.repr(value)
