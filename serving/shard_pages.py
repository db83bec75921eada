"""The pages of one shard, over all cache groups, as sequences take, share and give them back."""

from __future__ import annotations

from jaxserve.serving.pages import PageAllocator, column, pages_of
from jaxserve.serving.plan import SchedulerConfig, StepPlan
from jaxserve.serving.prefix_cache import (
    PrefixCache,
    extend_digests,
    first_visible_page,
    longest_hit,
)
from jaxserve.serving.sequence import Sequence


class ShardPages:
    """Allocators and prefix caches of one shard, by group; the scheduler alone calls it.

    All groups have pages of one size, so a sequence has as many of them in each group, except that
    a window group gives those back that no later query sees.
    """

    def __init__(self, config: SchedulerConfig, shard: int) -> None:
        self.shard = shard
        self.groups = config.groups
        self.page_size = config.page_size
        self.allocators = [PageAllocator(limits.num_pages) for limits in config.groups]
        self.caches = (
            [PrefixCache(pages) for pages in self.allocators] if config.prefix_cache else []
        )
        self.widths = [config.table_width(group) for group in range(len(config.groups))]
        self.pinned = [pages_of(limits.sink_tokens, self.page_size) for limits in config.groups]
        self._windowed = [g for g, limits in enumerate(config.groups) if limits.window is not None]

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence that has no pages its empty lists."""
        sequence.shard = self.shard
        sequence.pages = [[] for _ in self.groups]
        sequence.released = list(self.pinned)
        sequence.num_pages = 0
        sequence.num_known = 0

    def grow(self, sequence: Sequence, position: int, end: int, plan: StepPlan) -> bool:
        """Returns whether a sequence now has pages for the tokens up to `end`; all or none.

        Args:
            sequence: with a slot in this shard.
            position: no later query is before it; pages it does not see are given back.
            end: one after the last position that is written.
            plan: gets the writes to the page tables.
        """
        for group in self._windowed:
            self._give_back(sequence, group, position)
        begin = sequence.num_pages
        stop = pages_of(end, self.page_size)
        if stop <= begin:
            return True
        wanted = stop - begin
        for allocator in self.allocators:
            if allocator.num_available < wanted:
                return False
        for group, allocator in enumerate(self.allocators):
            pages, writes = sequence.pages[group], plan.writes[group]
            for index in range(begin, stop):
                page = allocator.take()
                pages.append(page)
                writes.append((sequence.slot, self._column(group, index), page))
        sequence.num_pages = stop
        return True

    def _give_back(self, sequence: Sequence, group: int, position: int) -> None:
        """Releases the pages of a window group that a query at `position` does not see."""
        first = self._first(group, position)
        pages, release = sequence.pages[group], self.allocators[group].release
        for index in range(sequence.released[group], first):
            release(pages[index])
            pages[index] = -1
        sequence.released[group] = max(sequence.released[group], first)

    def release(self, sequence: Sequence) -> None:
        """Takes all pages from a sequence; of its known pages the last go first."""
        for pages, allocator in zip(sequence.pages, self.allocators, strict=True):
            for page in reversed(pages):
                if page >= 0:
                    allocator.release(page)
        sequence.pages = []
        sequence.released = []
        sequence.num_pages = 0

    def find(self, sequence: Sequence) -> int:
        """Returns how many leading tokens the prefix cache holds; never all of them."""
        if not self.caches or not all(map(len, self.caches)):
            return 0
        most = (len(sequence.tokens) - 1) // self.page_size
        self._digest(sequence, most)
        digests = sequence.digests[:most]
        return longest_hit(self.caches, self.groups, digests, self.page_size) * self.page_size

    def insert(self, sequence: Sequence, num_tokens: int) -> None:
        """Makes the full pages of the first `num_tokens` tokens known."""
        stop = num_tokens // self.page_size
        if not self.caches or stop <= sequence.num_known:
            return
        self._digest(sequence, stop)
        for cache, pages in zip(self.caches, sequence.pages, strict=True):
            for index in range(sequence.num_known, stop):
                if pages[index] >= 0:
                    cache.insert(sequence.digests[index], pages[index])
        sequence.num_known = stop

    def _digest(self, sequence: Sequence, num_pages: int) -> None:
        if len(sequence.digests) < num_pages:
            salt = sequence.request.salt
            extend_digests(sequence.digests, sequence.tokens, num_pages, self.page_size, salt)

    def adopt(self, sequence: Sequence, hit: int, plan: StepPlan) -> None:
        """Gives a started sequence the cached pages of its first `hit` tokens."""
        count = hit // self.page_size
        for group, cache in enumerate(self.caches):
            found = [cache.find(digest) for digest in sequence.digests[:count]]
            pages = [-1 if page is None else page for page in found]
            self._hold(sequence, group, pages, hit, plan)
        sequence.num_pages = sequence.num_known = count

    def can_fork(self, source: Sequence, num_tokens: int) -> bool:
        """Returns whether `source` still holds what a query after `num_tokens` tokens sees."""
        last = pages_of(num_tokens, self.page_size)
        for group, pages in enumerate(source.pages):
            first = max(self.pinned[group], self._first(group, num_tokens))
            if last > first and (last > len(pages) or pages[first] < 0):
                return False
        return True

    def fork(self, sequence: Sequence, source: Sequence, num_tokens: int, plan: StepPlan) -> None:
        """Gives a started sequence the pages of another one's first `num_tokens` tokens.

        Full pages are shared. A page that both would write is copied; one must be available.
        """
        count, rest = divmod(num_tokens, self.page_size)
        for group, allocator in enumerate(self.allocators):
            self._hold(sequence, group, source.pages[group][:count], num_tokens, plan)
            if rest:
                page = allocator.take()
                sequence.pages[group].append(page)
                plan.writes[group].append((sequence.slot, self._column(group, count), page))
                plan.copies[group].append((self.shard, source.pages[group][count], page))
        sequence.num_pages = count + (rest > 0)
        sequence.num_known = min(source.num_known, count)
        if len(sequence.digests) < sequence.num_known:
            sequence.digests = source.digests[: sequence.num_known]

    def _hold(
        self, sequence: Sequence, group: int, pages: list[int], position: int, plan: StepPlan
    ) -> None:
        """Shares those of the leading pages that a query at `position` sees."""
        first = max(self.pinned[group], self._first(group, position))
        held: list[int] = []
        for index, page in enumerate(pages):
            seen = index < self.pinned[group] or index >= first
            held.append(page if seen else -1)
            if seen:
                self.allocators[group].share(page)
                plan.writes[group].append((sequence.slot, self._column(group, index), page))
        sequence.pages[group] = held
        sequence.released[group] = first

    def fits(self, sequence: Sequence, reused: int, from_cache: bool, promised: list[int]) -> bool:
        """Returns whether pages for all known tokens are there, apart from promised ones.

        Args:
            sequence: without pages.
            reused: leading tokens whose pages are shared.
            from_cache: they come from the prefix cache, where nobody may hold them.
            promised: by group, pages that others were admitted for and have not taken yet.
        """
        count = reused // self.page_size
        for group, allocator in enumerate(self.allocators):
            shared = self._seen(group, reused)
            available = allocator.num_available - promised[group]
            if from_cache:
                find, references = self.caches[group].find, allocator.references
                found = [find(sequence.digests[index]) for index in shared]
                available -= sum(page is not None and not references(page) for page in found)
            if self._still_to_take(sequence, group, count, len(shared)) > available:
                return False
        return True

    def outstanding(self, sequence: Sequence, group: int) -> int:
        """Returns how many more pages a sequence with a slot needs for its known tokens."""
        count = sequence.num_pages
        held = min(count, self.pinned[group]) + max(0, count - sequence.released[group])
        return self._still_to_take(sequence, group, count, held)

    def _still_to_take(self, sequence: Sequence, group: int, count: int, held: int) -> int:
        """Returns the pages still taken by one that has `count` pages and holds `held` of them."""
        total = pages_of(len(sequence.tokens), self.page_size)
        most = min(total, self.widths[group])
        return max(0, min(total - count + held, most) - held)

    def _seen(self, group: int, position: int) -> list[int]:
        """Returns the indices of full pages that a query at `position` sees."""
        count = position // self.page_size
        pinned = min(self.pinned[group], count)
        return [*range(pinned), *range(max(pinned, self._first(group, position)), count)]

    def _first(self, group: int, position: int) -> int:
        return first_visible_page(self.groups[group], position, self.page_size)

    def _column(self, group: int, index: int) -> int:
        return column(index, self.widths[group], self.pinned[group])

    def check(self, sequences: list[Sequence]) -> None:
        """Raises AssertionError unless pages are conserved and no page has two writers.

        Args:
            sequences: all that have a slot in this shard.
        """
        for group, allocator in enumerate(self.allocators):
            allocator.check()
            holders = [0] * allocator.num_pages
            for sequence in sequences:
                for page in self._checked_pages(sequence, group):
                    holders[page] += 1
            held = [allocator.references(page) for page in range(allocator.num_pages)]
            assert holders == held, f"holders {holders} are counted as {held}"
        for cache in self.caches:
            cache.check()

    def _checked_pages(self, sequence: Sequence, group: int) -> list[int]:
        """Returns the pages that a sequence holds in a group."""
        pages, allocator = sequence.pages[group], self.allocators[group]
        assert len(pages) == sequence.num_pages, sequence
        assert sequence.computed <= sequence.num_pages * self.page_size, sequence
        first_written = min(sequence.computed, len(sequence.tokens) - 1) // self.page_size
        for index, page in enumerate(pages):
            gone = self.pinned[group] <= index < sequence.released[group]
            assert (page < 0) == gone, f"{sequence}: page {index} of group {group} is {page}"
            if not gone and index >= max(first_written, sequence.num_known):
                alone = allocator.references(page) == 1 and not allocator.is_kept(page)
                assert alone, f"{sequence} writes page {page}, which others read"
        return [page for page in pages if page >= 0]
