from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.errors import UsageError
from jaxserve.stop import StopMatcher

# Two letters make overlaps, nested stops and false starts common.
TEXT = st.text("ab", max_size=40)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)


def run(matcher: StopMatcher, pieces: Sequence[str]) -> tuple[str, str | None]:
    text, matched = "", None
    for piece in pieces:
        emitted, matched = matcher.push(piece)
        text += emitted
    return text + matcher.finish(), matched


def naive(text: str, stops: Sequence[str], include_stop: bool) -> tuple[str, str | None]:
    """Returns the text up to the first place where a stop ends, the longest if several do."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include_stop else end - len(longest)], longest
    return text, None


@given(st.lists(TEXT, max_size=8), STOPS, st.booleans())
def test_any_chunking_gives_what_searching_the_whole_text_gives(
    pieces: list[str], stops: list[str], include_stop: bool
):
    got = run(StopMatcher(stops, include_stop), pieces)
    assert got == naive("".join(pieces), stops, include_stop)


@given(st.lists(TEXT, max_size=8), STOPS)
def test_held_text_is_the_longest_suffix_that_may_become_a_stop(
    pieces: list[str], stops: list[str]
):
    matcher, seen, shown = StopMatcher(stops), "", ""
    for piece in pieces:
        emitted, matched = matcher.push(piece)
        if matched is not None:
            return
        seen, shown = seen + piece, shown + emitted
        starts = [stop[:n] for stop in stops for n in range(len(stop))]
        longest = max((s for s in starts if seen.endswith(s)), key=len, default="")
        assert matcher.held == longest
        assert shown + longest == seen


def test_a_stop_that_spans_many_pieces_is_found():
    matcher = StopMatcher(["<|end|>"])
    assert matcher.push("Hello <") == ("Hello ", None)
    assert [matcher.push(char) for char in "|end|"] == [("", None)] * 5
    assert matcher.push("> and more") == ("", "<|end|>")
    assert matcher.matched == "<|end|>"


def test_a_false_start_is_released_as_soon_as_it_is_one():
    matcher = StopMatcher(["abac"])
    assert matcher.push("aba") == ("", None)
    assert matcher.push("b") == ("ab", None)  # "ab" may still begin "abac"
    assert matcher.held == "ab"
    assert matcher.push("x") == ("abx", None)


def test_the_stop_that_ends_first_wins_over_one_that_begins_first():
    assert run(StopMatcher(["bcd", "c"]), ["abcd"]) == ("ab", "c")


def test_the_longest_of_stops_that_end_together_wins():
    assert run(StopMatcher(["c", "abc", "bc"]), ["xab", "c"]) == ("x", "abc")


def test_text_after_a_match_is_discarded():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.finish() == ""


def test_finish_releases_an_unfinished_stop():
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("a\n") == ("a", None)
    assert matcher.finish() == "\n"
    assert matcher.finish() == ""


def test_without_stops_all_text_passes():
    assert StopMatcher([]).push("anything") == ("anything", None)


@pytest.mark.parametrize("stops", ["END", [""], ["a", ""], [3], None])
def test_what_is_no_list_of_stop_strings_is_refused(stops: list[str]):
    with pytest.raises(UsageError, match="stops"):
        StopMatcher(stops)
