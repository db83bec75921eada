"""Plans: which slice, layout and batch serve a model, at what cost and latency; no accelerator.

    from jaxserve import planner

    found = planner.search("llama-3-70b", "v5e:4x4", input_tokens=4000, output_tokens=500)
    found                                     # in a notebook or a terminal, a table
    found.save("out")                         # report, layout.json, manifest, benchmark
    planner.estimate("palm-540b", "v4:4x4x4", batch=64, context=2048, attention="batch")
    planner.max_context("palm-540b", "v4:4x4x4", batch=128, attention="batch")
    planner.size("llama-3-8b", chip="v5e", rate=5, input_tokens=1000, output_tokens=200)

Names load on first use: the parts that compile for other machines import JAX, planning does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.planner.answers import Plan, Room, StepPlan
    from jaxserve.planner.ask import estimate, max_context, search, size

__all__ = ["Plan", "Room", "StepPlan", "estimate", "max_context", "search", "size"]

_HOMES = {
    **dict.fromkeys(("Plan", "Room", "StepPlan"), "jaxserve.planner.answers"),
    **dict.fromkeys(("estimate", "max_context", "search", "size"), "jaxserve.planner.ask"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve.planner' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
