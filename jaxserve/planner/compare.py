"""Two plans or estimates side by side.

compared(read(Path("a.json")), read(Path("b.json")), ("a", "b"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from jaxserve.errors import UsageError
from jaxserve.planner.show import ms


@dataclass(frozen=True)
class Comparison:
    """Numbers of two answers.

    Attributes:
        names: of the two.
        rows: (what, unit, first, second); None where one has no such number.
    """

    names: tuple[str, str]
    rows: tuple[tuple[str, str, float | None, float | None], ...]

    def fields(self) -> dict[str, Any]:
        """Returns the rows as JSON shows them."""
        keys = ("name", "unit", "first", "second")
        return {"names": self.names, "rows": [dict(zip(keys, r, strict=True)) for r in self.rows]}

    def __rich__(self) -> RenderableType:
        table = Table()
        for name in ("", *self.names, "second / first"):
            table.add_column(name, justify="right" if name else "left")
        for name, unit, *pair in self.rows:
            shown = ["-" if value is None else _shown(value, unit) for value in pair]
            first, second = pair
            ratio = f"{second / first:.2f}" if first and second is not None else ""
            table.add_row(name, *shown, ratio)
        return table


def read(path: Path) -> dict[str, Any]:
    """Returns an answer that was written as JSON.

    Raises:
        UsageError: the file is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not ("best" in found or "terms" in found):
        raise UsageError(
            f"{path} is no plan and no estimate; write one with --json, or with --save-dir"
        )
    return found


def compared(
    first: Mapping[str, Any], second: Mapping[str, Any], names: tuple[str, str]
) -> Comparison:
    """Returns two answers side by side.

    Raises:
        UsageError: one is a plan and the other an estimate.
    """
    if ("best" in first) != ("best" in second):
        raise UsageError("one file is a plan and the other an estimate; compare two of a kind")
    one, two = _numbers(first), _numbers(second)
    keys = list(dict.fromkeys([*one, *two]))
    return Comparison(
        names,
        tuple((name, unit, one.get((name, unit)), two.get((name, unit))) for name, unit in keys),
    )


def _numbers(found: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    numbers: dict[tuple[str, str], float] = {}
    if found.get("band") is not None:
        numbers["band, share of a time", ""] = found["band"]
    if "best" in found:
        if found["best"]:
            best = found["best"][0]
            for key, unit in (
                ("ttft_s", "s"),
                ("tpot_s", "s"),
                ("tokens_per_s", ""),
                ("requests_per_s", ""),
                ("usd_per_million", "$"),
                ("batch", ""),
                ("free_bytes", "GB"),
            ):
                if best.get(key) is not None:
                    numbers[key, unit] = best[key]
        for name, step in found.get("steps", {}).items():
            _terms(numbers, step, f"{name}: ")
    else:
        numbers["time_s", "s"] = found["time_s"]
        numbers["mfu", ""] = found["mfu"]
        _terms(numbers, found, "")
    return numbers


def _terms(numbers: dict[tuple[str, str], float], step: Mapping[str, Any], before: str) -> None:
    for term in step["terms"]:
        note = term["note"].partition(",")[0]
        key = f"{before}{term['name']} ({term['kind']}{f', {note}' if note else ''})", "s"
        numbers[key] = numbers.get(key, 0.0) + term["seconds"]
    for name, size in step["memory"].items():
        numbers[f"{before}memory, {name.removesuffix('_bytes')}", "GB"] = size


def _shown(value: float, unit: str) -> str:
    match unit:
        case "s":
            return ms(value)
        case "GB":
            return f"{value / 1e9:,.3f} GB"
        case "$":
            return f"${value:,.2f}"
    return f"{value:,.4g}"
