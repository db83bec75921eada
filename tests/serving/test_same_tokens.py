"""On CPU a request gives the same tokens whatever the engine does besides, bit for bit.

What is expected comes from the functional `generate`, one request at a time; log-probabilities are
compared as well, exactly, because they tell of a changed bit long before a token does.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from jaxserve import compile_cache
from jaxserve.api import LLM, load
from jaxserve.checkpoint import inspect, load_params
from jaxserve.checkpoint.locate import locate
from jaxserve.cli import app
from jaxserve.config import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.batch import Ladder
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.engine import Engine
from jaxserve.serving.generation import Program, Prompts, generate
from jaxserve.serving.http.background import serve_in_background
from jaxserve.serving.options import (
    EngineOptions,
    history_tokens,
    scheduler_config,
    size_cache,
)
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.runner import ModelRunner
from jaxserve.serving.sampler import Sampling
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import LocalService, ModelCard

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = ("float32", "bfloat16")
NEW_TOKENS = 12

# Sums over 256 features, dots over them and exponentials of 600 scores all change bits between
# the smallest and the largest of these shapes, wherever XLA is left to choose their order.
VOCAB = 600
LADDER = Ladder(decode_rows=(2, 8), mixed_tokens=(16, 64), mixed_rows=(8,))
SHORT_LADDER = Ladder(decode_rows=(8,), mixed_tokens=(32,), mixed_rows=(8,))

Bits = tuple[tuple[int, ...], tuple[float, ...]]
"""Tokens of a completion and their log-probabilities."""

Sample = tuple[str, int]
"""Request id and sample index."""


class Loaded(NamedTuple):
    """A model with its weights."""

    program: Program
    params: Params


@cache
def small(dtype: str) -> Loaded:
    """Returns a model of a full and a window layer, with weights that do not repeat themselves."""
    rope = RopeSpec(32)
    mlp = MlpSpec(256, Activation.SILU, gated=True)
    layers = (
        LayerSpec(AttentionSpec(8, 2, 32, rope=rope), mlp, NormSpec()),
        LayerSpec(AttentionSpec(4, 4, 32, rope=rope, window=20), mlp, NormSpec()),
    )
    config = ModelConfig("small", VOCAB, 256, layers, NormSpec(), 256)
    program = Program(Model(config, Declare.best("cpu", dtype)), LocalComm(), kernel_set("xla"))
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = 0.05 if len(leaf.shape) > 1 else 1.5
        return jnp.asarray(rng.normal(size=leaf.shape) * scale, leaf.dtype)

    return Loaded(program, jax.tree.map(values, program.model.abstract_params()))


@cache
def checkpoint(directory: Path, dtype: str) -> Loaded:
    info = inspect(directory)
    model = Model(info.config, Declare.best("cpu", dtype))
    return Loaded(Program(model, LocalComm(), kernel_set("xla")), load_params(info, model))


def request(
    number: int, prompt: Sequence[int], stops: Sequence[int] = (), **fields: Any
) -> Request:
    fields = {"max_tokens": NEW_TOKENS, "seed": number - 2**40, "logprobs": 0, **fields}
    params = SamplingParams(**fields).resolved({})
    return Request(id=str(number), prompt=tuple(prompt), params=params, stop_ids=tuple(stops))


def with_params(request: Request, **fields: Any) -> Request:
    params = msgspec.structs.replace(request.params, **fields)
    return msgspec.structs.replace(request, params=params)


def random_prompt(rng: np.random.Generator, length: int, vocab: int = VOCAB) -> list[int]:
    return rng.integers(0, vocab, length).tolist()


def mixed_requests(lengths: Sequence[int], vocab: int = VOCAB) -> list[Request]:
    """Returns requests that are greedy and drawn in all ways, in turns."""
    rng = np.random.default_rng(len(lengths))
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.001},
        {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"temperature": 0.0, "frequency_penalty": 0.7, "logit_bias": {3: 4.0, 5: -100.0}},
        {"temperature": 1.5, "min_tokens": 4, "stops": range(0, vocab, -(-vocab // 100))},
    ]
    return [
        request(number, random_prompt(rng, length, vocab), **kinds[number % len(kinds)])
        for number, length in enumerate(lengths)
    ]


LENGTHS = (5, 1, 130, 40, 17, 64, 2, 90, 33, 7)
REQUESTS = mixed_requests(LENGTHS)
SEVERAL = [
    request(100 + number, REQUESTS[number].prompt, temperature=1.0, n=3) for number in (3, 6)
]
WIDEST, SLOTS = 130, 150

_generate = jax.jit(generate, static_argnames=("program", "slots", "max_tokens"))


def functional(
    loaded: Loaded, requests: Sequence[Request], width: int = WIDEST, slots: int = SLOTS
) -> dict[Sample, Bits]:
    """Returns what each sample of the requests gives alone; one program serves them all."""
    rows = [(r, index) for r in requests for index in range(r.params.n)]
    whole = Sampling.create(
        [r.params for r, _ in rows],
        [r.prompt for r, _ in rows],
        [r.stop_ids for r, _ in rows],
        loaded.program.model.config.vocab_size,
        [index for _, index in rows],
    )
    found: dict[Sample, Bits] = {}
    for row, (r, index) in enumerate(rows):
        tokens = np.zeros((1, width), np.int32)
        tokens[0, : len(r.prompt)] = r.prompt
        prompts = Prompts(jnp.asarray(tokens), jnp.array([len(r.prompt)]))
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], whole)
        out = jax.device_get(_generate(*loaded, prompts, alone, slots, NEW_TOKENS))
        length = int(out.lengths[0])
        bits = out.tokens[0, :length].tolist(), out.logprobs[0, :length].tolist()
        found[r.id, index] = tuple(bits[0]), tuple(bits[1])
    return found


@cache
def everything(dtype: str) -> dict[Sample, Bits]:
    found = functional(small(dtype), [*REQUESTS, *SEVERAL])
    assert len({tokens for tokens, _ in found.values()}) == len(found)
    assert all(len(set(tokens)) > 1 or len(tokens) == 1 for tokens, _ in found.values())
    assert any(len(tokens) < NEW_TOKENS for tokens, _ in found.values())
    return found


def expected(dtype: str, requests: Sequence[Request] = REQUESTS) -> dict[Sample, Bits]:
    """Returns the bits of requests, no two of which are alike."""
    return {(r.id, i): everything(dtype)[r.id, i] for r in requests for i in range(r.params.n)}


@cache
def runner(dtype: str, page_size: int = 16, ladder: Ladder = LADDER) -> ModelRunner:
    """Returns a runner of the small model, compiled as it is used."""
    loaded, options = small(dtype), options_of(page_size, ladder)
    config = loaded.program.model.config
    return ModelRunner(
        *loaded,
        size_cache(config, options, dtype, kv_bytes=1 << 23),
        ladder,
        options.max_sequences,
        history_tokens(config),
    )


def options_of(page_size: int = 16, ladder: Ladder = LADDER) -> EngineOptions:
    return EngineOptions(
        max_sequences=ladder.decode_rows[-1],
        max_step_tokens=ladder.mixed_tokens[-1],
        page_size=page_size,
    )


def engine(dtype: str, page_size: int = 16, ladder: Ladder = LADDER, **changes: Any) -> Engine:
    """Returns an engine with empty pages; `changes` are fields of its scheduler's limits."""
    used = runner(dtype, page_size, ladder)
    used.reset()
    context = small(dtype).program.model.config.max_context_tokens
    limits = scheduler_config(options_of(page_size, ladder), used.geometry, context)
    return Engine(used, msgspec.structs.replace(limits, **changes))


class Collected:
    """Takes events; its bits are those of the completions so far."""

    def __init__(self) -> None:
        self.events: list[TokenEvent] = []

    @property
    def bits(self) -> dict[Sample, Bits]:
        found: dict[Sample, tuple[list[int], list[float]]] = {}
        for event in self.events:
            assert event.error is None, event.error
            tokens, logprobs = found.setdefault((event.request_id, event.sample_index), ([], []))
            tokens += event.token_ids
            logprobs += [entry.logprob for entry in event.logprobs or ()]
        return {sample: (tuple(bits[0]), tuple(bits[1])) for sample, bits in found.items()}


def serve(
    engine: Engine, requests: Sequence[Request], between: Callable[[int], object] | None = None
) -> dict[Sample, Bits]:
    """Returns what an engine gives; `between` is called with the number of each step."""
    taken = Collected()
    for r in requests:
        engine.submit(r, taken.events.append)
    for number in itertools.count():
        if not engine.step():
            return taken.bits
        if between is not None:
            between(number)
    raise AssertionError


@pytest.fixture(scope="module", autouse=True)
def kept_programs() -> None:
    """Lets processes that share these tests share what they compile."""
    compile_cache.enable()


FEW = EngineOptions(max_sequences=2, max_step_tokens=16)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[LLM, httpx.Client]]:
    """Returns the embedded model, and a client of its engine behind HTTP."""
    served = load("tiny", dtype="float32", engine=FEW, show="silent")
    card = ModelCard(
        name="tiny",
        created=0,
        architecture="llama",
        dtype="float32",
        max_context_tokens=served.config.max_context_tokens,
        vocab_size=served.config.vocab_size,
        num_parameters=0,
    )

    @asynccontextmanager
    async def local() -> AsyncIterator[LocalService]:
        service = LocalService(served.engine, served.intake, card)
        await service.start()
        try:
            yield service
        finally:
            await service.stop()

    with (
        serve_in_background(local, ServerOptions(model_name="tiny")) as found,
        httpx.Client(base_url=found.url + "/v1", timeout=120) as client,
    ):
        yield served, client


@pytest.fixture(
    scope="module", params=["bfloat16", pytest.param("float32", marks=pytest.mark.slow)]
)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def test_alone_as_the_functional_generate(dtype: str) -> None:
    used = engine(dtype, prefix_cache=False)
    for r in REQUESTS:
        assert serve(used, [r]) == {(r.id, 0): expected(dtype)[r.id, 0]}


def test_beside_others(dtype: str) -> None:
    used = engine(dtype)
    assert serve(used, REQUESTS) == expected(dtype)
    assert used.metrics.steps < len(REQUESTS) * NEW_TOKENS  # they did share steps


def test_in_any_order_and_at_any_time(dtype: str) -> None:
    assert serve(engine(dtype), REQUESTS[::-1]) == expected(dtype)
    used, late = engine(dtype), Collected()

    def between(number: int) -> None:
        if number % 3 == 0 and number // 3 < len(REQUESTS[3:]):
            used.submit(REQUESTS[3 + number // 3], late.events.append)

    assert serve(used, REQUESTS[:3], between) | late.bits == expected(dtype)


def test_beside_one_that_is_aborted(dtype: str) -> None:
    used = engine(dtype)
    doomed = request(99, REQUESTS[2].prompt[:100], temperature=1.0)

    def between(number: int) -> None:
        if number == 6:
            used.abort(doomed.id)

    found = serve(used, [doomed, *REQUESTS], between)
    assert len(found.pop(("99", 0))[0]) < NEW_TOKENS
    assert found == expected(dtype)


def test_beside_and_after_one_whose_activations_are_no_numbers(dtype: str) -> None:
    # There is no such token, so its embedding is none; callers are stopped before they get here.
    hurt = request(99, [VOCAB + 1] * 70, temperature=0.0)
    used = engine(dtype, prefix_cache=False)
    found = serve(used, [hurt, *REQUESTS])
    assert found.pop(("99", 0))[0] == (0,) * NEW_TOKENS
    assert found == expected(dtype)
    assert serve(used, REQUESTS) == expected(dtype)


@pytest.mark.parametrize("chunk", [3, 16, 50])
def test_in_chunks_of_any_size(dtype: str, chunk: int) -> None:
    assert serve(engine(dtype, max_prefill_tokens=chunk), REQUESTS) == expected(dtype)


def test_after_preemption(dtype: str) -> None:
    geometry = runner(dtype).geometry
    tight = tuple(
        GroupLimits(min(group.num_pages, 16), group.spec.window) for group in geometry.groups
    )
    used = engine(dtype, groups=tight, prefix_cache=False)
    assert serve(used, REQUESTS) == expected(dtype)
    assert used.metrics.scheduler.preemptions > 0


def test_after_prefix_hits(dtype: str) -> None:
    used = engine(dtype)
    assert serve(used, REQUESTS) == expected(dtype)
    before = used.metrics.scheduler.prefix_hit_tokens
    assert serve(used, REQUESTS) == expected(dtype)
    assert used.metrics.scheduler.prefix_hit_tokens - before > sum(LENGTHS) // 2


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [
        (256, "float32"),
        pytest.param(64, "float32", marks=pytest.mark.slow),
        pytest.param(64, "bfloat16", marks=pytest.mark.slow),
        pytest.param(256, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_with_pages_of_any_size(page_size: int, dtype: str) -> None:
    used = engine(dtype, page_size, SHORT_LADDER)
    assert serve(used, REQUESTS) == expected(dtype)


@pytest.mark.parametrize("steps", [1, 4])
def test_with_any_number_of_steps_in_flight(dtype: str, steps: int) -> None:
    assert serve(engine(dtype, max_in_flight=steps), REQUESTS) == expected(dtype)


def test_as_a_stream(dtype: str) -> None:
    loaded = small(dtype)
    llm = LLM(loaded.program.model.config, loaded.params, declare=loaded.program.model.declare)
    llm._made = ModelEngine(engine(dtype), runner(dtype))
    for r in REQUESTS[:4]:
        stream = llm.stream(r.prompt, r.params)
        assert list(stream) == []  # no tokenizer, no text
        done = stream.completion
        assert done.logprobs is not None
        scores = tuple(entry.logprob for entry in done.logprobs)
        assert (done.token_ids, scores) == expected(dtype)[r.id, 0]


def test_each_of_several_samples_as_alone(dtype: str) -> None:
    assert serve(engine(dtype), SEVERAL) == expected(dtype, SEVERAL)
    crowd = [*REQUESTS[4:], *SEVERAL]
    assert serve(engine(dtype), crowd) == expected(dtype, crowd)


def test_with_log_probabilities_and_without(dtype: str) -> None:
    silent = [with_params(r, logprobs=None if i % 2 else 3) for i, r in enumerate(REQUESTS)]
    found = serve(engine(dtype), silent)
    for r in silent:
        tokens, logprobs = expected(dtype)[r.id, 0]
        assert found[r.id, 0] == (tokens, () if r.params.logprobs is None else logprobs)
    silent = [with_params(r, logprobs=None) for r in REQUESTS]
    found = serve(engine(dtype), silent)
    assert found == {sample: (tokens, ()) for sample, (tokens, _) in expected(dtype).items()}


def test_with_log_probabilities_of_the_prompt(dtype: str) -> None:
    scored = [with_params(r, prompt_logprobs=1) for r in REQUESTS[2:6]]
    found: list[dict[str, Any]] = []
    cases: list[dict[str, Any]] = [{}, {"max_prefill_tokens": 7}]
    for changes in cases:
        used, taken = engine(dtype, **changes), Collected()
        for r in scored:
            used.submit(r, taken.events.append)
        while used.step():
            pass
        assert taken.bits.items() <= expected(dtype).items()
        found.append({e.request_id: e.prompt_logprobs for e in taken.events if e.prompt_logprobs})
    assert found[0] == found[1]
    assert [len(found[0][r.id]) for r in scored] == [len(r.prompt) for r in scored]


def test_beams_beside_others_and_others_beside_beams(dtype: str) -> None:
    beams = msgspec.structs.replace(request(50, REQUESTS[3].prompt, temperature=0.0), beam_width=3)
    alone = serve(engine(dtype), [beams])
    assert len({tokens for tokens, _ in alone.values()}) == 3
    assert serve(engine(dtype), [*REQUESTS, beams]) == expected(dtype) | alone
    assert serve(engine(dtype, max_prefill_tokens=9), [beams, *REQUESTS]) == expected(dtype) | alone


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 0.9, "seed": 7}])
def test_in_a_notebook_by_command_and_from_a_server(
    sampling: dict[str, Any], server: tuple[LLM, httpx.Client], capsys: pytest.CaptureFixture[str]
) -> None:
    llm, client = server
    prompt = "class Stack:\n    def __init__(self):\n        self."
    asked = {"prompt": prompt, "max_tokens": NEW_TOKENS, "return_token_ids": True, "logprobs": 0}
    body = client.post("/completions", json=asked | sampling).json()["choices"][0]
    own = load("tiny", dtype="float32", engine=FEW, show="silent")
    done = own.generate(prompt, max_tokens=NEW_TOKENS, logprobs=0, **sampling)
    options = [f"--{name}={value}" for name, value in sampling.items()]
    command = ["generate", prompt, "--dtype=float32", "--json", "--quiet", "--logprobs=0"]
    app([*command, f"--max-tokens={NEW_TOKENS}", *options], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert tuple(told["token_ids"]) == tuple(body["token_ids"]) == done.token_ids
    assert told["text"] == body["text"] == done.text
    scores = tuple(one.logprob for one in done.logprobs)
    assert tuple(one["logprob"] for one in told["logprobs"]) == scores
    assert tuple(body["logprobs"]["token_logprobs"]) == scores
    assert llm is not own


FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
UNLIKE = {
    "bloom": "bfloat16",  # ALiBi
    "falcon-7b": "float32",  # one key head, blocks side by side
    "gemma2": "bfloat16",  # windows, soft caps, norms behind
    "qwen3_moe": "bfloat16",  # experts, norms of heads
}
"""Models that an engine could treat differently, in one dtype; all others are slow tests."""

LAST_BITS = {("bloom", "float32"), ("mpt", "float32"), ("qwen3_moe", "float32")}
"""Of heads of 8 features or fewer float32 may differ in its last bits: see docs/engine.md."""


def _marks(name: str, dtype: str) -> list[pytest.MarkDecorator]:
    return [] if UNLIKE.get(name) == dtype else [pytest.mark.slow]


MODELS = [
    pytest.param(name, dtype, marks=_marks(name, dtype))
    for name in [*FAMILIES, "tiny"]
    for dtype in DTYPES
]


@pytest.mark.parametrize(("name", "dtype"), MODELS)
def test_of_every_family(name: str, dtype: str) -> None:
    loaded = checkpoint(locate("tiny") if name == "tiny" else GOLDEN / name, dtype)
    vocab = loaded.program.model.config.vocab_size
    requests = mixed_requests((9, 23, 3, 17), vocab)
    wanted = functional(loaded, requests, width=23, slots=35)
    options = EngineOptions(max_sequences=2, max_step_tokens=16, page_size=8)
    used = ModelEngine.create(*loaded, options).engine
    for _ in range(2):  # and once more, from pages that are there
        found = serve(used, requests)
        if (name, dtype) in LAST_BITS:
            assert {key: one[0] for key, one in found.items()} == {
                key: one[0] for key, one in wanted.items()
            }
            for key, one in found.items():
                assert one[1] == pytest.approx(wanted[key][1], abs=1e-5)
        else:
            assert found == wanted
    attentions = [layer.attention for layer in loaded.program.model.config.layers]
    if all(a.window is None and not (a.rope and a.rope.by_length) for a in attentions):
        assert used.metrics.scheduler.prefix_hit_tokens > 0


def test_of_prompts_that_begin_alike_where_keys_depend_on_the_length() -> None:
    loaded = checkpoint(GOLDEN / "llama-dynamic", "float32")
    prompt = random_prompt(np.random.default_rng(0), 23, loaded.program.model.config.vocab_size)
    requests = [request(i, prompt[:end], temperature=0.0) for i, end in enumerate((23, 17))]
    wanted = functional(loaded, requests, width=23, slots=35)
    options = EngineOptions(max_sequences=2, max_step_tokens=16, page_size=8)
    used = ModelEngine.create(*loaded, options).engine
    assert serve(used, requests[:1]) | serve(used, requests[1:]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_embedded_model_in_steps_of_every_shape(dtype: str) -> None:
    loaded = checkpoint(locate("tiny"), dtype)
    vocab = loaded.program.model.config.vocab_size
    lengths = [(37 * index) % 150 + 1 if index % 3 else index % 7 + 1 for index in range(48)]
    requests = mixed_requests(lengths, vocab)
    wanted = functional(loaded, requests, width=150, slots=162)
    for options in (EngineOptions(), EngineOptions(page_size=64, max_step_tokens=64)):
        assert serve(ModelEngine.create(*loaded, options).engine, requests) == wanted


def test_every_guarantee_in_the_documentation_has_its_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")
    named = re.findall(r"^\|.*\| `(test_\w+)` \|$", page, re.MULTILINE)
    tests = {name for name in globals() if name.startswith("test_")}
    assert sorted(named) == sorted(
        tests - {"test_every_guarantee_in_the_documentation_has_its_test"}
    )
