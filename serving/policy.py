"""In which order waiting requests start.

    policy = make_policy("fair", {"batch": 0.5})
    policy.push(sequence)
    policy.head()          # who starts next, or None
    policy.pop()           # takes it, and charges its client
    policy.refund(sequence, 40)

A lower priority goes before a higher one in either policy; the policies differ within a priority.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Protocol

from jaxserve.serving.plan import PolicyName
from jaxserve.serving.sequence import Sequence

REMEMBERED_CLIENTS = 1024
"""Clients whose account is kept at least while they have no request waiting."""


class Policy(Protocol):
    """Order of the requests that wait for their first slot, each by its first sequence."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...

    def push(self, sequence: Sequence) -> None:
        """Adds a request."""
        ...

    def head(self) -> Sequence | None:
        """Returns who starts next."""
        ...

    def pop(self) -> Sequence:
        """Returns who starts next, taken out and charged; there must be one."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out that will never start."""
        ...

    def refund(self, sequence: Sequence, tokens: int) -> None:
        """Gives back what `pop` charged for output that was not generated."""
        ...


def make_policy(name: PolicyName, weights: Mapping[str, float]) -> Policy:
    """Returns the policy of that name."""
    return OldestFirst() if name == "fcfs" else FairByClient(weights)


def cost(sequence: Sequence) -> int:
    """Returns the tokens that a request may take: its prompt, and all output it asks for."""
    request = sequence.request
    outputs = max(request.params.n, request.beam_width)
    return sequence.num_prompt + outputs * (sequence.max_length - sequence.num_prompt)


class OldestFirst:
    """In the order of arrival."""

    def __init__(self) -> None:
        self._queue: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._queue)

    def push(self, sequence: Sequence) -> None:
        """Adds a request."""
        insort(self._queue, sequence, key=_age)

    def head(self) -> Sequence | None:
        """Returns the oldest request of the lowest priority."""
        return self._queue[0] if self._queue else None

    def pop(self) -> Sequence:
        """Returns the head, taken out."""
        return self._queue.pop(0)

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out."""
        self._queue.remove(sequence)

    def refund(self, sequence: Sequence, tokens: int) -> None:
        """Does nothing: nobody was charged."""


class FairByClient:
    """Fair queueing of clients, by start tags.

    Each client has an account in tokens over its weight. The next request is the oldest of the
    client with the lowest account, which is then charged with all the request may take; what it
    did not take is given back when it ends. A client that comes back after a pause starts from
    the account of whoever was served last, or from the lowest of those that wait if that is less,
    so that nobody saves up a claim by waiting and nobody waits for another's whole queue.

    Source: start-time fair queueing, Goyal et al. 1996, with tokens as the service.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = dict(weights)
        self._queues: dict[int, dict[str, deque[Sequence]]] = {}
        self._waiting: dict[str, int] = {}
        self._accounts: dict[str, float] = {}
        self._served = 0.0

    def __len__(self) -> int:
        return sum(self._waiting.values())

    def __iter__(self) -> Iterator[Sequence]:
        for _, clients in sorted(self._queues.items()):
            for queue in clients.values():
                yield from queue

    def push(self, sequence: Sequence) -> None:
        """Adds a request."""
        client = sequence.request.client
        if client not in self._waiting:
            # What was given back may have left those that wait below whoever was served last.
            lowest = min((self._accounts[other] for other in self._waiting), default=self._served)
            start = min(self._served, lowest)
            self._waiting[client] = 0
            self._accounts[client] = max(self._accounts.get(client, 0.0), start)
            self._forget_low_accounts()
        self._waiting[client] += 1
        clients = self._queues.setdefault(sequence.request.priority, {})
        clients.setdefault(client, deque()).append(sequence)

    def head(self) -> Sequence | None:
        """Returns the oldest request of the lowest account, within the lowest priority."""
        if not self._queues:
            return None
        queues = self._queues[min(self._queues)].values()
        return min((queue[0] for queue in queues), key=self._turn)

    def pop(self) -> Sequence:
        """Returns the head, taken out; its client pays for it."""
        sequence = self.head()
        assert sequence is not None, "no request waits"
        client = sequence.request.client
        self._served = max(self._served, self._accounts[client])
        self._accounts[client] += cost(sequence) / self._weight(client)
        self.remove(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out."""
        priority, client = sequence.request.priority, sequence.request.client
        clients = self._queues[priority]
        clients[client].remove(sequence)
        if not clients[client]:
            del clients[client]
        if not clients:
            del self._queues[priority]
        self._waiting[client] -= 1
        if not self._waiting[client]:
            del self._waiting[client]

    def refund(self, sequence: Sequence, tokens: int) -> None:
        """Gives a client back what it was charged for output that was not generated."""
        client = sequence.request.client
        if client in self._accounts:
            self._accounts[client] -= tokens / self._weight(client)

    def _turn(self, sequence: Sequence) -> tuple[float, int]:
        return self._accounts[sequence.request.client], sequence.arrival

    def _weight(self, client: str) -> float:
        return self._weights.get(client, 1.0)

    def _forget_low_accounts(self) -> None:
        """Drops accounts of clients that do not wait, those first that say least."""
        if len(self._accounts) <= 2 * REMEMBERED_CLIENTS + len(self._waiting):
            return
        idle = [client for client in self._accounts if client not in self._waiting]
        idle.sort(key=self._accounts.__getitem__)
        for client in idle[:-REMEMBERED_CLIENTS]:
            del self._accounts[client]


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.arrival
