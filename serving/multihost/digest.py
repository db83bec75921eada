"""What ranks compare to know that they compute the same."""

from __future__ import annotations

import array
import hashlib
from collections.abc import Sequence

DIGEST_BYTES = 8
EPOCH_BITS = 40


class TokenDigest:
    """A hash over the tokens of all plans since all was forgotten, for the `epoch`-th time."""

    def __init__(self, epoch: int = 0) -> None:
        self.epoch = epoch
        self._value = b""

    def place(self, number: int) -> int:
        """Returns the number of a plan over all epochs."""
        return self.epoch << EPOCH_BITS | number

    def add(self, number: int, tokens: Sequence[int]) -> tuple[int, bytes]:
        """Returns (number of the plan over all epochs, the hash with its tokens)."""
        data = array.array("q", (number, *tokens)).tobytes()
        self._value = hashlib.blake2b(self._value + data, digest_size=DIGEST_BYTES).digest()
        return self.place(number), self._value

    def next(self) -> TokenDigest:
        """Returns that of the next epoch."""
        return TokenDigest(self.epoch + 1)
