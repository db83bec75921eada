"""Compiles one step, and prints what the compiler made of it: a child process of `verify`.

Standard input is a `verify.Question` as JSON; the last line of standard output is the answer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import msgspec

from jaxserve.errors import JaxserveError
from jaxserve.partitioning.cost import Key
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.planner.verify import Question, Server

_MEGACORE = "megacore"


def answer(question: Question) -> dict[str, Any]:
    """Returns the compiled step beside its plan."""
    if question.server is not None:
        return _served(question, question.server)
    from jaxserve.planner.check import check
    from jaxserve.planner.gpu_topology import Gpus
    from jaxserve.planner.lower import Job, kv_bytes
    from jaxserve.planner.topology import Slice

    plan = MeshPlan(*question.mesh)
    dtype = "float32" if question.stand_in else "bfloat16"
    job = Job(
        question.config,
        question.phase,
        batch=question.batch,
        slots=question.slots,
        length=question.length,
        dtype=dtype,
        backend="tpu" if question.target is not None else "xla",
        quantize=question.quantize,
        kv_dtype=question.kv_dtype,
    )
    on: Any
    if question.target is not None:
        on = Slice(question.target, plan, _MEGACORE if question.megacore else None)
    elif question.gpu is not None:
        on = Gpus(question.gpu, plan, question.host_chips)
    else:
        on = _Here(plan)
    report = check(job, on)
    return {
        "predicted": _named(report.predicted),
        "compiled": _named(report.compiled),
        "copies": list(report.copies),
        "planned_bytes": report.planned_bytes,
        "kv_bytes": kv_bytes(job, on.sizes),
        "argument_bytes": report.argument_bytes,
        "temp_bytes": report.temp_bytes,
        "compile_s": report.compile_s,
    }


def _served(question: Question, server: Server) -> dict[str, Any]:
    """Returns the step of a server beside its plan."""
    from jaxserve.planner.engine_step import check_step, engine_on
    from jaxserve.planner.topology import Slice
    from jaxserve.serving.options import EngineOptions
    from jaxserve.serving.placing import sized

    assert question.target is not None
    on = Slice(question.target, server.layout.mesh, _MEGACORE if question.megacore else None)
    config = replace(question.config, max_context_tokens=question.slots)
    options = sized(EngineOptions(kv_bytes=server.kv_bytes), server.layout)
    made = engine_on(on, config, server.layout, options, question.quantize, question.kv_dtype)
    runner = made.runner
    shards = runner.program.comm.num_shards
    rows = -(-question.batch // shards)
    tokens = -(-question.batch * question.length // shards)
    shape = runner.ladder.fit(rows if question.length == 1 else max(tokens, rows + 1), rows)
    report = check_step(runner, shape)
    predicted, compiled = report.sent
    return {
        "predicted": _named(predicted),
        "compiled": _named(compiled),
        "copies": list(report.copies),
        "planned_bytes": report.planned_bytes,
        "kv_bytes": runner.array_bytes["pages"],
        "argument_bytes": report.argument_bytes,
        "temp_bytes": report.temp_bytes,
        "compile_s": report.compile_s,
    }


class _Here:
    """CPU devices in the place of a slice."""

    def __init__(self, plan: MeshPlan) -> None:
        self.plan = plan

    @property
    def sizes(self) -> dict[str, int]:
        return dict(self.plan.sizes)

    def mesh(self) -> Any:
        from jaxserve.partitioning.mesh import make_mesh

        return make_mesh(self.plan)


def _named(found: dict[Key, int]) -> dict[str, int]:
    return {
        f"{kind} over {' '.join(axes)}, {dtype}, {'a layer' if where == 'layer' else where}": size
        for (kind, axes, dtype, where), size in found.items()
    }


def main() -> int:
    """Answers one question; returns the exit status."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    try:
        found = answer(question)
    except JaxserveError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
