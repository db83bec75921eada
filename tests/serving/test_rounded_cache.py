"""Keys and values of one byte, through the functional core, the engine and meshes."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve as js
from jaxserve.config import (
    Activation,
    AttentionSpec,
    KvDtype,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
    cache_spec,
)
from jaxserve.layers.cache import DenseCache
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.partitioning.layout_file import choose
from jaxserve.serving.generation import Program, Prompts, decode_step, prefill
from jaxserve.serving.memory_plan import memory_plan
from jaxserve.serving.options import EngineOptions

LAYER = LayerSpec(
    AttentionSpec(8, 4, 16, rope=RopeSpec(16)), MlpSpec(48, Activation.SILU, gated=True), NormSpec()
)
WINDOWED = replace(LAYER, attention=replace(LAYER.attention, window=12))
CONFIG = ModelConfig("llama", 96, 48, (LAYER, WINDOWED), NormSpec(), max_context_tokens=64)
FULL = replace(CONFIG, layers=(LAYER, LAYER))
WIDE = EngineOptions(max_sequences=4, max_step_tokens=64, page_size=8)
DTYPES = list(KvDtype)
PREEMPTS = {"float32": 24_000, "bfloat16": 24_000}
PROMPTS = [list(range(5, 35)), [7, 8, 9], list(range(5, 25)), list(range(60, 90))]


@cache
def weights(config: ModelConfig, declare: Declare) -> Params:
    rng = np.random.default_rng(0)
    shapes = Model(config, declare).abstract_params()
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * (0.3 if x.ndim > 1 else 1.2), x.dtype),
        shapes,
    )


def llm(
    kv_dtype: KvDtype | None,
    options: EngineOptions = WIDE,
    config: ModelConfig = CONFIG,
    dtype: str = "float32",
    declare: Declare | None = None,
    **names: Any,
) -> js.LLM:
    declare = Declare.best("cpu", dtype) if declare is None else declare
    own = replace(declare, kv_dtype=kv_dtype)
    return js.LLM(config, weights(config, declare), declare=own, engine=options, **names)


def completions(model: js.LLM, prompts: Sequence[Any] = PROMPTS, **fields: Any) -> list[Any]:
    """Returns (tokens, log-probabilities) of each prompt."""
    given = {"max_tokens": 14, "temperature": 0, "logprobs": 0, **fields}
    return [
        (out.token_ids, [entry.logprob for entry in out.logprobs])
        for out in model.generate(list(prompts), **given)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_dtype", "dtype"), [(KvDtype.INT8, "bfloat16"), (KvDtype.FP8, "float32")]
)
def test_tokens_and_bits_do_not_depend_on_how_a_prompt_is_cut(
    kv_dtype: KvDtype, dtype: str
) -> None:
    model = llm(kv_dtype, dtype=dtype)
    whole = completions(model)
    # Found again by its prefix: pages have their scales.
    (again,) = model.generate([PROMPTS[0]], max_tokens=14, temperature=0, logprobs=0)
    assert again.usage.cached_tokens > 0
    assert (again.token_ids, [entry.logprob for entry in again.logprobs]) == whole[0]
    # So few pages that sequences are preempted, and computed again in other pieces.
    few = replace(WIDE, max_step_tokens=16, max_prefill_tokens=5, kv_bytes=PREEMPTS[dtype])
    cut = llm(kv_dtype, replace(few, prefix_cache=False), dtype=dtype)
    assert completions(cut) == whole
    assert cut.engine.metrics.scheduler.preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_beams_copy_scales_with_their_pages(kv_dtype: KvDtype) -> None:
    # Pages of other sizes are copied at other moments.
    found = [
        [(out.token_ids, out.logprobs) for out in model.beam_search([5, 6, 7], 3, max_tokens=12)]
        for model in (llm(kv_dtype, replace(WIDE, page_size=size)) for size in (8, 32))
    ]
    assert found[0] == found[1]
    assert len({tokens for tokens, _ in found[0]}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", DTYPES[:1])
def test_the_functional_core_draws_the_engines_tokens(kv_dtype: KvDtype) -> None:
    stored = Declare.best("cpu", "float32")
    model = Model(CONFIG, replace(stored, kv_dtype=kv_dtype))
    program = Program(model, LocalComm(), kernel_set("xla"))
    params, prompt = weights(CONFIG, stored), PROMPTS[0]
    cache = DenseCache.create(CONFIG, 1, 64, model.declare, program.comm, program.kernels)
    given = Prompts(jnp.array([prompt]), jnp.array([len(prompt)]))
    scores, cache = jax.jit(prefill, static_argnums=0)(program, params, given, cache)
    step, tokens = jax.jit(decode_step, static_argnums=0), []
    for place in range(len(prompt), len(prompt) + 14):
        tokens.append(int(scores[0].argmax()))
        last, at = jnp.array(tokens[-1:]), jnp.array([place])
        scores, cache = step(program, params, last, at, cache)
    assert tuple(tokens) == tuple(completions(llm(kv_dtype))[0][0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        ((2, 2, 2), {"layout": "ws2d"}),
        ((2, 2, 1), {"layout": "ws2d", "attention": "batch"}),
        ((2, 2, 1), {"layout": "ws2d", "attention": "sequence"}),
    ],
    ids=["heads", "batch", "sequence"],
)
def test_a_mesh_keeps_the_scales_of_its_share(mesh: Any, names: Any) -> None:
    layout = choose(FULL, "float32", mesh=mesh, **names)
    given = {"config": FULL, "declare": Declare()}  # a mesh has its own order of fused weights
    wanted = completions(llm(KvDtype.INT8, **given))
    found = completions(llm(KvDtype.INT8, layout=layout, **given))
    for one, other in zip(found, wanted, strict=True):
        assert one[0] == other[0]
        # A number between two integers may go either way where sums differ in the last digit.
        np.testing.assert_allclose(one[1], other[1], atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", DTYPES)
def test_the_reference_kernels_draw_the_same_tokens(kv_dtype: KvDtype) -> None:
    found = completions(llm(kv_dtype, backend="reference"), PROMPTS[:2], max_tokens=8)
    wanted = completions(llm(kv_dtype), PROMPTS[:2], max_tokens=8)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in wanted]


@pytest.mark.slow
def test_a_streaming_cache_is_rounded_too() -> None:
    config = FULL.streaming(window=16, sink_tokens=4)
    plain, rounded = (
        completions(llm(kind, config=config), max_tokens=40) for kind in (None, KvDtype.INT8)
    )
    for one, other in zip(plain, rounded, strict=True):
        assert one[1][0] == pytest.approx(other[1][0], abs=0.05)
        assert one != other


def test_pools_take_the_bytes_that_the_plan_counts() -> None:
    tokens = 4 * 64
    for kv_dtype, element in ((None, 4), (KvDtype.INT8, 1), (KvDtype.FP8, 1)):
        model = llm(kv_dtype, config=FULL)
        scale = 0 if kv_dtype is None else 4
        per_token = 2 * 2 * 4 * (16 * element + scale)
        assert model.runner.geometry.num_bytes == tokens * per_token
        # XLA's pages have one more row beside the values of each head.
        spare = tokens * 2 * 4 * element
        assert model.runner.array_bytes["pages"] == tokens * per_token + spare
        assert memory_plan(model.runner).kv_bytes == tokens * per_token + spare


def test_what_a_program_is_kept_by_names_the_type_of_the_cache() -> None:
    kept = {repr(llm(kv_dtype).runner.geometry) for kv_dtype in (None, *DTYPES)}
    assert len(kept) == 3


def test_scales_count_as_bytes_of_a_token() -> None:
    spec = cache_spec(LAYER.attention, KvDtype.INT8.value)
    assert spec.bytes_per_token == 2 * 4 * 16 + 2 * 4 * 4


def test_kernels_and_types_are_said_once() -> None:
    assert llm(None).program.summary == "kernels xla, float32"
    assert llm(KvDtype.FP8).program.summary == "kernels xla, float32, keys and values float8_e4m3fn"
