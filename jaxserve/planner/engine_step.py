"""The steps that an engine runs, compiled for TPUs that are not here.

    layout = choose(config, "bfloat16", mesh="4,2,8", layout="ws2d", attention="batch")
    engine = engine_on(SLICES["v5e:8x8"], config, layout, EngineOptions(max_sequences=128))
    report = check_step(engine.runner, StepShape(num_rows=2, num_tokens=2))
    report.exact                # it sends what was predicted and its results, nothing else
    report.copies               # weights or pages that the step moves about

Weights are shapes alone. Everything else is what a server compiles: its own runner makes the step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from jaxserve.config import KvDtype, ModelConfig, Quantization
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import MeshComm
from jaxserve.partitioning.cost import Key, Pass, Where, padded, step_collectives, totals
from jaxserve.partitioning.hlo import collectives
from jaxserve.partitioning.layout import Stage
from jaxserve.partitioning.layout_file import Layout
from jaxserve.partitioning.placement import AXES
from jaxserve.partitioning.relayout import relayouts
from jaxserve.planner.lower import compiled
from jaxserve.planner.topology import Slice
from jaxserve.serving.batch import StepShape
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.placing import program_of
from jaxserve.serving.request import MAX_LOGPROBS
from jaxserve.serving.runner import ModelRunner
from jaxserve.serving.sharded import abstract_params


def engine_on(
    on: Slice,
    config: ModelConfig,
    layout: Layout,
    options: EngineOptions,
    quantize: Quantization | None = None,
    kv_dtype: KvDtype | None = None,
) -> ModelEngine:
    """Returns a slice's engine; it compiles, and cannot run.

    Args:
        options: with `kv_bytes`, as no device says what it has left.
    """
    devices = list(on.mesh().devices.flat)
    dtype, kernels = layout.dtypes.weights, kernel_set("tpu")
    program = program_of(config, dtype, kernels, layout, quantize, kv_dtype, devices)
    return ModelEngine.create(program, abstract_params(program), options)


@dataclass(frozen=True)
class StepReport:
    """An engine's step beside its plan; bytes are of one chip, of collectives of full tensors.

    Attributes:
        shape: of each shard.
        axes: of the mesh, of more than one chip.
        tokens, rows: of the whole step; rows as they are sampled, evenly by all chips.
        predicted, compiled: bytes, see `cost.totals`.
        copies: weights or pages that the program moves about, in words.
        planned_bytes: weights, pages, slots and what comes from the host.
        argument_bytes, temp_bytes: what the compiler says of arguments and everything else.
        result_bytes: of drawn tokens and likeliest tokens, and the same of log-probabilities.
        compile_s: wall time of tracing and compiling.
        text: the program.
    """

    shape: StepShape
    axes: tuple[str, ...]
    tokens: int
    rows: int
    predicted: dict[Key, int]
    compiled: dict[Key, int]
    copies: tuple[str, ...]
    planned_bytes: int
    argument_bytes: int
    temp_bytes: int
    result_bytes: int
    compile_s: float
    text: str = field(repr=False)

    @property
    def sent(self) -> tuple[dict[Key, int], dict[Key, int]]:
        """Returns (predicted, compiled) bytes, results among them.

        What a branch sends, for who asks for a prompt's log-probabilities, is left out.
        """
        predicted, compiled = (_summed(one, self.axes) for one in (self.predicted, self.compiled))
        for dtype in _RESULTS:
            key = _results(dtype, self.axes)
            predicted[key] = predicted.get(key, 0) + self.result_bytes
        return predicted, compiled

    @property
    def differing(self) -> dict[Key, tuple[int, int]]:
        """Returns (predicted, compiled) bytes of what is not as predicted."""
        predicted, compiled = self.sent
        pairs = {key: (predicted.get(key, 0), compiled.get(key, 0)) for key in predicted | compiled}
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    @property
    def exact(self) -> bool:
        """Returns whether the program sends what was predicted, and nothing else."""
        return not self.differing


_RESULTS = ("s32", "f32")


def _results(dtype: str, axes: tuple[str, ...]) -> Key:
    return "all-reduce", axes, dtype, Where.ENDS


def _summed(found: dict[Key, int], every: tuple[str, ...]) -> dict[Key, int]:
    """Returns bytes without those of branches; small gathers of results count as sums.

    A compiler may write the gather of a few numbers as a sum of zeros, which for them is quicker.
    """
    out: dict[Key, int] = {}
    for key, size in found.items():
        kind, axes, dtype, where = key
        if where is Where.BRANCH:
            continue
        if where is Where.ENDS and kind == "all-gather" and dtype in _RESULTS and axes == every:
            key = _results(dtype, every)
        out[key] = out.get(key, 0) + size
    return out


def check_step(runner: ModelRunner, shape: StepShape) -> StepReport:
    """Returns what the compiler makes of a runner's step, beside the plan."""
    program = runner.program
    declare, comm = program.model.declare, program.of(shape.decode_only).comm
    assert declare.padding is not None and isinstance(comm, MeshComm)
    config = padded(program.model.config, declare.padding)
    sizes, shards = dict(comm.sizes), comm.num_shards
    began = time.perf_counter()
    step = compiled(runner.lowered(shape))
    seconds = time.perf_counter() - began
    text, memory = step.as_text(), step.memory_analysis()
    assert text is not None and memory is not None
    tokens = shards * shape.num_tokens
    chips = math.prod(sizes.values())
    rows = -(-shards * shape.num_rows // chips) * chips
    weights = None if declare.quantize is None else "int8"
    asked = Pass(tokens, rows, declare.dtype, Stage.SAMPLED, weights)
    return StepReport(
        shape,
        tuple(axis for axis in AXES if sizes[axis] > 1),
        tokens,
        rows,
        totals(step_collectives(config, comm.phase, sizes, asked)),
        totals(collectives(text, sizes)),
        tuple(str(one) for one in relayouts(text)),
        sum(runner.array_bytes.values()) + 4 * shards * shape.size(runner.geometry.widths),
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        4 * rows * (1 + min(MAX_LOGPROBS, config.vocab_size)),
        seconds,
        text,
    )
