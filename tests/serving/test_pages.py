"""Pages are free, held or idle, and page tables point where they lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.serving.pages import GroupLimits, PageAllocator, column, pages_of, table_width


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_tokens_need_whole_pages(tokens: int, pages: int) -> None:
    assert pages_of(tokens, 4) == pages


@pytest.mark.parametrize(
    ("window", "sinks", "context", "width"),
    [
        (None, 0, 100, 25),
        (None, 0, 101, 26),
        (16, 0, 100, 7),  # 16 + 8 tokens are 6 pages, and one more
        (16, 0, None, 7),
        (16, 3, None, 8),
        (16, 5, None, 9),
        (16, 0, 20, 5),  # never more than the context
    ],
)
def test_a_table_has_a_column_for_every_page_held_at_a_time(
    window: int | None, sinks: int, context: int | None, width: int
) -> None:
    assert table_width(4, context, 8, window, sinks) == width


def test_endless_generation_needs_a_window() -> None:
    with pytest.raises(ConfigError, match="max_context_tokens=None is endless, but a group with"):
        table_width(4, None, 8)


def test_columns_take_turns_after_the_pinned_ones() -> None:
    assert [column(page, 5, 2) for page in range(10)] == [0, 1, 2, 3, 4, 2, 3, 4, 2, 3]
    assert [column(page, 3, 0) for page in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [column(page, 4, 0) for page in range(4)] == [0, 1, 2, 3]


@given(
    page_size=st.integers(1, 5),
    window=st.integers(1, 20),
    step=st.integers(1, 12),
    sinks=st.integers(0, 6),
    start=st.integers(0, 100),
)
def test_pages_of_a_window_and_a_step_never_meet_in_a_column(
    page_size: int, window: int, step: int, sinks: int, start: int
) -> None:
    width = table_width(page_size, None, step, window, sinks)
    pinned = pages_of(sinks, page_size)
    first = max(0, start - window + 1) // page_size
    held = {*range(pinned), *range(first, pages_of(start + step, page_size))}
    assert len({column(page, width, pinned) for page in held}) == len(held)
    assert all(0 <= column(page, width, pinned) < width for page in held)


def test_pages_are_free_held_or_idle() -> None:
    pages = PageAllocator(3)
    first, second = pages.take(), pages.take()
    assert (pages.num_free, pages.num_held, pages.num_idle) == (1, 2, 0)
    pages.keep(second)
    pages.release(first)
    pages.release(second)
    assert (pages.num_free, pages.num_held, pages.num_idle) == (2, 0, 1)
    assert pages.num_available == 3
    pages.check()


def test_a_shared_page_is_held_until_its_last_holder_lets_go() -> None:
    pages = PageAllocator(1)
    page = pages.take()
    pages.share(page)
    assert (pages.references(page), pages.num_references) == (2, 2)
    pages.release(page)
    assert (pages.num_held, pages.num_available) == (1, 0)
    pages.release(page)
    assert (pages.num_held, pages.num_available) == (0, 1)


def test_idle_pages_are_reused_least_recently_released_first_and_only_when_none_is_free() -> None:
    reused: list[int] = []
    pages = PageAllocator(4, reused.append)
    a, b, c = pages.take(), pages.take(), pages.take()
    for page in (a, b, c):
        pages.keep(page)
    for page in (b, a, c):
        pages.release(page)
    pages.share(b)  # used again, so the youngest once it is released
    pages.release(b)
    pages.take()
    assert reused == []
    assert [pages.take() for _ in range(3)] == [a, c, b] == reused
    assert not pages.is_kept(a)
    pages.check()


def test_a_page_is_not_released_twice() -> None:
    pages = PageAllocator(1)
    page = pages.take()
    pages.release(page)
    with pytest.raises(AssertionError, match="page 0 is released more often than it was taken"):
        pages.release(page)


def test_check_notices_a_page_in_two_places() -> None:
    pages = PageAllocator(2)
    page = pages.take()
    pages._free.append(page)
    with pytest.raises(AssertionError, match=f"page {page}: 2 places"):
        pages.check()


def test_check_notices_a_lost_page() -> None:
    pages = PageAllocator(2)
    pages._free.pop()
    with pytest.raises(AssertionError, match="0 places, 0 holders"):
        pages.check()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"num_pages": 0}, "num_pages=0 is no memory"),
        ({"num_pages": 1, "window": 0}, "window=0 hides a token from itself"),
        ({"num_pages": 1, "sink_tokens": 4}, "sink_tokens=4 without a window"),
        ({"num_pages": 1, "window": 4, "sink_tokens": -1}, "sink_tokens=-1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupLimits(**limits)
