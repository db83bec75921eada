"""The notebook face: load a model, generate, look at it.

import jaxserve as js

llm = js.load("tiny")
llm.generate("def area(", max_tokens=32).text
for piece in llm.stream("import ", max_tokens=32, temperature=0):
    print(piece, end="")
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import msgspec
import numpy as np
from jax import Array

from jaxserve.checkpoint import GenerationDefaults, inspect, load_params
from jaxserve.checkpoint.locate import locate
from jaxserve.compile_cache import enable as enable_compile_cache
from jaxserve.config import ModelConfig, StreamingCache
from jaxserve.errors import QueueFullError, UsageError
from jaxserve.layers.decoder import Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.devices import use_devices
from jaxserve.partitioning.layout_file import Layout, choose
from jaxserve.partitioning.picture import LayoutView
from jaxserve.partitioning.plan import MeshPlan
from jaxserve.progress import Show, Unit, reporter
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.completion import CompletionBuilder
from jaxserve.serving.engine import Engine
from jaxserve.serving.intake import Intake, Prompt
from jaxserve.serving.model_files import has_tokenizer, kv_rounding, quantization, run_dtype
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.placing import placed, places_of, program_of, sized, spread_logits
from jaxserve.serving.request import Completion, Request, SamplingParams, TokenEvent
from jaxserve.serving.runner import CompileReport, ModelRunner
from jaxserve.serving.views import views
from jaxserve.tokenizer import Tokenizer

Message = Mapping[str, str]

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
        backend: kernels to run: "xla", "tpu" or "reference".
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
        on_compile=None if show is Show.SILENT else _print_compiled,
    )


class LLM:
    """A model with weights in memory. Use it from one thread at a time.

    Args:
        config: the architecture.
        params: weights in the tree of `Model(config, declare).abstract_params()`.
        tokenizer: None leaves token ids as the only way in and out.
        declare: how `params` are stored.
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
        declare = Declare() if declare is None else declare
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

    @property
    def params(self) -> Params:
        """Returns the weights as a tree of arrays.

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
            UsageError: their tree or shapes differ, or requests are under way.
        """
        params = placed(self.program, params)
        if self._made is not None:
            self._made.update(params)
        self._params = params

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **fields: Any,
    ) -> Any:
        """Returns the completion of a prompt, or a list of them for a list of prompts.

        A flat list of ints is one prompt of token ids. With n > 1 a prompt's result is itself a
        list, of n completions.

        Args:
            sampling: one for all prompts, or one per prompt; or its fields as keywords.

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
        results: list[Any] = []
        for done in _Batch(self, requests).run():
            results.append(done[0] if len(done) == 1 else done)
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **fields: Any
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
        return TextStream(self, self._request(prompt, params))

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
        (done,) = _Batch(self, [request]).run()
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

    def logits(self, token_ids: Any) -> Array:
        """Returns float32[..., T, V], the scores after each of the tokens int[..., T]."""
        try:
            tokens = np.asarray(token_ids)
        except ValueError:
            tokens = np.zeros(0)
        if tokens.ndim == 0 or tokens.size == 0 or tokens.dtype.kind not in "iu":
            raise UsageError(
                "logits takes token ids as integers, in a list or in lists of one length, at "
                f"least one; not {token_ids!r:.80}"
            )
        self.intake.check_ids([int(token) for token in tokens.ravel()])
        rows = tokens.reshape(-1, tokens.shape[-1]).astype(np.int32)
        out = self._logits(self._params, rows)
        return out.reshape(*tokens.shape, -1)

    def _request(self, prompt: Prompt, asked: SamplingParams, **fields: Any) -> Request:
        """Returns a request with every parameter decided; `fields` are others of `Request`."""
        request = self.intake.request(
            prompt, asked, id=f"request-{self._num_requests + 1}", **fields
        )
        self._num_requests += 1
        return request


class _Batch:
    """Requests that run together, and the completions that come of them."""

    def __init__(self, llm: LLM, requests: Sequence[Request]) -> None:
        self._engine = llm.engine
        self._requests = requests
        self._waiting = deque(requests)
        self._builders = {
            request.id: [
                CompletionBuilder(llm.tokenizer, request)
                for _ in range(max(request.params.n, request.beam_width))
            ]
            for request in requests
        }
        self._num_running = sum(map(len, self._builders.values()))

    def run(self) -> list[list[Completion]]:
        """Returns the completions of each request, in order."""
        try:
            while self._num_running:
                self._submit()
                self._engine.step()
        except BaseException:  # Ctrl-C, too, leaves the engine free for others
            for request in self._requests:
                self._engine.abort(request.id)
            while self._engine.step():
                pass
            raise
        return [
            [builder.completion() for builder in self._builders[request.id]]
            for request in self._requests
        ]

    def _submit(self) -> None:
        """Hands the engine as many requests as its queue takes."""
        while self._waiting:
            try:
                self._engine.submit(self._waiting[0], self._push)
            except QueueFullError:
                return
            self._waiting.popleft()

    def _push(self, event: TokenEvent) -> None:
        """Takes the events of all requests."""
        builder = self._builders[event.request_id][event.sample_index]
        if builder.finish_reason is not None:
            return
        builder.push(event)
        if builder.finish_reason is not None:
            self._num_running -= 1
            if event.finish_reason is None:
                self._engine.finish(event.request_id, event.sample_index, builder.num_drawn)


class TextStream:
    """The pieces of one completion, as they come; see `LLM.stream`.

    Dropping it before its end ends the request, as `close` and leaving a `with` block do.
    """

    def __init__(self, llm: LLM, request: Request) -> None:
        # The engine keeps the reading, which knows neither this nor its iterator: so both are
        # gone, and the request is over, as soon as nobody reads.
        self._reading = _Reading(llm, request)
        self._iterator = self._reading.pieces()

    @property
    def first_token_at(self) -> float:
        """Returns time.perf_counter() when the first token was there; 0 before."""
        return self._reading.first_token_at

    @property
    def completion(self) -> Completion:
        """Returns the whole completion, once the stream is exhausted or closed."""
        builder = self._reading.builder
        if builder.finish_reason is None:
            raise UsageError("the stream still runs; read it to its end first")
        return builder.completion()

    def close(self) -> None:
        """Ends the request if it is not over; its completion then ends with "abort"."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return self._iterator

    def __next__(self) -> str:
        return next(self._iterator)


class _Reading:
    """What has come of a streamed request; the engine writes it, through `_push`."""

    def __init__(self, llm: LLM, request: Request) -> None:
        self._engine = llm.engine
        self._request = request
        self._ready: deque[str] = deque()
        self.builder = CompletionBuilder(llm.tokenizer, request)
        self.first_token_at = 0.0

    def pieces(self) -> Generator[str, None, None]:
        """Returns an iterator over the pieces, which runs the engine; closing it ends the request.

        It holds this object, and must not be held by it.
        """
        self._engine.submit(self._request, self._push)
        try:
            while self.builder.finish_reason is None or self._ready:
                while self._ready:
                    yield self._ready.popleft()
                if self.builder.finish_reason is None:
                    self._engine.step()
        finally:
            if self.builder.finish_reason is None:  # nobody reads on
                self._engine.abort(self._request.id)
                if not self._engine.watch.busy:  # else garbage collected in the midst of a step
                    self._engine.step()
        _ = self.builder.completion()  # a failed request raises its cause

    def _push(self, event: TokenEvent) -> None:
        self.first_token_at = self.first_token_at or time.perf_counter()
        if self.builder.finish_reason is not None:
            return
        if piece := self.builder.push(event):
            self._ready.append(piece)
        if self.builder.finish_reason is not None and event.finish_reason is None:
            self._engine.finish(self._request.id, 0, self.builder.num_drawn)


def is_single(prompts: Any) -> bool:
    """Returns whether `prompts` is one prompt: a string, or a flat list of ints."""
    return isinstance(prompts, str) or (
        len(prompts) > 0 and all(isinstance(item, int | np.integer) for item in prompts)
    )


def _print_compiled(what: str, seconds: float) -> None:
    sys.stderr.write(f"compiled {what} in {seconds:.1f} s\n")


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
