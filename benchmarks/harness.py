"""Scores of lm-evaluation-harness through the completions route beside those of the library.

    JAXSERVE_PEER_LM_EVAL=~/peers/lm_eval/bin/python python benchmarks/harness.py

The harness scores choices by their log-likelihood after a prompt (`echo` and `logprobs`): here the
next line of modules that `tiny` never saw, among three lines of others. In this process the same
tokens are scored with `prompt_logprobs`. Both run the same engine, so they have to agree.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jaxserve as js  # noqa: E402  (the repository's root comes first)
from benchmarks import machine  # noqa: E402
from benchmarks.peers.servers import ServerProcess, free_port  # noqa: E402
from jaxserve.checkpoint.locate import locate  # noqa: E402
from jaxserve.training.corpus import read_corpus  # noqa: E402

VARIABLE = "JAXSERVE_PEER_LM_EVAL"
MODEL = "tiny"
CHOICES = 4
PROMPT_LINES = 12

Item = dict[str, Any]


def main() -> None:
    """Scores the items both ways and prints one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if VARIABLE not in os.environ:
        parser.error(f"{VARIABLE} is not set; see benchmarks/peers/README.md")
    items = make_items(options.items)
    theirs = through_the_server(os.environ[VARIABLE], items)
    ours = in_process(items)
    worst = max(
        abs(a - b)
        for one, other in zip(ours, theirs["log_likelihoods"], strict=True)
        for a, b in zip(one, other, strict=True)
    )
    result = {
        "benchmark": "harness",
        **machine.facts(),
        "model": MODEL,
        "lm_eval": theirs["version"],
        "items": len(items),
        "choices": CHOICES,
        "through_the_server": theirs["scores"],
        "in_process": scores(items, ours),
        "largest_difference_of_a_log_likelihood": worst,
    }
    text = json.dumps(result, indent=1)
    if options.out is not None:
        options.out.write_text(text + "\n")
    print(text)


def make_items(count: int) -> list[Item]:
    """Returns prompts of held-out modules with the line that follows and lines that do not."""
    rng = random.Random(0)
    modules = [document.text.splitlines() for document in read_corpus(None).held_out]
    lines = [line for module in modules for line in module if len(line.strip()) > 12]
    items: list[Item] = []
    while len(items) < count:
        module = rng.choice([m for m in modules if len(m) > 2 * PROMPT_LINES])
        at = rng.randrange(PROMPT_LINES, len(module))
        if len(module[at].strip()) <= 12:
            continue
        choices = [module[at], *rng.sample(lines, CHOICES - 1)]
        if len(set(choices)) < CHOICES:
            continue
        rng.shuffle(choices)
        prompt = "\n".join(module[at - PROMPT_LINES : at]) + "\n"
        items.append({"prompt": prompt, "choices": choices, "answer": choices.index(module[at])})
    return items


def through_the_server(python: str, items: list[Item]) -> dict[str, Any]:
    """Returns what the harness found with a server of the model."""
    port = free_port()
    command = [sys.executable, "-m", "jaxserve", "serve", "--model", MODEL, "--grpc-port", "-1"]
    log = ROOT / "build" / "harness.log"
    log.parent.mkdir(exist_ok=True)
    with (
        tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file,
        ServerProcess.start(
            "jaxserve",
            [*command, "--http-port", str(port)],
            log,
            {},
            url=f"http://127.0.0.1:{port}",
            ready_path="/health/ready",
        ) as server,
    ):
        file.write("\n".join(json.dumps(item) for item in items))
        file.flush()
        server.wait_ready()
        given = [server.url, MODEL, str(locate(MODEL)), file.name]
        done = subprocess.run(
            [python, "-m", "benchmarks.peers.lm_harness", *given],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)


def in_process(items: list[Item]) -> list[list[float]]:
    """Returns the log-likelihood of each choice after its prompt."""
    llm = js.load(MODEL, show="silent")
    assert llm.tokenizer is not None
    encode = llm.tokenizer.encode
    # As the harness parts prompt and choice: tokens of the whole, less those of the prompt.
    starts = [len(encode(item["prompt"])) for item in items for _ in item["choices"]]
    wholes = [encode(item["prompt"] + choice) for item in items for choice in item["choices"]]
    done = llm.generate(wholes, max_tokens=1, temperature=0, prompt_logprobs=0)
    found: list[float] = []
    for out, start in zip(done, starts, strict=True):
        # The first token has no log-probability.
        found.append(sum(one.logprob for one in out.prompt_logprobs[start - 1 :]))
    return [found[i : i + CHOICES] for i in range(0, len(found), CHOICES)]


def scores(items: list[Item], likelihoods: list[list[float]]) -> dict[str, float]:
    """Returns the share of items whose right choice is the likeliest, and so per character."""
    right = {"acc": 0, "acc_norm": 0}
    for item, row in zip(items, likelihoods, strict=True):
        by_length = [a / len(choice) for a, choice in zip(row, item["choices"], strict=True)]
        right["acc"] += max(range(CHOICES), key=row.__getitem__) == item["answer"]
        right["acc_norm"] += max(range(CHOICES), key=by_length.__getitem__) == item["answer"]
    return {name: count / len(items) for name, count in right.items()}


if __name__ == "__main__":
    main()
