"""Devices that a run asks for by name, before JAX starts.

use_devices("cpu:8")          # eight devices on one processor, to try a mesh on
unused_accelerator()          # what JAX overlooks, in words, or None
"""

from __future__ import annotations

from pathlib import Path

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


_GOOGLE = "0x1ae0"
_TPUS = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076", "0x007c", "0x0083"}
"""Numbers of TPUs on the PCI bus; network cards of the same maker have others."""


def unused_accelerator(root: Path = Path("/")) -> str | None:
    """Returns what to do about an accelerator of this machine that JAX does not use; else None.

    Nothing is said to those who chose the CPU, by JAX_PLATFORMS or `use_devices`.

    Args:
        root: where the machine's `dev` and `sys` are.
    """
    if jax.config.jax_platforms or jax.default_backend() != "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        return None
    if any((root / "dev").glob("nvidia[0-9]*")):
        found, extra = "an NVIDIA GPU", "cuda"
    elif any((root / "dev").glob("accel[0-9]*")) or _has_tpu(root):
        found, extra = "a TPU", "tpu"
    else:
        return None
    return (
        f"this machine has {found}, and JAX runs on the CPU, many times slower; install "
        f"'jaxserve[{extra}]' and start Python again, or set JAX_PLATFORMS=cpu if that is meant"
    )


def _has_tpu(root: Path) -> bool:
    for device in (root / "sys" / "bus" / "pci" / "devices").glob("*"):
        files = device / "vendor", device / "device"
        if all(file.exists() for file in files):
            maker, kind = (file.read_text().strip() for file in files)
            if maker == _GOOGLE and kind in _TPUS:
                return True
    return False
