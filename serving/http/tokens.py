"""`/tokenize` and `/detokenize`: text to tokens and back."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxserve.errors import TokenizerError
from jaxserve.serving.http.bodies import read
from jaxserve.serving.http.call import call_of
from jaxserve.serving.http.errors import JSON, FieldError
from jaxserve.serving.http.generate import Site
from jaxserve.serving.http.sampling import aside, check_model, plain_messages, template
from jaxserve.serving.http.schemas import DetokenizeRequest, TokenizeRequest


class TokenizeBody(msgspec.Struct):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeBody(msgspec.Struct):
    """The text of tokens."""

    prompt: str


async def tokenize(site: Site, http: HttpRequest) -> Response:
    """Returns the tokens of a text, or of a conversation."""
    body = read(call_of(http).body, TokenizeRequest)
    check_model(body.model, site.service.card.name)
    if (body.prompt is None) == (body.messages is None):
        raise FieldError("give either prompt or messages", "prompt")
    size = len(body.prompt or "") + sum(
        len(turn["content"]) for turn in plain_messages(body.messages or [])
    )
    data = await aside(size, _tokenized, site, body)
    return Response(data, media_type=JSON)


async def detokenize(site: Site, http: HttpRequest) -> Response:
    """Returns the text of tokens."""
    body = read(call_of(http).body, DetokenizeRequest)
    check_model(body.model, site.service.card.name)
    intake = site.service.intake
    if intake.tokenizer is None:
        raise TokenizerError("this model has no tokenizer")
    intake.check_ids(body.tokens)
    decode = intake.tokenizer.decode
    text = await aside(len(body.tokens), decode, body.tokens, body.skip_special_tokens)
    return Response(msgspec.json.encode(DetokenizeBody(text)), media_type=JSON)


def _tokenized(site: Site, body: TokenizeRequest) -> bytes:
    intake = site.service.intake
    if intake.tokenizer is None:
        raise TokenizerError("this model has no tokenizer")
    if body.messages is not None:
        turns = plain_messages(body.messages)
        ids = template(intake, turns, add_generation_prompt=body.add_generation_prompt)
    else:
        ids = intake.tokenizer.encode(body.prompt or "", body.add_special_tokens)
    names = [site.names.name(token) for token in ids] if body.return_token_strs else None
    card = site.service.card
    return msgspec.json.encode(TokenizeBody(len(ids), card.max_context_tokens, ids, names))
