"""Makes the engine of a model in its own process, phase by phase.

made = build_model(Start("tiny"), phase=print)
made.engine.submit(request, sink)
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import jax

import jaxserve
from jaxserve.checkpoint import load_params
from jaxserve.compile_cache import enable as enable_compile_cache
from jaxserve.config import Quantization
from jaxserve.errors import UnavailableError
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.devices import use_devices
from jaxserve.progress import Advance, Unit
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.made import Follows, Made
from jaxserve.serving.memory_plan import device_memory, memory_plan
from jaxserve.serving.model_files import ModelFiles, kv_rounding, quantization
from jaxserve.serving.multihost.follower import Follower
from jaxserve.serving.multihost.identity import identity_of
from jaxserve.serving.multihost.join import check_mesh, join, start_jax
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.ranks import Ranks, breaking_off
from jaxserve.serving.placing import places_of, program_of, sized
from jaxserve.serving.wire import Start

REPORT_S = 5.0
"""Between two lines of progress in the log."""

_log = logging.getLogger(__name__)


class LoggedProgress:
    """Tells the log how far loading has come, if it takes long."""

    @contextmanager
    def task(self, label: str, total: int, unit: Unit = Unit.BYTES) -> Iterator[Advance]:
        """Yields a function that may write a line."""
        last, done = time.monotonic(), 0

        def advance(amount: int) -> None:
            nonlocal last, done
            done += amount
            if done < total and time.monotonic() - last >= REPORT_S:
                last = time.monotonic()
                _log.info("%s: %d%%", label, 100 * done // total, extra={"done": done})

        yield advance


def build_model(
    start: Start,
    phase: Callable[[str], None],
    joined: Callable[[Ranks], None] = lambda ranks: None,
) -> Made | Follows:
    """Returns the engine of a model, every program of it compiled.

    Of a group that is what rank 0 has; the others follow it.

    Raises:
        JaxserveError: the model cannot be loaded, or does not fit the device; or ranks are missing.
    """
    phase("device")
    if start.devices is not None:
        use_devices(start.devices)
    enable_compile_cache()
    files = ModelFiles.find(start.model, start.dtype)
    if start.group is None:
        return _build(start, phase, files, None)
    identity = identity_of(start, files.info.path, start.group.num_processes)
    ranks = join(start.group, identity, phase)
    joined(ranks)
    with breaking_off(ranks):
        phase("devices of all ranks")
        start_jax(start.group)
        check_mesh(start.layout)
        return _build(start, phase, files, ranks)


def _build(
    start: Start,
    phase: Callable[[str], None],
    files: ModelFiles,
    ranks: Leader | Follower | None,
) -> Made | Follows:
    """Returns the engine of a model on the devices that JAX has."""
    platform = jax.devices()[0].platform
    phase("weights")
    kernels = kernel_set(start.backend)
    rounded = quantization(start.quantize, files.info)
    kept = kv_rounding(start.kv_dtype)
    program = program_of(files.info.config, files.dtype, kernels, start.layout, rounded, kept)
    rounded = program.model.declare.quantize
    params = load_params(files.info, program.model, places_of(program), LoggedProgress())
    phase("compile")
    options = sized(start.options, start.layout)
    made = ModelEngine.create(program, params, options, ranks=ranks)
    made.runner.warm_up()
    phase("memory plan")
    runner = made.runner
    info = _info(made, platform, files.dtype, start, rounded)
    if ranks is not None:
        phase("all ranks ready")
        ranks.agree("ready")
        ranks.serve()
    if isinstance(ranks, Follower):
        return Follows(ranks, partial(ranks.follow, runner, options.max_in_flight), info)
    return Made(
        made.engine,
        info,
        lambda: runner.compiles_after_ready,
        partial(_trace, threading.Lock()),
        ranks,
    )


def _info(
    made: ModelEngine, platform: str, dtype: str, start: Start, rounded: Quantization | None
) -> dict[str, Any]:
    """Returns what the engine tells of itself."""
    runner = made.runner
    plan = memory_plan(runner, device_memory())
    return {
        "versions": {"jaxserve": jaxserve.__version__, "jax": jax.__version__},
        "devices": [device.device_kind for device in jax.devices()],
        "platform": platform,
        "mesh": {} if start.layout is None else dict(start.layout.mesh.sizes),
        "layout": "one device" if start.layout is None else str(start.layout),
        "dtype": dtype,
        "quantize": rounded,
        "kv_dtype": start.kv_dtype,
        "kernels": start.backend,
        "numbers": made.runner.program.summary,
        "capacity": {
            "sequences": runner.num_slots,
            "kv_tokens": runner.geometry.num_tokens,
            "page_size": runner.geometry.page_size,
        },
        "programs": runner.num_executables,
        "processes": jax.process_count(),
        "memory": asdict(plan) | {"total_bytes": plan.total_bytes},
    }


def _trace(guard: threading.Lock, seconds: float) -> str:
    """Returns the folder of a trace of the next seconds, for xprof.

    Raises:
        UnavailableError: another trace is being taken.
    """
    if not guard.acquire(blocking=False):
        raise UnavailableError("a trace is being taken; ask again when it is done")
    try:
        folder = tempfile.mkdtemp(prefix="jaxserve-trace-")
        with jax.profiler.trace(folder):
            time.sleep(seconds)
        return folder
    finally:
        guard.release()
