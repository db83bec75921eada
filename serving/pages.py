"""Pages of KV memory: who holds them, and where a sequence's page table points.

    pages = PageAllocator(num_pages=4)
    page = pages.take()          # held once
    pages.share(page)            # held twice: no holder may write it any more
    pages.release(page)

A page is free, held, or idle: without a holder, but kept because its content is known (the prefix
cache asked for that with `keep`). Idle pages are taken again, least recently released first, when
no free one is left. `num_free + num_held + num_idle` is always `num_pages`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import msgspec

from jaxserve.errors import ConfigError


class GroupLimits(msgspec.Struct, frozen=True):
    """What one cache group may keep.

    Attributes:
        num_pages: pages of each shard.
        window: newest keys that a query sees, itself included; None sees all.
        sink_tokens: first tokens that stay visible besides the window.
    """

    num_pages: int
    window: int | None = None
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if self.num_pages < 1:
            raise ConfigError(f"num_pages={self.num_pages} is no memory; use at least 1")
        if self.window is not None and self.window < 1:
            raise ConfigError(f"window={self.window} hides a token from itself; use at least 1")
        if self.sink_tokens < 0 or (self.sink_tokens and self.window is None):
            raise ConfigError(
                f"sink_tokens={self.sink_tokens} without a window keeps nothing that is not kept "
                "anyway; use 0, or set a window"
            )


def pages_of(tokens: int, page_size: int) -> int:
    """Returns the pages that `tokens` tokens need."""
    return -(-tokens // page_size)


def table_width(
    page_size: int,
    max_context_tokens: int | None,
    max_step_tokens: int,
    window: int | None = None,
    sink_tokens: int = 0,
) -> int:
    """Returns the columns of a page table: the most pages a sequence has in a group at a time.

    A window group needs the sinks' pages, those of the window and of one step's tokens, and one
    more because neither begins at the start of a page.
    """
    full = None if max_context_tokens is None else pages_of(max_context_tokens, page_size)
    if window is None:
        if full is None:
            raise ConfigError(
                "max_context_tokens=None is endless, but a group without a window keeps every "
                "token; set max_context_tokens or a window"
            )
        return full
    ring = pages_of(window + max_step_tokens, page_size) + 1
    width = pages_of(sink_tokens, page_size) + ring
    return width if full is None else min(width, full)


def column(page: int, width: int, pinned: int) -> int:
    """Returns where the page table holds a sequence's `page`-th page.

    Args:
        page: counted from the start of the sequence.
        width: columns of the table.
        pinned: leading pages, those of sink tokens, that stay; the others take turns.
    """
    return page if page < pinned else pinned + (page - pinned) % (width - pinned)


class PageAllocator:
    """The pages of one group in one shard; the scheduler alone calls it.

    Attributes:
        on_reuse: called with an idle page that is about to be taken for other content.
    """

    __slots__ = ("_free", "_idle", "_kept", "_refs", "num_pages", "on_reuse")

    def __init__(self, num_pages: int, on_reuse: Callable[[int], None] | None = None) -> None:
        self.num_pages = num_pages
        self.on_reuse = on_reuse
        self._free = list(range(num_pages - 1, -1, -1))
        self._refs = [0] * num_pages
        self._kept = bytearray(num_pages)
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Returns how many pages hold nothing."""
        return len(self._free)

    @property
    def num_idle(self) -> int:
        """Returns how many pages have known content and no holder."""
        return len(self._idle)

    @property
    def num_held(self) -> int:
        """Returns how many pages have a holder."""
        return self.num_pages - len(self._free) - len(self._idle)

    @property
    def num_available(self) -> int:
        """Returns how many pages can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def num_references(self) -> int:
        """Returns the holders of all pages: the pages needed if none were shared."""
        return sum(self._refs)

    def references(self, page: int) -> int:
        """Returns the holders of a page."""
        return self._refs[page]

    def is_kept(self, page: int) -> bool:
        """Returns whether a page's content is known to the prefix cache."""
        return bool(self._kept[page])

    def take(self) -> int:
        """Returns a page, held once; its content is undefined. One must be available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._kept[page] = 0
            if self.on_reuse is not None:
                self.on_reuse(page)
        self._refs[page] = 1
        return page

    def share(self, page: int) -> None:
        """Adds a holder to a page that is held or idle."""
        if self._refs[page] == 0:
            del self._idle[page]
        self._refs[page] += 1

    def release(self, page: int) -> None:
        """Takes a holder from a page."""
        refs = self._refs[page] - 1
        assert refs >= 0, f"page {page} is released more often than it was taken"
        self._refs[page] = refs
        if refs == 0:
            if self._kept[page]:
                self._idle[page] = None
            else:
                self._free.append(page)

    def keep(self, page: int) -> None:
        """Notes that a held page's content is known: it becomes idle instead of free."""
        assert self._refs[page] > 0, f"page {page} is kept without a holder"
        self._kept[page] = 1

    def check(self) -> None:
        """Raises AssertionError unless every page is free, held or idle, and only one of these."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        for page, refs in enumerate(self._refs):
            places = (page in free) + (refs > 0) + (page in self._idle)
            assert refs >= 0 and places == 1, f"page {page}: {places} places, {refs} holders"
            assert not (page in free and self._kept[page]), f"free page {page} is kept"
            assert page not in self._idle or self._kept[page], f"idle page {page} is not kept"
        held = sum(refs > 0 for refs in self._refs)
        assert held == self.num_held and held + self.num_free + self.num_idle == self.num_pages
