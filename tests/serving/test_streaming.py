"""Streaming: sink tokens and a window, positions inside the cache, memory of constant size.

What a token sees is checked against the whole sequence computed in numpy, layer by layer, without
a cache: for every token the sink and window keys are picked out, turned to their places among
each other, and attended to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve as js
from jaxserve.config import (
    ENDLESS_TOKENS,
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare, Orientation
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.generation import Program, Prompts, generate
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.request import Completion, Request, SamplingParams, TokenEvent
from jaxserve.serving.sampler import Sampling

VOCAB = 31
CONTEXT = 64
WINDOW, SINKS = 20, 3
OWN_WINDOW = 6
PAGE, STEP_TOKENS = 8, 16
LONG = 200
"""Tokens of a sequence that goes around its 6 turning pages four times."""

MLP = MlpSpec(20, Activation.SILU, gated=True)
EVERYTHING = LayerSpec(AttentionSpec(4, 2, 8, rope=RopeSpec(6, theta=100.0)), MLP, NormSpec())
WINDOWED = LayerSpec(AttentionSpec(2, 1, 4, rope=RopeSpec(4), window=OWN_WINDOW), MLP, NormSpec())
CONFIG = ModelConfig("small", VOCAB, 12, (EVERYTHING, WINDOWED, EVERYTHING), NormSpec(), CONTEXT)
DECLARE = Declare(orientation=Orientation.OUT_IN)
STREAMING = CONFIG.streaming(WINDOW, SINKS)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, LONG).tolist()


@pytest.fixture(scope="module")
def params() -> Params:
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Large enough for continuations that do not repeat themselves.
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.5 if len(leaf.shape) > 1 else 1.5))

    return jax.tree.map(values, Model(CONFIG, DECLARE).abstract_params())


def serving(params: Params, config: ModelConfig = STREAMING, **options: Any) -> js.LLM:
    known: dict[str, Any] = {
        "max_sequences": 3,
        "max_step_tokens": STEP_TOKENS,
        "page_size": PAGE,
        "prefix_cache": False,
    }
    return js.LLM(config, params, declare=DECLARE, engine=EngineOptions(**known | options))


@pytest.fixture(scope="module")
def llm(params: Params) -> js.LLM:
    return serving(params)


def scored(llm: js.LLM, tokens: Sequence[int]) -> list[float]:
    """Returns the log-probability of each token after the first, read as a prompt in chunks."""
    done = llm.generate(list(tokens), max_tokens=1, temperature=0, prompt_logprobs=0)
    return [entry.logprob for entry in done.prompt_logprobs[1:]]


def assert_same_scores(llm: js.LLM, prompt: Sequence[int], done: Completion) -> None:
    """Checks the scores of a completion against those of the same tokens read as a prompt."""
    assert done.logprobs is not None
    drawn = [entry.logprob for entry in done.logprobs]
    read = scored(llm, [*prompt, *done.token_ids])[len(prompt) - 1 :]
    np.testing.assert_allclose(drawn, read, atol=2e-5)


# The whole sequence in numpy.


def written_out(params: Params, config: ModelConfig, tokens: Sequence[int]) -> np.ndarray:
    """Returns float64[T, V], the log-probabilities after each token."""
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = weights["embedding"]["values"][list(tokens)]
    for index, layer in enumerate(config.layers):
        w = weights["layers"][index]
        x = x + attended(normed(x, w["attention_norm"]), layer.attention, w["attention"])
        x = x + gated(normed(x, w["mlp_norm"]), w["mlp"])
    scores = normed(x, weights["final_norm"]) @ weights["head"]["values"].T
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def normed(x: np.ndarray, weight: Any) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + NormSpec().eps) * weight["scale"]


def gated(x: np.ndarray, weight: Any) -> np.ndarray:
    members = weight["hidden"]["separate"]
    gate, up = x @ members["gate"]["values"].T, x @ members["up"]["values"].T
    return (gate / (1 + np.exp(-gate)) * up) @ weight["down"]["values"].T


def attended(x: np.ndarray, spec: AttentionSpec, weight: Any) -> np.ndarray:
    members = weight["qkv"]["separate"]
    q, k, v = (np.einsum("TD,NHD->TNH", x, members[name]["values"]) for name in "qkv")
    share = spec.num_heads // spec.num_kv_heads
    k, v = (np.repeat(part, share, axis=1) for part in (k, v))
    assert spec.window is not None and spec.rope is not None
    out = np.zeros_like(q)
    for t in range(len(x)):
        kept = [*range(min(spec.sink_tokens, t + 1))]
        kept += range(max(spec.sink_tokens, t + 1 - spec.window), t + 1)
        places = np.arange(len(kept), dtype=np.float64)
        keys = turned(k[kept], places, spec.rope)
        query = turned(q[t][None], places[-1:], spec.rope)[0]
        scores = np.einsum("NH,SNH->NS", query, keys) * spec.score_scale
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        out[t] = np.einsum("NS,SNH->NH", shares, v[kept])
    return np.einsum("TNH,DNH->TD", out, weight["out"]["values"])


def turned(x: np.ndarray, positions: np.ndarray, rope: RopeSpec) -> np.ndarray:
    """Returns x[T, N, H] with pairs of its first features turned, as complex numbers."""
    half = rope.rotary_dim // 2
    speeds = rope.theta ** -(np.arange(half) / half)
    turns = np.exp(1j * positions[:, None] * speeds)[:, None, :]
    pairs = (x[..., :half] + 1j * x[..., half : 2 * half]) * turns
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)


@pytest.mark.parametrize("sinks", [SINKS, 0, PAGE + 1])
def test_a_token_sees_the_sinks_and_the_window_at_places_in_the_cache(
    params: Params, sinks: int
) -> None:
    config = CONFIG.streaming(WINDOW, sinks)
    found = scored(serving(params, config), TOKENS)
    wanted = written_out(params, config, TOKENS)[np.arange(LONG - 1), TOKENS[1:]]
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_sinks_and_their_places_count(params: Params) -> None:
    whole = written_out(params, STREAMING, TOKENS)
    without = written_out(params, CONFIG.streaming(WINDOW + SINKS, 0), TOKENS)
    assert np.abs(whole - without)[: WINDOW + SINKS].max() < 1e-9
    assert np.abs(whole - without)[WINDOW + SINKS :].max() > 0.1


# The same tokens, however they come.


def test_a_prompt_read_in_chunks_is_as_tokens_one_by_one(llm: js.LLM) -> None:
    done = llm.generate(TOKENS[:5], max_tokens=LONG - 5, temperature=1, seed=4, logprobs=0)
    assert len(set(done.token_ids)) > VOCAB // 2
    assert_same_scores(llm, TOKENS[:5], done)


@pytest.mark.slow
def test_the_engine_gives_what_the_functional_loop_with_the_whole_cache_gives(
    llm: js.LLM, params: Params
) -> None:
    prompts = [TOKENS[:50], TOKENS[60:67], TOKENS[90:91]]
    count = 120
    done = llm.generate(prompts, max_tokens=count, temperature=0)
    program = Program(Model(STREAMING, DECLARE), LocalComm(), kernel_set("xla"))
    run = jax.jit(generate, static_argnums=(0, 4, 5))
    greedy = SamplingParams(temperature=0, seed=0).resolved({})
    for prompt, completion in zip(prompts, done, strict=True):
        batch = Prompts(jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32))
        sampling = Sampling.create([greedy], [prompt], [()], VOCAB)
        wanted = run(program, params, batch, sampling, len(prompt) + count, count)
        assert list(completion.token_ids) == np.asarray(wanted.tokens)[0].tolist()


def test_samples_fork_from_a_prompt_longer_than_the_window(llm: js.LLM) -> None:
    prompt = TOKENS[:53]
    fields: dict[str, Any] = {"max_tokens": 40, "temperature": 1, "seed": 9, "logprobs": 0}
    samples = llm.generate(prompt, n=3, **fields)
    assert len({sample.token_ids for sample in samples}) == 3
    for sample in samples:
        assert_same_scores(llm, prompt, sample)


def test_beams_of_a_prompt_longer_than_the_window_have_its_scores(llm: js.LLM) -> None:
    prompt = TOKENS[:53]
    for beam in llm.beam_search(prompt, width=3, max_tokens=40):
        assert_same_scores(llm, prompt, beam)


def test_a_prefix_hit_gives_the_tokens_of_a_miss(params: Params) -> None:
    llm = serving(params, prefix_cache=True)
    first = llm.generate(TOKENS[:70], max_tokens=30, temperature=0)
    again = llm.generate(TOKENS[:70], max_tokens=30, temperature=0)
    assert (first.usage.cached_tokens, again.usage.cached_tokens) == (0, 64)
    assert again.token_ids == first.token_ids
    longer = [*TOKENS[:70], *first.token_ids, 5]
    hit = llm.generate(longer, max_tokens=30, temperature=0)
    assert hit.usage.cached_tokens == 96
    assert hit.token_ids == serving(params).generate(longer, max_tokens=30, temperature=0).token_ids


def test_a_preempted_sequence_goes_on_where_it_stopped(llm: js.LLM, params: Params) -> None:
    groups = llm.runner.geometry.groups
    page_bytes = [PAGE * g.spec.bytes_per_token * len(g.layers) for g in groups]
    tight = serving(params, kv_bytes=9 * sum(page_bytes))  # one takes up to 7 pages
    prompts = [TOKENS[:30], TOKENS[30:61], TOKENS[61:93]]
    found = tight.generate(prompts, max_tokens=90, temperature=0)
    assert tight.engine.metrics.scheduler.preemptions > 0
    assert found == llm.generate(prompts, max_tokens=90, temperature=0)


# Memory.


def test_generation_goes_on_beyond_the_context(llm: js.LLM, params: Params) -> None:
    done = llm.generate(TOKENS[:4], max_tokens=3 * CONTEXT, temperature=0)
    assert done.usage.completion_tokens == 3 * CONTEXT
    with pytest.raises(js.ContextLengthError, match=f"exceed the context of {CONTEXT} tokens"):
        serving(params, CONFIG).generate(TOKENS[:4], max_tokens=3 * CONTEXT)


def test_memory_stays_the_same_however_long_a_sequence_is(params: Params) -> None:
    config = replace(CONFIG, layers=(EVERYTHING,)).streaming(WINDOW, SINKS)
    weights = {**params, "layers": {0: params["layers"][0]}}
    llm = serving(weights, config)
    (group,) = llm.runner.geometry.groups
    # A page of sinks; 20 + 16 tokens touch 6 pages at most.
    assert (group.pinned_pages, group.table_width) == (1, 7)
    held: list[int] = []
    arrays: set[int] = set()
    count = 400

    def sink(event: TokenEvent) -> None:
        stats = llm.engine.metrics.scheduler
        assert stats.pages_held == stats.page_references
        held.append(stats.pages_held[0])
        if count // 4 < len(held) < count - 2:
            arrays.add(sum(array.nbytes for array in jax.live_arrays()))

    fields = SamplingParams(max_tokens=count, temperature=0, seed=0).resolved({})
    request = Request(id="long", prompt=tuple(TOKENS), params=fields)
    llm.engine.submit(request, sink)
    while llm.engine.step():
        pass
    assert len(held) == count
    # A page of sinks, and the 4 pages that a window of 20 tokens touches at most; one that leaves
    # the window is given back when the next one is taken.
    assert set(held[:-1]) == {5}
    assert len(arrays) == 1
    stats = llm.engine.metrics.scheduler
    assert (stats.pages_held, stats.pages_free) == ((0,), (group.num_pages,))


def test_pages_of_the_ring_are_used_in_turn(llm: js.LLM) -> None:
    before = llm.engine.metrics.steps
    done = llm.generate(TOKENS, max_tokens=2, temperature=0)
    assert done.usage.prompt_tokens == LONG
    assert llm.engine.metrics.steps - before == -(-LONG // STEP_TOKENS) + 1
    for group in llm.runner.geometry.groups:
        assert group.table_width * PAGE < LONG / 3


# What only the engine can do.


def test_a_forward_without_a_cache_refuses_what_the_window_leaves_behind(llm: js.LLM) -> None:
    assert llm.logits(TOKENS[:WINDOW]).shape == (WINDOW, VOCAB)
    with pytest.raises(
        js.UnsupportedError,
        match=f"sequences of {WINDOW + 1} tokens are longer than the window of {WINDOW}, and only "
        f"the engine keeps sink_tokens={SINKS}",
    ):
        llm.logits(TOKENS[: WINDOW + 1])


def test_a_forward_without_a_cache_agrees_within_the_window(llm: js.LLM) -> None:
    logits = np.asarray(jax.nn.log_softmax(llm.logits(TOKENS[:WINDOW])))
    found = scored(llm, TOKENS[:WINDOW])
    wanted = logits[np.arange(WINDOW - 1), TOKENS[1:WINDOW]]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_streaming_engine_has_no_end(llm: js.LLM) -> None:
    assert llm.config.max_context_tokens == ENDLESS_TOKENS
    with pytest.raises(js.ContextLengthError, match=f"context of {ENDLESS_TOKENS} tokens"):
        llm.generate(TOKENS[:4], max_tokens=ENDLESS_TOKENS)
