"""What an engine takes of a device's memory, known before it serves.

    runner.warm_up()
    plan = memory_plan(runner, device_bytes=None)
    print(plan.table())

Weights, pages and slots are counted from their shapes; temporaries are the compiler's own figure
for the largest step, and steps run one after another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.serving.runner import ModelRunner

RESERVED_SHARE = 0.05
"""Share of a device's memory that is left to its runtime and to fragmentation."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device.

    Attributes:
        weights_bytes: parameters.
        kv_bytes: pages of keys and values.
        slot_bytes: state of the running sequences.
        temporary_bytes: what the largest step needs besides, results included.
        reserve_bytes: left to the device's runtime.
        device_bytes: the device's memory; None where it does not say.
    """

    weights_bytes: int
    kv_bytes: int
    slot_bytes: int
    temporary_bytes: int
    reserve_bytes: int = 0
    device_bytes: int | None = None

    @property
    def total_bytes(self) -> int:
        """Returns what is taken, the reserve included."""
        parts = (self.weights_bytes, self.kv_bytes, self.slot_bytes, self.temporary_bytes)
        return sum(parts) + self.reserve_bytes

    def table(self) -> str:
        """Returns the plan as aligned lines for people."""
        lines = [
            ("weights", self.weights_bytes),
            ("keys and values", self.kv_bytes),
            ("running sequences", self.slot_bytes),
            ("largest step", self.temporary_bytes),
            ("reserve", self.reserve_bytes),
            ("total", self.total_bytes),
        ]
        if self.device_bytes is not None:
            lines.append(("device", self.device_bytes))
        return "\n".join(f"{name:<18}{count / 2**20:>12,.1f} MiB" for name, count in lines)


def memory_plan(runner: ModelRunner, device_bytes: int | None = None) -> MemoryPlan:
    """Returns the plan of a runner, from the programs that it has compiled."""
    held = runner.array_bytes
    return MemoryPlan(
        held["weights"],
        held["pages"],
        held["slots"],
        temporary_bytes(runner.executables().values()),
        0 if device_bytes is None else int(device_bytes * RESERVED_SHARE),
        device_bytes,
    )


def temporary_bytes(executables: Iterable[Any]) -> int:
    """Returns the most that any program needs besides its arguments."""
    found = (program.memory_analysis() for program in executables)
    return max(
        (m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes for m in found),
        default=0,
    )


def device_memory(device: Any = None) -> int | None:
    """Returns the bytes that programs may use on a device; None on CPU, which does not say."""
    stats = (device or jax.local_devices()[0]).memory_stats()
    return None if stats is None else stats.get("bytes_limit")
