"""Tuned sizes of blocks, from `tuning.toml`; every row says where it comes from.

    row = tuned("int8_matmul", "v5e", mode="w8a16", rows=16, inputs=4096, channels=6144)

A kernel takes the chip as it finds it: that of the mesh it is compiled for, or the default device.
"""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu

UNTUNED = "untuned: sizes by rule"
"""Origin of the sizes of a shape that the table does not have."""

TWO_CORES = ("v4", "v5p")
"""Chips whose two cores are one device."""

_CHIPS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e"}


def current_chip() -> str | None:
    """Returns "v4", "v5e", "v5p" or "v6e" where one is compiled for, else None."""
    try:
        info = pltpu.get_tpu_info()
    except (ValueError, RuntimeError, NotImplementedError):
        return None
    return _CHIPS.get(str(info.chip_version))


def tuned(op: str, chip: str | None, **shape: Any) -> dict[str, Any] | None:
    """Returns the row of an operation whose entries are those of the shape, or None."""
    wanted = {"chip": chip, **shape}
    for row in _table().get(op, ()):
        if all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


@cache
def _table() -> dict[str, Any]:
    with (Path(__file__).parent / "tuning.toml").open("rb") as file:
        return tomllib.load(file)
