"""Measures a cache of constant size on the embedded model, over text far beyond its context.

    python benchmarks/streaming.py --stdlib /usr/lib/python3.12     # the library it did not learn

Held-out modules are read as one text of 20,000 tokens, a single request, with caches that keep

- everything: beyond the context that the model was trained at, and without a bound;
- a window: the newest tokens;
- sinks and a window: the first four tokens and the newest, positions counted inside the cache.

The bound on quality is a fresh forward over just the tokens before each prediction, as many as the
caches hold, which costs a whole window for every few tokens. Then 20,000 tokens are generated in
one request. Pages held and live arrays are watched throughout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxserve as js  # noqa: E402  (the repository's root comes first)
from benchmarks import machine  # noqa: E402
from jaxserve.checkpoint.locate import locate  # noqa: E402
from jaxserve.config import AttentionSpec, ModelConfig  # noqa: E402
from jaxserve.layers.cache import At  # noqa: E402
from jaxserve.layers.decoder import Model, Params, forward  # noqa: E402
from jaxserve.layers.param import Declare  # noqa: E402
from jaxserve.layers.step import Step  # noqa: E402
from jaxserve.pallas_kernels import KernelSet, kernel_set  # noqa: E402
from jaxserve.partitioning.collectives import LocalComm  # noqa: E402
from jaxserve.partitioning.stripe import Stripe  # noqa: E402
from jaxserve.serving.options import EngineOptions  # noqa: E402
from jaxserve.serving.request import Request, SamplingParams, TokenEvent  # noqa: E402
from jaxserve.training.corpus import read_corpus  # noqa: E402
from jaxserve.training.dataset import encode_documents  # noqa: E402

TOKENS = 20_000
SEGMENT = 2000
SINKS = 4
SIZES = (1024, 256)
"""Tokens that a cache keeps, sinks included."""
STRIDE = 64
"""Tokens that one recomputed window scores."""
GENERATED = 20_000
WATCHED_STEPS = 50
"""Steps between two looks at the memory of a generation."""


def main() -> None:
    """Measures, writes the result and the plot, and prints the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stdlib", type=Path, help="default: that of the running Python")
    parser.add_argument("--model", default="tiny", choices=("tiny", "tiny-draft"))
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--generate", type=int, default=GENERATED)
    parser.add_argument("--out", type=Path, help="JSON; a .png beside it holds the plot")
    options = parser.parse_args()
    text = _held_out(options.stdlib, options.model, options.tokens + 1)
    result: dict[str, Any] = {
        "benchmark": "streaming",
        **machine.facts(),
        "model": options.model,
        "tokens": options.tokens,
        "segment_tokens": SEGMENT,
        "sink_tokens": SINKS,
    }
    plain = js.load(options.model, show="silent")
    result["context_tokens"] = plain.config.max_context_tokens
    result["share_of_attention_on_sinks"] = _sink_share(plain, text)
    runs: list[dict[str, Any]] = []
    for name, config in _caches(plain.config):
        runs.append(_scored(name, _engine(plain, config), text))
        print(json.dumps(runs[-1]), file=sys.stderr)
    for size in SIZES:
        runs.append(_recomputed(plain, text, size))
        print(json.dumps(runs[-1]), file=sys.stderr)
    result["runs"] = runs
    if options.generate:
        streaming = plain.config.streaming(SIZES[0] - SINKS, SINKS)
        result["generation"] = _generated(_engine(plain, streaming), text, options.generate)
    shown = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(shown + "\n")
        _plot(result, options.out.with_suffix(".png"))
    print(shown)


def _held_out(stdlib: Path | None, model: str, count: int) -> list[int]:
    """Returns the first tokens of the held-out modules, one after the other."""
    tokenizer = Tokenizer.from_file(str(locate(model) / "tokenizer.json"))
    tokens = encode_documents(read_corpus(stdlib).held_out, tokenizer)
    if tokens.size < count:
        raise SystemExit(f"the held-out modules have {tokens.size} tokens, and {count} are asked")
    return tokens[:count].tolist()


def _caches(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yields what is compared: a name, and the model with this cache."""
    yield "everything", replace(config, max_context_tokens=1 << 15)
    for size in SIZES:
        yield f"window {size}", config.streaming(size, 0)
        yield f"{SINKS} sinks + window {size - SINKS}", config.streaming(size - SINKS, SINKS)


def _engine(plain: js.LLM, config: ModelConfig) -> js.LLM:
    """Returns the model with another cache, for one sequence at a time."""
    options = EngineOptions(max_sequences=1, prefix_cache=False)
    declare = Declare.best(jax.default_backend(), str(plain.params["embedding"]["values"].dtype))
    return js.LLM(config, plain.params, plain.tokenizer, declare=declare, engine=options)


@dataclass
class Watch:
    """What a request's memory was, look by look, with the tokens it had then."""

    llm: js.LLM
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    array_bytes: list[int] = field(default_factory=list)

    def look(self, num_tokens: int) -> None:
        """Notes pages held and bytes of all arrays."""
        self.tokens.append(num_tokens)
        self.pages.append(sum(self.llm.engine.metrics.scheduler.pages_held))
        self.array_bytes.append(sum(array.nbytes for array in jax.live_arrays()))

    def facts(self, full_at: int) -> dict[str, Any]:
        """Returns page and array counts, least and most from `full_at` tokens on.

        The last look is left out: the request is over.
        """
        looks = list(zip(self.tokens, self.pages, self.array_bytes, strict=True))[:-1]
        late = [(pages, size) for tokens, pages, size in looks if tokens >= full_at]
        pages, sizes = zip(*late, strict=True)
        geometry = self.llm.runner.geometry
        page_bytes = geometry.num_bytes // sum(g.num_pages for g in geometry.groups)
        return {
            "pages_held": [min(pages), max(pages)],
            "kv_bytes_held": [min(pages) * page_bytes, max(pages) * page_bytes],
            "kv_pool_bytes": geometry.num_bytes,
            "live_array_bytes": [min(sizes), max(sizes)],
        }


def _run(llm: js.LLM, request: Request, sink: Callable[[TokenEvent], None], watch: Watch) -> float:
    """Returns the seconds that a request takes; memory is looked at now and then."""
    began = time.perf_counter()
    tokens, steps = 0, 0

    def count(event: TokenEvent) -> None:
        nonlocal tokens
        tokens += len(event.token_ids)
        sink(event)

    llm.engine.submit(request, count)
    while llm.engine.step():
        steps += 1
        read = llm.engine.metrics.prompt_tokens if tokens == 0 else len(request.prompt) + tokens
        if tokens == 0 or steps % WATCHED_STEPS == 0:
            watch.look(read)
    return time.perf_counter() - began


def _scored(name: str, llm: js.LLM, text: list[int]) -> dict[str, Any]:
    """Returns the losses over a text that is read as one prompt, and the memory it takes."""
    events: list[TokenEvent] = []
    params = SamplingParams(max_tokens=1, temperature=0, seed=0, prompt_logprobs=0).resolved({})
    watch = Watch(llm)
    request = Request(id=name, prompt=tuple(text), params=params)
    seconds = _run(llm, request, events.append, watch)
    scores = events[0].prompt_logprobs
    assert scores is not None, events
    losses = np.array([-entry.logprob for entry in scores if entry is not None])
    return {
        "cache": name,
        **_losses(losses),
        **watch.facts(full_at=max(SIZES) * 2),
        "seconds": round(seconds, 1),
    }


def _losses(losses: np.ndarray) -> dict[str, Any]:
    """Returns nats per token of the whole text and of each segment."""
    segments = [losses[at : at + SEGMENT] for at in range(0, len(losses), SEGMENT)]
    return {
        "nats_per_token": round(float(losses.mean()), 4),
        "by_segment": [round(float(segment.mean()), 4) for segment in segments],
    }


def _recomputed(llm: js.LLM, text: list[int], size: int) -> dict[str, Any]:
    """Returns the losses with a fresh forward over `size` tokens for every `STRIDE` predictions.

    A prediction sees the `size - STRIDE + 1` to `size` tokens before it, or all there are.
    """
    tokens = np.array(text, np.int32)
    began = time.perf_counter()
    losses: Any = np.zeros(len(text) - 1)
    known = 0
    for end in [*range(size, len(text) - 1, STRIDE), len(text) - 1]:
        start = end - size
        scores = _row_losses(llm.logits(tokens[start:end]), tokens[start + 1 : end + 1])
        losses[known:end] = np.asarray(scores)[known - start :]
        known = end
    return {
        "cache": f"none, {size} tokens recomputed for every {STRIDE}",
        **_losses(losses),
        "seconds": round(time.perf_counter() - began, 1),
    }


@jax.jit
def _row_losses(logits: Array, targets: Array) -> Array:
    """Returns float32[T], minus the log-probability of each target."""
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, targets[:, None], axis=1)[:, 0]


def _generated(llm: js.LLM, text: list[int], count: int) -> dict[str, Any]:
    """Returns what generating `count` tokens in one request takes."""
    prompt = tuple(text[: max(SIZES)])
    params = SamplingParams(max_tokens=count, temperature=1.0, seed=0).resolved({})
    watch, drawn = Watch(llm), list[int]()

    def sink(event: TokenEvent) -> None:
        drawn.extend(event.token_ids)

    seconds = _run(llm, Request(id="endless", prompt=prompt, params=params), sink, watch)
    assert len(drawn) == count, f"{len(drawn)} of {count} tokens"
    assert llm.tokenizer is not None
    return {
        "tokens": count,
        **watch.facts(full_at=max(SIZES) * 2),
        "seconds": round(seconds, 1),
        "distinct_tokens_by_segment": [
            len(set(drawn[at : at + SEGMENT])) for at in range(0, count, SEGMENT)
        ],
        "last_text": llm.tokenizer.decode(drawn[-80:]),
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _SinkShares:
    """A cache that keeps nothing: one sequence attends to itself, and shares are written down.

    Attributes:
        shares: per layer, float32[T]: of a token's attention, what the first `SINKS` keys get.
    """

    shares: tuple[Array, ...] = ()

    def begin(self, step: Step) -> _SinkShares:
        return self

    def attend(
        self,
        layer: At,
        q: Array,
        k: Array,
        v: Array,
        spec: AttentionSpec,
        kernels: KernelSet,
        sink_q: Array | None = None,
        slopes: Array | None = None,
        stripe: Stripe | None = None,
    ) -> tuple[Array, _SinkShares]:
        group = spec.num_heads // spec.num_kv_heads
        k, v = (jnp.repeat(x, group, axis=1).astype(jnp.float32) for x in (k, v))
        scores = jnp.einsum("TNH,SNH->NTS", q.astype(jnp.float32), k) * spec.score_scale
        before = jnp.tril(jnp.ones(scores.shape[1:], bool))
        weights = jax.nn.softmax(jnp.where(before, scores, -jnp.inf), axis=-1)
        share = weights[:, :, :SINKS].sum(axis=-1).mean(axis=0)
        out = jnp.einsum("NTS,SNH->TNH", weights, v).astype(q.dtype)
        return out, replace(self, shares=(*self.shares, share))

    def end(self) -> _SinkShares:
        return self


def _sink_share(llm: js.LLM, text: list[int]) -> dict[str, Any]:
    """Returns which share of their attention tokens 512 to 1,023 pay to the first `SINKS` keys."""
    length = 1024
    declare = Declare.best(jax.default_backend(), str(llm.params["embedding"]["values"].dtype))
    model = Model(llm.config, declare)

    @jax.jit
    def shares(params: Params, tokens: Array) -> tuple[Array, ...]:
        positions = jnp.arange(length, dtype=jnp.int32)
        step = Step(tokens, positions, jnp.full_like(positions, length))
        _, cache = forward(model, params, step, _SinkShares(), LocalComm(), kernel_set())
        return cache.shares

    found = shares(llm.params, jnp.asarray(text[:length], jnp.int32))
    by_layer = [round(float(share[length // 2 :].mean()), 4) for share in found]
    even = float(np.mean(SINKS / np.arange(length // 2 + 1, length + 1)))
    return {"by_layer": by_layer, "if_even": round(even, 4)}


def _plot(result: dict[str, Any], path: Path) -> None:
    """Draws the losses by segment."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for run in result["runs"]:
        ends = [SEGMENT * (at + 1) for at in range(len(run["by_segment"]))]
        dashed = "--" if run["cache"].startswith("none") else "-"
        axes.plot(ends, run["by_segment"], dashed, marker="o", ms=3, label=run["cache"])
    axes.axvline(result["context_tokens"], color="grey", lw=0.8)
    axes.set(
        title=f"{result['model']} on one text, by what is kept of it (grey: the model's context)",
        xlabel="tokens",
        ylabel=f"nats per token, {SEGMENT} tokens each",
    )
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
