"""Puts a model's engine together: pool, runner, scheduler and loop.

    made = ModelEngine.create(program, params, EngineOptions(), report=None)
    made.engine.submit(request, sink)

Nothing is compiled before a shape is first used, unless `runner.warm_up()` is called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Params
from jaxserve.serving.batch import Ladder
from jaxserve.serving.engine import Engine
from jaxserve.serving.generation import Program
from jaxserve.serving.memory_plan import device_memory, memory_plan
from jaxserve.serving.multihost.follower import Follower
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.leading_runner import LeadingRunner
from jaxserve.serving.options import (
    DEFAULT_KV_BYTES,
    EngineOptions,
    history_tokens,
    of_one_shard,
    scheduler_config,
    size_cache,
)
from jaxserve.serving.runner import CompileReport, ModelRunner


@dataclass(frozen=True)
class ModelEngine:
    """An engine and the runner it drives."""

    engine: Engine
    runner: ModelRunner

    @classmethod
    def create(
        cls,
        program: Program,
        params: Params,
        options: EngineOptions,
        report: CompileReport | None = None,
        ranks: Leader | Follower | None = None,
    ) -> Self:
        """Returns an engine for a model; nothing is compiled yet.

        Args:
            report: called after each compilation.
            ranks: the processes that serve the model together.
        """
        room = options.kv_bytes or _room_on_device(program, params, options, device_memory())
        if ranks is not None:
            room = ranks.agree("room", room)  # the pool is as large on every host
        runner = _runner(program, params, options, room, report)
        context = program.model.config.max_context_tokens
        shards = program.comm.num_shards
        each = of_one_shard(options, shards)
        ropes = [layer.attention.rope for layer in program.model.config.pattern]
        if any(rope is not None and rope.by_length for rope in ropes):
            # Keys of equal beginnings differ where prompts differ in length.
            each = replace(each, prefix_cache=False)
        scheduling = scheduler_config(each, runner.geometry, context, shards)
        led = LeadingRunner(runner, ranks) if isinstance(ranks, Leader) else runner
        return cls(Engine(led, scheduling), runner)

    def update(self, params: Params) -> None:
        """Takes other weights; cached prefixes of the old ones are forgotten.

        Raises:
            UsageError: requests are under way.
        """
        if self.engine.busy:
            raise UsageError("requests are under way; update the weights between requests")
        self.runner.update(params)
        self.engine.reset()


def _runner(
    program: Program,
    params: Params,
    options: EngineOptions,
    kv_bytes: int,
    report: CompileReport | None = None,
) -> ModelRunner:
    """Returns the runner of a pool of `kv_bytes` on each device."""
    shards = program.comm.num_shards
    each = of_one_shard(options, shards)
    config = program.device_config
    return ModelRunner(
        program,
        params,
        size_cache(
            config, each, program.model.declare.cache_dtype, kv_bytes, program.comm.num_stripes
        ),
        Ladder.of(each.max_step_tokens, each.max_sequences, program.token_multiple),
        shards * each.max_sequences,
        history_tokens(config),
        report,
        options.strict,
    )


def _room_on_device(
    program: Program, params: Params, options: EngineOptions, device_bytes: int | None
) -> int:
    """Returns the bytes for keys and values: what weights, steps and the reserve leave.

    What a step needs besides hardly depends on the size of the pool, so it is read off the largest
    step over a pool of the default size.

    Raises:
        UsageError: nothing is left.
    """
    if device_bytes is None:
        return DEFAULT_KV_BYTES
    runner = _runner(program, params, options, DEFAULT_KV_BYTES)
    runner.compile_largest()
    plan = memory_plan(runner, device_bytes)
    room = device_bytes - (plan.total_bytes - plan.kv_bytes)
    if room <= 0:
        raise UsageError(
            f"the device has {device_bytes:,} bytes and the model takes {device_bytes - room:,} "
            "besides keys and values; use more devices, a smaller dtype or fewer max_step_tokens"
        )
    return room
