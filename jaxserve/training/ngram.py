"""The baseline that the embedded model has to beat: an interpolated 5-gram model.

    model = NgramModel.fit(train_tokens, vocab_size=2048)
    -model.log_probs(held_out_tokens).mean()          # nats per token

Modified Kneser-Ney smoothing, every order interpolated with the next lower one down to the uniform
distribution, three discounts per order estimated from the training counts: the strongest of the
standard n-gram models (Chen and Goodman 1999, sections 3 and 5). Document separators are ordinary
tokens, for the baseline as for the neural model.

    python -m jaxserve.training.ngram --data DIR      # DIR with train.npy and held_out.npy
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from jaxserve.errors import UsageError
from jaxserve.training.shapes import VOCAB_SIZE

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """Interpolation of one order: p(w | h) = discounted(h w) + backoff(h) p(w | h shortened).

    Attributes:
        grams: int64[G], sorted keys of the seen n-grams.
        discounted: float64[G], max(count - discount, 0) / total count of the context.
        contexts: int64[C], sorted keys of their contexts.
        backoff: float64[C], mass left to the lower order.
    """

    grams: Keys
    discounted: Floats
    contexts: Keys
    backoff: Floats


@dataclass(frozen=True)
class NgramModel:
    """An interpolated n-gram model over a fixed vocabulary."""

    vocab_size: int
    orders: tuple[_Order, ...]

    @classmethod
    def fit(cls, tokens: NDArray[np.integer], vocab_size: int, order: int = 5) -> Self:
        """Returns the model of the n-grams of `tokens`.

        Args:
            tokens: integer[N], the training stream.

        Raises:
            UsageError: an n-gram does not fit a 63-bit key.
        """
        if vocab_size**order >= 2**63:
            raise UsageError(
                f"vocab_size={vocab_size} to the power order={order} exceeds 63 bits; lower either"
            )
        grams, counts = np.unique(_keys(tokens, order, vocab_size), return_counts=True)
        orders = [_interpolation(grams, counts, vocab_size)]
        for size in range(order - 1, 0, -1):
            # A lower order counts in how many different contexts an n-gram was continued.
            grams, counts = np.unique(grams % vocab_size**size, return_counts=True)
            orders.insert(0, _interpolation(grams, counts, vocab_size))
        return cls(vocab_size, tuple(orders))

    def log_probs(self, tokens: NDArray[np.integer]) -> Floats:
        """Returns float64[N - 1]: log p of each token after the first given those before it."""
        probability = np.full(tokens.size, 1.0 / self.vocab_size)
        for size, order in enumerate(self.orders, start=1):
            keys = _keys(tokens, size, self.vocab_size)
            probability[size - 1 :] = _mixed(order, keys, self.vocab_size, probability[size - 1 :])
        return np.log(probability[1:])

    def distribution(self, context: NDArray[np.integer]) -> Floats:
        """Returns float64[V], the probabilities of the token after `context`."""
        words = np.arange(self.vocab_size, dtype=np.int64)
        probability = np.full(self.vocab_size, 1.0 / self.vocab_size)
        for size, order in enumerate(self.orders, start=1):
            if size - 1 > context.size:
                break
            history = 0
            for token in context[context.size - (size - 1) :]:
                history = history * self.vocab_size + int(token)
            keys = history * self.vocab_size + words
            probability = _mixed(order, keys, self.vocab_size, probability)
        return probability


def _keys(tokens: NDArray[np.integer], size: int, vocab_size: int) -> Keys:
    """Returns int64[N - size + 1]: each run of `size` tokens as one number, last token lowest."""
    count = tokens.size - size + 1
    keys = np.zeros(count, np.int64)
    for shift in range(size):
        keys = keys * vocab_size + tokens[shift : shift + count]
    return keys


def _interpolation(grams: Keys, counts: NDArray[np.int64], vocab_size: int) -> _Order:
    """Returns the discounted probabilities and left-over masses of one order."""
    discount = _discounts(counts)[np.minimum(counts, 3)]
    contexts, place = np.unique(grams // vocab_size, return_inverse=True)
    total = np.bincount(place, weights=counts)
    left = np.bincount(place, weights=discount)
    return _Order(grams, (counts - discount) / total[place], contexts, left / total)


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """Returns float64[4]: what n-grams seen 0, 1, 2, and 3 or more times give up.

    Where the counts of counts allow no estimate (tiny corpora) absolute discounting by 0.5 stays.
    """
    seen = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    n1, n2, n3, n4 = seen[1:5]
    if min(n1, n2, n3, n4) == 0:
        return np.asarray([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    discounts = np.asarray([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(discounts, 0.0, [0, 1, 2, 3])


def _mixed(order: _Order, keys: Keys, vocab_size: int, lower: Floats) -> Floats:
    """Returns the probabilities of one order for `keys`, given those of the order below."""
    backoff = _looked_up(order.contexts, order.backoff, keys // vocab_size, missing=1.0)
    return _looked_up(order.grams, order.discounted, keys, missing=0.0) + backoff * lower


def _looked_up(known: Keys, values: Floats, keys: Keys, missing: float) -> Floats:
    place = np.minimum(np.searchsorted(known, keys), known.size - 1)
    return np.where(known[place] == keys, values[place], missing)


def main(arguments: list[str] | None = None) -> None:
    """Prints the held-out loss of the baseline as one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m jaxserve.training.ngram")
    parser.add_argument("--data", type=Path, required=True, help="train.npy and held_out.npy")
    parser.add_argument("--order", type=int, default=5)
    options = parser.parse_args(arguments)
    train, held_out = np.load(options.data / "train.npy"), np.load(options.data / "held_out.npy")
    model = NgramModel.fit(train, VOCAB_SIZE, options.order)
    loss = -float(model.log_probs(held_out).mean())
    result = {"order": options.order, "tokens": held_out.size - 1, "nats_per_token": loss}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
