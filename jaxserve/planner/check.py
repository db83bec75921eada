"""Holds a compiled step against its plan: communication, memory, copies.

report = check(Job(config, phase, batch=64, slots=2048), SLICES["v4:4x4x4"])
report.exact                        # the same bytes of every kind, over the same axes
report.wire("predicted"), report.copies, report.temp_bytes
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from jaxserve.partitioning.cost import (
    Collective,
    Key,
    Where,
    gathered_bytes,
    padded,
    step_collectives,
    totals,
)
from jaxserve.partitioning.hlo import collectives
from jaxserve.partitioning.relayout import relayouts
from jaxserve.planner.lower import Job, argument_bytes, compiled, lower
from jaxserve.planner.topology import Slice


@dataclass(frozen=True)
class Report:
    """A compiled step beside its plan; bytes are of one chip.

    Attributes:
        sizes: devices along x, y and z.
        predicted, compiled: bytes of full tensors, see `cost.totals`.
        copies: weights or cache that the program moves about, in words.
        planned_bytes: weights, cache and tokens as they are cut.
        gathered_bytes: what a layer's gathers of weights give, at most held at once.
        argument_bytes, temp_bytes: what the compiler says of arguments and everything else.
        num_heads: query heads that are computed, padding included.
        compile_s, cpu_s: wall and processor time of tracing and compiling.
    """

    sizes: Mapping[str, int]
    predicted: dict[Key, int]
    compiled: dict[Key, int]
    copies: tuple[str, ...]
    planned_bytes: int
    gathered_bytes: int
    argument_bytes: int
    temp_bytes: int
    num_heads: int
    compile_s: float
    cpu_s: float

    @property
    def exact(self) -> bool:
        """Returns whether the program sends what was predicted and nothing else."""
        return self.predicted == self.compiled

    def wire(self, side: str, where: Where = Where.LAYER) -> float:
        """Returns the bytes that a chip receives in one layer, or at the ends.

        Args:
            side: "predicted" or "compiled".
        """
        found = self.predicted if side == "predicted" else self.compiled
        return sum(
            Collective(kind, axes, dtype, size).wire_bytes(self.sizes)
            for (kind, axes, dtype, part), size in found.items()
            if part is where
        )


def check(job: Job, on: Slice) -> Report:
    """Returns what a TPU's compiler makes of a step, beside the plan."""
    config = padded(job.config, job.padding(on.sizes))
    began = time.perf_counter(), time.process_time()
    program = compiled(lower(job, on.mesh()))
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    text = program.as_text()
    memory = program.memory_analysis()
    assert text is not None and memory is not None
    return Report(
        on.sizes,
        totals(step_collectives(config, job.phase, on.sizes, job.step)),
        totals(collectives(text, on.sizes)),
        tuple(str(one) for one in relayouts(text)),
        argument_bytes(job, on.sizes),
        gathered_bytes(config, job.phase, on.sizes, job.weights),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        config.layers[0].attention.num_heads,
        *seconds,
    )
