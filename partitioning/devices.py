"""Devices that a run asks for by name, before JAX starts.

use_devices("cpu:8")          # eight devices on one processor, to try a mesh on
"""

from __future__ import annotations

import jax

from jaxserve.errors import UsageError


def use_devices(devices: str) -> None:
    """Makes JAX use these devices: "cpu:N", N devices that share the processor, or "cpu".

    Raises:
        UsageError: the name is none of these, or JAX has started with others.
    """
    platform, _, count = devices.partition(":")
    if platform != "cpu" or not (count or ":" not in devices) or not (count or "1").isdecimal():
        raise UsageError(f"devices={devices!r} is not known; use 'cpu:N', as in 'cpu:8'")
    wanted = int(count or 1)
    if wanted < 1:
        raise UsageError(f"devices={devices!r} must be at least one")
    try:
        jax.config.update("jax_num_cpu_devices", wanted)
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        # JAX has started; what it started with may do.
        found = jax.devices()
        if found[0].platform != "cpu" or len(found) < wanted:
            raise UsageError(
                f"devices={devices!r} comes too late: JAX runs on {len(found)} "
                f"{found[0].platform} devices already; give it before any array is made, or start "
                f"Python with XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
            ) from None
