"""Holds a layout's estimates against this machine: `jaxserve bench --against layout.json`.

The machine is calibrated first; then every term of a decode and of a prefill step runs alone at the
size that a device has (`terms`), and at last the engine serves. What a term is estimated to take
stands beside what it took. What cannot be measured by itself is named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from jaxserve.benchmark.terms import Line, Load, Terms
from jaxserve.config import dtype_bytes
from jaxserve.errors import UsageError
from jaxserve.partitioning.dtypes import stored
from jaxserve.partitioning.estimate import Coster
from jaxserve.partitioning.hardware import ChipSlice, parse_chips, slice_of
from jaxserve.partitioning.layout_file import Layout, read_layout
from jaxserve.partitioning.memory import Kept
from jaxserve.planner.calibrate import Calibration, calibrated
from jaxserve.planner.show import ms

if TYPE_CHECKING:
    from jaxserve.api import LLM

POINT_S = 0.05
"""Seconds that a point of the calibration, or a term, may take."""

BATCH, PROMPT, DECODED = 8, 64, 32
"""Most sequences, their tokens, and those that are decoded after them."""

SAMPLED = {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
"""How tokens are drawn: with the sampler's whole work, as it is estimated."""


@dataclass(frozen=True)
class Rounding:
    """How a model is rounded, which a layout does not say; see `api.load`."""

    quantize: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class Served:
    """What the engine took in seconds.

    Attributes:
        prefill_s: to read all prompts; in pieces, where a step takes no more.
        decode_s, gap_s: a decode step, and until the next one is there.
    """

    prefill_s: float
    decode_s: float
    gap_s: float


@dataclass(frozen=True)
class Against:
    """A layout beside this machine.

    Attributes:
        model, layout, device: what ran where.
        num_layers: of the model.
        batch: sequences.
        calibration: what the estimates are made of.
        lines: terms of a decode step, then the whole of it; then those of a prefill step.
    """

    model: str
    layout: str
    device: str
    num_layers: int
    batch: int
    calibration: Calibration
    lines: tuple[Line, ...]

    def fields(self) -> dict[str, Any]:
        """Returns the comparison as JSON shows it."""
        return {
            "model": self.model,
            "layout": self.layout,
            "device": self.device,
            "num_layers": self.num_layers,
            "batch": self.batch,
            "calibration": self.calibration.fields(),
            "terms": [vars(line) for line in self.lines],
        }

    def __rich__(self) -> RenderableType:
        title = f"{self.model}, {self.layout}, on {self.device}: {self.batch} sequences"
        table = Table(title=title, caption="estimates, by the rates that were measured here")
        for name in ("term", "estimated", "measured", "measured / estimated"):
            table.add_column(name, justify="left" if name == "term" else "right")
        for phase, before in (
            ("decode", f"after {PROMPT + DECODED // 2}"),
            ("prefill", f"of {PROMPT}"),
        ):
            table.add_section()
            table.add_row(f"[b]{phase} {before} tokens[/b]")
            for line in (line for line in self.lines if line.phase == phase):
                table.add_row(f"  {line.name}", ms(line.estimated_s), *_measured(line))
        return table


def _measured(line: Line) -> tuple[str, str]:
    """Returns what was measured and its ratio to the estimate, or why there is none."""
    if line.measured_s is None:
        return "-", line.note
    ratio = f"{line.measured_s / line.estimated_s:.2f}" if line.estimated_s else ""
    return ms(line.measured_s), ratio


def against(model: str, path: Path, rounding: Rounding | None = None) -> Against:
    """Returns the steps of a layout beside what this machine takes.

    Raises:
        UsageError: there are too few or too many devices, or the layout is another model's.
    """
    layout = read_layout(path)
    _take_devices(layout.mesh.num_devices)
    from jaxserve.planner.model import plan_config

    config = plan_config(model)
    layout.check(config)
    import jax

    _check_devices(path, layout)
    llm = _loaded(model, layout, rounding or Rounding())
    made = calibrated("here", POINT_S)
    on = slice_of(f"here:{made.num_devices}", parse_chips(made.text(), "calibration"))
    batch = BATCH if layout.buckets is None else min(BATCH, layout.buckets.max_sequences)
    took = served(llm, batch)
    lines = [
        line
        for load in (Load(batch, 1, PROMPT + DECODED // 2), Load(batch, PROMPT, 0))
        for line in _phase(llm, layout, on, load, took)
    ]
    device = jax.devices()[0].device_kind
    return Against(model, str(layout), device, config.num_layers, batch, made, tuple(lines))


def _take_devices(count: int) -> None:
    """Pretends devices where a processor is all there is and JAX has not started."""
    import os

    if count > 1 and os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        from jaxserve.partitioning.devices import use_devices

        use_devices(f"cpu:{count}")


def _check_devices(path: Path, layout: Layout) -> None:
    import jax

    if (count := len(jax.devices())) != layout.mesh.num_devices:
        raise UsageError(
            f"{path} is for {layout.mesh.num_devices} devices and there are {count}; "
            "hide the others, as with JAX_NUM_CPU_DEVICES or CUDA_VISIBLE_DEVICES"
        )


def _loaded(model: str, layout: Layout, rounding: Rounding) -> LLM:
    from jaxserve.api import load
    from jaxserve.serving.options import EngineOptions

    return load(
        model,
        layout=layout,
        dtype=layout.dtypes.activations,
        quantize=rounding.quantize,
        kv_dtype=rounding.kv_dtype,
        # Every prompt is to be read.
        engine=EngineOptions(prefix_cache=False),
        show="silent",
    )


def _phase(llm: LLM, layout: Layout, on: ChipSlice, load: Load, took: Served) -> Iterator[Line]:
    """Yields the lines of a step."""
    from jaxserve.serving.slot_state import param_row

    decodes = load.phase == "decode"
    declare = llm.program.model.declare
    weights = "int8" if declare.quantize is not None else declare.dtype
    kept = Kept(
        stored(weights, "weights"), stored(declare.cache_dtype, "kv"), dtype_bytes(declare.dtype)
    )
    own, other = layout.prefill, layout.decode
    if decodes:
        own, other = other, own
    coster = Coster.of(llm.config, own, on, dict(layout.mesh.sizes), kept, other=other)
    request = llm.intake.request([1], sampling(1))
    terms = Terms(llm.program.of(decodes), coster, load, param_row(request, 0), POINT_S)
    yield from terms.lines()
    host = sum(float(term.seconds) for term in terms.estimate.terms if term.name == "host")
    yield Line("host, between two steps", "host", load.phase, host, *_gap(decodes, took))
    step_s = took.decode_s + took.gap_s if decodes else took.prefill_s
    whole = float(terms.estimate.time_s)
    yield Line("the whole step", "step", load.phase, whole, step_s)


def _gap(decodes: bool, took: Served) -> tuple[float | None, str]:
    return (took.gap_s, "") if decodes else (None, "one step has none before it")


def sampling(tokens: int) -> Any:
    """Returns how so many tokens are drawn."""
    from jaxserve.serving.request import SamplingParams

    return SamplingParams(max_tokens=tokens, **SAMPLED)


def served(llm: LLM, batch: int) -> Served:
    """Returns what the engine's steps take: the best of three, compiled and warm."""
    prompts: Any = [[1 + i] * PROMPT for i in range(batch)]

    def took(tokens: int) -> tuple[float, float, int]:
        """Returns seconds of the device, between steps, and steps."""
        before = llm.engine.metrics
        llm.generate(prompts, sampling(tokens))
        after = llm.engine.metrics
        device, gap = (
            getattr(after, name).total - getattr(before, name).total
            for name in ("device_seconds", "host_gap_seconds")
        )
        return device, gap, after.steps - before.steps

    def best(tokens: int) -> tuple[float, float, int]:
        took(tokens)
        return min((took(tokens) for _ in range(3)), key=lambda one: one[0] + one[1])

    first, later = best(1), best(1 + DECODED)
    steps = max(later[2] - first[2], 1)
    return Served(
        first[0],
        max(later[0] - first[0], 0.0) / steps,
        max(later[1] - first[1], 0.0) / steps,
    )
