"""Between the messages of `jaxserve.v1` and the types of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.message import Message

from jaxserve.errors import ContextLengthError, ModelNotFoundError, UsageError
from jaxserve.serving.answer import Answer, AnswerUsage, Delta
from jaxserve.serving.request import Completion, FinishReason, Request, SamplingParams, TokenLogprob
from jaxserve.serving.rpc.protos import inference_pb2 as pb
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service
from jaxserve.tokenizer import Tokenizer

FINISH_REASONS: dict[FinishReason, pb.FinishReason] = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


def sampling_params(message: pb.SamplingParams) -> SamplingParams:
    """Returns the parameters that a message sets; what it leaves out is undecided.

    Raises:
        UsageError: a value is out of range.
    """
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        if isinstance(value, bool | int | float):
            fields[field.name] = value
        else:
            fields[field.name] = dict(value) if field.name == "logit_bias" else tuple(value)
    return SamplingParams.create(**fields)


def check_limits(options: ServerOptions, params: SamplingParams) -> None:
    """Checks parameters against what the operator allows.

    Raises:
        UsageError: one exceeds it.
    """
    asked = {
        "n": (params.n, options.max_n),
        "logprobs": (params.logprobs or 0, options.max_logprobs),
        "prompt_logprobs": (params.prompt_logprobs or 0, options.max_logprobs),
    }
    for name, (value, most) in asked.items():
        if value > most:
            raise UsageError(f"{name}={value} is above what this server allows; use up to {most}")


def check_prompt(options: ServerOptions, num_tokens: int) -> None:
    """Checks a prompt's length against what the operator allows.

    Raises:
        ContextLengthError: it is longer.
    """
    if options.max_prompt_tokens is not None and num_tokens > options.max_prompt_tokens:
        raise ContextLengthError(
            f"a prompt of {num_tokens} tokens is longer than this server allows; shorten it to at "
            f"most {options.max_prompt_tokens}"
        )


def check_model(service: Service, name: str) -> None:
    """Checks that a model is the one that is served; an empty name is.

    Raises:
        ModelNotFoundError: it is another one.
    """
    if name not in ("", service.card.name):
        raise ModelNotFoundError(
            f"model {name!r:.80} is not served here; use {service.card.name!r}"
        )


def prompt_of(service: Service, request: Any) -> str | list[int]:
    """Returns the prompt of a message: text, or token ids, those of a chat too.

    Raises:
        UsageError: there is none.
    """
    kind = request.WhichOneof("prompt")
    if kind == "text":
        return request.text
    if kind == "tokens":
        return list(request.tokens.ids)
    if kind == "messages":
        said = [{"role": m.role, "content": m.content} for m in request.messages.messages]
        return service.intake.chat(said)
    kinds = " or ".join(field.name for field in request.DESCRIPTOR.oneofs_by_name["prompt"].fields)
    raise UsageError(f"the request has no prompt; set {kinds}")


def chunk(
    request: Request,
    delta: Delta,
    scores: Sequence[TokenLogprob | None] | None,
    tokenizer: Tokenizer | None,
) -> pb.GenerateResponse:
    """Returns what a sample gained, as one message of its stream.

    Args:
        scores: of the prompt, where they come with this message.
    """
    event = pb.Chunk(sample_index=delta.sample_index, text=delta.text, token_ids=delta.token_ids)
    if delta.logprobs:
        event.logprobs.extend(logprobs(delta.logprobs, tokenizer))
    if scores is not None:
        event.prompt_logprobs.extend(prompt_logprobs(request.prompt, scores, tokenizer))
    return pb.GenerateResponse(chunk=event)


def complete(delta: Delta, answer: Answer) -> pb.GenerateResponse:
    """Returns the end of a sample, as one message of its stream."""
    assert delta.finish_reason is not None
    event = pb.Complete(
        sample_index=delta.sample_index,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        usage=usage(answer.usage),
        seed=answer.seed,
    )
    return pb.GenerateResponse(complete=event)


def completion(index: int, done: Completion, tokenizer: Tokenizer | None) -> pb.Completion:
    """Returns a whole sample."""
    return pb.Completion(
        sample_index=index,
        text=done.text,
        token_ids=done.token_ids,
        logprobs=logprobs(done.logprobs or (), tokenizer),
        finish_reason=FINISH_REASONS[done.finish_reason],
    )


def usage(used: AnswerUsage) -> pb.Usage:
    """Returns what a request took so far."""
    return pb.Usage(
        prompt_tokens=used.prompt_tokens,
        cached_tokens=used.cached_tokens,
        output_tokens=used.completion_tokens,
        queue_ns=_ns(used.queue_s),
        prefill_ns=_ns(used.prefill_s),
        decode_ns=_ns(used.decode_s),
    )


def logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer | None) -> list[pb.TokenLogprob]:
    """Returns the log-probabilities of tokens."""
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            token=_bytes(tokenizer, entry.token_id),
            logprob=entry.logprob,
            top=[
                pb.TopLogprob(token_id=token, token=_bytes(tokenizer, token), logprob=logprob)
                for token, logprob in entry.top
            ],
        )
        for entry in entries
    ]


def prompt_logprobs(
    prompt: Sequence[int],
    entries: Sequence[TokenLogprob | None] | None,
    tokenizer: Tokenizer | None,
) -> list[pb.TokenLogprob]:
    """Returns the log-probabilities of a prompt's tokens, the first of which has none."""
    scored: list[pb.TokenLogprob] = []
    for token, entry in zip(prompt, entries or (), strict=False):
        if entry is None:
            scored.append(pb.TokenLogprob(token_id=token, token=_bytes(tokenizer, token)))
        else:
            scored += logprobs((entry,), tokenizer)
    return scored


def set_struct(struct: Message, values: dict[str, Any]) -> None:
    """Fills a `google.protobuf.Struct` with what such a message can hold."""
    struct.update(_plain(values))  # pyright: ignore[reportAttributeAccessIssue]


def _plain(value: Any) -> Any:
    """Returns a value in the types of JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _bytes(tokenizer: Tokenizer | None, token: int) -> bytes:
    return b"" if tokenizer is None else tokenizer.token_bytes(token)


def _ns(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1e9)
