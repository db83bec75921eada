"""The memory plan against the arrays that live and what the compiler asks for."""

import gc
from dataclasses import replace

import jax
import numpy as np
import pytest

import jaxserve as js
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.memory_plan import MemoryPlan, memory_plan, temporary_bytes
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, SamplingParams


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_what_is_planned_is_what_is_taken(dtype: str, program: Program, params: Params) -> None:
    before = live_bytes()
    wide = program.model.config
    model = Model(wide, Declare(dtype=dtype, fuse=True))
    weights = jax.tree.map(lambda x: jax.numpy.asarray(x, dtype), params)
    small = replace(program, model=model)
    options = EngineOptions(max_sequences=2, max_step_tokens=16, kv_bytes=200_000)
    made = ModelEngine.create(small, weights, options)
    made.runner.warm_up()
    plan = memory_plan(made.runner)
    largest = temporary_bytes(made.runner.executables().values())
    for turn in range(3):
        request = Request(
            id=str(turn),
            prompt=tuple(range(1, 25)),
            params=SamplingParams(max_tokens=8, seed=turn, frequency_penalty=0.1).resolved({}),
        )
        made.engine.submit(request, lambda event: None)
        while made.engine.step():
            pass
        taken = live_bytes() - before + largest
        assert plan.total_bytes == pytest.approx(taken, rel=0.05)
    assert memory_plan(made.runner) == plan


def test_the_plan_of_the_embedded_model_holds() -> None:
    before = live_bytes()
    options = js.EngineOptions(max_sequences=2, max_step_tokens=16, kv_bytes=1 << 23)
    llm = js.load("tiny", engine=options, show="silent")
    llm.generate("def f(", max_tokens=4)
    plan = memory_plan(llm.runner)
    taken = live_bytes() - before + temporary_bytes(llm.runner.executables().values())
    assert plan.total_bytes == pytest.approx(taken, rel=0.05)
    tokens = 2 * llm.config.max_context_tokens  # two slots never use more
    assert plan.kv_bytes == pytest.approx(
        tokens * llm.config.cache_bytes_per_token("bfloat16"), rel=0.02
    )


def test_the_table_adds_up() -> None:
    plan = MemoryPlan(100 << 20, 50 << 20, 3 << 20, 7 << 20, 8 << 20, 160 << 20)
    assert plan.total_bytes == 168 << 20
    lines = plan.table().splitlines()
    amounts = [float(line.split()[-2]) for line in lines]
    assert amounts[-2] == sum(amounts[:-2]) == 168
    assert amounts[-1] == 160
    assert np.all([len(line) == len(lines[0]) for line in lines])
