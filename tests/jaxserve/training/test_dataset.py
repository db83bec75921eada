from __future__ import annotations

import numpy as np

from jaxserve.training.corpus import Document
from jaxserve.training.dataset import Batches, encode_documents, evaluation_windows
from jaxserve.training.tokenizer import train_tokenizer


def test_documents_are_separated_and_the_stream_starts_and_ends_with_a_separator() -> None:
    tokenizer = train_tokenizer(["ab"], 300)
    stream = encode_documents([Document("a", "ab"), Document("b", "b")], tokenizer)
    pieces = [tokenizer.encode(text).ids for text in ("ab", "b")]
    assert stream.tolist() == [0, *pieces[0], 0, *pieces[1], 0]


def test_a_batch_depends_only_on_seed_and_step() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, batch=4, length=16, seed=3)
    batches[500]
    np.testing.assert_array_equal(batches[7], Batches(tokens, 4, 16, 3)[7])
    assert not np.array_equal(batches[7], Batches(tokens, 4, 16, 4)[7])


def test_an_epoch_shows_every_window_once() -> None:
    batches = Batches(np.arange(1000, dtype=np.uint16), batch=1, length=16, seed=0)
    windows = (999 // 16) - 1
    starts = [int(batches[step][0, 0]) for step in range(windows)]
    assert len(set(starts)) == windows
    assert len({start % 16 for start in starts}) == 1
    np.testing.assert_array_equal(batches[0][0], np.arange(starts[0], starts[0] + 17))


def test_evaluation_predicts_every_token_after_the_first_once() -> None:
    tokens = np.arange(1, 101, dtype=np.uint16)
    windows, counted = evaluation_windows(tokens, 16)
    assert windows[:, 1:][counted].tolist() == list(range(2, 101))
    assert windows[1].tolist() == list(range(17, 34))
