"""The one decoder: a declaration of weights and a pure forward.

    model = Model(config, Declare("float32"))
    params = model.init(jax.random.key(0))               # plain tree of arrays
    step = Step(tokens, positions, lengths)               # packed, int32[T]
    output, cache = forward(model, params, step, NoCache(batch=1), LocalComm(), kernels)
    output.logits                                         # float32[T, V]

`forward` runs under eval_shape, jit, grad and shard_map; `Model` is hashable, so it can be a
static argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxserve.config import ModelConfig
from jaxserve.errors import UnsupportedError
from jaxserve.layers.block import Block
from jaxserve.layers.cache import AnyCache, At
from jaxserve.layers.ends import Entrance, Widening, per_unit_row
from jaxserve.layers.linear import product, rows_of
from jaxserve.layers.norm import Norm
from jaxserve.layers.param import (
    Axis,
    Declare,
    Init,
    Orientation,
    named_parameters,
    padded,
    tree_of,
)
from jaxserve.layers.runtime import Runtime
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Taps
from jaxserve.pallas_kernels import KernelSet
from jaxserve.partitioning.collectives import Comm
from jaxserve.partitioning.layout import Stage

Params = Mapping[str, Any]

_INT8_STD = 127 / 4
"""Of fresh quantised weights: four deviations are the largest value."""


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and logits of a `ModelConfig`."""

    def __init__(self, config: ModelConfig, declare: Declare) -> None:
        self.config = config
        embed, vocab = Axis("embed", config.embed_dim), declare.vocab(config.vocab_size)
        columns = Axis("embed", config.table_dim or config.embed_dim)
        self.embedding = declare.table(vocab, columns)
        self.entrance = Entrance(config, embed, declare)
        self.widening = (
            None
            if config.table_dim is None
            else Widening(config.table_dim, config.embed_dim, declare)
        )
        self.turns = config.num_layers // len(config.pattern) if declare.stack else None
        repeated = config.pattern if declare.stack else config.layers
        inner = replace(declare, copies=self.turns)
        self.layers = nnx.List([Block(spec, embed, inner) for spec in repeated])
        self.final_norm = (
            None if config.final_norm is None else Norm(config.final_norm, embed, declare)
        )
        self.head = (
            None
            if config.tied
            else replace(declare, orientation=Orientation.OUT_IN).weight((columns,), (vocab,))
        )

    def hidden(self, step: Step, cache: AnyCache, run: Runtime) -> tuple[Array, AnyCache]:
        """Returns (the normed residual stream [T, embed] after the last block, the cache)."""
        x = run.tap("input", rows_of(self.embedding, step.tokens, run.comm))
        if self.widening is not None:
            x = self.widening.enter(x, run.comm, run.kernels)
        x = run.tap("embed", self.entrance(x, step.positions, run))
        cache = cache.begin(run.step)
        if self.turns is None:
            for index, block in enumerate(self.layers):
                x, cache = block(x, At(index), cache, run)
        else:
            x, cache = self._turns(x, cache, run)
        if self.final_norm is not None:
            x = self.final_norm(x, run.comm, Stage.RESIDUAL)
        return run.tap("final", x), cache.end()

    def _turns(self, x: Array, cache: AnyCache, run: Runtime) -> tuple[Array, AnyCache]:
        """Returns what `hidden` does, in one loop over the turns of the repeated layers."""
        parts = [nnx.split(block) for block in self.layers]

        def turn(
            carry: tuple[Array, AnyCache], own: tuple[Array, list[Any]]
        ) -> tuple[tuple[Array, AnyCache], None]:
            x, cache = carry
            number, states = own
            for index, ((graph, _), state) in enumerate(zip(parts, states, strict=True)):
                x, cache = nnx.merge(graph, state)(x, At(index, number), cache, run)
            return (x, cache), None

        states = [state for _, state in parts]
        numbers = jnp.arange(self.turns, dtype=jnp.int32)
        return lax.scan(turn, (x, cache), (numbers, states))[0]

    def logits(
        self, hidden: Array, comm: Comm, kernels: KernelSet, target: Stage = Stage.WHOLE
    ) -> Array:
        """Returns float32[R, V] of the stage `target` for hidden[R, embed] at `Stage.ENDS`."""
        table = self.embedding if self.head is None else self.head
        if self.widening is not None:
            hidden = self.widening.leave(hidden, comm, kernels)
        scales = None if table.scales is None else table.scales[...]
        if scales is not None:
            scales = comm.scales(scales, [("vocab", table.outputs[0].size)], gathered=False)
        # Rows are not rounded here: logits are what tokens are chosen by.
        y = product(hidden, table, table.values[...], scales, kernels, jnp.float32, None)
        if self.config.unit_head:
            y = per_unit_row(y, table.values[...], scales, comm)
        # No target has the vocabulary cut, so its padding ends here.
        y = comm.move(y, Stage.SCORED, target)[:, : self.config.vocab_size]
        if self.config.logits_scale is not None:
            y = y * self.config.logits_scale
        if self.config.logits_soft_cap is not None:
            cap = self.config.logits_soft_cap
            y = jnp.tanh(y / cap) * cap
        return y


@dataclass(frozen=True)
class Model:
    """A configuration and the way a backend stores its weights; no arrays."""

    config: ModelConfig
    declare: Declare

    @property
    def turns(self) -> int:
        """Returns how often a stored layer is run: 1, or the turns of layers that repeat."""
        config = self.config
        return config.num_layers // len(config.pattern) if self.declare.stack else 1

    def module(self) -> Decoder:
        """Returns the declared decoder, its parameters abstract."""
        return Decoder(self.config, self.declare)

    def abstract_params(self) -> Params:
        """Returns the tree of parameters as shapes and dtypes."""
        return tree_of((path, leaf.get_value()) for path, leaf in named_parameters(self.module()))

    def param_axes(self) -> Params:
        """Returns the tree of parameters with each array's logical axes, as tuples of words."""
        return tree_of((path, leaf.axes) for path, leaf in named_parameters(self.module()))

    def init(self, key: Array) -> Params:
        """Returns fresh random parameters: normal with variance 1/fan-in, embeddings 0.02."""
        flat = []
        for index, (path, leaf) in enumerate(named_parameters(self.module())):
            dtype, logical = leaf.get_value().dtype, leaf.logical
            copies = leaf.get_value().shape[: -len(logical)]
            shape = copies + tuple(axis.real for axis in logical)
            match leaf.init:
                case Init.ZEROS:
                    value = jnp.zeros(shape, dtype)
                case Init.ONES:
                    value = jnp.ones(shape, dtype)
                case Init.SCALES:
                    value = jnp.full(shape, leaf.fan_in**-0.5 / _INT8_STD, dtype)
                case _:
                    std = 0.02 if leaf.init is Init.EMBED else leaf.fan_in**-0.5
                    noise = jax.random.normal(jax.random.fold_in(key, index), shape)
                    if dtype == jnp.int8:
                        value = jnp.clip(jnp.round(noise * _INT8_STD), -127, 127).astype(dtype)
                    else:
                        value = (noise * std).astype(dtype)
            flat.append((path, padded(value, logical)))
        return tree_of(flat)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of a forward.

    Attributes:
        logits: float32[R, V] of the rows asked for.
        hidden: [T, embed] after the final norm, as the residual stream lies.
        taps: captured activations by name.
    """

    logits: Array
    hidden: Array
    taps: dict[str, Array]


def forward(
    model: Model,
    params: Params,
    step: Step,
    cache: AnyCache,
    comm: Comm,
    kernels: KernelSet,
    rows: Array | None = None,
    taps: Taps | None = None,
    target: Stage = Stage.WHOLE,
) -> tuple[Output, AnyCache]:
    """Returns (output, cache) of one step.

    Args:
        params: arrays in the tree of `model.abstract_params()`.
        rows: int32[R], tokens whose logits are wanted; None wants all.
        taps: activations to return in `Output.taps`, and to change.
        target: where the logits are needed.

    Raises:
        UsageError: `taps` name an activation that the model does not have.
        UnsupportedError: activations lie in pieces here, or layers in one array.
    """
    decoder = _decoder(model, params)
    taps = Taps() if taps is None else taps
    if taps.asked and not (comm.whole and not model.declare.stack):
        raise UnsupportedError(
            "taps need whole activations and layers of their own; LLM.run has both on any mesh"
        )
    attentions = {layer.attention for layer in model.config.layers}
    run = Runtime.begin(step, attentions, comm, kernels, taps)
    hidden, cache = decoder.hidden(step, cache, run)
    with jax.named_scope("logits"):
        logits = decoder.logits(comm.take(hidden, rows), comm, kernels, target)
    logits = taps("logits", logits)
    taps.check()
    return Output(logits, hidden, taps.captured), cache


def logits_of(
    model: Model,
    params: Params,
    hidden: Array,
    rows: Array,
    comm: Comm,
    kernels: KernelSet,
    target: Stage = Stage.WHOLE,
) -> Array:
    """Returns float32[R, V] for rows int32[R] of `Output.hidden`."""
    return _decoder(model, params).logits(comm.take(hidden, rows), comm, kernels, target)


def _decoder(model: Model, params: Params) -> Decoder:
    """Returns the declared decoder with its weights, in dicts or in mappings of other kinds."""
    flat = jax.tree.leaves_with_path(params)
    plain = tree_of((tuple(getattr(key, "key", key) for key in path), leaf) for path, leaf in flat)
    return nnx.merge(nnx.graphdef(model.module()), plain)
