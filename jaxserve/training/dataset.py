"""Turns documents into token arrays, and cuts training batches and evaluation windows from them.

The stream is `<|endoftext|> document <|endoftext|> document <|endoftext|>`. The batch of a step is
a pure function of (seed, step): a resumed run sees what an unbroken run would have seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from jaxserve.training.corpus import Corpus, Document
from jaxserve.training.tokenizer import END_OF_TEXT

Tokens = NDArray[np.uint16]


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Tokens:
    """Returns uint16[N], the documents' tokens with a separator before, between and after them."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.asarray([separator], np.uint16)]
    for encoding in tokenizer.encode_batch([document.text for document in documents]):
        pieces.append(np.asarray([*encoding.ids, separator], np.uint16))
    return np.concatenate(pieces)


def write_arrays(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `train.npy` and `held_out.npy`, uint16 token streams."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "train.npy", encode_documents(corpus.train, tokenizer))
    np.save(folder / "held_out.npy", encode_documents(corpus.held_out, tokenizer))


@dataclass(frozen=True)
class Batches:
    """Training batches: each epoch cuts the stream into windows at a new offset, in a new order.

    Attributes:
        tokens: uint16[N], the training stream.
        batch: sequences B of a batch.
        length: predicted tokens L of a sequence.
        seed: decides offsets and orders.
    """

    tokens: Tokens
    batch: int
    length: int
    seed: int

    def __getitem__(self, step: int) -> NDArray[np.int32]:
        """Returns int32[B, L + 1], the batch of one step."""
        count = (self.tokens.size - 1) // self.length - 1
        rows = []
        for index in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(index, count)
            offset, order = _order(self.seed, self.length, epoch, count)
            start = offset + int(order[place]) * self.length
            rows.append(self.tokens[start : start + self.length + 1])
        return np.stack(rows).astype(np.int32)


@lru_cache(maxsize=4)
def _order(seed: int, length: int, epoch: int, count: int) -> tuple[int, NDArray[np.int64]]:
    """Returns (offset below `length`, permutation of `count` windows) of one epoch."""
    random = np.random.default_rng((seed, length, epoch))
    return int(random.integers(length)), random.permutation(count)


def evaluation_windows(tokens: Tokens, length: int) -> tuple[NDArray[np.int32], NDArray[np.bool]]:
    """Returns (int32[W, L + 1], bool[W, L] counted): every token after the first predicted once.

    Windows follow one another without overlap; the last is padded with zeros, not counted.
    """
    targets = tokens.size - 1
    count = -(-targets // length)
    padded = np.zeros(count * length + 1, np.int32)
    padded[: tokens.size] = tokens
    starts = np.arange(count)[:, None] * length
    counted = np.arange(count * length).reshape(count, length) < targets
    return padded[starts + np.arange(length + 1)], counted
