"""Compiles a step for TPUs that are not here, and reads what the compiler made of it.

    job = Job(named_config("llama-2-70b"), PhaseLayout(Ffn.WS2D, Heads.BATCH), batch=64, slots=2048)
    program = compiled(lower(job, SLICES["v5e:8x8"].mesh()))
    program.memory_analysis().temp_size_in_bytes          # of one chip

The step is that of `serving.generation` under one `shard_map`; layers that repeat are one loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.config import KvDtype, ModelConfig, Quantization
from jaxserve.layers.cache import DenseCache
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, named_parameters, tree_of
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import MeshComm
from jaxserve.partitioning.cost import Pass
from jaxserve.partitioning.layout import PhaseLayout, Stage
from jaxserve.partitioning.padding import Padding
from jaxserve.serving.generation import Program, Prompts, decode_step, prefill


@dataclass(frozen=True)
class Job:
    """A step to compile.

    Attributes:
        config: the model; layers that repeat are stored together.
        phase: its layout.
        batch: sequences.
        slots: tokens that the cache has room for, a sequence.
        length: tokens of each sequence in this step; 1 decodes.
        dtype: of weights, activations and cache, unless those are rounded.
        backend: kernels; a processor's copy the cache on a TPU.
        quantize: weights are int8.
        kv_dtype: keys and values are rounded.
    """

    config: ModelConfig
    phase: PhaseLayout
    batch: int
    slots: int
    length: int = 1
    dtype: str = "bfloat16"
    backend: str = "tpu"
    quantize: Quantization | None = None
    kv_dtype: KvDtype | None = None

    @property
    def weights(self) -> str:
        """Returns the dtype of weights as they are stored."""
        return self.dtype if self.quantize is None else "int8"

    @property
    def step(self) -> Pass:
        """Returns the step as its communication is derived from."""
        return Pass(self.batch * self.length, self.batch, self.dtype, weights=self.weights)

    def padding(self, sizes: dict[str, int]) -> Padding:
        """Returns what is added to the model so that it divides."""
        return Padding((self.phase,), tuple(sizes.items()))

    def program(self, sizes: dict[str, int]) -> Program:
        """Returns what the step is built from on a mesh."""
        padding = self.padding(sizes)
        padding.check(self.config)
        declare = Declare(
            self.dtype,
            fuse=True,
            stack=True,
            padding=padding,
            quantize=self.quantize,
            kv_dtype=self.kv_dtype,
        )
        model = Model(self.config, declare)
        return Program(model, MeshComm(self.phase, tuple(sizes.items())), kernel_set(self.backend))


def lower(job: Job, mesh: Mesh) -> jax.stages.Lowered:
    """Returns the step, traced for the devices of a mesh.

    The compiler chooses how weights and cache lie in memory, and the cache is updated in place.
    """
    program = job.program(dict(mesh.shape))
    weights = _weight_specs(program, job.phase, dict(mesh.shape))
    cache, cache_specs = _cache(job, program)
    whole = PartitionSpec()
    own = NamedSharding(mesh, whole)
    if job.length == 1:
        function = partial(_decode, program)
        given = [jax.ShapeDtypeStruct((job.batch,), jnp.int32)] * 2
    else:
        function = partial(_prefill, program)
        given = [
            jax.ShapeDtypeStruct((job.batch, job.length), jnp.int32),
            jax.ShapeDtypeStruct((job.batch,), jnp.int32),
        ]
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(weights, cache_specs, whole, whole),
        out_specs=(whole, cache_specs),
        check_vma=False,
    )
    formats = _formats(cache_specs, mesh)
    step = jax.jit(
        mapped,
        in_shardings=(_formats(weights, mesh), formats, own, own),
        out_shardings=(own, formats),
        donate_argnums=(1,),
    )
    return step.lower(program.model.abstract_params(), cache, *given)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Returns the compiled step.

    JAX would write it to its cache on disk, and fail to read it from there, as that needs the
    devices.
    """
    setting = "jax_persistent_cache_min_compile_time_secs"
    kept = getattr(jax.config, setting)
    jax.config.update(setting, float("inf"))
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, kept)


def argument_bytes(job: Job, sizes: dict[str, int]) -> int:
    """Returns the bytes of weights, cache and tokens on one device: the sum of its shards."""
    program = job.program(sizes)
    total = 0
    for _, leaf in named_parameters(program.model.module()):
        values = leaf.get_value()
        cuts = job.phase.cuts(leaf.axes, values.shape, sizes)
        pieces = math.prod(sizes[axis] for cut in cuts for axis in cut)
        total += values.size * values.dtype.itemsize // pieces
    return total + kv_bytes(job, sizes) + 4 * job.batch * (job.length + 1)


def kv_bytes(job: Job, sizes: dict[str, int]) -> int:
    """Returns the bytes of a step's cache on one device."""
    local = jax.eval_shape(partial(_empty, job, job.program(sizes)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(local))


def _decode(program: Program, params: Any, cache: Any, tokens: Any, positions: Any) -> Any:
    return decode_step(program, params, tokens, positions, cache)


def _prefill(program: Program, params: Any, cache: Any, tokens: Any, lengths: Any) -> Any:
    return prefill(program, params, Prompts(tokens, lengths), cache)


def _weight_specs(program: Program, phase: PhaseLayout, sizes: dict[str, int]) -> Any:
    flat = []
    for path, leaf in named_parameters(program.model.module()):
        cuts = phase.cuts(leaf.axes, leaf.get_value().shape, sizes)
        flat.append((path, PartitionSpec(*(cut or None for cut in cuts))))
    return tree_of(flat)


def _empty(job: Job, program: Program) -> DenseCache:
    """Returns the cache of one device."""
    declare, comm = program.model.declare, program.comm
    return DenseCache.create(job.config, job.batch, job.slots, declare, comm, program.kernels)


def _cache(job: Job, program: Program) -> tuple[Any, Any]:
    """Returns (the cache of all devices as shapes, its specs).

    A device's part is a shard of a larger array: rows over the axes of the tokens, heads over those
    of the features, each with its own copy where heads are copied. A page table is the same for
    all, as every device counts its own rows.
    """
    local = jax.eval_shape(partial(_empty, job, program))
    assert isinstance(program.comm, MeshComm)
    lies, sizes = program.comm.placement(Stage.QUERY), dict(program.comm.sizes)
    entries = lies.tokens or None, lies.features or None

    def spec(leaf: Any) -> PartitionSpec:
        return PartitionSpec(*entries) if leaf.ndim > 2 else PartitionSpec()

    def whole(leaf: Any) -> Any:
        shape = list(leaf.shape)
        for dim, axes in enumerate(spec(leaf)):
            shape[dim] *= math.prod(sizes[axis] for axis in axes or ())
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree.map(whole, local), jax.tree.map(spec, local)


def _formats(specs: Any, mesh: Mesh) -> Any:
    """Returns shardings whose layout in memory is the compiler's choice."""
    return jax.tree.map(
        lambda spec: (
            Format(Layout.AUTO, NamedSharding(mesh, spec))
            if len(spec)
            else NamedSharding(mesh, spec)
        ),
        specs,
        is_leaf=lambda spec: isinstance(spec, PartitionSpec),
    )
