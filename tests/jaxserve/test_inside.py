"""Looking into a model, changing it, differentiating through it."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxserve as js
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.partitioning.layout_file import choose
from jaxserve.serving.placing import program_of

from .test_mesh_api import CONFIG, SMALL, weights

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted({path.name.split("-")[0]: path for path in GOLDEN.glob("*/")}.items())
TOKENS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]


@cache
def small() -> js.LLM:
    return js.LLM(CONFIG, weights(), engine=SMALL)


def test_names_come_in_the_order_of_the_forward_with_the_shape_of_the_tokens() -> None:
    found = small().run(TOKENS, "*")
    of_layer = ("attention_probs", "attention", "mlp", "resid")
    inner = [f"layers.{i}.{name}" for i in range(2) for name in of_layer]
    assert list(found) == ["input", "embed", *inner, "final", "logits"]
    assert found["layers.1.resid"].shape == (2, 5, 48)
    assert found["layers.1.attention_probs"].shape == (2, 6, 5, 5)
    assert found["logits"].shape == (2, 5, 97)
    np.testing.assert_allclose(found["logits"], small().logits(TOKENS), atol=1e-5)
    one = small().run(TOKENS[1], ["layers.1.*", "logits"])
    assert one["layers.1.attention_probs"].shape == (6, 5, 5)
    np.testing.assert_allclose(one["layers.1.mlp"], found["layers.1.mlp"][1], atol=1e-5)


def test_the_residual_stream_is_the_sum_of_what_the_layers_add() -> None:
    found = small().run(TOKENS, "*")
    stream = found["embed"]
    for index in range(2):
        stream = stream + found[f"layers.{index}.attention"] + found[f"layers.{index}.mlp"]
        np.testing.assert_allclose(found[f"layers.{index}.resid"], stream, atol=1e-5)


def test_an_edited_residual_is_what_the_rest_of_the_model_sees() -> None:
    other = small().run(TOKENS[1], "layers.0.resid")["layers.0.resid"]
    found = small().run(TOKENS[0], "logits", edit={"layers.0.resid": lambda x: other})
    np.testing.assert_allclose(found["logits"], small().logits(TOKENS[1]), atol=1e-5)


def test_what_an_edit_closes_over_may_change_between_calls() -> None:
    scale = 1.0

    def grown(x: jax.Array) -> jax.Array:
        return x * scale

    first = small().run(TOKENS[0], edit={"layers.1.mlp": grown})["logits"]
    scale = 3.0
    second = small().run(TOKENS[0], edit={"layers.1.mlp": grown})["logits"]
    np.testing.assert_allclose(first, small().logits(TOKENS[0]), atol=1e-5)
    assert not np.allclose(first, second)

    @jax.jit
    def steered(scale: jax.Array) -> jax.Array:
        return small().run(TOKENS[0], edit={"layers.1.mlp": lambda x: x * scale})["logits"]

    np.testing.assert_allclose(steered(jnp.float32(1)), first, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(steered)(jnp.array([1.0, 3.0]))[1], second, atol=1e-5)


@pytest.mark.parametrize("stack", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_mesh_shows_whole_activations_whatever_its_layout(stack: bool) -> None:
    layout = choose(CONFIG, "float32", mesh=(2, 2, 2), prefill_layout="wg-xyz", attention="batch")
    assert layout is not None
    declare = Declare(fuse=True, stack=stack, padding=layout.padding)
    llm = js.LLM(CONFIG, weights(), declare=declare, layout=layout, engine=SMALL)
    wanted = small().run(TOKENS, "*", edit={"layers.*.attention_probs": lambda x: x**2})
    found = llm.run(TOKENS, "*", edit={"layers.*.attention_probs": lambda x: x**2})
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        limit = 1e-5 * float(jnp.max(jnp.abs(value)))
        np.testing.assert_allclose(found[name], value, atol=limit, err_msg=name)
    gradient = jax.grad(lambda params: loss(llm.logits(TOKENS, params=params)))(llm.params)
    assert gradient["layers"][1]["mlp"]["down"]["values"].shape[-1] == 48


@pytest.mark.parametrize(("family", "folder"), FAMILIES)
def test_every_family_shows_the_same_names(family: str, folder: Path) -> None:
    llm = js.load(folder, dtype="float32", show="silent")
    tokens = np.arange(1, 8)
    shapes = jax.eval_shape(lambda: llm.run(tokens, "*"))
    config = llm.config
    for index, layer in enumerate(config.layers):
        assert shapes[f"layers.{index}.attention_probs"].shape == (layer.attention.num_heads, 7, 7)
        for name in ("attention", "mlp", "resid"):
            assert shapes[f"layers.{index}.{name}"].shape == (7, config.embed_dim)
        experts = layer.mlp.experts
        assert (f"layers.{index}.expert_load" in shapes) == (experts is not None)
    assert shapes["logits"].shape == (7, config.vocab_size)


def test_bytes_are_bounded_before_anything_runs() -> None:
    shapes = [(2, 5, 97), (2, 5, 48)]
    total = 4 * sum(int(np.prod(shape)) for shape in shapes)
    names = ["final", "logits"]
    assert small().run(TOKENS, names, max_bytes=total).nbytes == total
    with pytest.raises(js.UsageError) as caught:
        small().run(TOKENS, names, edit={"final": jnp.negative}, max_bytes=total - 1)
    message = str(caught.value)
    assert f"max_bytes={total - 1}" in message and f"use max_bytes={total}" in message
    assert "logits alone" in message


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"capture": "layers.2.resid"}, js.UsageError, r"layers\.2\.resid names .*N from 0 to 1"),
        ({"edit": {"residual": jnp.negative}}, js.UsageError, "edit=residual names no .*input, "),
        ({"edit": {"final": 3}}, js.UsageError, "is no function"),
        ({"edit": {"final": lambda x: x[0]}}, js.UsageError, r"gave shape \(48,\)"),
        ({"edit": {"final": lambda x: None}}, js.UsageError, "gave None, which is no array"),
        ({"edit": {"final": lambda x: 1j * x}}, js.UsageError, "no array of real numbers"),
        ({"edit": {"final": np.asarray}}, js.UsageError, "use jax.numpy"),
        ({"edit": ["final"]}, js.UsageError, "is no mapping"),
        ({"capture": [3]}, js.UsageError, "3 is no name"),
        ({"tokens": [[1], [2, 3]]}, js.UsageError, "lists of one length"),
        ({"tokens": [97]}, js.UsageError, "97 is outside"),
        ({"tokens": [1] * 65}, js.ContextLengthError, "65 tokens exceeds the context of 64"),
        ({"tokens": "text"}, js.JaxserveError, "no tokenizer"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(call: dict, error: type, message: str) -> None:  # pyright: ignore[reportMissingTypeArgument]
    with pytest.raises(error, match=message):
        small().run(**{"tokens": TOKENS[0], **call})


def loss(logits: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 7])


def test_gradients_by_weights_and_embeddings_are_slopes() -> None:
    llm = small()

    def by_params(params) -> jax.Array:
        return loss(llm.logits(TOKENS, params=params))

    def by_embeddings(embeddings: jax.Array) -> jax.Array:
        return loss(llm.logits(embeddings=embeddings))

    rows = llm.run(TOKENS, "input")["input"]
    assert float(by_embeddings(rows)) == pytest.approx(float(by_params(llm.params)), abs=1e-6)
    for function, at in ((by_params, llm.params), (by_embeddings, rows)):
        leaves, tree = jax.tree.flatten(at)
        noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
        step = tree.unflatten(noise)
        slope = jax.jvp(function, (at,), (step,))[1]
        gradient = jax.grad(function)(at)
        product = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), noise, strict=True))
        h = 1e-2 / float(jnp.sqrt(sum(jnp.vdot(n, n) for n in noise)))
        ends = [jax.tree.map(lambda x, n, h=h: x + h * n, at, step) for h in (h, -h)]
        wanted = (function(ends[0]) - function(ends[1])) / (2 * h)
        assert float(slope) == pytest.approx(float(product), rel=1e-3)
        assert float(product) == pytest.approx(float(wanted), rel=2e-2)


def test_logits_take_tokens_or_embeddings_of_the_right_width() -> None:
    with pytest.raises(js.UsageError, match="one of them"):
        small().logits()
    with pytest.raises(js.UsageError, match=r"expected \[\.\.\., tokens, 48\]"):
        small().logits(embeddings=jnp.zeros((3, 47)))
    for shape in ((0, 48), (0, 3, 48)):
        with pytest.raises(js.UsageError, match="there are no tokens"):
            small().logits(embeddings=jnp.zeros(shape))
    with pytest.raises(js.ContextLengthError, match="65 tokens exceeds the context of 64"):
        small().logits(embeddings=jnp.zeros((65, 48)))
    with pytest.raises(js.UsageError, match=r"params\['final_norm'\]\['scale'\] has shape None"):
        small().logits([1], params={"embedding": small().params["embedding"]})


@pytest.mark.parametrize("kind", ["plain", "cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_given_weights_are_stored_is_found_out(kind: str, dtype: str) -> None:
    declare = Declare(dtype) if kind == "plain" else Declare.best(kind, dtype)
    params = Model(CONFIG, declare).init(jax.random.key(0))
    assert js.LLM(CONFIG, params).program == program_of(CONFIG, declare, small().program.kernels)


def test_other_weights_are_taken_without_compiling_and_wrong_ones_refused() -> None:
    compiled: list[str] = []
    llm = js.LLM(CONFIG, weights(), engine=SMALL, on_compile=lambda what, s: compiled.append(what))
    before = llm.generate(TOKENS[0], max_tokens=6, temperature=0)
    other = Model(CONFIG, Declare()).init(jax.random.key(9))
    compiled.clear()
    llm.update(other)
    after = llm.generate(TOKENS[0], max_tokens=6, temperature=0)
    assert compiled == [] and after != before
    best = jnp.argmax(js.LLM(CONFIG, other).logits([*TOKENS[0], *after.token_ids]), axis=-1)
    assert after.token_ids == tuple(best[4:-1].tolist())
    llm.update(jax.tree.map(lambda x: x * 1, llm.params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), other)
    with pytest.raises(js.UsageError, match=r"dtype bfloat16, expected float32; convert it"):
        llm.update(half)
    with pytest.raises(js.UsageError, match=r"params\['embedding'\]\['values'\] lies on .*:1"):
        llm.update(jax.device_put(other, jax.devices()[1]))
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P())
    with pytest.raises(js.UsageError, match="lies on 8 devices"):
        llm.update(jax.device_put(other, everywhere))
    with pytest.raises(js.UsageError, match="has shape"):
        llm.update(jax.tree.map(lambda x: x[..., None], other))
    assert llm.generate(TOKENS[0], max_tokens=6, temperature=0) == after


def test_the_command_of_the_guide_prints_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    llm = js.load("tiny", show="silent")
    found = llm.run("def f(x):", capture=["layers.*.resid", "logits"])
    count = len(llm.intake.encode("def f(x):"))
    wanted = {f"layers.{i}.resid": (count, 256) for i in range(6)} | {"logits": (count, 2048)}
    assert {k: v.shape for k, v in found.items()} == wanted
    assert json.loads(json.dumps(list(found))) == list(wanted)
