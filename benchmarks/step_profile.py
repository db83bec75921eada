"""Where the time of a decode step goes, from XLA's own trace."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

PARTS = ("qkv", "rope", "attend", "out", "mlp", "norm", "logits", "sample")
"""Named scopes of the forward and the sampler, innermost last in an operation's name."""

_SKIPPED_STEPS = 2


def share_by_part(programs: Iterable[Any], step: Callable[[], bool]) -> dict[str, float]:
    """Returns part -> share of the processor time of the steps until none is left; they sum to 1.

    Args:
        programs: compiled executables whose operations may run.
        step: makes one step; False when there is nothing left to do.
    """
    for _ in range(_SKIPPED_STEPS):
        step()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            while step():
                pass
        (trace,) = Path(folder).rglob("*.xplane.pb")
        return _shares(trace, _part_of_operation(program.as_text() for program in programs))


def _part_of_operation(programs: Iterable[str]) -> dict[str, str]:
    """Returns HLO instruction name -> part, from the metadata of compiled programs."""
    parts: dict[str, str] = {}
    for text in programs:
        for name, scope in re.findall(
            r"%?([\w.-]+) = .*?metadata=\{[^}]*op_name=\"([^\"]*)\"", text
        ):
            found = [word for word in scope.split("/") if word in PARTS]
            parts[name] = found[-1] if found else "other"
    return parts


def _shares(trace: Path, parts: Mapping[str, str]) -> dict[str, float]:
    """Returns the shares of busy time in the trace's executor threads."""
    busy: Counter[str] = Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in parts:
                    busy[parts[event.name]] += event.duration_ns
    total = sum(busy.values())
    return {part: busy[part] / total for part in (*PARTS, "other") if busy[part]}
