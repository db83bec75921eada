"""The tensors of the Open Inference Protocol: typed contents, or raw bytes beside the message.

Raw strings are each preceded by their length; raw numbers are little-endian. An answer has the form
that its request had.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from jaxserve.errors import UsageError
from jaxserve.serving.rpc.protos import open_inference_grpc_pb2 as pb

Input = pb.ModelInferRequest.InferInputTensor
Output = pb.ModelInferResponse.InferOutputTensor
Values = list[bytes] | list[int]

_NUMBERS = {"INT32": ("int_contents", "i"), "INT64": ("int64_contents", "q")}
_LENGTH = struct.Struct("<I")


def read_inputs(request: pb.ModelInferRequest) -> dict[str, tuple[Input, Values]]:
    """Returns each tensor of a request with its values, by its name.

    Raises:
        UsageError: a tensor is malformed, there twice, or of a type that is not taken here.
    """
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise UsageError(
            f"{len(raw)} raw contents for {len(request.inputs)} inputs; give one for each, or none"
        )
    found: dict[str, tuple[Input, Values]] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in found:
            raise UsageError(f"input {tensor.name!r:.80} is given twice")
        values = _unpack(tensor, raw[index]) if raw else _contents(tensor)
        if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) != len(values):
            raise UsageError(
                f"input {tensor.name!r:.80} has {len(values)} values, and its shape is "
                f"{list(tensor.shape)[:8]}"
            )
        found[tensor.name] = tensor, values
    return found


def write_output(
    response: pb.ModelInferResponse,
    name: str,
    shape: Sequence[int],
    values: Sequence[str] | Sequence[int],
    raw: bool,
) -> None:
    """Adds a tensor of strings or of int64 to an answer."""
    strings = [value.encode() for value in values if isinstance(value, str)]
    numbers = [value for value in values if isinstance(value, int)]
    tensor = response.outputs.add(name=name, datatype="BYTES" if strings else "INT64", shape=shape)
    if raw:
        packed = b"".join(_LENGTH.pack(len(s)) + s for s in strings)
        response.raw_output_contents.append(packed + struct.pack(f"<{len(numbers)}q", *numbers))
    else:
        tensor.contents.bytes_contents.extend(strings)
        tensor.contents.int64_contents.extend(numbers)


def _contents(tensor: Input) -> Values:
    if tensor.datatype == "BYTES":
        return list(tensor.contents.bytes_contents)
    if tensor.datatype in _NUMBERS:
        return list(getattr(tensor.contents, _NUMBERS[tensor.datatype][0]))
    raise _unknown_type(tensor)


def _unpack(tensor: Input, raw: bytes) -> Values:
    """Returns the values of raw bytes."""
    if tensor.datatype in _NUMBERS:
        code = _NUMBERS[tensor.datatype][1]
        if len(raw) % struct.calcsize(code):
            raise UsageError(f"input {tensor.name!r:.80}: {len(raw)} bytes are no {code} numbers")
        return [value for (value,) in struct.iter_unpack(f"<{code}", raw)]
    if tensor.datatype != "BYTES":
        raise _unknown_type(tensor)
    strings: list[bytes] = []
    place = 0
    while place < len(raw):
        if len(raw) - place < _LENGTH.size:
            raise UsageError(f"input {tensor.name!r:.80}: a string's length is cut off")
        (length,) = _LENGTH.unpack_from(raw, place)
        place += _LENGTH.size
        if len(raw) - place < length:
            raise UsageError(f"input {tensor.name!r:.80}: a string of {length} bytes is cut off")
        strings.append(raw[place : place + length])
        place += length
    return strings


def _unknown_type(tensor: Input) -> UsageError:
    return UsageError(
        f"input {tensor.name!r:.80} has the datatype {tensor.datatype!r:.80}; "
        f"use BYTES, {' or '.join(_NUMBERS)}"
    )
