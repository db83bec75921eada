"""The Open Inference Protocol (KServe, version 2) over gRPC.

A request has one input: `text_input`, BYTES of any shape, one prompt each; or `input_ids`, INT64 or
INT32, the tokens of one prompt. Its parameters are fields of `SamplingParams`. The answer has
`text_output` and `finish_reason`, BYTES, one for each prompt, and for a single prompt `output_ids`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import jaxserve
from jaxserve.errors import NotFoundError, UsageError
from jaxserve.serving.answer import Answer
from jaxserve.serving.request import MAX_PROMPTS, Completion, Request, SamplingParams
from jaxserve.serving.rpc import convert
from jaxserve.serving.rpc.call import Call, Method
from jaxserve.serving.rpc.protos import open_inference_grpc_pb2 as pb
from jaxserve.serving.rpc.tensors import read_inputs, write_output
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service, State

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]

VERSION = "1"
TEXT, TOKENS = "text_input", "input_ids"
OUTPUTS = ("text_output", "finish_reason", "output_ids")

_LISTS = ("stop", "bad_words")
_REFUSED = ("n", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "stop_token_ids")


class OpenInference:
    """Answers the protocol's calls."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self._service = service
        self._options = options

    def methods(self) -> dict[str, Method]:
        """Returns what serves each method of the definition."""
        return {
            "ServerLive": self.server_live,
            "ServerReady": self.server_ready,
            "ModelReady": self.model_ready,
            "ServerMetadata": self.server_metadata,
            "ModelMetadata": self.model_metadata,
            "ModelInfer": self.model_infer,
        }

    async def server_live(self, message: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        """Returns whether the server need not be started again."""
        return pb.ServerLiveResponse(live=self._service.state is not State.DEAD)

    async def server_ready(
        self, message: pb.ServerReadyRequest, call: Call
    ) -> pb.ServerReadyResponse:
        """Returns whether requests are taken."""
        return pb.ServerReadyResponse(ready=self._service.state is State.READY)

    async def model_ready(self, message: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        """Returns whether requests to a model are taken."""
        self._check(message.name, message.version)
        return pb.ModelReadyResponse(ready=self._service.state is State.READY)

    async def server_metadata(
        self, message: pb.ServerMetadataRequest, call: Call
    ) -> pb.ServerMetadataResponse:
        """Returns what the server is."""
        return pb.ServerMetadataResponse(name="jaxserve", version=jaxserve.__version__)

    async def model_metadata(
        self, message: pb.ModelMetadataRequest, call: Call
    ) -> pb.ModelMetadataResponse:
        """Returns the tensors that a model takes and gives."""
        self._check(message.name, message.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=self._service.card.name,
            versions=[VERSION],
            platform="jaxserve",
            inputs=[
                tensor(name=TEXT, datatype="BYTES", shape=[-1]),
                tensor(name=TOKENS, datatype="INT64", shape=[-1]),
            ],
            outputs=[
                tensor(name=name, datatype=datatype, shape=[-1])
                for name, datatype in zip(OUTPUTS, ("BYTES", "BYTES", "INT64"), strict=True)
            ],
            properties={"architecture": self._service.card.architecture},
        )

    async def model_infer(self, message: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        """Returns the completions of one prompt or of several."""
        self._check(message.model_name, message.model_version)
        wanted = [output.name for output in message.outputs] or list(OUTPUTS)
        if unknown := set(wanted) - set(OUTPUTS):
            raise UsageError(f"there is no output {min(unknown)!r:.80}; use {', '.join(OUTPUTS)}")
        requests, shape = await asyncio.to_thread(self._requests, message, call)
        done = await self._all(requests, call)
        response = pb.ModelInferResponse(
            model_name=self._service.card.name, model_version=VERSION, id=call.request_id
        )
        raw = bool(message.raw_input_contents)
        if "text_output" in wanted:
            write_output(response, "text_output", shape, [one.text for one in done], raw)
        if "finish_reason" in wanted:
            write_output(response, "finish_reason", shape, [one.finish_reason for one in done], raw)
        if "output_ids" in wanted and len(done) == 1:
            ids = done[0].token_ids
            write_output(response, "output_ids", [len(ids)], ids, raw)
        return response

    def _requests(
        self, message: pb.ModelInferRequest, call: Call
    ) -> tuple[list[Request], list[int]]:
        """Returns the requests of a message, and the shape in which they lie."""
        params = sampling_params(message.parameters)
        inputs = read_inputs(message)
        if len(inputs) != 1 or not inputs.keys() <= {TEXT, TOKENS}:
            raise UsageError(
                f"inputs {sorted(inputs)!r:.200}: there must be one, {TEXT} or {TOKENS}"
            )
        ((name, (tensor, values)),) = inputs.items()
        prompts = [_text(value) for value in values] if name == TEXT else [values]
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise UsageError(f"{len(prompts)} prompts; a request takes 1 to {MAX_PROMPTS}")
        requests = [
            self._service.intake.request(
                prompt,  # pyright: ignore[reportArgumentType]  # checked there
                params,
                id=call.engine_id() + (f".{index}" if index else ""),
                client=call.caller.name,
                salt=call.caller.salt,
            )
            for index, prompt in enumerate(prompts)
        ]
        for request in requests:
            convert.check_prompt(self._options, len(request.prompt))
        return requests, list(tensor.shape) if name == TEXT else [1]

    async def _all(self, requests: Sequence[Request], call: Call) -> list[Completion]:
        """Returns the completions of all requests; one that fails ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(one, call)) for one in requests]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _complete(self, request: Request, call: Call) -> Completion:
        async with await Answer.open(self._service, request, call.time_left_s()) as answer:
            (done,) = await answer.completions()
            return done

    def _check(self, name: str, version: str) -> None:
        convert.check_model(self._service, name)
        if version not in ("", VERSION):
            raise NotFoundError(f"version {version!r:.80} is not served; use {VERSION}")


def sampling_params(parameters: Mapping[str, pb.InferParameter]) -> SamplingParams:
    """Returns the sampling parameters of a request.

    Raises:
        UsageError: one has no meaning here, or a value that is out of range.
    """
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise UsageError(f"parameter {name!r:.80} has no value")
        if name in _REFUSED:
            raise UsageError(f"parameter {name}: this protocol has no place for it; leave it out")
        value = getattr(parameter, kind)
        fields[name] = (value,) if name in _LISTS else value  # a list of one
    return SamplingParams.create(**fields)


def _text(value: object) -> str:
    """Returns the text of a value of a BYTES tensor."""
    try:
        return value.decode() if isinstance(value, bytes) else _no_text(value)
    except UnicodeDecodeError:
        raise UsageError(f"{TEXT} is not UTF-8") from None


def _no_text(value: object) -> str:
    raise UsageError(f"{TEXT} holds {value!r:.80}; it must have the datatype BYTES")
