"""Measures the machine at hand, and writes it as a chip that plans can be made for.

    made = calibrated("here")
    made.write(Path("hardware.toml"))       # then: --hardware hardware.toml --slice here:1

Memory is read by a sum, for sizes that leave the caches behind; products are those of a few rows
with a large matrix, as decoding has them, up to square ones; collectives run over all devices of
this process. A point is the best of many runs, as others only ever add time.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from jaxserve.errors import UsageError

READ_BYTES = tuple(2**n for n in range(18, 29, 2))
"""Sizes that are read, from 256 KiB to 256 MiB."""

ROWS = (1, 8, 64, 512, 2048)
SIDE = 2048
"""Rows of activations that are multiplied with a square weight of this side."""

SENT_BYTES = tuple(2**n for n in range(12, 25, 4))
"""Full tensors of an all-gather, from 4 KiB to 16 MiB."""


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        name: of the chip.
        device_kind: as JAX names it.
        num_devices: devices that were joined.
        memory_bytes: of one device.
        read: (bytes, bytes per second).
        matmul: (rows, operations per second).
        gathered: (bytes of the full tensor, seconds), empty for one device.
        dtype: of the products.
        layer_s, host_s: fixed seconds of a layer, and between two steps; None where no model was
            run.
    """

    name: str
    device_kind: str
    num_devices: int
    memory_bytes: float
    read: tuple[tuple[int, float], ...]
    matmul: tuple[tuple[int, float], ...]
    gathered: tuple[tuple[int, float], ...]
    dtype: str
    layer_s: float | None = None
    host_s: float | None = None

    @property
    def start_s(self) -> float:
        """Returns the seconds of a collective that sends next to nothing."""
        return min((seconds for _, seconds in self.gathered), default=0.0)

    @property
    def link(self) -> float:
        """Returns the bytes per second that a device receives in a large collective."""
        if not self.gathered:
            return 0.0
        size, seconds = self.gathered[-1]
        share = (self.num_devices - 1) / self.num_devices
        return share * size / max(seconds - self.start_s, 1e-9)

    def fields(self) -> dict[str, Any]:
        """Returns the measurements as JSON shows them."""
        return asdict(self)

    def text(self) -> str:
        """Returns a table like those of `partitioning/hardware.toml`."""
        date = time.strftime("%Y-%m-%d")
        source = f"jaxserve plan calibrate, {date}"
        peak, read = max(rate for _, rate in self.matmul), max(rate for _, rate in self.read)
        joined = "switch" if self.num_devices > 1 else "none"
        lines = [
            f"# Measured by {source}, on {self.device_kind}; products in {self.dtype}.",
            f"[{self.name}]",
            f'device_kind = "{self.device_kind}"',
            f'network = "{joined}"',
            f"host_chips = {self.num_devices}",
            f"max_chips = {self.num_devices}",
            "tile = 1",
            f'bfloat16 = [{peak:.4g}, "measured", "{source}"]',
            f'hbm_bytes = [{self.memory_bytes:.0f}, "measured", "{source}"]',
            f'hbm = [{read:.4g}, "measured", "{source}"]',
            f'hop_s = [{self.start_s:.4g}, "measured", "{source}"]',
        ]
        for name in ("layer_s", "host_s"):
            if (own := getattr(self, name)) is not None:
                lines.append(f'{name} = [{own:.4g}, "measured", "{source}"]')
        if self.num_devices > 1:
            lines.append(f'link = [{self.link:.4g}, "measured", "{source}"]')
            lines.append(f'links = [1, "measured", "{source}"]')
        lines.append(f"[{self.name}.curves]")
        lines.append(f"hbm = {[[float(a), float(f'{b:.4g}')] for a, b in self.read]}")
        lines.append(f"matmul = {[[float(a), float(f'{b:.4g}')] for a, b in self.matmul]}")
        if self.gathered:
            share = (self.num_devices - 1) / self.num_devices
            rates = [[float(a), float(f"{share * a / took:.4g}")] for a, took in self.gathered]
            lines.append(f"gather = {rates}")
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Writes the chip as a file.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            path.write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error}") from error

    def __rich__(self) -> RenderableType:
        table = Table(title=f"{self.name}: {self.num_devices} x {self.device_kind}, measured")
        for name in ("what", "size", "rate"):
            table.add_column(name, justify="left" if name == "what" else "right")
        for size, rate in self.read:
            table.add_row("memory read", f"{size / 2**20:g} MiB", f"{rate / 1e9:,.2f} GB/s")
        for rows, rate in self.matmul:
            table.add_row(
                f"product with {SIDE} x {SIDE}", f"{rows} rows", f"{rate / 1e9:,.1f} Gflop/s"
            )
        for size, seconds in self.gathered:
            table.add_row("all-gather", f"{size / 2**10:g} KiB", f"{seconds * 1e6:,.0f} us")
        if self.layer_s is not None:
            table.add_row("a layer, beside its terms", "", f"{self.layer_s * 1e6:,.0f} us")
        if self.host_s is not None:
            table.add_row("between two steps", "", f"{self.host_s * 1e6:,.0f} us")
        return table


def calibrated(name: str, seconds: float = 0.3, devices: str | None = None) -> Calibration:
    """Returns what this machine does.

    Args:
        name: what the chip is to be called.
        seconds: that a point may take.
        devices: "cpu:8" for eight pretended devices; before JAX has started.

    Raises:
        UsageError: the name is no bare TOML key, or the time is not positive.
    """
    check_name(name)
    if seconds <= 0:
        raise UsageError(f"--seconds {seconds} must be positive")
    if devices is not None:
        from jaxserve.partitioning.devices import use_devices

        use_devices(devices)
    import jax

    found = jax.devices()
    return Calibration(
        name,
        found[0].device_kind,
        len(found),
        _memory_bytes(found[0], len(found)),
        _reads(seconds),
        _products(seconds),
        _gathers(found, seconds) if len(found) > 1 else (),
        "bfloat16",
    )


def check_name(name: str) -> None:
    """Checks that a chip's name is a bare key of TOML.

    Raises:
        UsageError: it is not.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--name {name!r} must be letters, digits, - and _")


def _reads(seconds: float) -> tuple[tuple[int, float], ...]:
    import jax
    import jax.numpy as jnp

    total = jax.jit(jnp.sum)
    points = []
    for size in READ_BYTES:
        x = jax.block_until_ready(jnp.ones(size // 4, jnp.float32))
        points.append((size, size / best_time(lambda x=x: total(x), seconds)))
    return tuple(points)


def _products(seconds: float) -> tuple[tuple[int, float], ...]:
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.dot)
    weight = jnp.ones((SIDE, SIDE), jnp.bfloat16)
    points = []
    for rows in ROWS:
        x = jax.block_until_ready(jnp.ones((rows, SIDE), jnp.bfloat16))
        took = best_time(lambda x=x: product(x, weight), seconds)
        points.append((rows, 2 * rows * SIDE * SIDE / took))
    return tuple(points)


def _gathers(devices: Sequence[Any], seconds: float) -> tuple[tuple[int, float], ...]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(devices), ("all",))
    cut, whole = PartitionSpec("all"), PartitionSpec()

    def body(x: Any) -> Any:
        return jax.lax.all_gather(x, "all", tiled=True)

    mapped = jax.shard_map(body, mesh=mesh, in_specs=cut, out_specs=whole, check_vma=False)
    gather = jax.jit(mapped)
    points = []
    for size in SENT_BYTES:
        x = jax.device_put(jnp.ones(size // 4, jnp.float32), NamedSharding(mesh, cut))
        points.append((size, best_time(lambda x=x: gather(x), seconds)))
    return tuple(points)


def best_time(run: Callable[[], Any], seconds: float) -> float:
    """Returns the shortest time of a call, compiled and warm."""
    run().block_until_ready()
    best, end = math.inf, time.perf_counter() + seconds
    while True:
        began = time.perf_counter()
        run().block_until_ready()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= end:
            return best


def _memory_bytes(device: Any, count: int) -> float:
    """Returns the memory of one device; devices of a processor share what it has."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / count
