"""Synthetic requests whose lengths are spread as those of people's conversations with a chatbot.

    trace = make_trace(TraceSpec(requests=200, seed=0, vocab_size=2048, context=2048, rate=4.0))
    trace[0].prompt, trace[0].output_tokens, trace[0].due_s

Lengths of prompts and outputs are log-normal, after the ShareGPT conversations:

- means of 161.31 prompt and 337.99 output tokens. Source: Kwon et al. 2023, "Efficient Memory
  Management for Large Language Model Serving with PagedAttention", figure 11.
- spreads from medians and 90th percentiles of 1730 and 5696 prompt tokens, 415 and 834 output
  tokens. Source: Agrawal et al. 2024, "Taming Throughput-Latency Tradeoff in LLM Inference with
  Sarathi-Serve", table 2 (there a prompt holds the conversation so far, hence its own means).

Prompts are uniform random ids, so no two share a page and a prefix cache cannot help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxserve.errors import UsageError

MIN_PROMPT_TOKENS = 4
FIRST_ID = 3
"""Ids below are what many vocabularies keep for padding, begin and end."""

Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""


@dataclass(frozen=True)
class LogNormal:
    """Lengths whose logarithm is normal.

    Attributes:
        mean: mean length, tokens.
        median, p90: any two lengths with the distribution's ratio of 90th percentile to median.
    """

    mean: float
    median: float
    p90: float

    @property
    def sigma(self) -> float:
        """Returns the standard deviation of the logarithm."""
        return math.log(self.p90 / self.median) / Z90

    def draw(self, rng: np.random.Generator, count: int, scale: float) -> np.ndarray:
        """Returns float64[count] lengths with `scale` times the mean, not rounded."""
        # mean = exp(mu + sigma^2 / 2)
        mu = math.log(self.mean * scale) - self.sigma**2 / 2
        return rng.lognormal(mu, self.sigma, count)


SHAREGPT_PROMPT = LogNormal(mean=161.31, median=1730, p90=5696)
SHAREGPT_OUTPUT = LogNormal(mean=337.99, median=415, p90=834)


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """What fixes a trace, to the last token.

    Attributes:
        requests: how many.
        seed: of lengths, tokens and arrivals, each with a stream of its own: another rate changes
            neither lengths nor tokens.
        vocab_size: ids are drawn below it.
        context: most tokens of prompt and output together. A prompt is clipped to half of it, an
            output to what is left.
        rate: mean arrivals per second of a Poisson process; None: all requests are there at once.
        scale: factor on both mean lengths.
        prompt_tokens, output_tokens: lengths of every request, instead of drawn ones.
        variant: another one has other tokens, and nothing else differs; for a prefix cache that
            would know the prompts of an earlier run.
    """

    requests: int
    seed: int
    vocab_size: int
    context: int
    rate: float | None = None
    scale: float = 1.0
    variant: int = 0
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    def __post_init__(self) -> None:
        checks = (
            ("requests", self.requests, self.requests >= 1, "a whole number >= 1"),
            ("seed", self.seed, self.seed >= 0, "a whole number >= 0"),
            ("variant", self.variant, self.variant >= 0, "a whole number >= 0"),
            ("scale", self.scale, 0 < self.scale < math.inf, "a number above 0"),
            (
                "rate",
                self.rate,
                self.rate is None or 0 < self.rate < math.inf,
                "a number above 0, or left out for all requests at once",
            ),
            (
                "vocab_size",
                self.vocab_size,
                self.vocab_size > FIRST_ID,
                f"a whole number >= {FIRST_ID + 1}",
            ),
            (
                "context",
                self.context,
                self.context >= 2 * MIN_PROMPT_TOKENS,
                f"a whole number >= {2 * MIN_PROMPT_TOKENS}",
            ),
        )
        for name, value, holds, allowed in checks:
            if not holds:
                raise UsageError(f"{name}={value!r} is out of range; it must be {allowed}")
        least = MIN_PROMPT_TOKENS if self.prompt_tokens is None else self.prompt_tokens
        given = least, 1 if self.output_tokens is None else self.output_tokens
        if min(given) < 1 or sum(given) > self.context:
            raise UsageError(
                f"prompt_tokens={self.prompt_tokens} and output_tokens={self.output_tokens} must "
                f"be at least 1 and together at most context={self.context}"
            )


@dataclass(frozen=True)
class TraceRequest:
    """One request: its prompt, the number of tokens it asks for, and when it is due."""

    prompt: tuple[int, ...]
    output_tokens: int
    due_s: float


def make_trace(spec: TraceSpec) -> list[TraceRequest]:
    """Returns the requests in the order they are due, the first at 0 s."""
    lengths, tokens, arrivals = (np.random.default_rng([spec.seed, k]) for k in range(3))
    if spec.variant:
        tokens = np.random.default_rng([spec.seed, 1, spec.variant])
    drawn = SHAREGPT_PROMPT.draw(lengths, spec.requests, spec.scale)
    prompts = np.clip(np.rint(drawn), MIN_PROMPT_TOKENS, spec.context // 2).astype(int)
    if spec.prompt_tokens is not None:
        prompts[:] = spec.prompt_tokens
    if spec.output_tokens is not None:
        prompts = np.minimum(prompts, spec.context - spec.output_tokens)
    drawn = SHAREGPT_OUTPUT.draw(lengths, spec.requests, spec.scale)
    outputs = np.clip(np.rint(drawn), 1, spec.context - prompts).astype(int)
    if spec.output_tokens is not None:
        outputs[:] = spec.output_tokens
    due = np.zeros(spec.requests)
    if spec.rate is not None:
        due[1:] = np.cumsum(arrivals.exponential(1 / spec.rate, spec.requests - 1))
    return [
        TraceRequest(
            tuple(tokens.integers(FIRST_ID, spec.vocab_size, prompt).tolist()),
            int(output),
            float(at),
        )
        for prompt, output, at in zip(prompts, outputs, due, strict=True)
    ]
