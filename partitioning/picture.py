"""Pictures of a layout: which chip holds what.

    view = LayoutView(layout, config)
    print(view)               # as text; in a notebook, `view` alone draws it

Arrays are drawn as rectangles, cut as the mesh cuts them; a cell names the chips that hold it,
counted with z fastest. No JAX.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from jaxserve.config import ModelConfig
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.layout_file import Layout

_SHOWN = 16
"""Chips whose parts are written out."""

_STAGES = {
    Stage.RESIDUAL: "residual stream",
    Stage.INPUT: "into the first projections",
    Stage.PROJECTED: "out of them",
    Stage.HIDDEN: "at the non-linearity",
    Stage.QUERY: "queries at attention",
    Stage.CONTRACTED: "into the last projections",
    Stage.PRODUCED: "out of them",
}


@dataclass(frozen=True)
class Dimension:
    """One side of a drawn array.

    Attributes:
        name, size: None leaves the size open.
        axes: mesh axes that cut it.
        most: no more pieces than this differ: neighbours along the last axes hold the same.
    """

    name: str
    size: int | None
    axes: tuple[str, ...]
    most: int | None = None


@dataclass(frozen=True)
class Panel:
    """An array as it is drawn."""

    title: str
    rows: Dimension
    columns: Dimension


@dataclass(frozen=True)
class LayoutView:
    """A layout and the model it serves, to look at.

    Attributes:
        layout: what lies where.
        config: the model.
    """

    layout: Layout
    config: ModelConfig

    def write(self, path: str | Path) -> None:
        """Writes the layout as a file that `load` takes."""
        self.layout.write(path)

    def panels(self) -> list[Panel]:
        """Returns the arrays that are drawn: weights of a block, and its keys and values."""
        padding, phase, sizes = self.layout.padding, self.layout.decode, self._sizes
        layer = self.config.layers[0]
        attention = padding.attention(layer.attention)
        embed = Dimension("embed", self.config.embed_dim, self._stored("embed", 0))
        kv_heads = attention.num_kv_heads
        features = {
            "ffn": padding.ffn(layer.mlp.ffn_dim),
            "heads": attention.num_heads,
            "kv_heads": kv_heads,
            "vocab": padding.vocab(self.config.vocab_size),
        }
        titles = ("MLP", "queries and output", "keys and values", "embedding")
        panels = [
            Panel(f"weights: {title}", embed, Dimension(name, size, self._stored(name, size)))
            for title, (name, size) in zip(titles, features.items(), strict=True)
        ]
        lies = phase.placement(Stage.QUERY).over(sizes)
        # A device keeps the heads that its queries read.
        kept = Dimension("kv_heads", kv_heads, lies.features, kv_heads)
        stripes = tuple(axis for axis in phase.stripes if sizes[axis] > 1)
        tokens = Dimension("tokens", None, stripes) if stripes else None
        panels.append(Panel("cache", tokens or Dimension("sequences", None, lies.tokens), kept))
        return panels

    def chips(self, panel: Panel) -> dict[tuple[int, int], list[int]]:
        """Returns, for each (row, column) that an array is cut into, the chips that hold it."""
        found: dict[tuple[int, int], list[int]] = {}
        for number, at in enumerate(self._coordinates):
            cell = self._piece(panel.rows, at), self._piece(panel.columns, at)
            found.setdefault(cell, []).append(number)
        return found

    @property
    def _sizes(self) -> dict[str, int]:
        return dict(self.layout.mesh.sizes)

    @property
    def _coordinates(self) -> list[dict[str, int]]:
        sizes = self._sizes
        every = product(*(range(size) for size in sizes.values()))
        return [dict(zip(sizes, at, strict=True)) for at in every]

    def _stored(self, axis: str, size: int) -> tuple[str, ...]:
        stored = self.layout.decode.stored(axis, size, self._sizes)
        return tuple(name for name in stored if self._sizes[name] > 1)

    def _piece(self, dimension: Dimension, at: dict[str, int]) -> int:
        """Returns which piece of a dimension a chip holds."""
        index = 0
        for axis in dimension.axes:
            index = index * self._sizes[axis] + at[axis]
        return index * self._pieces(dimension) // self._cuts(dimension)

    def _pieces(self, dimension: Dimension) -> int:
        count = self._cuts(dimension)
        return count if dimension.most is None else min(count, dimension.most)

    def _cuts(self, dimension: Dimension) -> int:
        return math.prod(self._sizes[axis] for axis in dimension.axes)

    def _padded(self) -> list[str]:
        """Returns what is padded, in words."""
        padding, layer = self.layout.padding, self.config.layers[0]
        own, run = layer.attention, padding.attention(layer.attention)
        pairs = {
            "heads": (own.num_heads, run.num_heads),
            "key and value heads": (own.num_kv_heads, run.num_kv_heads),
            "ffn": (layer.mlp.ffn_dim, padding.ffn(layer.mlp.ffn_dim)),
            "vocabulary": (self.config.vocab_size, padding.vocab(self.config.vocab_size)),
        }
        return [f"{name} {old} to {new}" for name, (old, new) in pairs.items() if old != new]

    def _header(self) -> list[str]:
        layout = self.layout
        num = layout.mesh.num_devices
        lines = [f"{layout}: {num} device{'s' if num > 1 else ''}, {layout.dtypes.weights}"]
        if padded := self._padded():
            lines.append(f"padded: {', '.join(padded)}")
        return lines

    def __repr__(self) -> str:
        lines, panels = self._header(), self.panels()
        dimensions = [panels[0].rows, *(panel.columns for panel in panels[:-1])]
        kept = [panels[-1].rows, panels[-1].columns]
        names = [one.name for one in dimensions] + [f"cached {one.name}" for one in kept]
        coordinates = self._coordinates
        table = [["chip", *self._sizes, *names]]
        for number, at in enumerate(coordinates[:_SHOWN]):
            parts = (self._part(one, at) for one in [*dimensions, *kept])
            table.append([str(number), *(str(at[axis]) for axis in self._sizes), *parts])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        if len(coordinates) > _SHOWN:
            lines.append(f"and {len(coordinates) - _SHOWN} more")
        return "\n".join(lines)

    def _part(self, dimension: Dimension, at: dict[str, int]) -> str:
        """Returns a chip's part of a dimension, such as "0:14"."""
        count, index = self._pieces(dimension), self._piece(dimension, at)
        if dimension.size is None:
            return "all" if count == 1 else f"{index + 1} of {count}"
        size = dimension.size // count
        return f"{index * size}:{(index + 1) * size}"

    def svg(self) -> str:
        """Returns the arrays as one SVG image."""
        drawn: list[str] = []
        left: float = _GAP
        top: float = _TOP
        bottom = right = 0.0
        for panel in self.panels():
            width, height, body = self._drawn(panel)
            if left > _GAP and left + width + _GAP > _PAGE:  # goes on below
                left, top = _GAP, bottom + _TOP + _GAP
            drawn.append(f'<g transform="translate({left},{top})">{body}</g>')
            left += width + _GAP
            right, bottom = max(right, left), max(bottom, top + height)
        height = bottom + _GAP
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{right:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {right:.0f} {height:.0f}" font-family="sans-serif" font-size="11">'
            f'<rect width="100%" height="100%" fill="white"/>{"".join(drawn)}</svg>'
        )

    def _drawn(self, panel: Panel) -> tuple[float, float, str]:
        """Returns (width, height, SVG) of one array."""
        cells = self.chips(panel)
        rows, columns = self._pieces(panel.rows), self._pieces(panel.columns)
        names = {at: _names(chips) for at, chips in cells.items()}
        longest = max(len(name) for name in names.values())
        wide = max(_CELL, 6.6 * longest + 10, _WIDEST / columns)
        high = max(22.0, 90 / rows)
        found = [_text(0, -26, panel.title, bold=True), _text(0, -8, _label(panel.columns, "→"))]
        total = self.layout.mesh.num_devices
        for (row, column), chips in sorted(cells.items()):
            hue = round(310 * sum(chips) / len(chips) / max(total, 1))
            x, y = column * wide, row * high
            found.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" '
                f'fill="hsl({hue},65%,84%)" stroke="#555" stroke-width="0.6"/>'
            )
            found.append(_text(x + wide / 2, y + high / 2 + 4, names[row, column], middle=True))
        found.append(_text(0, rows * high + 16, _label(panel.rows, "↓")))
        return max(columns * wide, _WIDEST), rows * high + 16, "".join(found)

    def _repr_html_(self) -> str:
        header = "<br>".join(html.escape(line) for line in self._header())
        layout = self.layout
        phases = {"prefill": layout.prefill, "decode": layout.decode}
        head = "".join(f"<th>{name}</th>" for name in phases)
        rows = "".join(
            f"<tr><td>{words}</td>"
            + "".join(f"<td><code>{self._lies(p, stage)}</code></td>" for p in phases.values())
            + "</tr>"
            for stage, words in _STAGES.items()
        )
        return (
            f"<div><p>{header}</p><div style='overflow-x:auto'>{self.svg()}</div>"
            f"<p>Activations [tokens, features] on the way through a block:</p>"
            f"<table><tr><th></th>{head}</tr>{rows}</table></div>"
        )

    def _lies(self, phase: PhaseLayout, stage: Stage) -> str:
        return html.escape(str(phase.placement(stage).over(self._sizes)))


_CELL, _GAP, _TOP, _WIDEST = 26, 28, 44, 190

_PAGE = 1150
"""Width in which arrays stand side by side, as a page has it."""


def _names(chips: Sequence[int]) -> str:
    """Returns numbers as text, long lists shortened."""
    if len(chips) <= 4:
        return " ".join(map(str, chips))
    return f"{chips[0]} {chips[1]} … {chips[-1]}"


def _label(dimension: Dimension, arrow: str) -> str:
    size = "" if dimension.size is None else f" {dimension.size:,}"
    cut = f", cut by {' '.join(dimension.axes)}" if dimension.axes else ", whole"
    return f"{arrow} {dimension.name}{size}{cut}"


def _text(x: float, y: float, text: str, bold: bool = False, middle: bool = False) -> str:
    style = (' font-weight="bold"' if bold else "") + (' text-anchor="middle"' if middle else "")
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#222"{style}>{html.escape(text)}</text>'
