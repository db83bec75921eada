"""What is asked of a deployment, and what a search may choose from.

    demand = Demand(input_tokens=4000, output_tokens=500, tpot_s=0.05, rate=2.0)
    space = Space(batches=(1, 64), weights=(WEIGHTS["bfloat16"], WEIGHTS["int8"]))

No JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from jaxserve.config import ModelConfig
from jaxserve.errors import UsageError
from jaxserve.partitioning.dtypes import KV, WEIGHTS, Stored
from jaxserve.partitioning.layout import Ffn, Heads

FULL = 0.9
"""Share of its capacity at which a deployment is taken to be full (assumed)."""


class Objective(StrEnum):
    """What is best: the least dollars a token, the shortest request, or the most tokens."""

    COST = "cost"
    LATENCY = "latency"
    THROUGHPUT = "throughput"


class Serving(StrEnum):
    """Whether prefill and decode share chips."""

    COLOCATED = "colocated"
    DISAGGREGATED = "disaggregated"


@dataclass(frozen=True)
class Demand:
    """A load and the limits it is to be served within.

    Attributes:
        input_tokens, output_tokens: of a request.
        ttft_s, tpot_s: longest time to the first token, and from one to the next; None for any.
        rate: requests per second on the whole slice; None asks for what is possible.
        objective: what is best.
    """

    input_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    tpot_s: float | None = None
    rate: float | None = None
    objective: Objective = Objective.THROUGHPUT

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("ttft_s", "tpot_s", "rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(
                    f"{name}={value} must be positive and finite; leave it out for no limit"
                )

    @property
    def context_tokens(self) -> int:
        """Returns the tokens of a request at its end."""
        return self.input_tokens + self.output_tokens

    def check(self, config: ModelConfig) -> None:
        """Checks that the model can serve it.

        Raises:
            UsageError: requests are longer than the model's context.
        """
        if self.context_tokens > config.max_context_tokens:
            raise UsageError(
                f"{self.input_tokens} input and {self.output_tokens} output tokens are "
                f"{self.context_tokens}, and the model's context is {config.max_context_tokens}; "
                "ask for fewer, or plan a model with a longer context"
            )


@dataclass(frozen=True)
class Space:
    """What a search chooses from.

    Attributes:
        batches: least and most sequences of a replica.
        weights, kv: dtypes.
        prefill, decode: how projections are computed in each phase. Decode does not gather unless
            it is asked to: a step would wait for all weights to arrive.
        heads: how attention is cut.
        chunks: tokens of a prompt in one step; 0 takes all of them.
        serving: colocated, disaggregated or both.
        max_replicas: most copies of the model side by side.
        max_stages: most groups of layers, each on chips of its own, that a token goes through.
    """

    batches: tuple[int, int] = (1, 512)
    weights: tuple[Stored, ...] = (WEIGHTS["bfloat16"],)
    kv: tuple[Stored, ...] = (KV["bfloat16"],)
    prefill: tuple[Ffn, ...] = tuple(Ffn)
    decode: tuple[Ffn, ...] = (Ffn.WS1D, Ffn.WS2D)
    heads: tuple[Heads, ...] = tuple(Heads)
    chunks: tuple[int, ...] = (0, 512, 2048)
    serving: tuple[Serving, ...] = (Serving.COLOCATED,)
    max_replicas: int = 256
    max_stages: int = 1

    def __post_init__(self) -> None:
        low, high = self.batches
        if not 1 <= low <= high:
            raise UsageError(f"batch {low}:{high} must be LEAST:MOST with 1 <= LEAST <= MOST")
        for name in ("max_replicas", "max_stages"):
            if (value := getattr(self, name)) < 1:
                raise UsageError(f"{name}={value} must be at least 1")

    @property
    def batch_sizes(self) -> list[int]:
        """Returns the batches that are tried: powers of two within the bounds, and the bounds."""
        low, high = self.batches
        powers = (2**i for i in range(high.bit_length()))
        return sorted({low, high, *(n for n in powers if low <= n <= high)})

    def chunk_sizes(self, input_tokens: int) -> list[int]:
        """Returns the tokens of a prompt's step that are tried."""
        whole = input_tokens
        return sorted({chunk if 0 < chunk < whole else whole for chunk in self.chunks})
