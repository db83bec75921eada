"""A model at a glance: what it is, how it lies, and what it takes of memory.

print(card_of(program, params, layout=None, made=None))      # in a notebook, drawn
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.config import ModelConfig
from jaxserve.layers.decoder import Params
from jaxserve.notebook.html import bar, escape, frame, size, table
from jaxserve.partitioning.layout_file import Layout
from jaxserve.partitioning.picture import LayoutView
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.memory_plan import device_memory, memory_plan


@dataclass(frozen=True)
class Card:
    """What is shown of a model.

    Attributes:
        title: family and size.
        facts: (name, value) of what is worth knowing.
        memory: (name, bytes) on one device.
        device_bytes: of its memory; None where it does not say.
        drawing: HTML of the layout; empty on one device.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    memory: tuple[tuple[str, int], ...]
    device_bytes: int | None = None
    drawing: str = ""

    @property
    def _memory_line(self) -> str:
        of = "" if self.device_bytes is None else f" of {size(self.device_bytes)}"
        return f"{size(sum(amount for _, amount in self.memory))}{of} on each device"

    def __repr__(self) -> str:
        lines = [*self.facts, ("memory", self._memory_line)]
        lines += [(f"  {name}", size(amount)) for name, amount in self.memory]
        return "\n".join([self.title, *(f"  {name:<20} {value}" for name, value in lines)])

    def _repr_html_(self) -> str:
        taken = sum(amount for _, amount in self.memory)
        body = f'<div class="title">{escape(self.title)}</div>{table(self.facts)}'
        body += f'<div class="soft">memory: {escape(self._memory_line)}</div>'
        body += bar(self.memory, self.device_bytes or taken)
        if self.drawing:
            body += f"<details><summary>which device holds what</summary>{self.drawing}</details>"
        return frame(body)


def card_of(
    program: Program, params: Params, layout: Layout | None, made: ModelEngine | None
) -> Card:
    """Returns the card of a model; the engine counts once it is made."""
    config, declare = program.model.config, program.model.declare
    leaves = jax.tree.leaves(params)
    count = sum(leaf.size for leaf in leaves)
    kind = declare.dtype if declare.quantize is None else f"{declare.quantize.value} weights"
    devices = sorted({d for leaf in leaves for d in leaf.devices()}, key=lambda d: d.id)
    where = f"{len(devices)} x " if len(devices) > 1 else ""
    attention = config.layers[0].attention
    facts = [
        ("layers", f"{config.num_layers} of width {config.embed_dim}"),
        ("attention", f"{attention.num_heads} heads of {attention.head_dim}{_keys(config)}"),
        ("vocabulary", f"{config.vocab_size:,}{' (tied)' if config.tied else ''}"),
        ("context", f"{config.max_context_tokens:,} tokens"),
        ("runs on", f"{where}{devices[0].device_kind}, kernels of {program.kernels.backend}"),
    ]
    drawing = ""
    if layout is not None and layout.mesh.num_devices > 1:
        facts.append(("layout", str(layout)))
        drawing = f'<div style="overflow-x:auto">{LayoutView(layout, config).svg()}</div>'
    title = f"{config.family}, {_number(count)} parameters in {kind}"
    return Card(title, tuple(facts), _memory(params, made), device_memory(devices[0]), drawing)


def _memory(params: Params, made: ModelEngine | None) -> tuple[tuple[str, int], ...]:
    """Returns what lies on a device: the weights and, once there is an engine, what it takes."""
    if made is None:
        return (("weights", sum(map(_on_device, jax.tree.leaves(params)))),)
    plan = memory_plan(made.runner)
    return (
        ("weights", plan.weights_bytes),
        ("keys and values", plan.kv_bytes),
        ("running sequences", plan.slot_bytes),
        ("largest step so far", plan.temporary_bytes),
    )


def _on_device(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _keys(config: ModelConfig) -> str:
    """Returns how many heads have keys, and the window, of all layers."""
    attentions = [layer.attention for layer in config.layers]
    counts = sorted({a.num_kv_heads for a in attentions})
    windows = sorted({a.window for a in attentions if a.window is not None})
    keys = " or ".join(map(str, counts))
    window = f", windows of {' or '.join(map(str, windows))}" if windows else ""
    return f", {keys} with keys{window}"


def _number(count: int) -> str:
    """Returns a count for people."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:,}"
