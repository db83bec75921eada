"""Finding stop strings in streamed text.

    matcher = StopMatcher(["Q:", "END"])
    matcher.push("some EN")     # ("some ", None): "EN" may become "END"
    matcher.push("D more")      # ("", "END")

No more text is held back than may still become a stop string.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from jaxserve.errors import UsageError

_ROOT = 0


@dataclass
class _Node:
    """A prefix of some stop string. Written only while `_build` runs."""

    depth: int
    next: dict[str, int] = field(default_factory=dict[str, int])
    fallback: int = _ROOT  # the longest proper suffix that is also a prefix of some stop
    match: str | None = None  # the longest stop that this prefix ends with


class StopMatcher:
    """Emits text up to the first stop string. Its single writer is the caller of `push`.

    The first match is the one that ends first, so it does not depend on how the text is cut into
    pieces nor on text that is still to come; of several that end together the longest wins.

    Args:
        stops: the strings to stop at; none means that all text passes.
        include_stop: whether the emitted text ends with the stop string that matched.

    Raises:
        UsageError: `stops` is a single string, or one of them is empty or not a string.
    """

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        _check(stops)
        self._nodes = _build(stops)
        self._include_stop = include_stop
        self._state = _ROOT
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """Returns the stop string that was found, or None."""
        return self._matched

    @property
    def held(self) -> str:
        """Returns the text that is held back because it may begin a stop string."""
        return self._held

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that can be shown now, and the stop string once one has matched.

        Args:
            text: the next piece of text, of any length. After a match it is discarded.
        """
        if self._matched is not None:
            return "", self._matched
        text_so_far = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            match = self._advance(char)
            if match is not None:
                self._matched, self._held = match, ""
                return text_so_far[: end if self._include_stop else end - len(match)], match
        shown = len(text_so_far) - self._nodes[self._state].depth
        self._held = text_so_far[shown:]
        return text_so_far[:shown], None

    def finish(self) -> str:
        """Returns the text still held back: no more comes, so it is not a stop string."""
        held, self._held, self._state = self._held, "", _ROOT
        return held

    def _advance(self, char: str) -> str | None:
        nodes, state = self._nodes, self._state
        while (following := nodes[state].next.get(char)) is None and state != _ROOT:
            state = nodes[state].fallback
        self._state = _ROOT if following is None else following
        return nodes[self._state].match


def _check(stops: object) -> None:
    if isinstance(stops, str) or not isinstance(stops, Sequence):
        raise UsageError(f"stops={stops!r} is not a list of strings; pass one, such as ['END']")
    for index, stop in enumerate(cast("Sequence[object]", stops)):
        if not isinstance(stop, str) or not stop:
            raise UsageError(f"stops[{index}]={stop!r} is not a string of one character or more")


def _build(stops: Sequence[str]) -> list[_Node]:
    """Returns the Aho-Corasick automaton of the stops; node 0 is the empty prefix."""
    nodes = [_Node(depth=0)]
    for stop in stops:
        state = _ROOT
        for char in stop:
            if char not in nodes[state].next:
                nodes[state].next[char] = len(nodes)
                nodes.append(_Node(depth=nodes[state].depth + 1))
            state = nodes[state].next[char]
        nodes[state].match = stop
    queue = deque(nodes[_ROOT].next.values())  # breadth first: fallbacks are shallower, so ready
    while queue:
        node = nodes[queue.popleft()]
        for char, child in node.next.items():
            fallback = node.fallback
            while char not in nodes[fallback].next and fallback != _ROOT:
                fallback = nodes[fallback].fallback
            nodes[child].fallback = nodes[fallback].next.get(char, _ROOT)
            if nodes[child].match is None:
                nodes[child].match = nodes[nodes[child].fallback].match
            queue.append(child)
    return nodes
