"""What a step keeps in a device's memory.

    memory = memory_of(share, on, Kept(WEIGHTS["int8"], KV["bfloat16"]), batch=64, context=2048)
    memory.total_bytes, memory.free_bytes           # free is below zero where it does not fit

Weights and cache are exact sums of shards. Temporaries are an estimate: the gathered weights of a
product, a layer's activations beside them and the logits; `--verify` has the compiler's
figure. No JAX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.config import AttentionSpec, BlockKind
from jaxserve.partitioning.dtypes import KV, WEIGHTS, Several, Stored
from jaxserve.partitioning.hardware import ChipSlice
from jaxserve.partitioning.layout import Ffn, Stage
from jaxserve.partitioning.work import Product, Share

RESERVED_SHARE = 0.05
"""Share of a device's memory that is left to its runtime, as an engine leaves it (assumed)."""

GATHER_AHEAD = ("v5e",)
"""Chips whose compiler gathers the last weights of a layer while the first are multiplied, read
from compiled programs (libtpu 0.0.52).
"""

LAST = ("attention output", "MLP out")
"""Products that contract what the first projections of a layer led to."""

_FLOAT32 = 4


@dataclass(frozen=True)
class Kept:
    """Dtypes.

    Attributes:
        weights, kv: how weights, and keys and values, are stored; several of each are asked at
            once, and then every number is an array of as many rows.
        activation_bytes: of an element of an activation.
    """

    weights: Stored | Several = WEIGHTS["bfloat16"]
    kv: Stored | Several = KV["bfloat16"]
    activation_bytes: int = 2

    @property
    def tables(self) -> Stored | Several:
        """Returns how embedding and output head are stored: rounded to bytes, not to less."""
        return self.weights.table


@dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
        weights_bytes: parameters, padded.
        kv_bytes: keys and values of all sequences at their longest.
        gathered_bytes: weights that a product gathers.
        activation_bytes: what else a layer holds where it holds the most: activations, and weights
            on their way.
        logits_bytes: scores of the vocabulary.
        reserve_bytes: left to the runtime.
        device_bytes: the device's memory.
    """

    weights_bytes: Any
    kv_bytes: Any
    gathered_bytes: Any
    activation_bytes: Any
    logits_bytes: Any
    reserve_bytes: float
    device_bytes: float

    @property
    def total_bytes(self) -> Any:
        """Returns what is taken, the reserve included."""
        temporary = self.gathered_bytes + self.activation_bytes + self.logits_bytes
        return self.weights_bytes + self.kv_bytes + temporary + self.reserve_bytes

    @property
    def free_bytes(self) -> Any:
        """Returns what is left; below zero, what is short."""
        return self.device_bytes - self.total_bytes


def memory_of(
    share: Share, on: ChipSlice, kept: Kept, *, batch: Any, context: int, new: Any = 1
) -> Memory:
    """Returns what a step keeps.

    Args:
        batch: sequences.
        context: tokens of a sequence at its longest.
        new: tokens of a sequence in a step.
    """
    return Memory(
        weights_bytes(share, kept),
        kv_bytes(share, kept, batch, context),
        *_temporary(share, on, kept, share.tokens(batch, new)),
        _logits(share, batch),
        RESERVED_SHARE * on.device_hbm_bytes,
        on.device_hbm_bytes,
    )


def weights_bytes(share: Share, kept: Kept) -> Any:
    """Returns the bytes of a device's parameters; vectors stay in 16 bits or more."""
    total = np.clip(kept.weights.bits / 8, 2.0, 4.0) * share.vector_elements
    table = share.logits
    total = total + share.tables * kept.tables.kept(table.stored, table.inputs, table.outputs)
    for op in share.products:
        total = total + op.turns * kept.weights.kept(op.stored, op.inputs, op.outputs)
    return total


def kv_bytes(share: Share, kept: Kept, batch: Any, context: int) -> Any:
    """Returns the bytes of the keys and values that a device keeps."""
    rows = share.local_rows(batch)
    per_row: Any = 0.0
    for run in share.runs:
        spec = run.layer.attention
        tokens = kept_tokens(spec, context) / share.stripes
        element = kept.kv.per_element(spec.head_dim)
        per_row = per_row + run.turns * tokens * share.kv_elements(spec) * element
    return rows * per_row


def kept_tokens(spec: AttentionSpec, context: int) -> int:
    """Returns the tokens of a sequence that a layer keeps."""
    if spec.window is None:
        return context
    return min(context, spec.window + spec.sink_tokens)


def max_context(share: Share, kept: Kept, *, batch: int, budget_bytes: float) -> int:
    """Returns the longest context whose keys and values fit in a part of the memory."""
    least, most = 0, 1
    while kv_bytes(share, kept, batch, most) <= budget_bytes:
        least, most = most, most * 2
        if most > 1 << 40:
            return most
    while most - least > 1:
        middle = (least + most) // 2
        if kv_bytes(share, kept, batch, middle) <= budget_bytes:
            least = middle
        else:
            most = middle
    return least


def _gathered(kept: Kept, ops: Sequence[Product]) -> Any:
    """Returns the gathered weights of the product that has the most; the next waits for it."""
    most: Any = 0.0
    for op in ops:
        if op.used > op.stored:
            most = np.maximum(most, op.used * kept.weights.per_element(op.inputs))
    return most


def _temporary(share: Share, on: ChipSlice, kept: Kept, tokens: Any) -> tuple[Any, Any]:
    """Returns (gathered weights, activations beside them) where a layer holds the most.

    That is while its first weights are gathered, step by step, while they are multiplied, or while
    the last ones are.
    """
    ops = share.products
    first = _gathered(kept, [op for op in ops if op.name not in LAST])
    last = _gathered(kept, [op for op in ops if op.name in LAST])
    # The step before the last one, which is over x, is still there while that goes on.
    steps = share.sizes["x"] if share.phase.ffn in (Ffn.WG_XY, Ffn.WG_XYZ) else 1
    arriving = 1 + 1 / steps if steps > 1 else 1
    ahead = last * arriving if on.chip.name in GATHER_AHEAD else 0.0
    embed = share.config.embed_dim
    entering = sum(embed / _product(share.pieces(at)) for at in (Stage.RESIDUAL, Stage.INPUT))
    widest = _widest(share)
    terms = _product(share.sizes[a] for a in share.phase.placement(Stage.PROJECTED).partial)
    # Terms of sums are put together, then scattered.
    leaving = widest * (2 + 1 / terms) if terms > 1 else widest
    element = tokens * kept.activation_bytes
    gathering = first * arriving + ahead + element * entering
    multiplying = first + ahead + element * (entering + leaving)
    # What the non-linearity makes of it.
    ending = last + element * (entering + 1.5 * widest)
    return first, np.maximum(np.maximum(gathering, multiplying), ending) - first


def _widest(share: Share) -> float:
    """Returns a token's features where a layer's first projections leave the most."""
    cut, pieces = share.pieces(Stage.PROJECTED)
    widest = 0.0
    for run in share.runs:
        spec, mlp = run.layer.attention, run.layer.mlp
        heads = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        taken = 1 if mlp.experts is None else mlp.experts.per_token
        ffn = mlp.ffn_dim * taken * (2 if mlp.gated else 1)
        width = heads + ffn if run.layer.block is BlockKind.PARALLEL else max(heads, ffn)
        widest = max(widest, width / (cut * pieces))
    return widest


def _logits(share: Share, batch: Any) -> Any:
    """Returns the scores as the product leaves them and as the sampler reads them, in float32."""
    vocab = share.config.vocab_size
    devices = _product(share.sizes.values())
    rows = -(-batch // devices)
    return _FLOAT32 * (batch * vocab / share.pieces(Stage.SCORED)[1] + 2 * rows * vocab)


def _product(numbers: Any) -> int:
    found = 1
    for number in numbers:
        found *= number
    return found
