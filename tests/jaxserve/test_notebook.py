"""The embedded model as a notebook holds it."""

import asyncio
import shutil
import signal
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import constants

import jaxserve as js
from jaxserve import progress
from jaxserve.checkpoint import convert
from jaxserve.checkpoint.locate import locate
from jaxserve.notebook.requests import Batch
from jaxserve.partitioning.devices import unused_accelerator
from jaxserve.partitioning.layout_file import choose
from jaxserve.progress import CompileLog, Meter, Page, Show, reporter
from jaxserve.serving.generation import Prompts, generate
from jaxserve.serving.sampler import Sampling

from .test_mesh_api import CONFIG, SMALL, on, weights
from .test_mesh_api import PROMPTS as ALL_IDS

IDS = ALL_IDS[:3]
PROMPTS = ["def add(a, b):\n", "import os", "class Stack:\n    def __init__(self):\n        self."]
# Few sizes of a step, since each is compiled.
ENGINE = js.EngineOptions(max_sequences=2, max_step_tokens=16)


@pytest.fixture(scope="module")
def llm() -> js.LLM:
    return js.load("tiny", dtype="float32", engine=ENGINE, show="silent")


@pytest.fixture
def listening() -> Iterator[None]:
    """Takes interrupts as a terminal's programs do; shells have those beside them ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PLACES = ["in the sinks", "while the device works", "when all is begun", "between steps"]


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("when", PLACES)
def test_ctrl_c_leaves_the_model_usable(
    llm: js.LLM, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_tokens": 12, "temperature": 0.8, "seed": 3}
    before = llm.generate(PROMPTS, **options)
    calls = 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            signal.raise_signal(signal.SIGINT)
        return None if when == "in the sinks" else original(*arguments)

    with monkeypatch.context() as patch:
        name = "collect" if when == "while the device works" else "dispatch"
        original: Any = getattr(llm.runner, name)
        if when == "in the sinks":
            patch.setattr(llm.engine, "after_events", interrupted)
        elif when == "between steps":
            original = Batch._submit
            patch.setattr(Batch, "_submit", interrupted)
        else:
            patch.setattr(llm.runner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, **options)
    assert calls >= 4
    assert not llm.engine.busy
    assert llm.generate(PROMPTS, **options) == before


def test_a_running_event_loop_is_in_nobodys_way(llm: js.LLM, tmp_path: Path) -> None:
    wanted = llm.generate(PROMPTS[0], max_tokens=4, temperature=0)
    # Orbax uses asyncio itself.
    convert(locate("tiny"), tmp_path / "orbax", reporter(Show.SILENT))

    async def cell() -> js.Completion:
        loaded = js.load(tmp_path / "orbax", dtype="float32", engine=ENGINE, show="silent")
        return loaded.generate(PROMPTS[0], max_tokens=4, temperature=0)

    assert asyncio.run(cell()) == wanted


def no_repeats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Forbids every token that came before, and those of odd number."""
    rows = jnp.arange(logits.shape[0])[:, None]
    at = jnp.where(tokens >= 0, tokens, logits.shape[1])
    logits = logits.at[rows, at].set(-jnp.inf, mode="drop")
    odd = jnp.arange(logits.shape[1])[None, :] % 2 == 1
    return jnp.where(jnp.broadcast_to(odd, logits.shape), -jnp.inf, logits)


def plain(llm: js.LLM, params: list[js.SamplingParams]) -> list[list[int]]:
    """Returns what the functional generate gives with the same processor."""
    longest = max(map(len, IDS))
    given = np.array([[*one, *[0] * (longest - len(one))] for one in IDS], np.int32)
    sampling = Sampling.create(
        [one.resolved({}) for one in params], IDS, [()] * len(IDS), llm.config.vocab_size
    )
    run = jax.jit(generate, static_argnames=("program", "slots", "max_tokens", "processor"))
    batch = Prompts(jnp.asarray(given), jnp.array([len(one) for one in IDS]))
    found = run(llm.program, llm.params, batch, sampling, 64, 10, processor=no_repeats)
    return found.tokens.tolist()


@pytest.mark.parametrize("mesh", [None, pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_a_processor_chooses_the_same_tokens_by_the_engine_and_plainly(mesh: Any) -> None:
    layout = None if mesh is None else choose(CONFIG, "float32", mesh=mesh, attention="batch")
    small = js.LLM(CONFIG, weights(), layout=layout, engine=ENGINE if mesh is None else SMALL)
    fields: dict[str, Any] = dict(top_p=1, top_k=0, seed=4, max_tokens=10, logprobs=0)
    params = [js.SamplingParams(temperature=t, **fields) for t in (0.0, 0.9, 0.0)]
    done = small.generate(IDS, params, processor=no_repeats)
    assert [list(one.token_ids) for one in done] == plain(on(), params)
    for prompt, one in zip(IDS, done, strict=True):
        assert all(token % 2 == 0 for token in one.token_ids)
        assert len({*prompt, *one.token_ids}) == len(set(prompt)) + 10
    start = len(IDS[0]) - 1
    scores = jax.nn.log_softmax(small.logits([*IDS[0], *done[0].token_ids]), axis=-1)
    wanted = [float(scores[start + i, token]) for i, token in enumerate(done[0].token_ids)]
    assert done[0].logprobs is not None
    # They are the model's own, whatever the processor did.
    np.testing.assert_allclose([x.logprob for x in done[0].logprobs], wanted, atol=1e-4)
    with small.stream(IDS[0], params[0], processor=no_repeats) as stream:
        assert list(stream) == []  # no tokenizer, no text
    assert stream.completion.token_ids == done[0].token_ids
    free = small.generate(IDS[0], max_tokens=1, temperature=0)
    assert free.token_ids == (int(jnp.argmax(scores[start])),)


def test_processors_do_not_mix_and_wrong_ones_are_refused(llm: js.LLM) -> None:
    with llm.stream(PROMPTS[0], max_tokens=9) as stream:
        next(stream)
        with pytest.raises(js.UsageError, match="another processor is under way"):
            llm.generate(PROMPTS[0], processor=no_repeats)
    with pytest.raises(js.UsageError, match=r"logits float32\[2, 2048\]; give back"):
        llm.generate(PROMPTS[0], processor=lambda logits, tokens: logits[:, :5])
    with pytest.raises(js.UsageError, match="is no function"):
        llm.generate(PROMPTS[0], processor=3)  # type: ignore[arg-type]
    with pytest.raises(js.UsageError, match="processor: no such sampling parameter"):
        llm.beam_search(PROMPTS[0], processor=no_repeats)
    assert llm.generate(PROMPTS[0], max_tokens=2, temperature=0).text


def test_generation_maps_over_keys_and_temperatures() -> None:
    small, ids = on(), IDS[0]
    prompts = Prompts(jnp.array([ids]), jnp.array([len(ids)]))
    params = js.SamplingParams(temperature=1.0, seed=0).resolved({})
    sampling = Sampling.create([params], [ids], [()], small.config.vocab_size)
    seeds = jax.random.key_data(jax.random.split(jax.random.key(0), 3))
    temperatures = jnp.array([0.5, 1.5])

    def tokens(seed: jax.Array, temperature: jax.Array) -> jax.Array:
        own = replace(sampling, seed=seed[None], temperature=temperature[None])
        return generate(small.program, small.params, prompts, own, 64, 6).tokens[0]

    over = jax.vmap(jax.vmap(tokens, (None, 0)), (0, None))
    found = jax.jit(over)(seeds, temperatures)
    assert found.shape == (3, 2, 6)
    assert len({tuple(row) for row in found.reshape(-1, 6).tolist()}) > 3
    alone = jax.jit(tokens)
    for seed, temperature in ((0, 0), (2, 1)):
        wanted = alone(seeds[seed], temperatures[temperature])
        np.testing.assert_array_equal(found[seed, temperature], wanted)


def test_a_score_is_that_of_the_logits(llm: js.LLM) -> None:
    text = "def mean(values):\n    return sum(values) / len(values)\n# naïve ☕\n"
    score = llm.score(text)
    ids = llm.intake.encode(text)
    table = jax.nn.log_softmax(llm.logits(ids), axis=-1)
    wanted = [float(table[i - 1, ids[i]]) for i in range(1, len(ids))]
    assert score.token_ids == tuple(ids)
    assert score.logprobs[0] is None
    np.testing.assert_allclose([x for x in score.logprobs if x is not None], wanted, atol=1e-4)
    assert "".join(score.view.pieces) == text
    many = llm.score([text, ids, "x = 1"])
    assert many[0] == many[1] == score and many[2].total != score.total
    assert llm.score([]) == []
    with pytest.raises(js.UsageError, match="empty"):
        llm.score("")


def test_what_is_shown_of_the_model_has_no_weights(llm: js.LLM) -> None:
    assert repr(llm).startswith("llama, 5.05 million parameters in float32")
    assert "keys and values" in llm._repr_html_()
    for text in (repr(llm), llm._repr_html_(), repr(llm.params), repr(llm.params["layers"])):
        assert len(text) < 8000
        assert "Array" not in text
    done = llm.generate(PROMPTS[0], max_tokens=3, temperature=0, logprobs=2)
    view = llm.view_tokens(done)
    assert "".join(view.pieces) == done.text
    assert [len(top) for top in view.top] == [2, 2, 2]
    with pytest.raises(js.UsageError, match="generate with logprobs=3"):
        llm.view_tokens(llm.generate(PROMPTS[0], max_tokens=1, temperature=0))
    count = len(llm.intake.encode(PROMPTS[0]))
    assert llm.view_attention(PROMPTS[0], layer=2).probs.shape == (8, count, count)
    assert llm.view_attention(PROMPTS[0], layer=2, head=7).probs.shape == (1, count, count)
    with pytest.raises(js.UsageError, match="use 0 to 7"):
        llm.view_attention(PROMPTS[0], head=8)


def test_a_hub_name_is_taken_from_the_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--someone--tiny-copy"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots").mkdir()
    shutil.copytree(locate("tiny"), folder / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    copy, own = (js.load(name, show="silent") for name in ("someone/tiny-copy", "tiny"))
    ids = copy.intake.encode(PROMPTS[0])
    np.testing.assert_array_equal(copy.logits(ids), own.logits(ids))
    with pytest.raises(js.CheckpointError, match="HF_HUB_OFFLINE is set"):
        js.load("someone/else", show="silent")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"dev/nvidia0": ""}, "an NVIDIA GPU"),
        ({"dev/nvidiactl": ""}, None),
        ({"dev/accel0": ""}, "a TPU"),
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0\n", "sys/bus/pci/devices/a/device": "0x0063\n"},
         "a TPU"),
        ({"sys/bus/pci/devices/a/vendor": "0x1ae0\n", "sys/bus/pci/devices/a/device": "0x0042\n"},
         None),
    ],
)  # fmt: skip
def test_an_accelerator_that_is_not_used_is_noticed(
    files: dict[str, str], found: str | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    assert unused_accelerator(tmp_path) is None  # the tests chose the CPU
    jax.config.update("jax_platforms", None)
    try:
        told = unused_accelerator(tmp_path)
    finally:
        jax.config.update("jax_platforms", chosen)
    assert (told is None) == (found is None)
    if found is not None:
        assert f"has {found}" in str(told) and "JAX_PLATFORMS=cpu" in str(told)


def test_loading_warns_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxserve.api.unused_accelerator", lambda: "this machine has a TPU")
    with pytest.warns(UserWarning, match="this machine has a TPU"):
        js.load("tiny-draft", show="silent")


class Shown:
    """Stands for IPython's display: what a page shows, newest last."""

    def __init__(self) -> None:
        self.pages: list[list[str]] = []

    def HTML(self, text: str) -> str:
        return text

    def display(self, text: str, display_id: bool) -> types.SimpleNamespace:
        assert display_id
        page = [text]
        self.pages.append(page)
        return types.SimpleNamespace(update=page.append)


def test_a_notebook_sees_bars_that_move_and_one_line_of_compiles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Shown()
    shell = types.SimpleNamespace(execution_count=1)
    module = types.SimpleNamespace(display=shown, get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", module)
    assert progress.notebook() is None  # IPython at a terminal
    shell.kernel = object()
    made = reporter()
    assert isinstance(made, Meter)
    page = progress.notebook()
    assert isinstance(page, Page)
    with Meter(page, every_s=0).task("<loading>", 10) as advance:
        advance(4)
    assert len(shown.pages) == 1
    assert "&lt;loading&gt;" in shown.pages[0][0] and 'value="4"' in shown.pages[0][1]
    assert "<progress" not in shown.pages[0][-1]
    log = CompileLog()
    log("step: 16 tokens", 1.0)
    log("step: 32 tokens", 0.5)
    shell.execution_count = 2
    log("step: 64 tokens", 2.0)
    assert [len(page) for page in shown.pages[1:]] == [3, 2]
    assert "compiled step: 32 tokens in 0.5 s, 2 of this cell" in shown.pages[1][-1]
    monkeypatch.delitem(sys.modules, "IPython")
    log("step: 128 tokens", 2.0)
    assert capsys.readouterr().err == "compiled step: 128 tokens in 2.0 s\n"


def test_numpy_weights_are_put_on_the_device(llm: js.LLM) -> None:
    weights = jax.tree.map(np.asarray, llm.params)
    made = js.LLM(llm.config, weights, llm.tokenizer, engine=ENGINE)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made.params))
    assert "million parameters" in repr(made)
    made.update(weights)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(made.params))


@pytest.mark.parametrize("messages", ["hi", ["hi"], {"role": "user", "content": "hi"}])
def test_messages_that_are_no_mappings_are_refused(llm: js.LLM, messages: Any) -> None:
    with pytest.raises(js.UsageError, match="list of mappings"):
        llm.chat(messages)
