"""What an engine will compile and take of memory, from a checkpoint's headers alone.

made = engine_ahead("tiny")
made.runner.warm_up()                       # fills the cache of compiled programs
memory_plan(made.runner)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxserve.checkpoint import inspect
from jaxserve.checkpoint.locate import locate
from jaxserve.compile_cache import enable as enable_compile_cache
from jaxserve.config import ModelConfig
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.devices import use_devices
from jaxserve.partitioning.layout_file import Layout
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.model_files import kv_rounding, quantization, run_dtype
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.placing import program_of, sized
from jaxserve.serving.sharded import abstract_params


def engine_ahead(
    model: str | Path,
    dtype: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    backend: str = "xla",
    options: EngineOptions | None = None,
    layout: Callable[[ModelConfig, str], Layout | None] | None = None,
    devices: str | None = None,
) -> ModelEngine:
    """Returns the engine that `load` would make, its weights only shapes.

    It compiles, and tells what it takes; it cannot run. See `api.load` for the arguments.

    Args:
        layout: given the model's configuration and dtype, returns what lies where on a mesh.
    """
    if devices is not None:
        use_devices(devices)
    enable_compile_cache()
    info = inspect(locate(model))
    running = run_dtype(dtype, info.dtype)
    chosen = None if layout is None else layout(info.config, running)
    rounded, kept = quantization(quantize, info), kv_rounding(kv_dtype)
    program = program_of(info.config, running, kernel_set(backend), chosen, rounded, kept)
    made = sized(options or EngineOptions(), chosen)
    return ModelEngine.create(program, abstract_params(program), made)
