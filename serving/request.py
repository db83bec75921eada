"""Messages between users and whatever generates for them. Pure: no JAX, no NumPy.

    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=64)

A `SamplingParams` is valid by construction; what is left `None` is decided later, by the
model's `generation_config.json` and then by neutral values (`resolved`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import msgspec

from jaxserve.errors import UsageError

FinishReason = Literal["stop", "length"]

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy."""

MAX_N = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 100.0


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
        logit_bias: token id -> added to its logit, clamped to +-100.
        seed: int64; None draws one, which is returned with the completion.
        max_tokens: longest completion; None takes the model's default, and without one whatever the
            caller has for it (`LLM` takes 128).
        min_tokens: no end-of-sequence and no stop token before this many tokens.
        stop: strings that end the completion, up to 16; they may span tokens, and lie wholly after
            the first `min_tokens` tokens.
        stop_token_ids: token ids that end the completion besides the model's own.
        ignore_eos: the model's end-of-sequence tokens do not end the completion.
        include_stop_str_in_output: the matched stop string stays in the text.
        skip_special_tokens: special tokens leave no text.
        logprobs: number of likeliest tokens whose log-probabilities are returned beside the
            chosen one's, 0 to 20; None returns none.
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
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

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
        msgspec.structs.force_setattr(self, "stop", _stops(self.stop))
        msgspec.structs.force_setattr(self, "stop_token_ids", _token_ids(self.stop_token_ids))
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


class Usage(msgspec.Struct, frozen=True):
    """Tokens that a request cost."""

    prompt_tokens: int
    completion_tokens: int

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


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A finished completion.

    Attributes:
        text: what was generated; a stop string is cut off unless asked for.
        token_ids: tokens behind the text, an ending stop token not included.
        finish_reason: "stop" (a stop string or token) or "length".
        seed: seed that gives the same completion again.
        usage: tokens of prompt and completion.
        logprobs: one entry per token id, where asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seed: int
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _stops(value: object) -> tuple[str, ...]:
    """Returns stop strings as a tuple, a single one too."""
    stops = [value] if isinstance(value, str) else _items("stop", value)
    if len(stops) > MAX_STOPS:
        raise UsageError(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    if any(not isinstance(s, str) or not s for s in stops):
        raise UsageError(f"stop={value!r} must hold strings of at least one character")
    return tuple(cast("list[str]", stops))


def _token_ids(value: object) -> tuple[int, ...]:
    ids = _items("stop_token_ids", value)
    if not all(map(_is_token, ids)):
        raise UsageError(f"stop_token_ids={value!r} must hold token ids (integers >= 0)")
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
    (
        "logprobs",
        f"a whole number from 0 to {MAX_LOGPROBS}",
        lambda v: isinstance(v, int) and 0 <= v <= MAX_LOGPROBS,
    ),
)
"""(field, range in words, check) of the numeric sampling parameters."""
