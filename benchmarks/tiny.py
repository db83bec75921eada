"""Measures the embedded models and writes their model cards.

    python benchmarks/tiny.py --stdlib /usr/lib/python3.12      # the library that they learnt from

Held-out loss of the shipped weights beside that of an interpolated 5-gram model on the same
tokens, and one completion for each held-out module: its beginning up to the first function with a
body, at the model's own sampling defaults and the module's number as seed. Nothing is picked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxserve as js  # noqa: E402  (the repository's root comes first)
from benchmarks import machine  # noqa: E402
from jaxserve.checkpoint import inspect, load_params  # noqa: E402
from jaxserve.checkpoint.locate import locate  # noqa: E402
from jaxserve.training.corpus import Corpus, Document, read_corpus  # noqa: E402
from jaxserve.training.dataset import encode_documents  # noqa: E402
from jaxserve.training.ngram import NgramModel  # noqa: E402
from jaxserve.training.objective import held_out_loss  # noqa: E402
from jaxserve.training.shapes import TINY, TINY_DRAFT, Shape  # noqa: E402
from jaxserve.training.trainer import training_model  # noqa: E402

WINDOWS = (256, 2048)
COMPLETION_TOKENS = 64
PROMPT_LINES = 24
TRAINING = {
    "tiny": """\
python -m jaxserve.training.tiny --out tiny --steps 2200 --decay-steps 400 --long-steps 80
python -m jaxserve.training.tiny --out tiny --resume --steps 2420 --decay-steps 220 \\
    --long-steps 220""",
    "tiny-draft": """\
python -m jaxserve.training.tiny --draft --data tiny/data --out draft --steps 1000 \\
    --decay-steps 400 --long-steps 150
python -m jaxserve.training.tiny --draft --data tiny/data --out draft --resume --steps 1130 \\
    --decay-steps 130 --long-steps 130""",
}
"""How the shipped weights were made."""

FUNCTION = re.compile(r"^ *def \w+\(.*\).*:$")


def main() -> None:
    """Measures both models and writes cards and result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stdlib", type=Path, help="default: that of the running Python")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/tiny.json")
    options = parser.parse_args()
    corpus = read_corpus(options.stdlib)
    tokenizer = Tokenizer.from_file(str(locate("tiny") / "tokenizer.json"))
    train = encode_documents(corpus.train, tokenizer)
    held_out = encode_documents(corpus.held_out, tokenizer)
    baseline = NgramModel.fit(train, TINY.config().vocab_size)
    result: dict[str, Any] = {
        "benchmark": "tiny",
        **machine.facts(),
        "training_tokens_in_corpus": int(train.size),
        "held_out_tokens": int(held_out.size),
        "held_out_bytes": sum(len(d.text.encode()) for d in corpus.held_out),
        "five_gram_nats_per_token": round(-float(baseline.log_probs(held_out).mean()), 4),
        "models": {},
    }
    for shape in (TINY, TINY_DRAFT):
        losses = _losses(shape, held_out)
        result["models"][shape.name] = losses
        card = locate(shape.name) / "README.md"
        card.write_text(_card(shape, result, _completions(shape.name, corpus)))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _losses(shape: Shape, held_out: Any) -> dict[str, Any]:
    """Returns parameters and held-out nats per token by window length."""
    info = inspect(locate(shape.name))
    model = training_model(shape)
    params = load_params(info, model)
    facts: dict[str, Any] = {"parameters": info.num_parameters}
    for length in WINDOWS:
        loss = held_out_loss(model, params, np.asarray(held_out), length)
        facts[f"nats_per_token_window_{length}"] = round(loss, 4)
    return facts


def _completions(name: str, corpus: Corpus) -> list[tuple[Document, str, str]]:
    """Returns (module, prompt, completion) for every held-out module that has a function."""
    llm = js.load(name, show="silent")
    out = []
    for number, document in enumerate(corpus.held_out):
        prompt = _beginning(document.text)
        done = llm.generate(prompt, max_tokens=COMPLETION_TOKENS, seed=number)
        out.append((document, prompt, done.text))
    return out


def _beginning(text: str) -> str:
    """Returns the lines before and with the first one-line function signature."""
    lines = text.splitlines()
    for index, line in enumerate(lines):
        if FUNCTION.match(line):
            return "\n".join(lines[max(0, index - PROMPT_LINES) : index + 1])
    return "\n".join(lines[:PROMPT_LINES])


def _card(shape: Shape, result: dict[str, Any], samples: list[tuple[Document, str, str]]) -> str:
    """Returns the model card."""
    own = result["models"][shape.name]
    long, short = (own[f"nats_per_token_window_{length}"] for length in reversed(WINDOWS))
    five = result["five_gram_nats_per_token"]
    draft = " --draft" if shape is TINY_DRAFT else ""
    bits = long * result["held_out_tokens"] / result["held_out_bytes"] / np.log(2)
    head = f"""# {shape.name}

A language model of {own["parameters"]:,} parameters that completes Python code. It ships with
jaxserve so that first use, tests, quantisation and speculation are measured on a real
distribution. It is far too small to rely on for anything else.

| | |
|---|---|
| architecture | Llama: {shape.num_layers} layers, width {shape.embed_dim}, \
{shape.num_heads} heads and {shape.num_kv_heads} KV heads of {shape.head_dim}, \
SwiGLU {shape.ffn_dim}, RoPE, tied embeddings |
| tokenizer | byte-level BPE, {shape.config().vocab_size} tokens |
| context | {shape.config().max_context_tokens} tokens; the last training phase had that length |
| weights | bfloat16 safetensors, loadable by jaxserve and by Hugging Face transformers |
| corpus | sources of the Python 3.12 standard library without its tests, and the pydoc topics: \
{result["training_tokens_in_corpus"]:,} tokens |
| held out | {len(samples)} modules, {result["held_out_tokens"]:,} tokens, never seen by model or \
tokenizer; named in `jaxserve/training/corpus.py` |
| licence | weights Apache-2.0; the corpus is under the Python Software Foundation licence |

## Held-out loss

Measured on {result["date"]} with `python benchmarks/tiny.py`, on the shipped weights, nats per
token:

| model | loss |
|---|---|
| {shape.name}, windows of {WINDOWS[1]} tokens | {long:.4f} ({bits:.3f} bits per byte) |
| {shape.name}, windows of {WINDOWS[0]} tokens | {short:.4f} |
| interpolated 5-gram (modified Kneser-Ney) on the same tokens | {five:.4f} |

## Reproducing it

Trained with these commands (resumable; hours on a laptop, minutes on an accelerator):

```text
{TRAINING[shape.name]}
```

`python -m jaxserve.training.export{draft}` writes this folder, `python benchmarks/tiny.py` measures
it and writes this page.

## {len(samples)} completions, not picked

One for each held-out module: its beginning up to the first function, completed with
{COMPLETION_TOKENS} tokens at the model's sampling defaults, the module's number as seed. Shown are
the signature and, after the marker `#>`, the completion.
"""
    parts = [head]
    for document, prompt, completion in samples:
        signature = prompt.rsplit("\n", 1)[-1]
        shown = completion.replace("```", "'''").strip("\n").rstrip()
        parts.append(f"\n`{document.name}`\n\n```text\n{signature}\n#>\n{shown}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    main()
