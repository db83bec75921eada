from __future__ import annotations

import numpy as np
import pytest

from jaxserve.errors import UsageError
from jaxserve.training.ngram import NgramModel


def stream(count: int, vocab_size: int, seed: int) -> np.ndarray:
    """Returns tokens of a chain in which a token mostly decides the next."""
    random = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(count - 1):
        follows = (tokens[-1] * 3 + 1) % vocab_size
        tokens.append(follows if random.random() < 0.8 else int(random.zipf(1.5)) % vocab_size)
    return np.asarray(tokens, np.uint16)


def test_every_distribution_sums_to_one() -> None:
    vocab_size = 50
    model = NgramModel.fit(stream(5000, vocab_size, 0), vocab_size)
    random = np.random.default_rng(1)
    contexts = [random.integers(vocab_size, size=n) for n in (0, 1, 2, 3, 4, 7) for _ in range(5)]
    seen = stream(40, vocab_size, 0)
    for context in [*contexts, seen[:4], seen[7:11]]:
        distribution = model.distribution(context)
        assert distribution.min() > 0
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)


def test_bigram_by_hand() -> None:
    # Too few tokens to estimate discounts, so every count gives up one half.
    model = NgramModel.fit(np.asarray([0, 1, 0, 1, 0, 2], np.int64), vocab_size=3, order=2)
    third = 1 / 3  # of the unigrams: each token follows exactly one other
    np.testing.assert_allclose(
        model.distribution(np.asarray([0], np.int64)),
        [third * third, 1.5 / 3 + third * third, 0.5 / 3 + third * third],
    )


def test_log_probs_are_those_of_the_distributions() -> None:
    vocab_size = 20
    model = NgramModel.fit(stream(2000, vocab_size, 0), vocab_size)
    tokens = stream(30, vocab_size, 5)
    expected = [
        np.log(model.distribution(tokens[max(0, i - 4) : i])[tokens[i]]) for i in range(1, 30)
    ]
    np.testing.assert_allclose(model.log_probs(tokens), expected)


def test_longer_contexts_help_where_tokens_decide_the_next() -> None:
    vocab_size = 50
    train, held_out = stream(20_000, vocab_size, 0), stream(2000, vocab_size, 1)
    loss = {
        order: -NgramModel.fit(train, vocab_size, order).log_probs(held_out).mean()
        for order in (1, 2, 5)
    }
    assert loss[2] < loss[1] - 0.5
    assert loss[5] < loss[2] + 0.1


def test_keys_that_overflow_are_refused() -> None:
    with pytest.raises(UsageError, match="63 bits"):
        NgramModel.fit(np.asarray([0, 1, 2], np.int64), vocab_size=2**16)
