"""Generation as pure functions of pytrees: `prefill`, `decode_step`, `generate`, `logits`.

    program = Program(model, LocalComm(), kernel_set("xla"))
    batch = Prompts(tokens, lengths)                          # int32[B, L] and int32[B]
    result = generate(program, params, batch, sampling, slots=256, max_tokens=64)
    result.tokens                                             # int32[B, 64]

`Program` is hashable: pass it as a static argument. `start` and `advance` are the two steps
that a loop on the host drives when tokens are wanted as they come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh

from jaxserve.config import ModelConfig, Quantization
from jaxserve.errors import UsageError
from jaxserve.layers.cache import DenseCache, NoCache
from jaxserve.layers.decoder import Model, Params, forward
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm, MeshComm
from jaxserve.partitioning.layout import PhaseLayout
from jaxserve.serving.sampler import Processor, Sampled, Sampling, processed, sample


@dataclass(frozen=True)
class Program:
    """What a compiled step is built from; no arrays.

    Attributes:
        comm: communication of decode, and of everything else unless there is a `prefill`.
        prefill: communication of steps with more than one token a sequence.
        mesh: devices, with axes x, y and z; None is one device.
        layout: how weights are stored on the mesh; that of decode and prefill alike.
    """

    model: Model
    comm: Comm
    kernels: KernelSet
    prefill: Comm | None = None
    mesh: Mesh | None = None
    layout: PhaseLayout | None = None

    @classmethod
    def on(
        cls, model: Model, kernels: KernelSet, mesh: Mesh, prefill: PhaseLayout, decode: PhaseLayout
    ) -> Program:
        """Returns a program on a mesh; prefill and decode lay out weights and cache alike."""
        sizes = tuple(mesh.shape.items())
        comms = MeshComm(decode, sizes), MeshComm(prefill, sizes)
        return cls(model, comms[0], kernels, comms[1], mesh, decode)

    @property
    def device_config(self) -> ModelConfig:
        """Returns the model as one device's cache sees it, with the heads that it attends to."""
        config = self.model.config
        layers = (
            replace(layer, attention=self.comm.local(self.model.declare.attention(layer.attention)))
            for layer in config.layers
        )
        return replace(config, layers=tuple(layers))

    @property
    def summary(self) -> str:
        """Returns kernels and types of numbers, for people."""
        declare = self.model.declare
        parts = [f"kernels {self.kernels.backend}", declare.dtype]
        if declare.quantize is not None:
            activations = " and activations" if declare.quantize is Quantization.W8A8 else ""
            parts.append(f"weights{activations} int8")
        if declare.kv_dtype is not None:
            parts.append(f"keys and values {declare.kv_dtype}")
        return ", ".join(parts)

    @property
    def token_multiple(self) -> int:
        """Returns what divides the tokens of a shard's step, of either phase."""
        return math.lcm(self.comm.token_multiple, (self.prefill or self.comm).token_multiple)

    def of(self, decode_only: bool) -> Program:
        """Returns the program of a step, whose `comm` is that of its phase."""
        return self if decode_only or self.prefill is None else replace(self, comm=self.prefill)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch.

    Attributes:
        tokens: int32[B, L], padded on the right; what stands in the padding does not matter.
        lengths: int32[B], tokens of each prompt, at least 1.
    """

    tokens: Array
    lengths: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """A batch between two steps.

    Attributes:
        cache: keys and values so far, without the last token's.
        tokens: int32[B], last token of each row.
        positions: int32[B], position of that token.
        sampling: parameters and state of the sampler.
        seen: int32[B, slots], all tokens so far, for a processor; or None.
    """

    cache: DenseCache
    tokens: Array
    positions: Array
    sampling: Sampling
    seen: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """Outcome of `generate`.

    Attributes:
        tokens: int32[B, max_tokens]; -1 after the end of a row.
        lengths: int32[B], tokens of each row, an ending stop token included.
        logprobs: float32[B, max_tokens] of the tokens, or None.
    """

    tokens: Array
    lengths: Array
    logprobs: Array | None


Carry = tuple[Array, Array, Progress, Generated]
"""State of the loop in `generate`: next column, finished rows bool[B], batch, outcome so far."""


def logits(program: Program, params: Params, tokens: Array) -> Array:
    """Returns float32[B, L, V] for int32[B, L] whole sequences; differentiable."""
    program = program.of(decode_only=False)
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    step = Step(tokens.reshape(-1), positions, jnp.full_like(positions, length))
    own = NoCache(program.comm.rows(batch))
    out, _ = forward(program.model, params, step, own, program.comm, program.kernels)
    return out.logits.reshape(batch, length, -1)


def prefill(
    program: Program, params: Params, prompts: Prompts, cache: DenseCache
) -> tuple[Array, DenseCache]:
    """Returns (float32[B, V] after each prompt's last token, the cache filled)."""
    program = program.of(decode_only=False)
    batch, length = prompts.tokens.shape
    given = prompts.tokens
    if batch * length == 1:  # as in `decode_step`
        given, length = jnp.pad(given, ((0, 0), (0, 1))), 2
    column = jnp.arange(length, dtype=jnp.int32)[None, :]
    inside = column < prompts.lengths[:, None]
    positions = jnp.where(inside, column, -1).reshape(-1)
    tokens = jnp.where(inside, given, 0).reshape(-1)
    lengths = jnp.repeat(prompts.lengths, length)
    last = jnp.arange(batch) * length + prompts.lengths - 1
    last = jnp.repeat(last, 2) if batch == 1 else last
    out, cache = forward(
        program.model,
        params,
        Step(tokens, positions, lengths),
        cache,
        program.comm,
        program.kernels,
        rows=last,
    )
    return out.logits[:batch], cache


def decode_step(
    program: Program, params: Params, tokens: Array, positions: Array, cache: DenseCache
) -> tuple[Array, DenseCache]:
    """Returns (float32[B, V] after one more token a row, the cache with it).

    Args:
        tokens, positions: int32[B].
        cache: room for another token a row.
    """
    batch = tokens.shape[0]
    if batch > 1:
        step = Step(tokens, positions, positions + 1)
        out, cache = forward(program.model, params, step, cache, program.comm, program.kernels)
        return out.logits, cache
    # One row falls off XLA's fast path on CPU, more than ten times slower than two and with other
    # bits: a padding token runs along, which the cache does not keep.
    step = Step(jnp.append(tokens, 0), jnp.append(positions, -1), jnp.append(positions + 1, 0))
    out, cache = forward(program.model, params, step, cache, program.comm, program.kernels)
    return out.logits[:1], cache


def start(
    program: Program,
    params: Params,
    prompts: Prompts,
    sampling: Sampling,
    slots: int,
    processor: Processor | None = None,
) -> tuple[Sampled, Progress]:
    """Returns (the first token of each row, the batch to go on with).

    Args:
        slots: room of the cache, in tokens a row; at least L.
        processor: changes the logits that tokens are chosen by; see `sampler.Processor`.
    """
    batch, length = prompts.tokens.shape
    if slots < length:
        raise UsageError(f"slots={slots} cannot hold prompts of {length} tokens; use at least that")
    model = program.model
    cache = DenseCache.create(
        model.config, batch, slots, model.declare, program.comm, program.kernels
    )
    scores, cache = prefill(program, params, prompts, cache)
    if processor is None:
        sampled, sampling = sample(scores, prompts.lengths, sampling)
        return sampled, Progress(cache, sampled.tokens, prompts.lengths, sampling)
    seen = jnp.pad(prompts.tokens, ((0, 0), (0, slots - length)))
    chosen_by = processed(processor, scores, seen, prompts.lengths)
    sampled, sampling = sample(scores, prompts.lengths, sampling, chosen_by)
    seen = _written(seen, prompts.lengths, sampled.tokens)
    return sampled, Progress(cache, sampled.tokens, prompts.lengths, sampling, seen)


def _written(seen: Array, positions: Array, tokens: Array) -> Array:
    """Returns seen[B, slots] with tokens[B] at positions[B]."""
    return seen.at[jnp.arange(tokens.shape[0]), positions].set(tokens, mode="drop")


def advance(
    program: Program, params: Params, progress: Progress, processor: Processor | None = None
) -> tuple[Sampled, Progress]:
    """Returns (the next token of each row, the batch to go on with)."""
    scores, cache = decode_step(
        program, params, progress.tokens, progress.positions, progress.cache
    )
    positions, seen, chosen_by = progress.positions + 1, progress.seen, None
    if processor is not None:
        assert seen is not None, "start was called without the processor"
        chosen_by = processed(processor, scores, seen, positions)
    sampled, sampling = sample(scores, positions, progress.sampling, chosen_by)
    if seen is not None:
        seen = _written(seen, positions, sampled.tokens)
    return sampled, Progress(cache, sampled.tokens, positions, sampling, seen)


def generate(
    program: Program,
    params: Params,
    prompts: Prompts,
    sampling: Sampling,
    slots: int,
    max_tokens: int,
    processor: Processor | None = None,
) -> Generated:
    """Returns up to `max_tokens` tokens a row in one loop on the device.

    It ends early once every row has drawn a stop token.

    Args:
        slots: at least L + max_tokens.
        processor: changes the logits that tokens are chosen by; see `sampler.Processor`.
    """
    batch, length = prompts.tokens.shape
    if slots < length + max_tokens:
        raise UsageError(
            f"slots={slots} cannot hold prompts of {length} tokens and max_tokens={max_tokens}; "
            f"use at least {length + max_tokens}"
        )
    sampled, progress = start(program, params, prompts, sampling, slots, processor)
    tokens = jnp.full((batch, max_tokens), -1, jnp.int32).at[:, 0].set(sampled.tokens)
    scores = None
    if sampled.logprobs is not None:
        scores = jnp.zeros((batch, max_tokens), jnp.float32).at[:, 0].set(sampled.logprobs)
    result = Generated(tokens, jnp.ones(batch, jnp.int32), scores)

    def unfinished(carry: Carry) -> Array:
        index, done, _, _ = carry
        return (index < max_tokens) & ~jnp.all(done)

    def body(carry: Carry) -> Carry:
        index, done, progress, result = carry
        sampled, progress = advance(program, params, progress, processor)
        column = jnp.where(done, -1, sampled.tokens)[:, None]
        logprobs = result.logprobs
        if logprobs is not None:
            assert sampled.logprobs is not None
            own = jnp.where(done, 0.0, sampled.logprobs)[:, None]
            logprobs = lax.dynamic_update_slice(logprobs, own, (0, index))
        result = replace(
            result,
            tokens=lax.dynamic_update_slice(result.tokens, column, (0, index)),
            lengths=result.lengths + ~done,
            logprobs=logprobs,
        )
        return index + 1, done | sampled.stopped, progress, result

    carry = jnp.int32(1), sampled.stopped, progress, result
    return lax.while_loop(unfinished, body, carry)[-1]
