"""What an engine will compile and take of memory, from a checkpoint's headers alone.

made = engine_ahead("tiny")
made.runner.warm_up()                       # fills the cache of compiled programs
memory_plan(made.runner)
"""

from __future__ import annotations

from pathlib import Path

import jax

from jaxserve.checkpoint import inspect
from jaxserve.checkpoint.locate import locate
from jaxserve.compile_cache import enable as enable_compile_cache
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.model_files import run_dtype
from jaxserve.serving.options import EngineOptions


def engine_ahead(
    model: str | Path,
    dtype: str | None = None,
    backend: str = "xla",
    options: EngineOptions | None = None,
) -> ModelEngine:
    """Returns the engine that `load` would make, its weights only shapes.

    It compiles, and tells what it takes; it cannot run. See `api.load` for the arguments.
    """
    enable_compile_cache()
    info = inspect(locate(model))
    declare = Declare.best(jax.default_backend(), run_dtype(dtype, info.dtype))
    abstract = Model(info.config, declare)
    program = Program(abstract, LocalComm(), kernel_set(backend))
    return ModelEngine.create(program, abstract.abstract_params(), options or EngineOptions())
