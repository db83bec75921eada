"""The notebook face: load a model, generate, look at it.

import jaxserve as js

llm = js.load("tiny")
llm.generate("def area(", max_tokens=32).text
for piece in llm.stream("import ", max_tokens=32, temperature=0):
    print(piece, end="")
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array
from jax.core import Tracer

from jaxserve.checkpoint import GenerationDefaults, inspect, load_params
from jaxserve.checkpoint.locate import locate
from jaxserve.compile_cache import enable as enable_compile_cache
from jaxserve.config import ModelConfig, StreamingCache
from jaxserve.errors import ContextLengthError, UsageError
from jaxserve.layers.decoder import Params
from jaxserve.layers.param import Declare
from jaxserve.layers.tap import Edit
from jaxserve.notebook.activations import Activations, check_size
from jaxserve.notebook.attention import AttentionView
from jaxserve.notebook.card import Card, card_of
from jaxserve.notebook.requests import Batch, TextStream, is_single
from jaxserve.notebook.tokens import Score, TokenView, pieces_of
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.devices import unused_accelerator, use_devices
from jaxserve.partitioning.layout_file import Layout, choose
from jaxserve.partitioning.picture import LayoutView
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.progress import CompileLog, Show, Unit, reporter
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.engine import Engine
from jaxserve.serving.inside import Look, inside
from jaxserve.serving.intake import Intake, Prompt
from jaxserve.serving.model_files import has_tokenizer, kv_rounding, quantization, run_dtype
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.placing import (
    check_views,
    declared,
    placed,
    places_of,
    program_of,
    sized,
    spread_logits,
)
from jaxserve.serving.request import Completion, Request, SamplingParams
from jaxserve.serving.runner import CompileReport, ModelRunner
from jaxserve.serving.sampler import Processor, check_processor
from jaxserve.serving.views import Views, views
from jaxserve.tokenizer import Tokenizer

Message = Mapping[str, str]

MAX_CAPTURED_BYTES = 1 << 30
"""Of one `run`, unless it says another limit."""

_NEUTRAL_FOR_BEAMS = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "logprobs": 0,
}
"""A search follows log-probabilities: the model's own sampling defaults do not count."""


def load(
    model: str | Path = "tiny",
    *,
    dtype: str | None = None,
    mesh: MeshPlan | str | Sequence[int] | None = None,
    layout: Layout | str | Path | None = None,
    prefill_layout: str | None = None,
    attention: str | None = None,
    devices: str | None = None,
    quantize: str | None = None,
    kv_dtype: str | None = None,
    backend: str = "xla",
    engine: EngineOptions | None = None,
    streaming: StreamingCache | None = None,
    show: Show | str = Show.AUTO,
) -> LLM:
    """Returns a model ready to generate.

    Args:
        model: "tiny" or "tiny-draft" (shipped), a checkpoint directory, or a hub name.
        dtype: "bfloat16" or "float32", of weights, activations and cache; None takes float32
            for a float32 checkpoint and bfloat16 for any other.
        mesh: devices along x, y and z, such as (2, 2, 2) or "2,2,2"; None takes one device.
        layout: of a mesh: "ws1d", "ws2d" (the default), "wg-x", "wg-xy" or "wg-xyz"; or the file
            of a layout, which says the mesh and everything else. `docs/layouts.md` explains them.
        prefill_layout: of prefill, where it has another than decode.
        attention: what the cache is cut by: "heads" (the default), "batch", "heads-batch",
            "heads-batch-xy" or "sequence".
        devices: "cpu:8" takes eight devices on this processor; before JAX has started.
        quantize: "int8" rounds weights, with a scale per output channel; "w8a8" rounds each row of
            activations too. None keeps them as they are in the checkpoint.
        kv_dtype: "int8" or "fp8" rounds keys and values when they are kept, with a scale for each
            token and head; None keeps them as activations are.
        backend: kernels to run: "xla", "tpu", "gpu" (Hopper) or "reference".
        engine: sizes of the engine that generates: sequences at once, memory for keys and values.
        streaming: keep so much of a sequence and no more, so that it may go on without end; None
            keeps all of it, up to the model's context.
        show: progress of loading and compiling, on standard error: "auto" (a bar on a terminal,
            lines elsewhere), "bar", "lines" or "silent".

    Raises:
        CheckpointError: files are missing, damaged or do not fit the architecture.
        UnsupportedError: architecture, config field, dtype or backend is not supported.
        UsageError: the model was not trained on as many tokens as `streaming` keeps, or the layout
            fits neither it nor the devices.
    """
    if devices is not None:
        use_devices(devices)
    if (unused := unused_accelerator()) is not None:
        warnings.warn(unused, stacklevel=2)
    enable_compile_cache()
    show = Show(show)
    path = locate(model)
    info = inspect(path)
    config = info.config
    if streaming is not None:
        config = config.streaming(streaming.window, streaming.sink_tokens)
    running = run_dtype(dtype, info.dtype)
    chosen = choose(
        config,
        running,
        mesh=mesh,
        layout=layout,
        prefill_layout=prefill_layout,
        attention=attention,
    )
    # Whatever is refused is refused before gigabytes are read.
    rounded = quantization(quantize, info)
    kept = kv_rounding(kv_dtype)
    program = program_of(config, running, kernel_set(backend), chosen, rounded, kept)
    params = load_params(info, program.model, places_of(program), reporter(show))
    return LLM(
        config,
        params,
        Tokenizer.from_dir(path) if has_tokenizer(path) else None,
        declare=program.model.declare,
        layout=chosen,
        backend=backend,
        engine=engine,
        defaults=info.generation,
        on_compile=None if show is Show.SILENT else CompileLog(),
    )


class LLM:
    """A model with weights in memory. Use it from one thread at a time.

    Args:
        config: the architecture.
        params: weights in the tree of `Model(config, declare).abstract_params()`.
        tokenizer: None leaves token ids as the only way in and out.
        declare: how `params` are stored; None finds out, for weights that are not rounded.
        layout: what lies where on a mesh; params may lie elsewhere, and lack its padding.
        backend: kernels to run.
        engine: sizes of the engine that generates.
        defaults: what the model's authors want where a request says nothing. Without end tokens
            there, those of the tokenizer end a completion.
        on_compile: called with what was compiled and the seconds it took.

    Attributes:
        config, tokenizer, defaults: as given.
        intake: makes requests of prompts and sampling parameters.
        eos_token_ids: tokens that end a completion.
        program: what the functions of `serving.generation` take beside the weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        declare: Declare | None = None,
        layout: Layout | None = None,
        backend: str = "xla",
        engine: EngineOptions | None = None,
        defaults: GenerationDefaults | None = None,
        on_compile: CompileReport | None = None,
    ) -> None:
        declare = declared(config, params) if declare is None else declare
        if layout is not None:
            layout.check(config, declare.dtype)
        program = program_of(config, declare, kernel_set(backend), layout)
        self.config = config
        self.tokenizer = tokenizer
        self.defaults = GenerationDefaults() if defaults is None else defaults
        self.intake = Intake.of(config, tokenizer, self.defaults)
        self.eos_token_ids = self.intake.eos_token_ids
        self.program = program
        self._layout = layout
        self._params = placed(program, params)
        self._options = sized(EngineOptions() if engine is None else engine, layout)
        self._on_compile = on_compile
        self._made: ModelEngine | None = None
        self._num_requests = 0
        self._logits = jax.jit(spread_logits(program))
        self._looks: dict[Any, Look] = {}

    @property
    def params(self) -> Views:
        """Returns the weights as a tree of arrays, whose text shows names and shapes alone.

        On one device it is what is stored. A mesh interleaves weights and may keep layers together;
        here each has its own, cut out when it is asked for.
        """
        return views(self.program.model, self._params, places_of(self.program))

    @property
    def layout(self) -> LayoutView:
        """Returns which device holds what; a notebook draws it."""
        layout = self._layout
        if layout is None:
            layout = choose(self.config, self.program.model.declare.dtype, mesh=MeshPlan())
            assert layout is not None
        return LayoutView(layout, self.config)

    @property
    def engine(self) -> Engine:
        """Returns the engine that generates, made on first use."""
        return self._model_engine.engine

    @property
    def runner(self) -> ModelRunner:
        """Returns what runs the engine's steps."""
        return self._model_engine.runner

    @property
    def compiles_after_ready(self) -> int:
        """Returns how many programs were compiled after `warm_up`; each was a pause."""
        return 0 if self._made is None else self._made.runner.compiles_after_ready

    @property
    def _model_engine(self) -> ModelEngine:
        if self._made is None:
            self._made = ModelEngine.create(
                self.program, self._params, self._options, self._on_compile
            )
        return self._made

    def warm_up(self, show: Show | str = Show.AUTO) -> None:
        """Compiles every step that serving can need; without it each compiles on first use."""
        runner = self.runner
        with reporter(Show(show)).task("compiling", runner.num_executables, Unit.ITEMS) as advance:
            runner.warm_up(advance)

    def update(self, params: Params) -> None:
        """Takes other weights of the same architecture; nothing is compiled again.

        Raises:
            UsageError: their tree, shapes, dtypes or devices differ, or requests are under way.
        """
        params = placed(self.program, params)
        if self._made is not None:
            self._made.update(params)
        self._params = params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        processor: Processor | None = None,
        **fields: Any,
    ) -> Any:
        """Returns the completion of a prompt, or a list of them for a list of prompts.

        A flat list of ints is one prompt of token ids. With n > 1 a prompt's result is itself a
        list, of n completions.

        Args:
            sampling: one for all prompts, or one per prompt; or its fields as keywords.
            processor: function in JAX of logits float32[R, V] and the tokens before them int32[R,
                C], -1 past their end, each row by itself; tokens are chosen by the logits that it
                gives. It is compiled into the steps, once for each function. Log-probabilities
                are those of the model.

        Raises:
            UsageError: a parameter is unknown or out of range, or a prompt is empty.
            ContextLengthError: prompt and max_tokens exceed the model's context.
        """
        if not isinstance(prompts, str | Sequence | np.ndarray):
            raise UsageError(f"prompts is text, a list of token ids or a list of them: {prompts!r}")
        single = is_single(prompts)
        many: list[Any] = [prompts] if single else list(prompts)
        params = _per_prompt(sampling, fields, len(many))
        requests = [self._request(p, s) for p, s in zip(many, params, strict=True)]
        self._process_by(processor)
        results: list[Any] = []
        for done in Batch(self.engine, self.tokenizer, requests).run():
            results.append(done[0] if len(done) == 1 else done)
        return results[0] if single else results

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        processor: Processor | None = None,
        **fields: Any,
    ) -> TextStream:
        """Returns an iterator over the pieces of one completion as they are generated.

        Its `completion` is there once it is exhausted. Leaving it earlier ends the request: when
        nothing refers to the iterator any more, with its `close()`, or at the end of a `with`.
        """
        if not is_single(prompt):
            raise UsageError("stream takes one prompt; use generate for a list of prompts")
        (params,) = _per_prompt(sampling, fields, 1)
        if params.n != 1:
            raise UsageError(f"n={params.n} cannot be streamed; use n=1 or generate")
        request = self._request(prompt, params)
        return TextStream(self.engine, self.tokenizer, request, lambda: self._process_by(processor))

    def beam_search(
        self,
        prompt: Prompt,
        width: int = 4,
        length_penalty: float = 1.0,
        sampling: SamplingParams | None = None,
        **fields: Any,
    ) -> list[Completion]:
        """Returns the `width` best completions that a beam search finds, best first.

        As Hugging Face's with `early_stopping=False`. The beams share the pages of their common
        tokens. The log-probabilities that order the completions are in `logprobs`.

        Args:
            width: beams, up to 10.
            length_penalty: power of the length that divides a completion's log-probability; above
                0 favours long completions.
            sampling: its `max_tokens`, `min_tokens` and `stop_token_ids` count; or as keywords.

        Raises:
            UsageError: a sampling parameter has no meaning for beams; the message names it.
        """
        if not is_single(prompt):
            raise UsageError("beam_search takes one prompt")
        if width < 2:
            raise UsageError(f"width={width} is no beam search; use at least 2, or generate")
        (params,) = _per_prompt(sampling, fields, 1)
        for name, neutral in _NEUTRAL_FOR_BEAMS.items():
            if (asked := getattr(params, name)) not in (None, neutral):
                raise UsageError(f"{name}={asked!r} has no effect on beams; leave it out")
        params = msgspec.structs.replace(params, **_NEUTRAL_FOR_BEAMS)
        request = self._request(
            prompt, params, beam_width=width, length_penalty=float(length_penalty)
        )
        self._process_by(None)
        (done,) = Batch(self.engine, self.tokenizer, [request]).run()
        return done

    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        **fields: Any,
    ) -> Completion:
        """Returns the assistant's answer to a conversation, through the chat template.

        Args:
            messages: mappings with "role" and "content", oldest first.
        """
        stream = self.chat_stream(messages, sampling, **fields)
        for _ in stream:
            pass
        return stream.completion

    def chat_stream(
        self, messages: Sequence[Message], sampling: SamplingParams | None = None, **fields: Any
    ) -> TextStream:
        """Returns an iterator over the pieces of the assistant's answer."""
        return self.stream(self.intake.chat(messages), sampling, **fields)

    def score(self, texts: Prompt | Sequence[Prompt]) -> Any:
        """Returns the `Score` of a text, or of token ids; a list of them for a list.

        Each token but the first has its log-probability after those before it, as the engine gives
        it for `prompt_logprobs`; a text may be one token shorter than the context.
        """
        single = is_single(texts)
        many: list[Any] = [texts] if single else list(texts)
        ids = [self.intake.encode(text) for text in many]
        neutral = _NEUTRAL_FOR_BEAMS | {"logprobs": None, "min_tokens": 0}
        params = SamplingParams(**neutral, max_tokens=1, prompt_logprobs=3)
        done = [] if not ids else self.generate(ids, params)
        scores = [self._score(*pair) for pair in zip(ids, done, strict=True)]
        return scores[0] if single else scores

    def _score(self, ids: Sequence[int], done: Completion) -> Score:
        assert done.prompt_logprobs is not None
        entries = done.prompt_logprobs
        logprobs = tuple(None if entry is None else entry.logprob for entry in entries)
        tops = [() if entry is None else entry.top for entry in entries]
        return Score(tuple(ids), logprobs, TokenView.of(self.tokenizer, ids, logprobs, tops))

    def logits(
        self, tokens: Any = None, *, params: Params | None = None, embeddings: Array | None = None
    ) -> Array:
        """Returns float32[..., T, V], the scores after each of the tokens int[..., T].

        It can be differentiated by `params` and by `embeddings`, and runs under `jit` and `vmap`.

        Args:
            tokens: token ids, or text.
            params: in the tree of `llm.params`, in the place of these.
            embeddings: [..., T, width], in the place of what the embedding has for the tokens; see
                `run(tokens, "input")`.
        """
        if (tokens is None) == (embeddings is None):
            raise UsageError("logits takes tokens or embeddings, one of them")
        if embeddings is not None:
            wide = self.config.table_dim or self.config.embed_dim
            if embeddings.ndim < 2 or embeddings.shape[-1] != wide:
                raise UsageError(
                    f"embeddings have shape {embeddings.shape}, expected [..., tokens, {wide}]"
                )
            rows = jnp.zeros(embeddings.shape[:-1], jnp.int32)
        else:
            rows = self._tokens(tokens)
        if params is None and embeddings is None:
            flat = rows.reshape(-1, rows.shape[-1])
            return self._logits(self._params, flat).reshape(*rows.shape, -1)
        look, weights = self._look(("logits",), None, params)
        return look(weights, rows, embeddings)["logits"]

    def run(
        self,
        tokens: Any,
        capture: str | Sequence[str] = ("logits",),
        edit: Edit | None = None,
        *,
        params: Params | None = None,
        max_bytes: int = MAX_CAPTURED_BYTES,
    ) -> Activations:
        """Returns activations of a forward over whole sequences, by name.

        Names are `input` (rows of the embedding), `embed` (what enters the first layer),
        `layers.N.attention_probs`, `layers.N.attention`, `layers.N.mlp` (what these add),
        `layers.N.resid` (the residual stream after the layer), `final` and `logits`; models with
        experts have `layers.N.expert_load`, too. `*` stands for anything. Activations are [..., T,
        features] for tokens [..., T], probabilities float32[..., heads, T, T].

        Args:
            tokens: text, or token ids int[..., T].
            capture: names or patterns of what to return.
            edit: name or pattern -> function of that activation; what it gives goes on. It is
                compiled anew at every call, since what the functions close over may have changed;
                put a loop's variable through `jax.jit` around `run`.
            params: in the tree of `llm.params`, in the place of these.
            max_bytes: captured activations take no more.

        Raises:
            UsageError: a name is none of this model's, or captured activations are larger than
                `max_bytes`, which is known before anything runs.
            ContextLengthError: a sequence is longer than the context.
        """
        names = (capture,) if isinstance(capture, str) else tuple(capture)
        rows = self._tokens(tokens)
        look, weights = self._look(names, edit, params)
        check_size(look.eval_shape(weights, rows), max_bytes)
        return Activations(look(weights, rows))

    def view_tokens(self, completion: Completion) -> TokenView:
        """Returns a completion's tokens, coloured by their log-probabilities.

        Raises:
            UsageError: it was generated without `logprobs`.
        """
        if completion.logprobs is None:
            raise UsageError("the completion has no log-probabilities; generate with logprobs=3")
        entries = completion.logprobs
        logprobs = [entry.logprob for entry in entries]
        tops = [entry.top for entry in entries]
        return TokenView.of(self.tokenizer, completion.token_ids, logprobs, tops)

    def view_attention(self, tokens: Any, layer: int = 0, head: int | None = None) -> AttentionView:
        """Returns a picture of attention in one layer: of all heads, or larger of one.

        Args:
            tokens: text, or token ids of one sequence.
        """
        rows = self._tokens(tokens)
        if rows.ndim != 1:
            raise UsageError(f"tokens have shape {rows.shape}; give those of one sequence")
        (probs,) = self.run(rows, f"layers.{layer}.attention_probs").values()
        heads = range(len(probs)) if head is None else [head]
        if head is not None and not 0 <= head < len(probs):
            raise UsageError(f"head={head} is none of this layer's; use 0 to {len(probs) - 1}")
        title = f"attention of layer {layer}" + ("" if head is None else f", head {head}")
        pieces = pieces_of(self.tokenizer, [int(token) for token in rows])
        return AttentionView(np.asarray(probs)[list(heads)], tuple(pieces), title)

    def card(self) -> Card:
        """Returns what this model is and what it takes of memory; a notebook draws it."""
        return card_of(self.program, self._params, self._layout, self._made)

    def __repr__(self) -> str:
        return repr(self.card())

    def _repr_html_(self) -> str:
        return self.card()._repr_html_()

    def _tokens(self, tokens: Any) -> Any:
        """Returns token ids int32[..., T] of text or of token ids, checked where they are known."""
        if isinstance(tokens, str):
            tokens = self.intake.encode(tokens)
        known = not isinstance(tokens, Tracer)
        try:
            tokens = np.asarray(tokens) if known else tokens
        except ValueError:
            tokens = np.zeros(0)
        if tokens.ndim == 0 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise UsageError(
                "tokens are text, or token ids as integers, in a list or in lists of one length, "
                f"at least one; not {tokens!r:.80}"
            )
        if tokens.shape[-1] > self.config.max_context_tokens:
            raise ContextLengthError(
                f"a sequence of {tokens.shape[-1]} tokens exceeds the context of "
                f"{self.config.max_context_tokens}; shorten it"
            )
        if known:
            self.intake.check_ids([int(token) for token in tokens.ravel()])
        return tokens.astype(np.int32)

    def _look(
        self, capture: tuple[str, ...], edit: Edit | None, params: Params | None
    ) -> tuple[Any, Params]:
        """Returns (a compiled look into the forward, the weights that it takes)."""
        if params is not None:
            check_views(self.program, params)
        stored = params is None
        weights = self._params if params is None else params
        if edit:  # what a function closes over may be another by the next call
            return jax.jit(inside(self.program, capture, edit, stored)), weights
        if (capture, stored) not in self._looks:
            self._looks[capture, stored] = jax.jit(inside(self.program, capture, None, stored))
        return self._looks[capture, stored], weights

    def _process_by(self, processor: Processor | None) -> None:
        """Makes the engine choose tokens by a processor.

        Raises:
            UsageError: requests that have another are under way, or it gives another shape.
        """
        if self._made is None and processor is None:
            return
        if processor is self.runner.processor:
            return
        if self.engine.busy:
            raise UsageError(
                "a request with another processor is under way; read its stream to the end first"
            )
        if processor is not None:
            check_processor(processor, self.config.vocab_size)
        self.runner.process_by(processor)

    def _request(self, prompt: Prompt, asked: SamplingParams, **fields: Any) -> Request:
        """Returns a request with every parameter decided; `fields` are others of `Request`."""
        request = self.intake.request(
            prompt, asked, id=f"request-{self._num_requests + 1}", **fields
        )
        self._num_requests += 1
        return request


def _per_prompt(
    sampling: SamplingParams | Sequence[SamplingParams] | None,
    fields: Mapping[str, Any],
    count: int,
) -> list[SamplingParams]:
    """Returns one SamplingParams per prompt."""
    if sampling is None:
        return [SamplingParams.create(**fields)] * count
    if fields:
        raise UsageError(
            f"sampling and the keyword {next(iter(fields))} are both given; use one of them"
        )
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if not all(isinstance(one, SamplingParams) for one in sampling):
        raise UsageError(
            f"sampling={sampling!r:.80} is no SamplingParams; give its fields as keywords, as in "
            "generate(prompt, temperature=0.7), or SamplingParams(temperature=0.7)"
        )
    if len(sampling) != count:
        raise UsageError(
            f"{len(sampling)} sampling parameters for {count} prompts; give one, or one for each"
        )
    return list(sampling)
