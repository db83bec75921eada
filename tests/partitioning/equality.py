"""One small model of each family, and how far a mesh takes its logits from one device's.

    error(Case("llama", (2, 2, 2), Ffn.WS2D, Ffn.WS2D, Heads.HEADS))        # about 1e-7

No size but the width divides over the meshes, so that everything is padded.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxserve.checkpoint.place import place as place_param
from jaxserve.checkpoint.quantize import QuantizingReader, quantized_names
from jaxserve.checkpoint.stored import stored_parameters
from jaxserve.config import (
    Activation,
    AlibiSpec,
    AttentionSpec,
    BlockKind,
    ExpertsSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormKind,
    NormPlace,
    NormSpec,
    Quantization,
    RopeSpec,
)
from jaxserve.layers.cache import PAGE_SIZE, DenseCache
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare, Init, Orientation, named_parameters, tree_of
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Ring
from jaxserve.partitioning.mesh import MeshPlan, make_mesh, places
from jaxserve.partitioning.padding import Padding
from jaxserve.serving.generation import Program, Prompts, decode_step, prefill
from jaxserve.serving.sharded import BY_DEVICE, EVERYWHERE, param_specs, spread

WIDTH, VOCAB, PROMPT, STEPS = 48, 97, 4, 3
RMS, LAYER = NormSpec(), NormSpec(NormKind.LAYER, bias=True)


def _config(layers: tuple[LayerSpec, ...], **fields: Any) -> ModelConfig:
    return ModelConfig(
        "tiny", VOCAB, WIDTH, layers, fields.pop("norm", RMS), max_context_tokens=64, **fields
    )


_llama = LayerSpec(
    AttentionSpec(6, 2, 8, rope=RopeSpec(8), qkv_bias=True),
    MlpSpec(50, Activation.SILU, gated=True),
    RMS,
)
_gemma = LayerSpec(
    AttentionSpec(6, 3, 4, rope=RopeSpec(4), soft_cap=5.0, scale=0.4),
    MlpSpec(34, Activation.GELU_TANH, gated=True),
    NormSpec(unit_offset=True),
    post_norms=True,
)
_falcon = LayerSpec(
    AttentionSpec(5, 1, 8, rope=RopeSpec(8)),
    MlpSpec(44, Activation.GELU, gated=False),
    LAYER,
    block=BlockKind.PARALLEL,
)
_bloom = LayerSpec(
    AttentionSpec(7, 7, 4, alibi=AlibiSpec(), qkv_bias=True, out_bias=True),
    MlpSpec(30, Activation.GELU_TANH, gated=False, bias=True),
    LAYER,
)
_palm = LayerSpec(
    AttentionSpec(6, 1, 8, rope=RopeSpec(8)),
    MlpSpec(40, Activation.SILU, gated=True),
    RMS,
    block=BlockKind.PARALLEL,
    mlp_norm=False,
)

_opt = LayerSpec(
    AttentionSpec(6, 6, 4, qkv_bias=True, out_bias=True),
    MlpSpec(28, Activation.RELU, gated=False, bias=True),
    LAYER,
    norm_place=NormPlace.SUM,
)
_qwen3 = LayerSpec(
    AttentionSpec(6, 2, 8, rope=RopeSpec(8), qk_norm=RMS, qkv_clip=1.0),
    MlpSpec(36, Activation.SILU, gated=True),
    RMS,
)
_experts = replace(
    _llama,
    mlp=MlpSpec(20, Activation.SILU, gated=True, experts=ExpertsSpec(5, 2, renormalised=False)),
)

FAMILIES: dict[str, ModelConfig] = {
    "llama": _config((_llama,) * 2),
    "gemma2": _config(
        (replace(_gemma, attention=replace(_gemma.attention, window=3)), _gemma),
        norm=_gemma.norm,
        tied=True,
        embed_scale=7.0,
        logits_soft_cap=3.0,
    ),
    "falcon": _config((_falcon,) * 2, norm=LAYER, tied=True),
    "alibi": _config((_bloom,) * 2, norm=LAYER),
    "palm": _config((_palm,) * 2, logits_scale=0.5, tied=True),
}

PARTS: dict[str, ModelConfig] = {
    # Norms behind the sums, learned positions, embeddings of another width.
    "opt": _config(
        (_opt,) * 2, norm=None, tied=True, num_positions=70, table_dim=24, embed_norm=LAYER
    ),
    # Norms of heads, clipped projections, a head of unit rows; key heads vary from layer to layer.
    "varied": _config(
        (_qwen3, replace(_qwen3, attention=replace(_qwen3.attention, num_kv_heads=3))),
        unit_head=True,
    ),
    "experts": _config((_experts,) * 2),
}
"""Parts of the other families, each in a few cases."""

MODELS = FAMILIES | PARTS

MESHES = [(1, 2, 4), (2, 2, 2), (8, 1, 1), (3, 2, 1), (1, 1, 2)]

_ALIKE = [ffn for ffn in Ffn if ffn is not Ffn.WS1D]
PAIRS: list[tuple[Ffn, Ffn]] = [(Ffn.WS1D, Ffn.WS1D), *product(_ALIKE, _ALIKE)]
"""Prefill's and decode's projections: those that store weights alike."""


@dataclass(frozen=True)
class Case:
    """A model on a mesh, with its layouts; `padding` of other phases too, if it is given."""

    family: str
    mesh: tuple[int, int, int]
    prefill: Ffn
    decode: Ffn
    heads: Heads
    stack: bool = False
    fuse: bool = True
    padding: Padding | None = None
    quantize: Quantization | None = None
    overlap: Ring = Ring.PLAIN
    wire: str | None = None

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        return f"{self.family}-{mesh}-{self.prefill}-{self.decode}-{self.heads}"

    @property
    def phases(self) -> tuple[PhaseLayout, PhaseLayout]:
        prefill, decode = (
            PhaseLayout(ffn, self.heads, self.overlap, self.wire)
            for ffn in (self.prefill, self.decode)
        )
        return prefill, decode


def serves(family: str, mesh: tuple[int, int, int], heads: Heads) -> bool:
    """Returns whether pages may be cut, where they would be: no windows, no ALiBi, even pieces."""
    if heads is not Heads.SEQUENCE:
        return True
    attentions = [layer.attention for layer in MODELS[family].layers]
    return PAGE_SIZE % mesh[0] == 0 and not any(a.window or a.alibi for a in attentions)


def error(case: Case) -> float:
    """Returns the largest difference of a logit from one device's, relative to the largest."""
    wanted = one_device(case.family, _batch(case.mesh), case.quantize)
    found = on_mesh(case)
    assert found.shape == wanted.shape
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


@cache
def one_device(family: str, batch: int, quantize: Quantization | None = None) -> np.ndarray:
    """Returns float32[1 + STEPS, B, V], logits of the prompts' ends and of greedy steps."""
    return logits_alone(Model(MODELS[family], Declare(quantize=quantize)), family, batch)


def logits_alone(model: Model, family: str, batch: int) -> np.ndarray:
    """Returns the same of a family's model, however stored, on one device."""
    return _rounds(model, family, None, batch)


def on_mesh(case: Case) -> np.ndarray:
    """Returns the same, computed on the mesh."""
    plan = MeshPlan(*case.mesh)
    padding = case.padding or Padding(case.phases, plan.sizes)
    declare = Declare(stack=case.stack, fuse=case.fuse, padding=padding, quantize=case.quantize)
    model = Model(MODELS[case.family], declare)
    return _rounds(model, case.family, (make_mesh(plan), *case.phases), _batch(case.mesh))


def params_of(model: Model, family: str, place: Any = None) -> Any:
    """Returns the family's weights as the model stores them, read as those of a checkpoint."""
    reader = Weights(family)
    if model.declare.quantize is not None:
        reader = QuantizingReader(reader, quantized_names(model))
    found = (
        (one.path, place_param(one, reader, place and place(one.axes, one.shape)))
        for one in stored_parameters(model)
    )
    return tree_of(found)


@dataclass(frozen=True)
class Weights:
    """A checkpoint of random weights; none is the neutral one."""

    family: str

    @property
    def parallel(self) -> int:
        return 1

    def shape(self, name: str) -> tuple[int, ...] | None:
        return _weights(self.family)[name].shape

    def where(self, name: str) -> str:
        return name

    def read(self, name: str, index: Any) -> np.ndarray:
        return _weights(self.family)[name][index]


@cache
def _weights(family: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    model = Model(MODELS[family], Declare(orientation=Orientation.OUT_IN))
    found: dict[str, np.ndarray] = {}
    for stored, (_, leaf) in zip(
        stored_parameters(model), named_parameters(model.module()), strict=True
    ):
        spread = {Init.EMBED: 0.5, Init.FAN_IN: leaf.fan_in**-0.5}.get(leaf.init, 0.3)
        values = rng.normal(size=stored.shape) * spread + (leaf.init is Init.ONES)
        found[stored.pieces[0].name] = values.astype(np.float32)
    return found


def _rounds(model: Model, family: str, spread_over: Any, batch: int) -> np.ndarray:
    """Returns the logits of a prefill and of greedy steps after it."""
    fill, step, place = _compiled(model, spread_over)
    params = params_of(model, family, place)
    tokens, lengths = _prompts(batch)
    logits, cache = fill(params, tokens, lengths)
    found = [np.asarray(logits)]
    for number in range(STEPS):
        newest = found[-1].argmax(axis=-1).astype(np.int32)
        logits, cache = step(params, newest, lengths + np.int32(number), cache)
        found.append(np.asarray(logits))
    return np.stack(found)


def _compiled(model: Model, spread_over: Any) -> tuple[Any, Any, Any]:
    """Returns (prefill, decode step, places of parameters)."""
    if spread_over is None:
        return _prefill_on(model, None, None), _decode_on(model, None, None), None
    mesh, first, second = spread_over
    return _prefill_on(model, mesh, first), _decode_on(model, mesh, second), places(mesh, second)


@cache
def _prefill_on(model: Model, mesh: Any, phase: PhaseLayout | None) -> Any:
    program = _program(model, mesh, phase)

    def run(params: Any, tokens: Array, lengths: Array) -> tuple[Array, DenseCache]:
        empty = DenseCache.create(
            model.config, lengths.shape[0], 16, model.declare, program.comm, program.kernels
        )
        return prefill(program, params, Prompts(tokens, lengths), empty)

    specs = None if mesh is None else (param_specs(program), EVERYWHERE, EVERYWHERE)
    return jax.jit(spread(program, run, specs, (EVERYWHERE, BY_DEVICE)))


@cache
def _decode_on(model: Model, mesh: Any, phase: PhaseLayout | None) -> Any:
    program = _program(model, mesh, phase)
    specs = None
    if mesh is not None:
        specs = (param_specs(program), EVERYWHERE, EVERYWHERE, BY_DEVICE)
    run = partial(decode_step, program)
    return jax.jit(spread(program, run, specs, (EVERYWHERE, BY_DEVICE)))


def _program(model: Model, mesh: Any, phase: PhaseLayout | None) -> Program:
    # What is at stake is where things lie; reference kernels compile in half the time.
    kernels = kernel_set("reference")
    if mesh is None or phase is None:
        return Program(model, LocalComm(), kernels)
    return Program.on(model, kernels, mesh, phase, phase)


def _batch(mesh: tuple[int, int, int]) -> int:
    """Returns sequences that divide over the mesh."""
    return mesh[0] * mesh[1] * mesh[2]


def _prompts(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens int32[B, PROMPT] and lengths int32[B]; all lengths occur."""
    tokens = np.random.default_rng(1).integers(0, VOCAB, (batch, PROMPT), np.int32)
    return tokens, PROMPT - np.arange(batch, dtype=np.int32) % PROMPT
