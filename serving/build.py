"""Puts a model's engine together: pool, runner, scheduler and loop.

    made = ModelEngine.create(program, params, EngineOptions(), report=None)
    made.engine.submit(request, sink)

Nothing is compiled before a shape is first used, unless `runner.warm_up()` is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Params
from jaxserve.serving.batch import Ladder
from jaxserve.serving.engine import Engine
from jaxserve.serving.generation import Program
from jaxserve.serving.options import EngineOptions, history_tokens, scheduler_config, size_cache
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
    ) -> Self:
        """Returns an engine for a model; nothing is compiled yet.

        Args:
            report: called after each compilation.
        """
        config = program.model.config
        geometry = size_cache(config, options, program.model.declare.dtype)
        runner = ModelRunner(
            program,
            params,
            geometry,
            Ladder.of(options.max_step_tokens, options.max_sequences),
            options.max_sequences,
            history_tokens(config),
            report,
            options.strict,
        )
        scheduling = scheduler_config(options, geometry, config.max_context_tokens)
        return cls(Engine(runner, scheduling), runner)

    def update(self, params: Params) -> None:
        """Takes other weights; cached prefixes of the old ones are forgotten.

        Raises:
            UsageError: requests are under way.
        """
        if self.engine.busy:
            raise UsageError("requests are under way; update the weights between requests")
        self.runner.update(params)
        self.engine.reset()
