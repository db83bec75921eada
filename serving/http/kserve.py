"""The Open Inference Protocol (KServe, version 2) over HTTP, and its generate extension.

A request to `infer` has one input: `text_input`, BYTES, one prompt each; or `input_ids`, INT64 or
INT32, the tokens of one prompt. Its parameters are sampling parameters. The answer has
`text_output` and `finish_reason`, BYTES, one for each prompt, and for a single prompt `output_ids`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import jaxserve
from jaxserve.errors import UsageError
from jaxserve.serving.answer import Answer, Delta
from jaxserve.serving.http.bodies import convert, read
from jaxserve.serving.http.call import Call, call_of
from jaxserve.serving.http.errors import FieldError
from jaxserve.serving.http.generate import Site, respond
from jaxserve.serving.http.info import told
from jaxserve.serving.http.sampling import Prompts, check_model, sampling_params
from jaxserve.serving.http.schemas import Generation
from jaxserve.serving.http.stream import frame
from jaxserve.serving.intake import DEFAULT_MAX_TOKENS
from jaxserve.serving.request import MAX_PROMPTS, Completion, Request
from jaxserve.serving.service import State

VERSION = "1"
TEXT, TOKENS = "text_input", "input_ids"
OUTPUTS = {"text_output": "BYTES", "finish_reason": "BYTES", "output_ids": "INT64"}

_NO_PLACE = ("n", "logprobs", "prompt_logprobs", "return_token_ids", "stream", "stream_options")
_INTEGERS = ("INT32", "INT64")


class ServerMetadata(msgspec.Struct):
    """What the server is."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(msgspec.Struct):
    """A tensor that a model takes or gives."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class LiveBody(msgspec.Struct):
    """Whether the server need not be started again."""

    live: bool


class ReadyBody(msgspec.Struct):
    """Whether requests are taken."""

    ready: bool


class ModelReadyBody(msgspec.Struct):
    """Whether requests to a model are taken."""

    name: str
    ready: bool


class InputTensor(msgspec.Struct, forbid_unknown_fields=True):
    """An input."""

    name: Literal["text_input", "input_ids"]
    datatype: Literal["BYTES", "INT32", "INT64"]
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1, max_length=8)]
    data: list[Any]
    parameters: dict[str, Any] | None = None


class WantedOutput(msgspec.Struct, forbid_unknown_fields=True):
    """An output that is asked for."""

    name: Literal["text_output", "finish_reason", "output_ids"]
    parameters: dict[str, Any] | None = None


class InferRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Prompts in a tensor."""

    id: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[InputTensor], Meta(min_length=1, max_length=8)]
    outputs: Annotated[list[WantedOutput], Meta(max_length=8)] | None = None


class OutputTensor(msgspec.Struct):
    """An output."""

    name: str
    datatype: str
    shape: list[int]
    data: Sequence[Any]


class InferBody(msgspec.Struct):
    """Completions in tensors."""

    model_name: str
    model_version: str
    id: str
    outputs: list[OutputTensor]


class GenerateRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A prompt."""

    id: str | None = None
    text_input: str
    parameters: dict[str, Any] | None = None


class Details(msgspec.Struct):
    """What is known beside the text."""

    finish_reason: str | None
    seed: int
    prompt_tokens: int
    completion_tokens: int


class GenerateBody(msgspec.Struct):
    """A completion, or a piece of one in a stream."""

    id: str
    model_name: str
    model_version: str
    text_output: str
    details: Details | None


def server_live(site: Site) -> Response:
    """Returns whether the server need not be started again."""
    live = site.service.state is not State.DEAD
    return told(LiveBody(live), 200 if live else 503)


def server_ready(site: Site) -> Response:
    """Returns whether requests are taken."""
    ready = site.service.state is State.READY
    return told(ReadyBody(ready), 200 if ready else 503)


def server_metadata() -> Response:
    """Returns what the server is."""
    return told(ServerMetadata("jaxserve", jaxserve.__version__, ["generate"]))


def model_metadata(site: Site, name: str) -> Response:
    """Returns what a model takes and gives."""
    check_model(name, site.service.card.name)
    inputs = [TensorMetadata(TEXT, "BYTES", [-1]), TensorMetadata(TOKENS, "INT64", [-1])]
    outputs = [TensorMetadata(name, kind, [-1]) for name, kind in OUTPUTS.items()]
    return told(ModelMetadata(site.service.card.name, [VERSION], "jaxserve", inputs, outputs))


def model_ready(site: Site, name: str) -> Response:
    """Returns whether requests to a model are taken."""
    check_model(name, site.service.card.name)
    ready = site.service.state is State.READY
    return told(ModelReadyBody(site.service.card.name, ready), 200 if ready else 503)


async def infer(site: Site, http: HttpRequest, name: str) -> Response:
    """Returns the completions of one prompt or of several."""
    check_model(name, site.service.card.name)
    call = call_of(http)
    body = read(call.body, InferRequest)
    wanted = [output.name for output in body.outputs or ()] or list(OUTPUTS)
    prompts, shape = _prompts(body.inputs)
    requests = await _requests(site, call, prompts, body.parameters)
    form = _Tensors(site, body.id or call.request_id, wanted, shape)
    return await respond(site, http, requests, form, stream=False)


async def generate(site: Site, http: HttpRequest, name: str, stream: bool) -> Response:
    """Returns the completion of a prompt, at once or as a stream."""
    check_model(name, site.service.card.name)
    call = call_of(http)
    body = read(call.body, GenerateRequest)
    requests = await _requests(site, call, [body.text_input], body.parameters)
    form = _Text(site, body.id or call.request_id)
    return await respond(site, http, requests, form, stream=stream, end=b"")


async def _requests(
    site: Site, call: Call, prompts: Sequence[str | list[int]], parameters: dict[str, Any] | None
) -> list[Request]:
    fields = parameters or {}
    if refused := [name for name in _NO_PLACE if fields.get(name) is not None]:
        raise FieldError(
            f"{refused[0]}: this protocol has no place for it; leave it out",
            f"parameters.{refused[0]}",
        )
    sampling = convert(fields, Generation)
    params = sampling_params(sampling, site.options, max_tokens=sampling.max_tokens)
    making = Prompts(site.service.intake, site.options, call, sampling)
    return await making.requests(prompts, params, DEFAULT_MAX_TOKENS)


def _prompts(inputs: Sequence[InputTensor]) -> tuple[list[str | list[int]], list[int]]:
    """Returns the prompts of a request, and the shape in which they lie.

    Raises:
        FieldError: there is not one input of a known name and a fitting type and shape.
    """
    if len(inputs) != 1:
        raise FieldError(f"{len(inputs)} inputs: there must be one, {TEXT} or {TOKENS}", "inputs")
    (tensor,) = inputs
    data = _flat(tensor.data)
    if math.prod(tensor.shape) != len(data):
        raise FieldError(
            f"{tensor.name} has {len(data)} values, which do not fill shape {tensor.shape}",
            "inputs[0].shape",
        )
    if tensor.name == TOKENS:
        _check_type(tensor, _INTEGERS, all(type(value) is int for value in data))
        return [data], [1]
    _check_type(tensor, ("BYTES",), all(isinstance(value, str) for value in data))
    if not 1 <= len(data) <= MAX_PROMPTS:
        raise FieldError(f"{len(data)} prompts; send 1 to {MAX_PROMPTS} at once", "inputs[0].data")
    return data, tensor.shape


def _check_type(tensor: InputTensor, kinds: Sequence[str], fits: bool) -> None:
    if tensor.datatype not in kinds or not fits:
        raise FieldError(
            f"{tensor.name} must have the datatype {' or '.join(kinds)} and values of it, "
            f"not {tensor.datatype!r:.40}",
            "inputs[0].datatype",
        )


def _flat(data: Sequence[Any]) -> list[Any]:
    """Returns the values of a tensor that may be written as nested lists, row by row."""
    flat: list[Any] = []
    for value in data:
        flat.extend(_flat(value)) if isinstance(value, list) else flat.append(value)
    return flat


class _Tensors:
    """Writes completions into tensors."""

    def __init__(self, site: Site, id: str, wanted: Sequence[str], shape: list[int]) -> None:
        self._name, self._id, self._wanted, self._shape = (
            site.service.card.name,
            id,
            wanted,
            shape,
        )

    def chunk(self, position: int, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Is never called: tensors are not streamed."""
        raise UsageError("tensors are not streamed")

    def last(self, answers: Sequence[Answer]) -> bytes:
        """Returns nothing."""
        return b""

    def whole(self, answers: Sequence[Answer], done: Sequence[Sequence[Completion]]) -> bytes:
        """Returns the outputs that are wanted."""
        flat = [completion for (completion,) in done]
        values: dict[str, list[Any]] = {
            "text_output": [completion.text for completion in flat],
            "finish_reason": [completion.finish_reason for completion in flat],
        }
        shapes = dict.fromkeys(values, self._shape)
        if len(flat) == 1:
            values["output_ids"] = list(flat[0].token_ids)
            shapes["output_ids"] = [len(flat[0].token_ids)]
        outputs = [
            OutputTensor(name, OUTPUTS[name], shapes[name], values[name])
            for name in OUTPUTS
            if name in self._wanted and name in values
        ]
        return msgspec.json.encode(InferBody(self._name, VERSION, self._id, outputs))


class _Text:
    """Writes one completion, or its pieces."""

    def __init__(self, site: Site, id: str) -> None:
        self._name, self._id = site.service.card.name, id

    def chunk(self, position: int, answer: Answer, deltas: Sequence[Delta]) -> bytes:
        """Returns the text of a step, and the details at the end."""
        (delta,) = deltas
        if delta.finish_reason is None:
            return frame(self._body(delta.text, None)) if delta.text else b""
        return frame(self._body(delta.text, self._details(answer, delta.finish_reason)))

    def last(self, answers: Sequence[Answer]) -> bytes:
        """Returns nothing."""
        return b""

    def whole(self, answers: Sequence[Answer], done: Sequence[Sequence[Completion]]) -> bytes:
        """Returns the completion."""
        completion = done[0][0]
        return self._body(completion.text, self._details(answers[0], completion.finish_reason))

    def _body(self, text: str, details: Details | None) -> bytes:
        return msgspec.json.encode(GenerateBody(self._id, self._name, VERSION, text, details))

    def _details(self, answer: Answer, reason: str) -> Details:
        usage = answer.usage
        return Details(reason, answer.seed, usage.prompt_tokens, usage.completion_tokens)
