"""Which replica a prompt goes to, and how many there should be. Pure: Ray is not needed.

    known = Beginnings()
    parts = parts_of("You are helpful. ...")
    order = ranked(known.held(parts), {"a": Standing(free=0.5), "b": Standing(free=0.9)}, parts)
    known.note(parts, order[0])            # it has the prompt's beginning in its cache from now on

Nothing is asked of replicas for a request: what they hold is remembered from what they were sent,
and their memory is told about once a second.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

PART_BYTES = 64
"""Bytes of text, or sixteen token ids: about a page of the prefix cache."""
MOST_PARTS = 64
MOST_KNOWN = 1 << 16
LEAST_FREE = 0.1
"""Share of the pages below which a replica is crowded."""
BURST = 8
"""So many more requests than another a replica may have under way for the sake of its cache."""
FULL_KV = 0.8
"""Share of the pages that replicas should have in use."""


class Standing(NamedTuple):
    """How a replica stands.

    Attributes:
        free: share of its pages; what only the prefix cache holds is free.
        waiting: requests at it without a slot.
        under_way: requests that were sent to it and have not ended, as far as the sender knows.
    """

    free: float = 1.0
    waiting: int = 0
    under_way: int = 0


def parts_of(prompt: str | Sequence[int]) -> list[bytes]:
    """Returns digests of a prompt's beginnings, each a part longer than the one before.

    What is no prompt has none.
    """
    if isinstance(prompt, str):
        data = prompt[: PART_BYTES * MOST_PARTS].encode(errors="surrogatepass")
    else:
        try:
            data = array("i", prompt[: PART_BYTES // 4 * MOST_PARTS]).tobytes()
        except (TypeError, OverflowError):  # no token ids: the replica says so
            return []
    last = b""
    found: list[bytes] = []
    whole = min(len(data) // PART_BYTES, MOST_PARTS)
    for at in range(0, whole * PART_BYTES, PART_BYTES):
        last = blake2b(last + data[at : at + PART_BYTES], digest_size=8).digest()
        found.append(last)
    return found


def part_of_session(session: str) -> list[bytes]:
    """Returns what stands for a prompt that the router cannot read, but for its session."""
    return [blake2b(session.encode(), digest_size=8, person=b"session").digest()]


class Beginnings:
    """Which replicas were sent prompts of which beginnings; one router writes it."""

    def __init__(self, most: int = MOST_KNOWN) -> None:
        self._most = most
        self._names: OrderedDict[bytes, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def held(self, parts: Sequence[bytes]) -> dict[str, int]:
        """Returns how many parts of a prompt's beginning each replica probably holds."""
        found: dict[str, int] = {}
        for length, part in enumerate(parts, 1):
            names = self._names.get(part)
            if names is None:
                break
            found.update(dict.fromkeys(names, length))
        return found

    def note(self, parts: Sequence[bytes], name: str) -> None:
        """Remembers that a replica was sent a prompt; the longest unused ones are forgotten."""
        for part in reversed(parts):  # the shortest is the latest, and forgotten last
            self._names.setdefault(part, set()).add(name)
            self._names.move_to_end(part)
        while len(self._names) > self._most:
            self._names.popitem(last=False)

    def forget(self, name: str) -> None:
        """Forgets a replica that is gone."""
        for part, names in list(self._names.items()):
            names.discard(name)
            if not names:
                del self._names[part]


def ranked(
    held: Mapping[str, int], standings: Mapping[str, Standing], parts: Sequence[bytes] = ()
) -> list[str]:
    """Returns replicas by name, in the order in which a prompt is offered to them.

    Crowded ones are last: those that are short of pages, let requests wait, or have many more
    under way than another. Then the longest beginning in the cache counts, then free pages to a
    tenth, then what is under way; among equals the beginning draws, the same for every router.

    Args:
        held: of a replica, the parts of the prompt that it holds.
        parts: of the prompt.
    """
    least = min((standing.under_way for standing in standings.values()), default=0)
    start = parts[0] if parts else b""

    def key(name: str) -> tuple[bool, int, float, int, bytes]:
        free, waiting, under_way = standings[name]
        crowded = free < LEAST_FREE or waiting > 0 or under_way > least + BURST
        return crowded, -held.get(name, 0), -round(free, 1), under_way, _draw(start, name)

    return sorted(standings, key=key)


def _draw(start: bytes, name: str) -> bytes:
    return blake2b(start + name.encode(), digest_size=8).digest()


def wanted_replicas(
    current: int, requests: float, requests_each: float, kv_uses: Sequence[float]
) -> float:
    """Returns how many replicas there should be, by what is scarcer: slots or pages.

    Args:
        current: how many there are.
        requests: under way and waiting, at all of them.
        requests_each: how many of them each should have.
        kv_uses: of each replica the share of its pages that is in use.
    """
    by_requests = requests / requests_each
    used = sum(kv_uses) / len(kv_uses) if kv_uses else 0.0
    return max(by_requests, current * used / FULL_KV)
