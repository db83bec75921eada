"""Architecture of a model as data.

A `ModelConfig` is a tuple of layer specs and a few facts about the ends of the model.
New mathematics is a new enum member or spec, never a family name: `family` is only a label.

    layer = LayerSpec(
        attention=AttentionSpec(num_heads=8, num_kv_heads=2, head_dim=32, rope=RopeSpec(32)),
        mlp=MlpSpec(ffn_dim=768, activation=Activation.SILU, gated=True),
        norm=NormSpec(NormKind.RMS, eps=1e-5),
    )
    config = ModelConfig("llama", vocab_size=2048, embed_dim=256, layers=(layer,) * 6,
                         final_norm=layer.norm, max_context_tokens=2048)

Only the standard library is imported here, so kernels and layers run on a bare machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from jaxserve.errors import ConfigError, UnsupportedError, UsageError


class NormKind(StrEnum):
    """Statistic a norm divides by."""

    RMS = "rms"
    LAYER = "layer"


class Activation(StrEnum):
    """Non-linearity of an MLP."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


class RopeScaling(StrEnum):
    """How rotary frequencies are stretched past the trained context."""

    NONE = "none"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


class RopePairs(StrEnum):
    """Which two features a rotation turns: halves apart, or neighbours."""

    HALVES = "halves"
    NEIGHBOURS = "neighbours"


class BlockKind(StrEnum):
    """How attention and MLP stand in a block: one after the other, or side by side."""

    SERIAL = "serial"
    PARALLEL = "parallel"


class NormPlace(StrEnum):
    """What a block's norms see: the input of each part, or the sum that each part is added to."""

    INPUT = "input"
    SUM = "sum"


class KvDtype(StrEnum):
    """Types of one byte that keys and values may be kept in, with a scale per token and head."""

    INT8 = "int8"
    FP8 = "float8_e4m3fn"

    @classmethod
    def named(cls, name: str) -> KvDtype:
        """Returns the type that a person calls "int8" or "fp8".

        Raises:
            UsageError: there is no such type.
        """
        known = {kind.short: kind for kind in cls}
        if name not in known:
            raise UsageError(f"kv_dtype={name!r} is not supported; use {' or '.join(known)}")
        return known[name]

    @property
    def short(self) -> str:
        """Returns what a person calls it."""
        return {KvDtype.INT8: "int8", KvDtype.FP8: "fp8"}[self]


class CacheKind(StrEnum):
    """What a layer remembers of earlier tokens."""

    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"
    STATE = "state"
    STATIC = "static"


@dataclass(frozen=True, slots=True)
class NormSpec:
    """A normalisation over the features.

    Attributes:
        kind: statistic divided by.
        eps: added to the variance or mean square.
        unit_offset: the stored scale is added to one (Gemma).
        bias: a bias is added after scaling (LayerNorm of Falcon; not PaLM).
    """

    kind: NormKind = NormKind.RMS
    eps: float = 1e-5
    unit_offset: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    Attributes:
        rotary_dim: features rotated, the first of each head; even.
        theta: base of the frequencies.
        pairs: which features form a pair.
        scaling: how frequencies are stretched; the fields below are its parameters.
        factor: stretch of the context.
        original_context_tokens: context the model was trained at before stretching.
        low_freq_factor, high_freq_factor: band edges of `llama3`.
        beta_fast, beta_slow: band edges of `yarn`, in rotations.
        truncate: `yarn` rounds the band edges to whole features.
        attention_factor: `yarn` and `longrope` multiply cos and sin by it.
        short_factors, long_factors: what `longrope` divides each frequency by, in sequences of
            up to and of more than `original_context_tokens`.
    """

    rotary_dim: int
    theta: float = 10_000.0
    pairs: RopePairs = RopePairs.HALVES
    scaling: RopeScaling = RopeScaling.NONE
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rotary_dim <= 0 or self.rotary_dim % 2:
            raise ConfigError(f"rotary_dim={self.rotary_dim} must be positive and even")
        if self.scaling is not RopeScaling.NONE and self.factor < 1.0:
            raise ConfigError(f"rope factor={self.factor} must be at least 1")
        if self.scaling is RopeScaling.DYNAMIC and self.rotary_dim == 2:
            raise ConfigError("rotary_dim=2 must be at least 4 for rope scaling 'dynamic'")
        stretched_from = {*RopeScaling} - {RopeScaling.NONE, RopeScaling.LINEAR}
        if self.scaling in stretched_from and self.original_context_tokens <= 0:
            raise ConfigError(
                f"original_context_tokens={self.original_context_tokens} must be positive "
                f"for rope scaling {self.scaling}"
            )
        if self.scaling is RopeScaling.LLAMA3 and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor={self.high_freq_factor} must be above "
                f"low_freq_factor={self.low_freq_factor}"
            )
        wanted = self.rotary_dim // 2 if self.scaling is RopeScaling.LONGROPE else 0
        if not len(self.short_factors) == len(self.long_factors) == wanted:
            raise ConfigError(
                f"{len(self.short_factors)} short and {len(self.long_factors)} long factors for "
                f"rope scaling {self.scaling}; rotary_dim={self.rotary_dim} needs {wanted} of each"
            )

    @property
    def by_length(self) -> bool:
        """Returns whether a token's rotation depends on the length of its sequence."""
        return self.scaling in (RopeScaling.DYNAMIC, RopeScaling.LONGROPE)


@dataclass(frozen=True, slots=True)
class AlibiSpec:
    """Linear position bias, one slope per head, counted forward from key zero.

    Attributes:
        scale: multiplies slope times position (Falcon adds the bias before scaling scores).
        bfloat16: slopes and biases are rounded to bfloat16, as Falcon was trained.
    """

    scale: float = 1.0
    bfloat16: bool = False


ENDLESS_TOKENS = 1 << 30
"""Context of a model that streams: more tokens than anyone generates, and still an int32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingCache:
    """How much a cache of constant size keeps of a sequence without end.

    Attributes:
        window: newest tokens, the one that is computed included.
        sink_tokens: first tokens, kept besides; 0 keeps the window alone.
    """

    window: int = 1024
    sink_tokens: int = 4

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sink_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name}={value!r} must be a whole number of at least {least}")

    @property
    def num_tokens(self) -> int:
        """Returns the tokens that are kept of a sequence, however long it is."""
        return self.sink_tokens + self.window


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Attention of one layer; MHA, GQA and MQA are values of `num_kv_heads`.

    Attributes:
        num_heads, num_kv_heads: query heads N and key/value heads K; K divides N.
        head_dim: features H of a head, independent of the width.
        scale: multiplies scores; None means 1/sqrt(head_dim).
        rope, alibi: position information; at most one.
        window: a query sees this many newest keys, itself included; None sees all.
        sink_tokens: first tokens of a sequence that stay visible besides the window; positions are
            then counted inside the cache (StreamingLLM, Xiao et al. 2023).
        soft_cap: scores become cap * tanh(scores / cap).
        qkv_bias, out_bias: biases of the projections.
        qk_norm: norm over the features of each query and key head, before positions.
        qkv_clip: queries, keys and values are kept within plus and minus this.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    rope: RopeSpec | None = None
    alibi: AlibiSpec | None = None
    window: int | None = None
    sink_tokens: int = 0
    soft_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: NormSpec | None = None
    qkv_clip: float | None = None

    def __post_init__(self) -> None:
        if min(self.num_heads, self.num_kv_heads, self.head_dim) <= 0:
            raise ConfigError(
                f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
                f"head_dim={self.head_dim} must all be positive"
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}"
            )
        if self.rope is not None and self.rope.rotary_dim > self.head_dim:
            raise ConfigError(f"rotary_dim={self.rope.rotary_dim} exceeds head_dim={self.head_dim}")
        if self.rope is not None and self.alibi is not None:
            raise ConfigError("rope and alibi are both set; a layer takes at most one")
        if self.window is not None and self.window <= 0:
            raise ConfigError(f"window={self.window} must be positive; leave it out for none")
        if self.sink_tokens < 0 or (self.sink_tokens and self.window is None):
            raise ConfigError(
                f"sink_tokens={self.sink_tokens} keeps tokens besides a window, and window="
                f"{self.window}; set a window, or sink_tokens=0"
            )
        for name in ("soft_cap", "qkv_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name}={value} must be positive; leave it out for none")

    @property
    def cached_tokens(self) -> int | None:
        """Returns the tokens that a streaming cache holds; None where no sinks are kept."""
        if not self.sink_tokens or self.window is None:
            return None
        return self.sink_tokens + self.window

    @property
    def score_scale(self) -> float:
        """Returns the factor that multiplies query-key products."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Several MLPs of which each token takes the few that a router scores highest.

    Attributes:
        count: experts E.
        per_token: experts that a token takes.
        renormalised: weights of a token's experts are divided by their sum.
    """

    count: int
    per_token: int
    renormalised: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.per_token <= self.count:
            raise ConfigError(
                f"per_token={self.per_token} experts of {self.count}; take at least one and at "
                "most all of them"
            )


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """Feed-forward part of one layer.

    Attributes:
        ffn_dim: hidden features F; of one expert where there are several.
        activation: non-linearity; of the gate where `gated`.
        gated: activation(gate(x)) * up(x) instead of activation(up(x)).
        bias: all projections have biases.
        experts: there are several, and a router; None is one for all tokens.
    """

    ffn_dim: int
    activation: Activation
    gated: bool
    bias: bool = False
    experts: ExpertsSpec | None = None

    def __post_init__(self) -> None:
        if self.ffn_dim <= 0:
            raise ConfigError(f"ffn_dim={self.ffn_dim} must be positive")
        if self.experts is not None and self.bias:
            raise ConfigError("experts with biases are not supported; use bias=False")


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One block of the decoder.

    Attributes:
        attention, mlp: its two parts.
        norm: the norm used throughout the block.
        block: serial, or attention and MLP side by side on the same input.
        mlp_norm: the MLP has a norm of its own (always in serial blocks; Falcon 40B).
        post_norms: outputs of attention and MLP are normed too before they are added (Gemma 2).
        norm_place: the norms see inputs of the parts, or sums (the original Transformer).
    """

    attention: AttentionSpec
    mlp: MlpSpec
    norm: NormSpec
    block: BlockKind = BlockKind.SERIAL
    mlp_norm: bool = True
    post_norms: bool = False
    norm_place: NormPlace = NormPlace.INPUT

    def __post_init__(self) -> None:
        if self.block is BlockKind.SERIAL and not self.mlp_norm:
            raise ConfigError("a serial block needs mlp_norm=True")
        if self.norm_place is NormPlace.SUM and self.block is BlockKind.PARALLEL:
            raise ConfigError("a parallel block has no sums to norm; use norm_place='input'")


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """Memory that one layer needs of earlier tokens; all that allocators and planners read.

    Attributes:
        kind: full history, a window, a latent, or a fixed state.
        token_shape: shape of what one token leaves behind: (2, K, H) for keys and values.
        axes: logical axes of `token_shape`.
        dtype: element type.
        window: newest tokens kept; None keeps all.
        sink_tokens: first tokens kept besides the window.
    """

    kind: CacheKind
    token_shape: tuple[int, ...]
    axes: tuple[str, ...]
    dtype: str
    window: int | None = None
    sink_tokens: int = 0

    @property
    def scaled(self) -> bool:
        """Returns whether each token's key and value of a head have a scale, in float32."""
        return self.dtype in list(KvDtype)

    @property
    def bytes_per_token(self) -> int:
        """Returns the bytes that one token costs in one layer, scales included."""
        scales = math.prod(self.token_shape[:2]) * dtype_bytes("float32") if self.scaled else 0
        return math.prod(self.token_shape) * dtype_bytes(self.dtype) + scales

    def bytes_per_sequence(self, context_tokens: int) -> int:
        """Returns the bytes that a sequence of `context_tokens` costs in one layer."""
        kept = context_tokens
        if self.window is not None:
            kept = min(context_tokens, self.window + self.sink_tokens)
        return kept * self.bytes_per_token


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share a `CacheSpec`, and so a page table."""

    spec: CacheSpec
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only language model.

    Attributes:
        family: label for people and for the choice of checkpoint reader.
        vocab_size: V.
        embed_dim: width D.
        layers: one spec per layer.
        final_norm: norm before the logits; None has none.
        max_context_tokens: longest sequence the model is meant for.
        tied: logits use the embedding table.
        embed_scale: multiplies embeddings; None means one.
        logits_scale: multiplies logits; None means one (PaLM: 1/sqrt(embed_dim)).
        logits_soft_cap: logits become cap * tanh(logits / cap).
        embed_norm: norm of the embeddings; None has none.
        num_positions: rows of a table whose row p is added to the embedding at position p; None
            has no such table.
        table_dim: features of the embedding table and of a tied head where linear maps lead from
            there to the width and back; None is the width.
        unit_head: rows of the head are divided by their lengths.
    """

    family: str
    vocab_size: int
    embed_dim: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    max_context_tokens: int
    tied: bool = False
    embed_scale: float | None = None
    logits_scale: float | None = None
    logits_soft_cap: float | None = None
    embed_norm: NormSpec | None = None
    num_positions: int | None = None
    table_dim: int | None = None
    unit_head: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("layers is empty; a model has at least one layer")
        for name in ("vocab_size", "embed_dim", "max_context_tokens"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive")
        if self.num_positions is not None and self.num_positions < self.max_context_tokens:
            raise ConfigError(
                f"num_positions={self.num_positions} ends before max_context_tokens="
                f"{self.max_context_tokens}; every position needs a row"
            )

    @property
    def pattern(self) -> tuple[LayerSpec, ...]:
        """Returns the shortest run of layers that, repeated, gives all of them."""
        total = len(self.layers)
        for length in range(1, total + 1):
            run = self.layers[:length]
            if total % length == 0 and run * (total // length) == self.layers:
                return run
        return self.layers

    @property
    def num_layers(self) -> int:
        """Returns the number of layers L."""
        return len(self.layers)

    def cache_groups(self, dtype: str) -> tuple[CacheGroup, ...]:
        """Returns the layers grouped by what they remember, in order of first layer."""
        members: dict[CacheSpec, list[int]] = {}
        for index, layer in enumerate(self.layers):
            members.setdefault(cache_spec(layer.attention, dtype), []).append(index)
        return tuple(CacheGroup(spec, tuple(layers)) for spec, layers in members.items())

    def streaming(self, window: int, sink_tokens: int = 4) -> ModelConfig:
        """Returns the model with a cache of constant size, for sequences without end.

        A layer sees the first `sink_tokens` tokens and the newest `window`; one with a window of
        its own that is no larger stays as it was trained. Source: Xiao et al. 2023, StreamingLLM.

        Raises:
            UsageError: the model was not trained on as many tokens as the cache holds.
            UnsupportedError: positions of this kind cannot be counted inside the cache.
        """
        cache = StreamingCache(window=window, sink_tokens=sink_tokens)
        if self.num_positions is not None:
            raise UnsupportedError(
                "streaming is not supported with learned positions, which end at "
                f"{self.num_positions}; use a model with rotary positions"
            )
        if cache.num_tokens > self.max_context_tokens:
            raise UsageError(
                f"window={window} and sink_tokens={sink_tokens} keep {cache.num_tokens} tokens and "
                f"the model's context is {self.max_context_tokens}; use a window of at most "
                f"{self.max_context_tokens - sink_tokens}"
            )
        layers = tuple(_streaming_layer(layer, cache) for layer in self.layers)
        return replace(self, layers=layers, max_context_tokens=ENDLESS_TOKENS)

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Returns the bytes one more token costs over all layers, windows not yet full."""
        return sum(g.spec.bytes_per_token * len(g.layers) for g in self.cache_groups(dtype))


def cache_spec(attention: AttentionSpec, dtype: str) -> CacheSpec:
    """Returns what a layer with this attention keeps of each token."""
    return CacheSpec(
        kind=CacheKind.FULL if attention.window is None else CacheKind.WINDOW,
        token_shape=(2, attention.num_kv_heads, attention.head_dim),
        axes=("kv", "kv_heads", "head"),
        dtype=dtype,
        window=attention.window,
        sink_tokens=attention.sink_tokens,
    )


def _streaming_layer(layer: LayerSpec, cache: StreamingCache) -> LayerSpec:
    """Returns a layer that keeps no more than `cache` of a sequence."""
    attention = layer.attention
    if attention.alibi is not None:
        raise UnsupportedError(
            "streaming is not supported with ALiBi, whose bias counts positions from the start of "
            "the sequence; use a model with rotary positions"
        )
    if attention.window is not None and attention.window <= cache.window:
        return layer
    rope = attention.rope
    if rope is not None and rope.scaling is RopeScaling.LONGROPE:
        raise UnsupportedError(
            "streaming is not supported with rope scaling 'longrope', which turns by the length "
            "of the sequence; use a model with another one"
        )
    if rope is not None and rope.scaling is RopeScaling.DYNAMIC:
        if cache.num_tokens > rope.original_context_tokens:
            raise UnsupportedError(
                f"streaming over {cache.num_tokens} tokens is not supported with rope scaling "
                f"'dynamic', which turns keys anew beyond {rope.original_context_tokens}; keep at "
                "most that many"
            )
        # Inside the cache no position is reached from which on it would stretch.
        rope = replace(rope, scaling=RopeScaling.NONE)
    streams = replace(attention, rope=rope, window=cache.window, sink_tokens=cache.sink_tokens)
    return replace(layer, attention=streams)


class Quantization(StrEnum):
    """What is rounded to int8: weights (w8a16), or each row of activations too (w8a8)."""

    INT8 = "int8"
    W8A8 = "w8a8"


def dtype_bytes(dtype: str) -> int:
    """Returns the bytes of one element of `dtype`.

    Raises:
        ConfigError: the name is not one of the dtypes a model can be stored in.
    """
    sizes = {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "float8_e4m3fn": 1,
        "int8": 1,
    }
    if dtype not in sizes:
        raise ConfigError(f"dtype={dtype!r} is not supported; use one of {', '.join(sizes)}")
    return sizes[dtype]


def uniform_layers(layer: LayerSpec, num_layers: int) -> tuple[LayerSpec, ...]:
    """Returns `num_layers` copies of one spec."""
    return (layer,) * num_layers


def alternating_layers(pattern: Sequence[LayerSpec], num_layers: int) -> tuple[LayerSpec, ...]:
    """Returns `num_layers` specs that repeat `pattern` in order."""
    return tuple(pattern[i % len(pattern)] for i in range(num_layers))
