"""How an engine is sized: what a person may set, and what follows from it for a model.

    options = EngineOptions(max_sequences=64)
    geometry = size_cache(config, options, "bfloat16", kv_bytes=4 << 30)      # CacheGeometry
    scheduler_config(options, geometry, config.max_context_tokens)         # SchedulerConfig

What is not set follows from the model and the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxserve.config import CacheGroup, ModelConfig
from jaxserve.errors import UsageError
from jaxserve.serving.pages import table_width
from jaxserve.serving.scheduler import GroupLimits, SchedulerConfig

if TYPE_CHECKING:  # what a person may set is read by processes without JAX
    from jaxserve.serving.kv_cache import CacheGeometry, GroupGeometry

DEFAULT_KV_BYTES = 1 << 30
"""Room for keys and values where neither the user nor the device names one."""

MAX_HISTORY_TOKENS = 1 << 17


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a person may set of an engine; `docs/engine.md` says what each costs.

    Attributes:
        max_sequences: sequences that run at once.
        max_step_tokens: tokens of one step; a longer prompt is read in chunks.
        page_size: tokens in a page of keys and values: a power of two from 8 to 256.
        kv_bytes: memory for keys and values, of which no more is taken than all sequences can use;
            None takes what the device has left, and 1 GiB on a CPU.
        prefix_cache: prompts share the pages of equal beginnings.
        policy: who is served first: "fcfs" (oldest first) or "fair" (equal shares by client).
        client_weights: shares of clients under "fair", by name; 1 where not named.
        max_prefill_tokens: most prompt tokens of one sequence in a step; None takes
            `max_step_tokens`.
        max_queued_requests, max_queued_tokens: longest queue.
        max_in_flight: steps that may be under way; 1 waits for each.
        strict: a step that has to be compiled after `warm_up` is an error.
    """

    max_sequences: int = 32
    max_step_tokens: int = 512
    page_size: int = 16
    kv_bytes: int | None = None
    prefix_cache: bool = True
    policy: str = "fcfs"
    client_weights: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)
    max_prefill_tokens: int | None = None
    max_queued_requests: int = 4096
    max_queued_tokens: int = 4_000_000
    max_in_flight: int = 2
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_sequences < 1:
            raise UsageError(f"max_sequences={self.max_sequences} must be at least 1")
        if self.page_size not in (8, 16, 32, 64, 128, 256):
            raise UsageError(
                f"page_size={self.page_size} is not a power of two from 8 to 256; use 16"
            )
        least = max(16, self.max_sequences + 1)
        if self.max_step_tokens < least:
            raise UsageError(
                f"max_step_tokens={self.max_step_tokens} leaves no room beside "
                f"max_sequences={self.max_sequences}; use at least {least}"
            )
        if self.policy not in ("fcfs", "fair"):
            raise UsageError(f"policy={self.policy!r} is unknown; use fcfs or fair")
        object.__setattr__(self, "client_weights", dict(self.client_weights))
        for client, weight in self.client_weights.items():
            if not 0 < weight < math.inf:
                raise UsageError(f"client_weights[{client!r}]={weight} must be above 0, and finite")
        if self.client_weights and self.policy != "fair":
            raise UsageError(f"client_weights have no effect with policy={self.policy}; use fair")
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise UsageError(f"max_prefill_tokens={self.max_prefill_tokens} must be at least 1")
        if self.max_in_flight < 1:
            raise UsageError(f"max_in_flight={self.max_in_flight} must be at least 1")


def of_one_shard(options: EngineOptions, num_shards: int) -> EngineOptions:
    """Returns the options of one of the shards among which sequences are divided evenly."""
    sequences = -(-options.max_sequences // num_shards)
    tokens = max(16, sequences + 1, -(-options.max_step_tokens // num_shards))
    return replace(options, max_sequences=sequences, max_step_tokens=tokens)


def size_cache(
    config: ModelConfig, options: EngineOptions, dtype: str, kv_bytes: int, stripes: int = 1
) -> CacheGeometry:
    """Returns the pool for a model: as many tokens as fit, at most what all slots can use.

    Args:
        dtype: element type of keys and values.
        kv_bytes: room for the pool.
        stripes: devices over which every page is cut, each with such room.

    Raises:
        UsageError: a page does not divide over the stripes.
        UsageError: the room does not hold one sequence of the model's full context.
    """
    from jaxserve.serving.kv_cache import CacheGeometry

    if options.page_size % stripes:
        raise UsageError(
            f"page_size={options.page_size} does not divide over {stripes} devices along x; use a "
            "larger page_size or a smaller x"
        )
    groups = config.cache_groups(dtype)
    context = config.max_context_tokens

    def geometry(tokens: int) -> CacheGeometry:
        return CacheGeometry(
            options.page_size, tuple(_group(g, tokens, context, options) for g in groups), stripes
        )

    windows = [
        table_width(
            options.page_size, None, options.max_step_tokens, g.spec.window, g.spec.sink_tokens
        )
        for g in groups
        if g.spec.window is not None
    ]
    if len(windows) == len(groups):  # however long the sequence, no more is kept
        context = min(context, max(windows) * options.page_size)
    least = geometry(context).num_bytes
    if least > kv_bytes:
        raise UsageError(
            f"kv_bytes={kv_bytes:,} cannot hold one sequence of {context:,} tokens, which takes "
            f"{least:,} bytes; raise kv_bytes or shorten the model's context"
        )
    low, high = context, options.max_sequences * context
    while low < high:  # the largest number of tokens whose pool fits
        middle = (low + high + 1) // 2
        fits = geometry(middle).num_bytes <= kv_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return geometry(low)


def _group(group: CacheGroup, tokens: int, context: int, options: EngineOptions) -> GroupGeometry:
    """Returns a group's share of a pool of `tokens` tokens."""
    from jaxserve.serving.kv_cache import GroupGeometry

    size, spec = options.page_size, group.spec
    width = table_width(size, context, options.max_step_tokens, spec.window, spec.sink_tokens)
    pages = math.ceil(tokens / size)
    if spec.window is not None:
        # Full sequences never need more, however many tokens the other groups hold.
        pages = min(pages, width * options.max_sequences)
    pinned = math.ceil(spec.sink_tokens / size)
    return GroupGeometry(spec, group.layers, max(pages, width), width, pinned)


def scheduler_config(
    options: EngineOptions,
    geometry: CacheGeometry,
    max_context_tokens: int | None,
    num_shards: int = 1,
) -> SchedulerConfig:
    """Returns the scheduler's view of an engine, whose sequences live in so many shards."""
    policy: Any = options.policy
    return SchedulerConfig(
        page_size=geometry.page_size,
        groups=tuple(
            GroupLimits(g.num_pages, g.spec.window, g.spec.sink_tokens) for g in geometry.groups
        ),
        num_slots=options.max_sequences,
        num_shards=num_shards,
        max_step_tokens=options.max_step_tokens,
        max_context_tokens=max_context_tokens,
        max_in_flight=options.max_in_flight,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        prefix_cache=options.prefix_cache,
        policy=policy,
        client_weights=dict(options.client_weights),
        max_prefill_tokens=options.max_prefill_tokens,
    )


def history_tokens(config: ModelConfig) -> int:
    """Returns how many tokens of a sequence penalties look at."""
    return min(config.max_context_tokens, MAX_HISTORY_TOKENS)
