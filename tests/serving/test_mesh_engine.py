"""The engine on a mesh gives the tokens of one device, under every pair of layouts."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.errors import UnsupportedError
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm, MeshComm
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan, make_mesh
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.sharded import param_specs, shardings

pytestmark = pytest.mark.usefixtures("compile_fast")

Tokens = dict[tuple[str, int], list[int]]

VOCAB = 96
CONFIG = ModelConfig(
    "llama",
    vocab_size=VOCAB,
    embed_dim=48,
    layers=(
        LayerSpec(
            AttentionSpec(8, 2, 8, rope=RopeSpec(8)),
            MlpSpec(48, Activation.SILU, gated=True),
            NormSpec(),
        ),
        LayerSpec(
            AttentionSpec(8, 2, 8, rope=RopeSpec(8), window=12),
            MlpSpec(48, Activation.SILU, gated=True),
            NormSpec(),
        ),
    ),
    final_norm=NormSpec(),
    max_context_tokens=64,
)
MODEL = Model(CONFIG, Declare())
UNWINDOWED = Model(replace(CONFIG, layers=CONFIG.layers[:1] * 2), Declare())
EACH = EngineOptions(max_sequences=4, max_step_tokens=32, page_size=8)
"""Sizes of a shard."""


class Case(NamedTuple):
    mesh: tuple[int, int, int]
    prefill: Ffn
    decode: Ffn
    heads: Heads


PAIRWISE = (
    Case((2, 2, 2), Ffn.WG_XY, Ffn.WS2D, Heads.BATCH),
    Case((8, 1, 1), Ffn.WS1D, Ffn.WS1D, Heads.HEADS),
)
ALL = [
    Case(mesh, prefill, decode, heads)
    for mesh in ((1, 2, 4), (2, 2, 2), (8, 1, 1))
    for heads in Heads
    if heads is not Heads.SEQUENCE  # the second layer has a window
    for decode in (Ffn.WS1D, Ffn.WS2D)
    for prefill in Ffn
    if (prefill is Ffn.WS1D) == (decode is Ffn.WS1D)
]


@cache
def values(model: Model = MODEL) -> Params:
    return model.init(jax.random.key(0))


def request(name: str, prompt: Sequence[int], **fields: object) -> Request:
    neutral = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "min_tokens": 0}
    chosen = neutral | {"repetition_penalty": 1.0, "seed": 3, "max_tokens": 24} | fields
    return Request(
        id=name, prompt=tuple(prompt), params=SamplingParams.create(**chosen), stop_ids=()
    )


def requests() -> list[Request]:
    """Returns short and long prompts, equal beginnings, samples, scores and penalties."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, size).tolist() for size in (1, 5, 20, 9, 3, 17, 2)]
    shared = prompts[2][:16]
    return [
        *(request(f"greedy-{i}", prompt) for i, prompt in enumerate(prompts)),
        *(request(f"shared-{i}", [*shared, i]) for i in range(3)),
        request("drawn", prompts[3], temperature=1.0, n=3),
        request("scored", prompts[5], logprobs=2, prompt_logprobs=1),
        request("penalised", prompts[1], repetition_penalty=1.5, top_k=9, temperature=0.8),
    ]


def served(program: Program, params: Params, options: EngineOptions) -> tuple[Tokens, ModelEngine]:
    """Returns the tokens of the requests, the second half sent while the first is under way."""
    made = ModelEngine.create(program, params, options)
    found: Tokens = {}

    def take(event: TokenEvent) -> None:
        assert event.error is None, event.error
        found.setdefault((event.request_id, event.sample_index), []).extend(event.token_ids)

    every = requests()
    for one in every[::2]:
        made.engine.submit(one, take)
    for _ in range(3):
        made.engine.step()
    for one in every[1::2]:
        made.engine.submit(one, take)
    while made.engine.step():
        pass
    return found, made


@cache
def on_one_device(model: Model = MODEL) -> Tokens:
    options = EngineOptions(max_sequences=8, max_step_tokens=32, page_size=8, kv_bytes=1 << 20)
    return served(Program(model, LocalComm(), kernel_set()), values(model), options)[0]


def small(program: Program) -> EngineOptions:
    """Returns options with pages for one long sequence a shard: others are preempted."""
    shards, config = program.comm.num_shards, program.device_config
    groups = config.cache_groups(program.model.declare.cache_dtype)
    token_bytes = sum(group.spec.bytes_per_token * len(group.layers) for group in groups)
    return replace(
        EACH,
        max_sequences=shards * EACH.max_sequences,
        max_step_tokens=shards * EACH.max_step_tokens,
        kv_bytes=config.max_context_tokens * token_bytes // program.comm.num_stripes,
    )


def check(case: Case, model: Model = MODEL) -> None:
    mesh = make_mesh(MeshPlan(*case.mesh))
    layouts = PhaseLayout(case.prefill, case.heads), PhaseLayout(case.decode, case.heads)
    program = Program.on(model, kernel_set(), mesh, *layouts)
    params = jax.tree.map(jax.device_put, values(model), shardings(mesh, param_specs(program)))
    found, made = served(program, params, small(program))
    assert found == on_one_device(model)
    stats = made.engine.metrics.scheduler
    assert stats.running == stats.waiting == 0
    assert sum(stats.pages_held) == 0
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_tokens_are_those_of_one_device(case: Case) -> None:
    check(case)


@pytest.mark.slow
def test_pages_may_be_cut_over_devices() -> None:
    check(Case((2, 2, 2), Ffn.WG_X, Ffn.WS2D, Heads.SEQUENCE), UNWINDOWED)


def test_a_window_refuses_pages_that_are_cut() -> None:
    comm = MeshComm(PhaseLayout(Ffn.WS2D, Heads.SEQUENCE), (("x", 2), ("y", 2), ("z", 2)))
    with pytest.raises(UnsupportedError, match="serves neither windows nor ALiBi"):
        comm.stripe(CONFIG.layers[1].attention)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in PAIRWISE], ids=str)
def test_tokens_are_those_of_one_device_in_every_layout(case: Case) -> None:
    check(case)
