"""Measures the memory that parallel sampling and beam search save by sharing pages.

    python benchmarks/sharing.py --stdlib /usr/lib/python3.12     # the library it did not learn

Prompts are pieces of held-out modules. While a step is under way the pages that are held are
counted, and the pages that the same sequences would need if none were shared; the saving is the
share of the latter that sharing avoids, over all steps together, as in Kwon et al. 2023 (Efficient
Memory Management for Large Language Model Serving with PagedAttention), section 6.3.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxserve as js  # noqa: E402  (the repository's root comes first)
from benchmarks import machine  # noqa: E402
from jaxserve.checkpoint.locate import locate  # noqa: E402
from jaxserve.serving.engine import Engine  # noqa: E402
from jaxserve.serving.options import EngineOptions  # noqa: E402
from jaxserve.serving.request import Request, SamplingParams, TokenEvent  # noqa: E402
from jaxserve.training.corpus import read_corpus  # noqa: E402
from jaxserve.training.dataset import encode_documents  # noqa: E402

LENGTHS = ((19, 58), (161, 338), (500, 128), (1000, 128))
"""Tokens of prompt and output: the means of Alpaca and ShareGPT (Kwon et al. 2023, figure 11), and
what questions about a document might have."""
REQUESTS = 4
"""Requests of each kind, one after the other."""
SAMPLES = (2, 4, 8)
BEAMS = (2, 4, 6)


@dataclass
class Pages:
    """Pages summed over looks, and the most at a time; `look` alone writes it."""

    looks: int = 0
    held: int = 0
    unshared: int = 0
    most_held: int = 0
    most_unshared: int = 0

    def look(self, engine: Engine) -> None:
        """Adds what is held, if a step is under way; between two, beams are yet to fork."""
        stats = engine.metrics.scheduler
        if not stats.in_flight:
            return
        held, unshared = sum(stats.pages_held), sum(stats.page_references)
        self.looks += 1
        self.held += held
        self.unshared += unshared
        self.most_held = max(self.most_held, held)
        self.most_unshared = max(self.most_unshared, unshared)

    @property
    def saving(self) -> float:
        """Returns the share of unshared pages that were not needed."""
        return 1 - self.held / self.unshared


def main() -> None:
    """Measures, writes the result and prints it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stdlib", type=Path, help="default: that of the running Python")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    llm = js.load("tiny", engine=_engine_options(), show="silent")
    tokenizer = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
    text = encode_documents(read_corpus(options.stdlib).held_out, tokenizer).tolist()
    rows: list[dict[str, Any]] = []
    for way, widths in (("sampling", SAMPLES), ("beams", BEAMS)):
        for width in widths:
            for length, max_tokens in LENGTHS:
                prompts = _pieces(text, length)
                rows.append(_row(llm.engine, way, width, prompts, max_tokens))
                print(json.dumps(rows[-1]), file=sys.stderr)
    result = {
        "benchmark": "sharing",
        **machine.facts(),
        "model": "tiny",
        "page_tokens": _engine_options().page_size,
        "requests": REQUESTS,
        "rows": rows,
    }
    shown = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(shown + "\n")
    print(shown)


def _engine_options() -> EngineOptions:
    """Returns an engine in which a request's samples all run at once."""
    return EngineOptions(max_sequences=max(*SAMPLES, *BEAMS), prefix_cache=False)


def _pieces(text: list[int], length: int) -> list[tuple[int, ...]]:
    """Returns `REQUESTS` pieces that lie evenly in a text."""
    apart = len(text) // REQUESTS
    return [tuple(text[at * apart : at * apart + length]) for at in range(REQUESTS)]


def _row(
    engine: Engine, way: str, width: int, prompts: Sequence[tuple[int, ...]], max_tokens: int
) -> dict[str, Any]:
    """Returns the pages that requests take, each with `width` samples or beams."""
    began = time.perf_counter()
    failed: list[TokenEvent] = []

    def sink(event: TokenEvent) -> None:
        if event.finish_reason == "error":
            failed.append(event)

    pages = Pages()
    for index, prompt in enumerate(prompts):
        engine.submit(_request(f"{way}-{index}", prompt, way, width, max_tokens), sink)
        while engine.step():
            pages.look(engine)
    if failed:
        raise SystemExit(f"{way} {width} failed: {failed[0].error}")
    return {
        "way": way,
        "width": width,
        "prompt_tokens": len(prompts[0]),
        "output_tokens": max_tokens,
        **asdict(pages),
        "saving": round(pages.saving, 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _request(name: str, prompt: tuple[int, ...], way: str, width: int, max_tokens: int) -> Request:
    if way == "beams":
        params = SamplingParams(max_tokens=max_tokens, temperature=0, seed=0)
        return Request(id=name, prompt=prompt, params=params.resolved({}), beam_width=width)
    params = SamplingParams(max_tokens=max_tokens, n=width, temperature=1.0, seed=0)
    return Request(id=name, prompt=prompt, params=params.resolved({}))


if __name__ == "__main__":
    main()
