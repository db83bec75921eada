"""Next-token loss of the one forward: matmuls in bfloat16, master weights in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.layers.cache import DenseCache, NoCache
from jaxserve.layers.decoder import Model, Params, forward
from jaxserve.layers.step import Step
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.training.dataset import Tokens, evaluation_windows


def token_losses(model: Model, params: Params, rows: Array) -> Array:
    """Returns float32[B, L]: -log p of rows[b, t + 1] given rows[b, : t + 1], nats.

    Where the model rounds keys and values, they are read from the cache that keeps them.

    Args:
        rows: int32[B, L + 1].
    """
    batch, length = rows.shape[0], rows.shape[1] - 1
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    step = Step(rows[:, :-1].reshape(-1), positions, positions + 1)
    if model.declare.quantize is None:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    comm, kernels = LocalComm(), kernel_set()
    if model.declare.kv_dtype is None:
        output, _ = forward(model, params, step, NoCache(batch=batch), comm, kernels)
    else:
        cache = DenseCache.create(model.config, batch, length, model.declare, comm, kernels)
        output, _ = forward(model, params, step, cache, comm, kernels)
    targets = rows[:, 1:].reshape(-1, 1)
    chosen = jnp.take_along_axis(output.logits, targets, axis=1)[:, 0]
    return (jax.nn.logsumexp(output.logits, axis=-1) - chosen).reshape(batch, length)


def loss(model: Model, params: Params, rows: Array) -> Array:
    """Returns the mean of `token_losses`, float32[], nats per token."""
    return jnp.mean(token_losses(model, params, rows))


_losses = jax.jit(token_losses, static_argnums=0)


def held_out_loss(
    model: Model,
    params: Params,
    tokens: Tokens,
    length: int,
    every: int = 1,
    batch_tokens: int = 4096,
) -> float:
    """Returns nats per token over windows of `length` tokens.

    Args:
        every: only each `every`-th window counts: a quick look during training.
        batch_tokens: tokens per forward.
    """
    windows, counted = evaluation_windows(tokens, length)
    windows, counted = windows[::every], counted[::every]
    batch = max(1, batch_tokens // length)
    total = 0.0
    for start in range(0, len(windows), batch):
        rows, mask = windows[start : start + batch], counted[start : start + batch]
        missing = batch - len(rows)
        rows = np.pad(rows, ((0, missing), (0, 0)))
        losses = np.asarray(_losses(model, params, jnp.asarray(rows)))[: len(mask)]
        total += float(losses[mask].sum(dtype=np.float64))
    return total / int(counted.sum())
