"""Pages are found by the whole prefix that they end, and by its salt."""

import pytest

from jaxserve.serving.pages import GroupLimits, PageAllocator
from jaxserve.serving.prefix_cache import (
    PrefixCache,
    extend_digests,
    first_visible_page,
    longest_hit,
)

FULL = GroupLimits(num_pages=8)


def digests_of(tokens: list[int], salt: str = "", page_size: int = 2) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, len(tokens) // page_size, page_size, salt)
    return digests


def cache_with(digests: list[bytes], known: list[int], num_pages: int = 8) -> PrefixCache:
    """Returns a cache that knows some of the pages."""
    cache = PrefixCache(PageAllocator(num_pages))
    for index in known:
        cache.insert(digests[index], cache.pages.take())
    return cache


def test_equal_prefixes_have_equal_digests() -> None:
    a, b = digests_of([1, 2, 3, 4, 5]), digests_of([1, 2, 3, 4, 9])
    assert a == b
    assert len(a) == 2


def test_a_digest_covers_everything_before_its_page() -> None:
    assert digests_of([1, 2, 3, 4])[1] != digests_of([1, 9, 3, 4])[1]
    assert digests_of([1, 2, 3, 4])[0] == digests_of([1, 2, 9, 9])[0]


def test_digests_differ_by_salt() -> None:
    assert not set(digests_of([1, 2, 3, 4], "a")) & set(digests_of([1, 2, 3, 4], "b"))


def test_digests_extended_in_steps_are_those_made_at_once() -> None:
    tokens = list(range(10))
    digests: list[bytes] = []
    for pages in (1, 1, 3, 5):
        extend_digests(digests, tokens, pages, 2, "")
    assert digests == digests_of(tokens)


def test_a_page_is_found_until_it_is_reused() -> None:
    pages = PageAllocator(1)
    cache = PrefixCache(pages)
    page = pages.take()
    cache.insert(b"x", page)
    pages.release(page)
    assert cache.find(b"x") == page
    cache.check()
    pages.take()
    assert cache.find(b"x") is None
    assert len(cache) == 0
    cache.check()


def test_the_first_page_with_a_content_stays_the_known_one() -> None:
    pages = PageAllocator(2)
    cache = PrefixCache(pages)
    first, second = pages.take(), pages.take()
    cache.insert(b"x", first)
    cache.insert(b"x", second)
    assert cache.find(b"x") == first
    assert not pages.is_kept(second)
    cache.check()


def test_check_notices_a_kept_page_that_nobody_knows() -> None:
    cache = cache_with(digests_of([1, 2, 3, 4]), [0])
    cache.pages.keep(cache.pages.take())
    with pytest.raises(AssertionError, match="page 1"):
        cache.check()


@pytest.mark.parametrize(
    ("position", "page"), [(0, 0), (4, 0), (5, 0), (6, 1), (7, 1), (8, 2), (20, 8)]
)
def test_the_window_hides_pages(position: int, page: int) -> None:
    # A query at position p sees keys from p - 4 on, in pages of 2.
    assert first_visible_page(GroupLimits(8, window=5), position, 2) == page
    assert first_visible_page(FULL, position, 2) == 0


@pytest.mark.parametrize(
    ("known", "hit"), [([], 0), ([0], 1), ([1, 2], 0), ([0, 1, 3], 2), ([0, 1, 2, 3], 4)]
)
def test_a_full_group_hits_up_to_the_first_gap(known: list[int], hit: int) -> None:
    digests = digests_of(list(range(8)))
    assert longest_hit([cache_with(digests, known)], [FULL], digests, 2) == hit


@pytest.mark.parametrize(
    ("known", "hit"),
    [
        ([2, 3, 4], 5),  # a query at 10 sees 7 to 10: pages 3 and 4
        ([3, 4], 5),
        ([4], 0),
        ([0, 4], 1),
        ([1, 2, 4], 3),
        ([0, 1, 3], 2),
    ],
)
def test_a_window_group_hits_where_the_window_is_known(known: list[int], hit: int) -> None:
    digests = digests_of(list(range(10)))
    window = GroupLimits(8, window=4)
    assert longest_hit([cache_with(digests, known)], [window], digests, 2) == hit


@pytest.mark.parametrize(("known", "hit"), [([3, 4], 0), ([0, 3, 4], 5), ([0, 4], 1)])
def test_the_pages_of_sink_tokens_must_be_known_too(known: list[int], hit: int) -> None:
    digests = digests_of(list(range(10)))
    window = GroupLimits(8, window=4, sink_tokens=1)
    assert longest_hit([cache_with(digests, known)], [window], digests, 2) == hit


def test_all_groups_must_agree() -> None:
    digests = digests_of(list(range(10)))
    full = cache_with(digests, [0, 1, 2, 3])
    window = cache_with(digests, [1, 2, 4])
    groups = [FULL, GroupLimits(8, window=4)]
    assert longest_hit([full, window], groups, digests, 2) == 3
