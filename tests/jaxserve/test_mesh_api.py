"""A model on a mesh, as a notebook and the command line meet it."""

import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import jaxserve as js
from jaxserve.config import Activation, AttentionSpec, LayerSpec, MlpSpec, NormSpec, RopeSpec
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.partitioning import mesh as mesh_module
from jaxserve.partitioning.layout_file import Buckets, choose
from jaxserve.partitioning.memory_order import turned
from jaxserve.serving.options import EngineOptions

SMALL = EngineOptions(max_sequences=6, max_step_tokens=32, page_size=8)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8], [9, 7, 9, 3]]
LAYER = LayerSpec(
    AttentionSpec(6, 2, 8, rope=RopeSpec(8)), MlpSpec(50, Activation.SILU, gated=True), NormSpec()
)
CONFIG = js.ModelConfig("llama", 97, 48, (LAYER,) * 2, NormSpec(), max_context_tokens=64)
"""Heads, MLP and vocabulary divide over no mesh here."""


@cache
def weights():
    return Model(CONFIG, Declare()).init(jax.random.key(0))


def on(mesh=None, **names) -> js.LLM:
    layout = choose(CONFIG, "float32", mesh=mesh, **names)
    return js.LLM(CONFIG, weights(), layout=layout, engine=SMALL)


@cache
def wanted() -> list[tuple[int, ...]]:
    outs = on().generate(PROMPTS, max_tokens=10, temperature=0)
    return [tuple(out.token_ids) for out in outs]


@pytest.mark.parametrize(
    ("mesh", "names"),
    [
        pytest.param((2, 2, 2), {"layout": "ws2d"}, marks=pytest.mark.slow),
        ((3, 2, 1), {"layout": "ws2d", "prefill_layout": "wg-xyz", "attention": "batch"}),
    ],
)
def test_a_padded_model_generates_what_one_device_does(mesh, names) -> None:
    llm = on(mesh, **names)
    outs = llm.generate(PROMPTS, max_tokens=10, temperature=0)
    assert [tuple(out.token_ids) for out in outs] == wanted()
    table = llm.params["embedding"]["values"]
    assert table.shape[0] > CONFIG.vocab_size
    assert len(table.sharding.device_set) == np.prod(mesh)


@pytest.mark.parametrize("shape", [(5,), (1, 3), (3, 5), (2, 2, 4)])
def test_logits_take_any_number_of_tokens(shape) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, shape)
    llm = on((2, 2, 2), prefill_layout="wg-xyz", attention="batch")
    found, expected = llm.logits(tokens), on().logits(tokens)
    assert found.shape == (*shape, 97)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))


@cache
def read_in_bfloat16(**names) -> tuple[np.ndarray, np.ndarray]:
    """Returns Python source as [4, 192] tokens: the likeliest next of each, and its loss."""
    llm = js.load("tiny", dtype="bfloat16", engine=SMALL, **names)
    assert llm.tokenizer is not None
    text = Path(textwrap.__file__).read_text(encoding="utf-8")
    tokens = np.asarray(llm.tokenizer.encode(text)[: 4 * 192]).reshape(4, 192)
    logits = llm.logits(tokens)[:, :-1]
    told = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
    return np.argmax(logits, -1), -np.asarray(told)


@pytest.mark.parametrize(
    ("mesh", "layout", "prefill", "attention"),
    [
        ((2, 2, 2), "ws2d", "ws2d", "heads"),
        ((1, 2, 4), "ws1d", "ws1d", "heads"),
        ((2, 2, 2), "ws2d", "wg-x", "heads-batch"),
    ],
)
def test_bfloat16_on_a_mesh_reads_as_well_as_on_one_device(
    mesh, layout, prefill, attention
) -> None:
    likely, losses = read_in_bfloat16()
    found = read_in_bfloat16(mesh=mesh, layout=layout, prefill_layout=prefill, attention=attention)
    assert not np.array_equal(found[1], losses)  # sums of other parts are rounded otherwise
    assert np.mean(found[0] == likely) >= 0.95
    assert found[1].mean() == pytest.approx(losses.mean(), rel=0.002)


def test_new_weights_are_padded_and_placed_too() -> None:
    llm = on((2, 2, 2))
    before = llm.logits(PROMPTS[0])
    llm.update(jax.tree.map(lambda x: 2 * x, weights()))
    alone = on()
    alone.update(jax.tree.map(lambda x: 2 * x, weights()))
    after, expected = llm.logits(PROMPTS[0]), alone.logits(PROMPTS[0])
    np.testing.assert_allclose(after, expected, atol=1e-5 * float(jnp.max(jnp.abs(expected))))
    assert not np.allclose(before, after)


@pytest.mark.parametrize("path", ["missing", "extra", "shape"])
def test_weights_of_another_model_are_refused(path: str) -> None:
    params = dict(weights())
    if path == "missing":
        del params["final_norm"]
    elif path == "extra":
        params["more"] = jnp.zeros(3)
    else:
        params["embedding"] = {"values": jnp.zeros((98, 48))}
    names = {"missing": "final_norm", "extra": "more", "shape": "embedding"}
    with pytest.raises(UsageError, match=rf"params\['{names[path]}'\].* has shape"):
        js.LLM(CONFIG, params, layout=choose(CONFIG, "float32", mesh=(2, 2, 2)))


def test_a_checkpoint_is_loaded_in_parts() -> None:
    llm = js.load("tiny", dtype="float32", mesh=(2, 2, 2), layout="ws2d", show="silent")
    down = llm.params["layers"][0]["mlp"]["down"]["values"]
    assert {shard.data.size for shard in down.addressable_shards} == {down.size // 8}
    assert str(llm.layout.layout) == "ws2d/heads on 2x2x2"
    one = js.load("tiny", dtype="float32", show="silent")
    expected = one.logits(PROMPTS[1])
    limit = 1e-5 * float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(llm.logits(PROMPTS[1]), expected, atol=limit)


def test_layers_that_repeat_lie_in_one_array_and_turned_as_on_a_tpu(monkeypatch) -> None:
    monkeypatch.setattr(mesh_module, "turned", lambda platform, axes: turned("tpu", axes))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "tpu")
        llm = js.load("tiny", dtype="float32", mesh=(2, 2, 2), show="silent")
    assert llm.program.model.declare.stack
    orders = [leaf.format.layout.major_to_minor for leaf in jax.tree.leaves(llm._params)]
    assert orders.count((0, 2, 3, 1)) == 3
    assert len(llm.params["layers"]) == llm.config.num_layers
    one = js.load("tiny", dtype="float32", show="silent")
    wanted = one.generate(PROMPTS, max_tokens=6, temperature=0)
    found = llm.generate(PROMPTS, max_tokens=6, temperature=0)
    assert [out.token_ids for out in found] == [out.token_ids for out in wanted]


def test_the_layout_shows_itself(capsys) -> None:
    llm = on((2, 2, 2), layout="wg-x", attention="heads-batch")
    assert repr(llm.layout).startswith("wg-x/heads-batch on 2x2x2: 8 devices, float32\npadded: ")
    assert llm.layout._repr_html_().count("<svg") == 1
    assert repr(on().layout).startswith("ws2d/heads on 1x1x1: 1 device")
    jax.debug.visualize_array_sharding(llm.params["embedding"]["values"])
    assert "CPU 0" in capsys.readouterr().out


def test_a_layout_is_written_and_loaded(tmp_path: Path) -> None:
    path = tmp_path / "layout.json"
    first = js.load("tiny", mesh="2,2,1", layout="wg-x", attention="batch", show="silent")
    first.layout.write(path)
    second = js.load("tiny", layout=path, show="silent")
    assert second.layout == first.layout
    with pytest.raises(UsageError, match="use dtype='bfloat16'"):
        js.load("tiny", layout=path, dtype="float32", show="silent")


def test_the_sizes_of_a_layout_are_the_engines() -> None:
    layout = choose(CONFIG, "float32", mesh=(2, 1, 1))
    assert layout is not None
    layout = msgspec.structs.replace(layout, buckets=Buckets(4, 64))
    llm = js.LLM(CONFIG, weights(), layout=layout)
    assert llm.runner.num_slots == 4
    with pytest.raises(UsageError, match="max_sequences=6, and the layout was made for 4"):
        js.LLM(CONFIG, weights(), layout=layout, engine=SMALL)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"mesh": "2,2"}, "give X,Y,Z, as in 2,2,2"),
        ({"mesh": "4,2,2"}, "needs 16 devices, found 8"),
        ({"mesh": "2,2,2", "layout": "ws3d"}, "use one of ws1d, ws2d"),
        ({"mesh": "3,2,1"}, r"embed_dim=256 .* use a mesh with x in \{1, 2, 4"),
        ({"attention": "batch"}, "attention needs a mesh"),
        ({"devices": "cpu:9"}, "comes too late"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(names, message) -> None:
    with pytest.raises(UsageError, match=message):
        js.load("tiny", show="silent", **names)


def test_the_cache_is_counted_over_all_shards() -> None:
    by_batch, by_heads = (
        on((2, 2, 2), attention=attention).runner for attention in ("batch", "heads")
    )
    assert by_batch.kv_tokens == 8 * by_batch.geometry.num_tokens
    assert by_heads.kv_tokens == by_heads.geometry.num_tokens


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    full = [sys.executable, "-m", "jaxserve", "generate", "import ", "--json", "--quiet"]
    full += ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12", *arguments]
    return subprocess.run(full, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(
    "names",
    [
        ("2,2,2", "ws2d", "ws2d", "heads"),
        pytest.param(("1,2,4", "ws1d", "ws1d", "heads-batch"), marks=pytest.mark.slow),
        pytest.param(("8,1,1", "wg-x", "ws2d", "heads-batch-xy"), marks=pytest.mark.slow),
        pytest.param(("2,2,2", "wg-xy", "wg-xy", "batch"), marks=pytest.mark.slow),
        pytest.param(("2,4,1", "wg-xyz", "wg-xyz", "batch"), marks=pytest.mark.slow),
    ],
)
def test_the_command_prints_the_tokens_of_one_device(names) -> None:
    mesh, prefill, layout, attention = names
    one = command()
    many = command(
        *("--mesh", mesh, "--layout", layout, "--prefill-layout", prefill),
        *("--attention", attention, "--devices", "cpu:8"),
    )
    assert many.returncode == 0, many.stderr
    assert json.loads(many.stdout) == json.loads(one.stdout)


def test_the_command_refuses_without_a_traceback() -> None:
    done = command("--mesh", "2,2,2", "--devices", "cpu:4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "needs 8 devices, found 4" in done.stderr
    assert "Traceback" not in done.stderr
