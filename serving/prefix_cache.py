"""Pages found again by the tokens that they hold.

    digests: list[bytes] = []
    extend_digests(digests, tokens, 3, page_size, salt="")
    cache.insert(digests[0], page)
    cache.find(digests[0])                     # the page, or None

A page's digest covers its tokens and the digest before it, so that equal digests mean equal
prefixes; the first one covers the salt. A window's keys depend on the whole prefix too, so the same
digests serve every group.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from jaxserve.serving.pages import GroupLimits, PageAllocator, pages_of

DIGEST_BYTES = 16


def _root(salt: str) -> bytes:
    """Returns what the first page's digest builds on."""
    return blake2b(salt.encode(), digest_size=DIGEST_BYTES, person=b"jaxserve prefix").digest()


def extend_digests(
    digests: list[bytes], tokens: Sequence[int], num_pages: int, page_size: int, salt: str
) -> None:
    """Appends the digests of the pages of `tokens` that are missing up to `num_pages`."""
    last = digests[-1] if digests else _root(salt)
    for page in range(len(digests), num_pages):
        content = array("i", tokens[page * page_size : (page + 1) * page_size]).tobytes()
        last = blake2b(last + content, digest_size=DIGEST_BYTES).digest()
        digests.append(last)


class PrefixCache:
    """Which pages of one group in one shard hold which prefix; the scheduler alone calls it."""

    __slots__ = ("_digests", "_pages", "pages")

    def __init__(self, pages: PageAllocator) -> None:
        self.pages = pages
        self._pages: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        pages.on_reuse = self._forget

    def __len__(self) -> int:
        return len(self._pages)

    def find(self, digest: bytes) -> int | None:
        """Returns the page with this digest, held or idle."""
        return self._pages.get(digest)

    def insert(self, digest: bytes, page: int) -> None:
        """Makes a full, held page known, unless another page has its content already."""
        if digest not in self._pages:
            self._pages[digest] = page
            self._digests[page] = digest
            self.pages.keep(page)

    def _forget(self, page: int) -> None:
        del self._pages[self._digests.pop(page)]

    def check(self) -> None:
        """Raises AssertionError unless exactly the kept pages are known, once each."""
        assert {page: digest for digest, page in self._pages.items()} == self._digests
        for page in range(self.pages.num_pages):
            assert self.pages.is_kept(page) == (page in self._digests), f"page {page}"


def first_visible_page(limits: GroupLimits, position: int, page_size: int) -> int:
    """Returns the first page, sinks left out, with a key that a query at `position` sees."""
    if limits.window is None:
        return 0
    return max(0, position - limits.window + 1) // page_size


def longest_hit(
    caches: Sequence[PrefixCache],
    groups: Sequence[GroupLimits],
    digests: Sequence[bytes],
    page_size: int,
) -> int:
    """Returns how many leading pages need no computing.

    After a hit of n pages the next query is at `n * page_size`: a full group must know all n, a
    window group the sinks' pages and those that this query still sees.
    """
    most = len(digests)
    windowed: list[tuple[GroupLimits, list[int]]] = []
    for cache, limits in zip(caches, groups, strict=True):
        find = cache.find
        if limits.window is None:
            run = 0
            while run < most and find(digests[run]) is not None:
                run += 1
            most = run
        else:
            windowed.append((limits, _runs(cache, digests, most)))
    for hit in range(most, 0, -1):
        if all(_covers(limits, runs, hit, page_size) for limits, runs in windowed):
            return hit
    return 0


def _runs(cache: PrefixCache, digests: Sequence[bytes], most: int) -> list[int]:
    """Returns for each page how many pages known without a gap end with it."""
    runs: list[int] = []
    run = 0
    for digest in digests[:most]:
        run = 0 if cache.find(digest) is None else run + 1
        runs.append(run)
    return runs


def _covers(limits: GroupLimits, runs: Sequence[int], hit: int, page_size: int) -> bool:
    """Returns whether a window group knows what a query after `hit` pages sees."""
    first = first_visible_page(limits, hit * page_size, page_size)
    pinned = min(pages_of(limits.sink_tokens, page_size), hit)
    sinks_known = pinned == 0 or runs[pinned - 1] == pinned
    return runs[hit - 1] >= hit - first and sinks_known
