"""From arguments to messages, and the names of the calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from google.protobuf.message import Message

from jaxserve.errors import UsageError
from jaxserve.serving.rpc.protos import inference_pb2 as pb

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat."""


class Sampling(TypedDict, total=False):
    """The sampling parameters; `jaxserve.SamplingParams` describes them."""

    n: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    bad_words: Sequence[str]
    seed: int
    max_tokens: int
    min_tokens: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    logprobs: int
    prompt_logprobs: int


@dataclass(frozen=True)
class Method:
    """One method of the service.

    Attributes:
        path: by which gRPC finds it.
        answer: the type of its answer, or of each of them.
    """

    path: str
    answer: type[Message]


METHODS = {
    method.name: Method(
        f"/{method.containing_service.full_name}/{method.name}",
        getattr(pb, method.output_type.name),
    )
    for method in pb.DESCRIPTOR.services_by_name["Inference"].methods
}


def generate(
    prompt: Prompt, sampling: Mapping[str, Any], request_id: str, priority: int
) -> pb.GenerateRequest:
    """Returns a request for a completion.

    Raises:
        UsageError: an argument is of a type that the message cannot hold.
    """
    fields = {name: value for name, value in sampling.items() if value is not None}
    for name in ("stop", "bad_words"):
        if isinstance(fields.get(name), str):
            fields[name] = [fields[name]]
    try:
        request = pb.GenerateRequest(
            request_id=request_id, priority=priority, sampling=pb.SamplingParams(**fields)
        )
        _set_prompt(request, prompt)
    except (TypeError, ValueError) as error:
        raise UsageError(f"this cannot be sent: {error}") from error
    return request


def score(prompt: str | Sequence[int], num_top: int) -> pb.ScoreRequest:
    """Returns a request for log-probabilities."""
    request = pb.ScoreRequest(num_top=num_top)
    _set_prompt(request, prompt)
    return request


def tokenize(prompt: str | Sequence[Mapping[str, str]]) -> pb.TokenizeRequest:
    """Returns a request for the tokens of a text or a chat."""
    request = pb.TokenizeRequest()
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: Any, prompt: Prompt) -> None:
    """Puts a prompt into the field of its kind."""
    if isinstance(prompt, str):
        request.text = prompt
    elif len(prompt) == 0:
        raise UsageError("the prompt is empty; give text, token ids or messages")
    elif isinstance(prompt[0], Mapping):
        for said in cast("Sequence[Mapping[str, str]]", prompt):
            if said.keys() != {"role", "content"}:
                raise UsageError(f"a message has role and content, and not {sorted(said)}")
            request.messages.messages.add(role=said["role"], content=said["content"])
    else:
        request.tokens.ids.extend(cast("Sequence[int]", prompt))
