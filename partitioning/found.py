"""What a search found: deployments, what they take, and what is missing where none will do.

    found.verdict, found.why
    found.best[0].steps(config, demand)["decode"].terms

No JAX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import StrEnum

from jaxserve.config import ModelConfig
from jaxserve.partitioning.demand import FULL, Demand, Serving
from jaxserve.partitioning.estimate import Coster, Estimate
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.points import Option


class Verdict(StrEnum):
    """Whether a load can be served, and if not, why."""

    OK = "ok"
    DOES_NOT_FIT = "does not fit"
    TOO_SLOW = "too slow"


@dataclass(frozen=True)
class Candidate:
    """A deployment and what it is estimated to do.

    Attributes:
        option: replicas, mesh, layouts and dtypes.
        batch: sequences of a replica; of the decoding ones where they are apart.
        group, chunk: prompts that prefill together, and tokens of each in a step.
        ttft_s, tpot_s: to the first token, and from one to the next, waiting included.
        tokens_per_s, requests_per_s: of the whole slice when it is full.
        usd_per_million: dollars for a million output tokens; None where prices are not known.
        free_bytes: of a device.
    """

    option: Option
    batch: int
    group: int
    chunk: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    requests_per_s: float
    usd_per_million: float | None
    free_bytes: float

    def steps(self, config: ModelConfig, demand: Demand) -> dict[str, Estimate]:
        """Returns the estimates of a prefill and of a decode step, of a stage where there are."""
        option = self.option
        config = stage_of(config, option.stages)
        both = option.serving is Serving.COLOCATED
        first = Coster.of(
            config,
            option.prefill,
            option.prefill_part,
            option.prefill_sizes,
            option.kept,
            option.decode if both else None,
        )
        later = Coster.of(
            config,
            option.decode,
            option.part,
            option.sizes,
            option.kept,
            option.prefill if both else None,
        )
        middle = demand.input_tokens + demand.output_tokens // 2
        before = (demand.input_tokens - self.chunk) // 2
        whole = demand.context_tokens
        decode = later.estimate(self.batch // option.stages, 1, middle, whole)
        prefill = first.estimate(self.group, self.chunk, before, demand.input_tokens)
        # The batches that are in other stages have keys and values here, too; and while some
        # prompts are read, all other sequences have theirs.
        kept = option.stages * decode.memory.kv_bytes
        decode = replace(decode, memory=replace(decode.memory, kv_bytes=kept))
        if both:
            prefill = replace(prefill, memory=replace(prefill.memory, kv_bytes=kept))
        return {"prefill": prefill, "decode": decode}


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        config, on, demand: what was asked.
        verdict: whether there is an answer.
        best: the best few, the best first.
        front: of all that will do, those that no other beats in both time per token and tokens
            per second, the fastest first.
        short: where there is no answer, what is missing: bytes of a device, or milliseconds, or
            requests per second.
        nearest: where there is no answer, the one that misses by the least.
        priced: deployments that were priced.
    """

    config: ModelConfig = field(repr=False)
    on: ChipSlice
    demand: Demand
    verdict: Verdict
    best: tuple[Candidate, ...]
    front: tuple[Candidate, ...]
    short: dict[str, float]
    nearest: Candidate | None
    priced: int

    @property
    def worst_miss(self) -> float:
        """Returns by what share the nearest deployment misses a limit; infinite where none fits."""
        one, demand = self.nearest, self.demand
        if one is None:
            return math.inf
        shares = [0.0]
        if demand.ttft_s is not None:
            shares.append(one.ttft_s / demand.ttft_s - 1)
        if demand.tpot_s is not None:
            shares.append(one.tpot_s / demand.tpot_s - 1)
        if demand.rate is not None:
            shares.append(demand.rate / (FULL * one.requests_per_s) - 1)
        return max(shares)

    @property
    def why(self) -> str:
        """Returns in words what is missing."""
        match self.verdict:
            case Verdict.OK:
                return ""
            case Verdict.DOES_NOT_FIT:
                missing, has = self.short["bytes"], self.short["device_bytes"]
                return (
                    f"does not fit: at best {(has + missing) / 1e9:,.2f} GB are needed on a device "
                    f"of {self.on.name}, which has {has / 1e9:,.2f} GB: {missing / 1e9:,.2f} GB "
                    "short; use more or larger chips, fewer tokens, or smaller dtypes"
                )
        parts = []
        if "ttft_ms" in self.short:
            parts.append(f"the first token comes {self.short['ttft_ms']:,.1f} ms too late")
        if "tpot_ms" in self.short:
            parts.append(f"a token takes {self.short['tpot_ms']:,.1f} ms too long")
        if "requests_per_s" in self.short:
            parts.append(f"{self.short['requests_per_s']:,.3f} requests/s short")
        return (
            f"too slow, at best: {', '.join(parts)}; it fits, but not within these limits: "
            "allow more, or use more or faster chips, or smaller dtypes"
        )


def stage_of(config: ModelConfig, stages: int) -> ModelConfig:
    """Returns the longest stage of a model whose layers are dealt out, pattern by pattern."""
    period = len(config.pattern)
    turns = -(-config.num_layers // period // stages)
    return replace(config, layers=config.layers[: turns * period])
