"""Tables of chips."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from jaxserve.partitioning.hardware import Chip

_SHOWN = {
    "bfloat16": (1e12, "bf16 TF"),
    "int8": (1e12, "int8 TF"),
    "hbm_bytes": (1e9, "GB"),
    "hbm": (1e9, "GB/s"),
    "link": (1e9, "link GB/s"),
    "links": (1, "links"),
    "usd_hour": (1, "$/h"),
}

_UNITS = {
    "bfloat16": "flop/s",
    "int8": "op/s",
    "fp8": "flop/s",
    "fp4": "flop/s",
    "hbm_bytes": "bytes",
    "hbm": "bytes/s",
    "hop_s": "s a hop",
    "link": "bytes/s one way",
    "links": "of a chip",
    "inside": "bytes/s between devices of a chip",
    "dcn": "bytes/s between hosts",
    "pcie": "bytes/s to the host",
    "layer_s": "s a layer",
    "host_s": "s between steps",
    "usd_hour": "$ an hour",
}


def chip_table(found: Iterable[Chip]) -> Table:
    """Returns chips, one a row; what is assumed has a star."""
    table = Table(caption="* assumed; `jaxserve plan hardware show CHIP` has the sources")
    table.add_column("chip")
    table.add_column("network")
    for _, name in _SHOWN.values():
        table.add_column(name, justify="right")
    for chip in found:
        cells = []
        for key, (scale, _) in _SHOWN.items():
            value = chip.values.get(key)
            star = "*" if value is not None and value.origin == "assumed" else ""
            cells.append("-" if value is None else f"{value.number / scale:,.4g}{star}")
        table.add_row(chip.name, str(chip.fabric), *cells)
    return table


def values_table(chip: Chip) -> Table:
    """Returns the numbers of a chip with their sources."""
    title = f"{chip.name}: {chip.device_kind}, {chip.fabric}, tile {chip.tile}"
    table = Table(title=title, title_justify="left")
    for name in ("value", "number", "unit", "origin", "source"):
        table.add_column(name, justify="right" if name == "number" else "left")
    for name, value in chip.values.items():
        table.add_row(name, f"{value.number:,.6g}", _UNITS[name], str(value.origin), value.source)
    for name, points in chip.curves.items():
        shown = ", ".join(f"{rate:.3g} at {size:.3g}" for size, rate in points)
        unit = "flop/s by rows" if name == "matmul" else "bytes/s by bytes"
        table.add_row(f"curve {name}", shown, unit, "measured", "plan calibrate")
    return table


def chip_fields(chip: Chip) -> dict[str, Any]:
    """Returns a chip as JSON shows it."""
    return {
        "device_kind": chip.device_kind,
        "network": str(chip.fabric),
        "host_chips": chip.host_chips,
        "max_chips": chip.max_chips,
        "tile": chip.tile,
        "devices": chip.devices,
        "values": {
            name: {"number": v.number, "origin": str(v.origin), "source": v.source}
            for name, v in chip.values.items()
        },
        "curves": {name: [list(point) for point in points] for name, points in chip.curves.items()},
    }
