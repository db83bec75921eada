"""Line-JSON protocol between a benchmark and a peer engine, standard library only.

A peer runs in its own Python. It reads one JSON command a line from standard input and answers each
with one JSON line:

    {"op": "load", "model": "DIR", "threads": 2}
    {"seconds": 1.9, "engine": "llama.cpp", "version": "...", "settings": "...", "threads": 2}

    {"op": "prefill", "batch": 1, "tokens": 128}
    {"seconds": 0.08, "tokens": 128, "output": [917]}

    {"op": "decode", "batch": 8, "prompt": 128, "tokens": 64}
    {"seconds": 3.1, "tokens": 512, "output": [917, 40, 12, ...]}

    {"op": "trace", "prompts": [[5, 9], [7]], "outputs": [30, 4], "batch": 8}
    {"seconds": 2.4, "tokens": 34, "output": [917, 40, 12, ...]}

`prefill` and `decode` take an optional `"seed"` (0) that chooses the prompts. `trace` hands over
all its requests at once, each with the number of tokens that it is to generate; an engine that
forms batches before it starts takes `"batch"` requests into each. A command that fails
answers `{"error": "..."}` and the worker lives on; end of input ends it. Standard output carries
nothing but these answers: whatever the engine prints itself goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol, TextIO, cast


@dataclasses.dataclass(frozen=True)
class Sample:
    """One timed call.

    seconds: wall time.
    tokens: prompt tokens read (prefill), tokens generated after the first of each sequence (decode)
        or tokens generated that were asked for (trace), all sequences together;
        `tokens / seconds` is the throughput.
    output: ids generated for the first sequence, its first token included, to compare engines.
    extra: further figures of the engine's own.
    """

    seconds: float
    tokens: int
    output: list[int]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TraceTask:
    """Requests that are all there at the start.

    prompts: ids of each.
    outputs: tokens each is to get.
    batch: requests of one static batch; engines that batch anew at every step have no use for it.
    """

    prompts: list[list[int]]
    outputs: list[int]
    batch: int | None = None


class Engine(Protocol):
    """What a peer implements; `serve` does the rest."""

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        """Loads the checkpoint for `threads` CPU threads.

        Returns `seconds`, `engine`, `version`, `threads` and the settings worth reporting.
        """

    def prefill(self, prompts: list[list[int]]) -> Sample:
        """Times reading all prompts and choosing one token for each."""

    def decode(self, prompts: list[list[int]], tokens: int) -> Sample:
        """Times `tokens` greedy tokens for each prompt, those after its first, prefill excluded.

        End-of-text does not end a sequence.
        """


class TraceEngine(Protocol):
    """What a peer implements that answers `trace`, beside the commands of `Engine` or alone."""

    def load(self, model: Path, threads: int) -> dict[str, Any]:
        """As `Engine.load`."""

    def trace(self, task: TraceTask) -> Sample:
        """Times all requests of a trace, greedy, from handing them over to the last token.

        End-of-text does not end a sequence.
        """


def random_prompts(batch: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Returns `batch` distinct prompts of `length` uniform ids, fixed by the arguments."""
    source = random.Random(f"{seed}/{batch}/{length}")
    return [[source.randrange(3, vocab_size) for _ in range(length)] for _ in range(batch)]


def vocab_size(model: Path) -> int:
    """Returns the vocabulary size from the checkpoint's config.json."""
    return json.loads((model / "config.json").read_text())["vocab_size"]


def serve(engine: Engine | TraceEngine) -> None:
    """Answers commands from standard input until it ends."""
    answers = _claim_stdout()
    vocab = 0
    for line in sys.stdin:
        try:
            command = json.loads(line)
            if command["op"] == "load":
                vocab = vocab_size(Path(command["model"]))
            answer = _answer(engine, command, vocab)
        except Exception as error:  # the parent decides what a failed measurement means
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(engine: Engine | TraceEngine, command: dict[str, Any], vocab: int) -> dict[str, Any]:
    """Returns the answer to one command."""
    match command:
        case {"op": "load", "model": model, "threads": threads}:
            return engine.load(Path(model), threads)
        case {"op": "prefill", "batch": batch, "tokens": tokens}:
            prompts = random_prompts(batch, tokens, vocab, command.get("seed", 0))
            return dataclasses.asdict(cast(Engine, engine).prefill(prompts))
        case {"op": "decode", "batch": batch, "prompt": prompt, "tokens": tokens}:
            prompts = random_prompts(batch, prompt, vocab, command.get("seed", 0))
            return dataclasses.asdict(cast(Engine, engine).decode(prompts, tokens))
        case {"op": "trace", "prompts": prompts, "outputs": outputs}:
            task = TraceTask(prompts, outputs, command.get("batch"))
            return dataclasses.asdict(cast(TraceEngine, engine).trace(task))
    raise ValueError(f"{command!r} is no command; see the examples at the top of protocol.py")


def _claim_stdout() -> TextIO:
    """Returns a private writer on standard output and points file descriptor 1 at standard error.

    Native code prints past `sys.stdout`, so the descriptor itself moves.
    """
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers
