"""Trains the embedded model: `python -m jaxserve.training.tiny --out DIR`.

    python -m jaxserve.training.tiny --out tiny                      # tokenizer, arrays, training
    python -m jaxserve.training.tiny --out tiny --resume --steps 4000    # go on, to another end
    python -m jaxserve.training.tiny --out draft --data tiny/data --draft

`DIR/data` holds the tokenizer and the token arrays, `DIR/checkpoints` the Orbax checkpoints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxserve.errors import JaxserveError, UsageError
from jaxserve.training.corpus import read_corpus
from jaxserve.training.dataset import write_arrays
from jaxserve.training.objective import held_out_loss
from jaxserve.training.schedule import Plan
from jaxserve.training.shapes import TINY, TINY_DRAFT, VOCAB_SIZE
from jaxserve.training.tokenizer import MAX_TOKENS, train_tokenizer, write_tokenizer
from jaxserve.training.trainer import Trainer, training_model


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code of the command."""
    options = _parser().parse_args(arguments)
    try:
        _train(options)
    except JaxserveError as error:
        _say(f"error: {error}")
        return error.exit_code
    return 0


def prepare(folder: Path, stdlib: Path | None) -> None:
    """Writes the tokenizer and the token arrays into `folder`, unless they are there."""
    if (folder / "held_out.npy").is_file():
        return
    corpus = read_corpus(stdlib)
    tokenizer: Tokenizer = train_tokenizer((d.text for d in corpus.train), VOCAB_SIZE)
    write_tokenizer(tokenizer, folder)
    write_arrays(corpus, tokenizer, folder)


def _train(options: argparse.Namespace) -> None:
    shape = TINY_DRAFT if options.draft else TINY
    checkpoints = options.out / "checkpoints"
    if checkpoints.is_dir() and any(checkpoints.iterdir()) and not options.resume:
        raise UsageError(f"{checkpoints} holds checkpoints; pass --resume or another --out")
    data = options.data or options.out / "data"
    prepare(data, options.stdlib)
    train, held_out = np.load(data / "train.npy"), np.load(data / "held_out.npy")
    _say(f"{shape.name}: {train.size} training tokens, {held_out.size} held out")
    plan = Plan(
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        decay_steps=options.decay_steps,
        long_steps=options.long_steps,
        batch_tokens=options.batch_tokens,
        short_tokens=options.short_tokens,
        long_tokens=MAX_TOKENS,
    )
    trainer = Trainer(shape, plan, train, held_out, options.seed, checkpoints, _say)
    state = trainer.run(trainer.restored())
    if state.step < plan.steps:
        _say(f"ended at step {state.step} of {plan.steps}; go on with --resume")
        return
    for length in (plan.short_tokens, MAX_TOKENS):
        value = held_out_loss(training_model(shape), state.params, held_out, length)
        _say(f"held-out loss {value:.4f} nats per token, windows of {length} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jaxserve.training.tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder of data and checkpoints")
    parser.add_argument("--data", type=Path, help="tokenizer and arrays; default OUT/data")
    parser.add_argument("--stdlib", type=Path, help="Python library; default this Python's")
    parser.add_argument("--draft", action="store_true", help="train the 1M-parameter draft model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--warmup-steps", type=int, default=50)
    parser.add_argument("--decay-steps", type=int, default=700)
    parser.add_argument("--long-steps", type=int, default=60, help="last steps, at full context")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--short-tokens", type=int, default=256)
    return parser


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
