"""Holds a layout's estimates against this machine: `jaxserve bench --against layout.json`.

The machine is calibrated first; then every product and every collective of a decode step runs alone
at the size that a device has, and at last the model itself decodes. What a term is estimated to
take stands beside what it took.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from jaxserve.errors import UsageError
from jaxserve.partitioning.estimate import Coster, Part
from jaxserve.partitioning.hardware import parse_chips, slice_of
from jaxserve.partitioning.layout_file import Layout, read_layout
from jaxserve.partitioning.placement import Kind
from jaxserve.planner.calibrate import Calibration, calibrated

POINT_S = 0.05
"""Seconds that a point of the calibration, or a term, may take."""

BATCH, PROMPT, DECODED = 8, 64, 32
"""Sequences, their tokens, and those that are decoded after them."""


@dataclass(frozen=True)
class Line:
    """A term, estimated and measured in seconds; a product, a collective or the step."""

    name: str
    kind: str
    estimated_s: float
    measured_s: float


@dataclass(frozen=True)
class Against:
    """A layout beside this machine.

    Attributes:
        model, layout, device: what ran where.
        num_layers: of the model.
        calibration: what the estimates are made of.
        lines: terms of a decode step, then the whole of it.
    """

    model: str
    layout: str
    device: str
    num_layers: int
    calibration: Calibration
    lines: tuple[Line, ...]

    def fields(self) -> dict[str, Any]:
        """Returns the comparison as JSON shows it."""
        return {
            "model": self.model,
            "layout": self.layout,
            "device": self.device,
            "num_layers": self.num_layers,
            "calibration": self.calibration.fields(),
            "terms": [vars(line) for line in self.lines],
        }

    def __rich__(self) -> RenderableType:
        table = Table(title=f"{self.model}, {self.layout}, on {self.device}: a decode step")
        for name in ("term", "estimated ms", "measured ms", "measured / estimated"):
            table.add_column(name, justify="left" if name == "term" else "right")
        for line in self.lines:
            ratio = line.measured_s / line.estimated_s if line.estimated_s else math.nan
            table.add_row(
                line.name,
                f"{line.estimated_s * 1e3:.3f}",
                f"{line.measured_s * 1e3:.3f}",
                f"{ratio:.2f}",
            )
        return table


def against(model: str, path: Path) -> Against:
    """Returns the decode step of a layout beside what this machine takes.

    Raises:
        UsageError: there are too few devices, or the layout is another model's.
    """
    layout = read_layout(path)
    _take_devices(layout.mesh.num_devices)
    from jaxserve.planner.model import plan_config

    config = plan_config(model)
    layout.check(config)
    import jax

    made = calibrated("here", POINT_S)
    if made.num_devices != layout.mesh.num_devices:
        raise UsageError(
            f"{path} is for {layout.mesh.num_devices} devices and there are {made.num_devices}; "
            "hide the others, as with JAX_NUM_CPU_DEVICES or CUDA_VISIBLE_DEVICES"
        )
    on = slice_of(f"here:{made.num_devices}", parse_chips(made.text(), "calibration"))
    coster = Coster.of(config, layout.decode, on, dict(layout.mesh.sizes), other=layout.prefill)
    found = coster.estimate(BATCH, 1, PROMPT + DECODED // 2)
    lines = [*_products(coster), *_collectives(coster, layout)]
    lines.append(Line("the whole step", "step", float(found.time_s), _step_s(model, layout)))
    device = jax.devices()[0].device_kind
    return Against(model, str(layout), device, config.num_layers, made, tuple(lines))


def _take_devices(count: int) -> None:
    """Pretends devices where a processor is all there is and JAX has not started."""
    import os

    if count > 1 and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        from jaxserve.partitioning.devices import use_devices

        use_devices(f"cpu:{count}")


def _products(coster: Coster) -> list[Line]:
    import jax
    import jax.numpy as jnp

    tokens = coster.share.tokens(BATCH, 1)
    product, lines = jax.jit(jnp.dot), []
    terms = coster.estimate(BATCH, 1, PROMPT).terms
    for op in coster.share.products:
        rows = -(-tokens // op.cut)
        x = jnp.ones((rows, op.inner), jnp.bfloat16)
        weight = jnp.ones((op.inner, op.outer), jnp.bfloat16)
        took = op.turns * _best(lambda x=x, weight=weight: product(x, weight))
        parts = (Part.COMPUTE, Part.WEIGHTS, Part.ACTIVATIONS)
        expected = sum(float(t.seconds) for t in terms if t.name == op.name and t.part in parts)
        lines.append(Line(op.name, "product", expected, took))
    return lines


def _collectives(coster: Coster, layout: Layout) -> list[Line]:
    from jaxserve.partitioning.mesh import make_mesh

    mesh, lines = make_mesh(layout.mesh), []
    tokens = coster.share.tokens(BATCH, 1)
    for flow in coster.traffic.flows:
        full = (flow.per_token * tokens + flow.per_row * BATCH + 2 * flow.weights) / flow.count
        per_byte, hops_s = coster.network.rates(flow.kind, flow.axes)
        took = flow.count * _best(_collective(flow.kind, flow.axes, int(full), mesh))
        expected = flow.count * (full * per_byte + hops_s)
        name = f"{flow.count} x {flow.kind} over {' '.join(flow.axes)}"
        lines.append(Line(name, "collective", expected, took))
    return lines


def _collective(kind: str, axes: tuple[str, ...], full: int, mesh: Any) -> Callable[[], Any]:
    """Returns a function that runs one collective of a tensor of `full` bytes."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import PartitionSpec

    count = math.prod(mesh.shape[axis] for axis in axes)
    size = max(full // 4 // count, 1) * count
    local = size // count if kind == Kind.ALL_GATHER else size
    hops = count - 1
    if kind == Kind.PERMUTE:
        local = max(full // 4 // hops, 1)

    def body(x: Any) -> Any:
        match kind:
            case Kind.ALL_GATHER:
                return lax.all_gather(x, axes, tiled=True)
            case Kind.REDUCE_SCATTER:
                return lax.psum_scatter(x, axes, tiled=True)
            case Kind.ALL_TO_ALL:
                return lax.all_to_all(x, axes, 0, 0, tiled=True)
            case Kind.PERMUTE:
                pairs = [(place, (place + 1) % count) for place in range(count)]
                for _ in range(hops):
                    x = lax.ppermute(x, axes, pairs)
                return x
        return lax.psum(x, axes)

    spec = PartitionSpec(tuple(mesh.shape))
    run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jnp.ones(local * mesh.size, jnp.float32)
    return lambda: run(x)


def _best(run: Callable[[], Any]) -> float:
    from jaxserve.planner.calibrate import best_time

    return best_time(run, POINT_S)


def _step_s(model: str, layout: Layout) -> float:
    """Returns the seconds of a decode step: those of many tokens, less those of one."""
    from jaxserve.api import load

    llm = load(model, layout=layout, dtype=layout.dtypes.activations, show="silent")
    prompts: Any = [[1 + i] * PROMPT for i in range(BATCH)]

    def took(tokens: int) -> float:
        llm.generate(prompts, max_tokens=tokens, ignore_eos=True, temperature=0)
        times = []
        for _ in range(3):
            began = time.perf_counter()
            llm.generate(prompts, max_tokens=tokens, ignore_eos=True, temperature=0)
            times.append(time.perf_counter() - began)
        return min(times)

    return max(took(1 + DECODED) - took(1), 0.0) / DECODED
