"""What a result must say of the machine it was measured on."""

from __future__ import annotations

import os
import platform
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

READ_BYTES = 512 * 2**20


def facts() -> dict[str, Any]:
    """Returns date, device and versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind if jax.default_backend() != "cpu" else _cpu_name(),
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
    }


def read_bandwidth(rounds: int = 5) -> float:
    """Returns bytes per second at which a matrix too large for any cache is read once.

    It is read by a float32 matrix-vector product on all cores, the best of `rounds`.
    """
    columns = 8192
    rows = READ_BYTES // 4 // columns
    matrix = jnp.ones((rows, columns), jnp.float32)
    vector = jnp.ones((1, columns), jnp.float32)
    product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    jax.block_until_ready(product(vector, matrix))
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(product(vector, matrix))
        best = min(best, time.perf_counter() - began)
    return READ_BYTES / best


def _cpu_name() -> str:
    """Returns the processor's name and what of it speeds up matrix products."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    wide = [f for f in ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16") if f in flags]
    return f"{fields.get('model name', platform.processor())} ({', '.join(wide)})"
