"""Makes a chip of what a model took here: `jaxserve plan calibrate --from measured.json`.

    fields = read_comparison(Path("measured.json"))      # of `bench --against layout.json --json`
    made = ingested(fields, "here")
    made.write(Path("hardware.toml"))

A calibration measures products and collectives of round sizes alone. A comparison has measured
those of a model, and its whole steps: products and reads are scaled by how far theirs were from
the estimate, collectives likewise, the time between two steps is taken over, and what a decode step
took beyond all that is a fixed time of a layer. So the estimate of that step is what it took.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from jaxserve.errors import UsageError
from jaxserve.planner.calibrate import Calibration, check_name

_BESIDE = ("step", "layers", "host", "overlap")
"""Lines that are no rate's work."""


class _Term(msgspec.Struct):
    name: str
    kind: str
    estimated_s: float
    measured_s: float | None
    phase: str = "decode"

    @property
    def taken_s(self) -> float:
        return self.measured_s or 0.0


class _Measured(msgspec.Struct):
    num_layers: int
    calibration: Calibration
    terms: list[_Term]


def read_comparison(path: Path) -> Any:
    """Returns the fields of a comparison.

    Raises:
        UsageError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--from {path} cannot be read: {error}") from error


def ingested(fields: Mapping[str, Any], name: str) -> Calibration:
    """Returns the calibration of a comparison, corrected by its terms.

    Args:
        fields: of `benchmark.against.Against`.
        name: what the chip is to be called.

    Raises:
        UsageError: they are not those of a comparison.
    """
    check_name(name)
    try:
        found = msgspec.convert(fields, _Measured)
    except msgspec.ValidationError as error:
        raise UsageError(
            f"--from is no comparison: {error}; write one with jaxserve bench --against "
            "layout.json --json"
        ) from error
    slower = {
        collective: _slower(t for t in found.terms if t.kind == kind)
        for collective, kind in ((False, "product"), (True, "collective"))
    }
    step = [term for term in found.terms if term.phase == "decode"]
    whole, host = (sum(t.taken_s for t in step if t.kind == kind) for kind in ("step", "host"))
    parts = sum(
        t.estimated_s * slower[t.kind == "collective"] for t in step if t.kind not in _BESIDE
    )
    made = found.calibration
    return replace(
        made,
        name=name,
        read=tuple((size, rate / slower[False]) for size, rate in made.read),
        matmul=tuple((rows, rate / slower[False]) for rows, rate in made.matmul),
        gathered=tuple((size, took * slower[True]) for size, took in made.gathered),
        layer_s=max(whole - host - parts, 0.0) / found.num_layers,
        host_s=host if any(term.kind == "host" for term in step) else None,
    )


def _slower(terms: Iterable[_Term]) -> float:
    """Returns how many times longer terms took than was estimated; 1 of none."""
    terms = list(terms)
    estimated = sum(term.estimated_s for term in terms)
    measured = sum(term.taken_s for term in terms)
    return measured / estimated if estimated and measured else 1.0
