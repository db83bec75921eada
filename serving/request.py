"""Messages between users and whatever generates for them. Pure: no JAX, no NumPy.

    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=64)

A `SamplingParams` is valid by construction; what is left `None` is decided later, by the
model's `generation_config.json` and then by neutral values (`resolved`). A `Request` is a prompt
in tokens with everything decided; `TokenEvent`s answer it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import msgspec

from jaxserve.errors import UsageError

FinishReason = Literal["stop", "length", "abort", "error"]

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy."""

MAX_N = 128
MAX_PROMPTS = 128  # of one call
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 64
MAX_STOP_IDS = 128  # with the model's own
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 32
MAX_BAD_WORD_FORMS = 2 * MAX_BAD_WORDS  # a word alone, and after a space
MAX_BAD_WORD_TOKENS = 8


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are chosen and when a completion ends.

    Attributes:
        n: completions per prompt; 1 when greedy.
        temperature: 0 (greedy) to 2; None takes the model's default.
        top_k: number of likeliest tokens kept; 0 keeps all.
        top_p: smallest set of likeliest tokens with this probability is kept; (0, 1].
        min_p: tokens below this fraction of the likeliest one's probability are dropped; [0, 1].
        repetition_penalty: divides positive logits of tokens seen in prompt or output, multiplies
            negative ones; [1e-6, 1e6].
        presence_penalty: subtracted once from logits of tokens in the output; [-2, 2].
        frequency_penalty: subtracted per occurrence in the output; [-2, 2].
        logit_bias: token id -> added to its logit, clamped to +-100; up to 1024 tokens.
        allowed_token_ids: no other token is taken, up to 1024; empty allows all.
        bad_words: words, up to 32, whose own tokens never appear in the output, neither those of
            the word alone nor those of the word after a space; the same text spelled with other
            tokens may.
        seed: int64; None draws one, which is returned with the completion.
        max_tokens: longest completion; None takes the model's default, and without one whatever the
            caller has for it (`LLM` takes 128).
        min_tokens: no end-of-sequence and no stop token before this many tokens.
        stop: strings that end the completion, up to 16; they may span tokens, and lie wholly after
            the first `min_tokens` tokens.
        stop_token_ids: token ids that end the completion besides the model's own, up to 64.
        ignore_eos: the model's end-of-sequence tokens do not end the completion.
        include_stop_str_in_output: the matched stop string stays in the text.
        skip_special_tokens: special tokens leave no text.
        logprobs: number of likeliest tokens whose log-probabilities are returned beside the
            chosen one's, 0 to 20; None returns none.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    n: int = 1
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, allowed, holds in _RANGES:
            value = getattr(self, name)
            undecided = value is None and name not in _NEVER_NONE
            if not undecided and not (_is_number(value) and holds(value)):
                raise UsageError(f"{name}={value!r} is out of range; it must be {allowed}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(
                    f"{name}={getattr(self, name)!r} is not a switch; use True or False"
                )
        msgspec.structs.force_setattr(self, "stop", _strings("stop", self.stop, MAX_STOPS))
        bad_words = _strings("bad_words", self.bad_words, MAX_BAD_WORDS)
        msgspec.structs.force_setattr(self, "bad_words", bad_words)
        for name, most in (
            ("stop_token_ids", MAX_STOP_TOKENS),
            ("allowed_token_ids", MAX_ALLOWED_TOKENS),
        ):
            ids = _token_ids(name, getattr(self, name), most)
            msgspec.structs.force_setattr(self, name, ids)
        msgspec.structs.force_setattr(self, "logit_bias", _clamped(self.logit_bias))
        if self.n > 1 and self.temperature is not None and self.greedy:
            raise UsageError(
                f"n={self.n} with temperature 0 gives {self.n} equal completions (where a request "
                "names no temperature it is the model's); use n=1 or a temperature above 0"
            )
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise UsageError(
                f"min_tokens={self.min_tokens} exceeds max_tokens={self.max_tokens}; raise "
                "max_tokens or lower min_tokens"
            )

    @classmethod
    def create(cls, **fields: Any) -> SamplingParams:
        """Returns parameters from keywords.

        Raises:
            UsageError: a keyword is not a field; the message names it and the fields.
        """
        known = cls.__struct_fields__
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise UsageError(
                f"{', '.join(unknown)}: no such sampling parameter; use {', '.join(known)}"
            )
        return cls(**fields)

    @property
    def greedy(self) -> bool:
        """Returns whether the likeliest token is always taken."""
        return self.temperature is not None and self.temperature < GREEDY_BELOW

    def resolved(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Returns these parameters with every None of a sampling field decided.

        Args:
            defaults: the model's own values (generation_config.json), by field name.
        """
        neutral = {
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "min_tokens": 0,
        }
        chosen = {
            name: defaults.get(name, value)
            for name, value in neutral.items()
            if getattr(self, name) is None
        }
        if self.max_tokens is None and "max_tokens" in defaults:
            chosen["max_tokens"] = defaults["max_tokens"]
        return msgspec.structs.replace(self, **chosen)


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt in tokens, with everything decided that generation needs.

    Attributes:
        id: name, unique among the open requests.
        prompt: token ids, at least one.
        params: resolved, with seed and max_tokens.
        stop_ids: tokens that end a completion: the model's own and those of the parameters, up to
            128.
        bad_word_ids: token sequences that are never completed, up to 64 of 1 to 8 tokens; two for
            each of the parameters' `bad_words`.
        priority: lower goes first.
        client: whose share of the machine this takes, under fair queueing.
        salt: prompts share cached pages only with those of the same salt.
        beam_width: above 1 the request is a beam search of this many beams.
        length_penalty: of a beam search, the power of the length that a hypothesis' summed
            log-probability is divided by; above 0 favours long hypotheses.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    client: str = ""
    salt: str = ""
    beam_width: int = 1
    length_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("prompt has no tokens; it must have at least 1")
        if set(map(type, self.prompt)) != {int}:
            raise UsageError("prompt must hold token ids (integers >= 0)")
        for token in (min(self.prompt), max(self.prompt)):
            if not 0 <= token < 2**31:
                raise UsageError(f"prompt holds {token}; token ids are from 0 to {2**31 - 1}")
        for name in ("seed", "max_tokens"):
            if getattr(self.params, name) is None:
                raise UsageError(f"{name}=None is undecided; a request needs {name} in its params")
        if len(self.stop_ids) > MAX_STOP_IDS:
            raise UsageError(
                f"stop_ids has {len(self.stop_ids)} tokens; at most {MAX_STOP_IDS} are allowed"
            )
        if len(self.bad_word_ids) > MAX_BAD_WORD_FORMS:
            raise UsageError(
                f"bad_words are {len(self.bad_word_ids)} token sequences (bad_word_ids); "
                f"at most {MAX_BAD_WORD_FORMS} are allowed"
            )
        for word in self.bad_word_ids:
            if not 1 <= len(word) <= MAX_BAD_WORD_TOKENS:
                raise UsageError(
                    f"bad_words: one of bad_word_ids has {len(word)} tokens; "
                    f"it must have 1 to {MAX_BAD_WORD_TOKENS}"
                )
        if not 1 <= self.beam_width <= MAX_N:
            raise UsageError(
                f"beam_width={self.beam_width} is out of range; "
                f"it must be a whole number from 1 to {MAX_N}"
            )
        if not math.isfinite(self.length_penalty):
            raise UsageError(f"length_penalty={self.length_penalty} is no finite number; use 1.0")
        if self.beam_width > 1 and self.params.n > 1:
            raise UsageError(
                f"beam_width={self.beam_width} with n={self.params.n}: a beam search is one "
                "sample; use n=1"
            )


class Usage(msgspec.Struct, frozen=True):
    """Tokens that a request cost.

    Attributes:
        prompt_tokens: tokens of the prompt, the cached ones included.
        completion_tokens: tokens that were generated.
        cached_tokens: tokens of the prompt that the prefix cache held.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Returns prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens


class TokenLogprob(msgspec.Struct, frozen=True):
    """Log-probability of a chosen token, before penalties and temperature.

    Attributes:
        token_id: the chosen token.
        logprob: its natural log-probability.
        top: (token id, log-probability) of the likeliest tokens, likeliest first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class RequestTimes(msgspec.Struct, frozen=True):
    """Where the time of a request went, in seconds.

    Attributes:
        queue_s: until it got a slot.
        prefill_s: from there to its first token.
        decode_s: from there to the newest token of a sample.
    """

    queue_s: float
    prefill_s: float
    decode_s: float = 0.0


class TokenEvent(msgspec.Struct, frozen=True):
    """New tokens of one completion, or its end, or both.

    Attributes:
        request_id: of the request.
        sample_index: which of its `n` completions.
        token_ids: new tokens, in order.
        finish_reason: set on the last event of a completion.
        logprobs: one entry per token id, where asked for.
        cached_tokens: tokens of the prompt that the prefix cache held.
        error: why it failed, where the finish reason is "error".
        stop_token: the last token id is a stop token, which ended the completion.
        prompt_logprobs: on the first event, one entry per token of the prompt, the first None.
        times: on the first event of the request, and on the last one of a completion.
    """

    request_id: str
    sample_index: int
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    cached_tokens: int = 0
    error: str | None = None
    stop_token: bool = False
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    times: RequestTimes | None = None


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished completion.

    Attributes:
        text: what was generated; a stop string is cut off unless asked for.
        token_ids: tokens behind the text, an ending stop token not included.
        finish_reason: "stop" (a stop string or token) or "length".
        seed: seed that gives the same completion again.
        usage: tokens of prompt and completion.
        logprobs: one entry per token id, where asked for.
        prompt_logprobs: one entry per token of the prompt, the first None, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _strings(name: str, value: object, most: int) -> tuple[str, ...]:
    """Returns strings as a tuple, a single one too."""
    strings = [value] if isinstance(value, str) else _items(name, value)
    if len(strings) > most:
        raise UsageError(f"{name} has {len(strings)} strings; at most {most} are allowed")
    if any(not isinstance(s, str) or not s for s in strings):
        raise UsageError(f"{name}={value!r} must hold strings of at least one character")
    return tuple(cast("list[str]", strings))


def _token_ids(name: str, value: object, most: int) -> tuple[int, ...]:
    ids = _items(name, value)
    if len(ids) > most:
        raise UsageError(f"{name} has {len(ids)} token ids; at most {most} are allowed")
    if not all(map(_is_token, ids)):
        raise UsageError(f"{name}={value!r} must hold token ids (integers >= 0)")
    return tuple(cast("list[int]", ids))


def _items(name: str, value: object) -> list[object]:
    if not isinstance(value, list | tuple):
        raise UsageError(f"{name}={value!r} must be a list")
    return list(cast("list[object]", value))


def _clamped(value: object) -> dict[int, float]:
    """Returns a logit bias with its numbers brought into the limits."""
    if not isinstance(value, dict):
        raise UsageError(f"logit_bias={value!r} must map token ids to numbers")
    bias = cast("dict[int, float]", value)
    if len(bias) > MAX_BIASED_TOKENS:
        raise UsageError(
            f"logit_bias has {len(bias)} token ids; at most {MAX_BIASED_TOKENS} are allowed"
        )
    for token, number in bias.items():
        if not (_is_token(token) and _is_number(number) and not math.isnan(number)):
            raise UsageError(
                f"logit_bias holds {token!r}: {number!r}; "
                "it maps token ids (integers >= 0) to numbers"
            )
    limit = MAX_LOGIT_BIAS
    return {t: max(-limit, min(limit, float(b))) for t, b in bias.items()}


_NEVER_NONE = ("n", "presence_penalty", "frequency_penalty")
_SWITCHES = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")

_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("n", f"a whole number from 1 to {MAX_N}", lambda v: isinstance(v, int) and 1 <= v <= MAX_N),
    ("temperature", "from 0 to 2", lambda v: 0 <= v <= 2),
    ("top_k", "0 (off) or a whole number >= 1", lambda v: isinstance(v, int) and v >= 0),
    ("top_p", "above 0, at most 1", lambda v: 0 < v <= 1),
    ("min_p", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("repetition_penalty", "from 1e-6 to 1e6", lambda v: 1e-6 <= v <= 1e6),
    ("presence_penalty", "from -2 to 2", lambda v: -2 <= v <= 2),
    ("frequency_penalty", "from -2 to 2", lambda v: -2 <= v <= 2),
    ("seed", "an int64", lambda v: isinstance(v, int) and -(2**63) <= v < 2**63),
    ("max_tokens", "a whole number >= 1", lambda v: isinstance(v, int) and v >= 1),
    ("min_tokens", "a whole number >= 0", lambda v: isinstance(v, int) and v >= 0),
    *(
        (
            name,
            f"a whole number from 0 to {MAX_LOGPROBS}",
            lambda v: isinstance(v, int) and 0 <= v <= MAX_LOGPROBS,
        )
        for name in ("logprobs", "prompt_logprobs")
    ),
)
"""(field, range in words, check) of the numeric sampling parameters."""
