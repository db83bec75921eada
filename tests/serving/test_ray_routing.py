"""Where prompts go among replicas; nothing of it needs Ray."""

from typing import Any

import pytest

from jaxserve.serving.ray_routing import (
    BURST,
    MOST_PARTS,
    PART_BYTES,
    Beginnings,
    Standing,
    part_of_session,
    parts_of,
    ranked,
    wanted_replicas,
)

NAMES = [f"replica{index}" for index in range(4)]
IDLE = {name: Standing() for name in NAMES}
SYSTEM = "You are a helpful assistant. " * 10


def test_prompts_that_begin_alike_go_to_one_replica_and_others_elsewhere() -> None:
    known, homes = Beginnings(), []
    for index in range(200):
        parts = parts_of(f"{index} is the number of this conversation. " * 4)
        homes.append(ranked(known.held(parts), IDLE, parts)[0])
        known.note(parts, homes[-1])
        longer = parts_of(f"{index} is the number of this conversation. " * 8)
        assert ranked(known.held(longer), IDLE, longer)[0] == homes[-1]
    assert all(homes.count(name) > 20 for name in NAMES)


@pytest.mark.parametrize("prompt", [["a", "b"], [1.5], [1 << 40], [-(1 << 40)], [None]])
def test_what_is_no_prompt_has_no_beginning(prompt: list[Any]) -> None:
    assert parts_of(prompt) == []


def test_text_that_is_no_unicode_is_routed_as_any() -> None:
    assert len(parts_of("\ud800" * 100)) > 0


def test_the_longest_beginning_wins_over_free_pages() -> None:
    known = Beginnings()
    known.note(parts_of(SYSTEM), "replica0")
    known.note(parts_of(SYSTEM + "Write a poem about the sea. " * 8), "replica1")
    asked = parts_of(SYSTEM + "Write a poem about the sea. " * 6)
    held = known.held(asked)
    assert held == {"replica0": len(SYSTEM) // PART_BYTES, "replica1": len(asked)}
    standings = IDLE | {"replica1": Standing(free=0.5)}
    assert ranked(held, standings, asked)[:2] == ["replica1", "replica0"]


@pytest.mark.parametrize(
    "crowded", [Standing(free=0.05), Standing(waiting=1), Standing(under_way=BURST + 1)]
)
def test_a_crowded_replica_is_the_last_whatever_it_holds(crowded: Standing) -> None:
    known, parts = Beginnings(), parts_of(SYSTEM)
    known.note(parts, "replica2")
    order = ranked(known.held(parts), IDLE | {"replica2": crowded}, parts)
    assert order[-1] == "replica2"
    assert sorted(order) == NAMES


def test_unknown_prompts_go_where_most_pages_are_free_then_where_least_is_under_way() -> None:
    standings = {"a": Standing(0.52), "b": Standing(0.94, 0, 3), "c": Standing(0.91, 0, 2)}
    assert ranked({}, standings) == ["c", "b", "a"]


def test_a_burst_of_equal_prompts_spreads() -> None:
    known, parts, sent = Beginnings(), parts_of(SYSTEM), dict.fromkeys(NAMES, 0)
    for _ in range(100):  # before anything is heard of the replicas
        standings = {name: Standing(under_way=count) for name, count in sent.items()}
        home = ranked(known.held(parts), standings, parts)[0]
        known.note(parts, home)
        sent[home] += 1
    assert max(sent.values()) - min(sent.values()) <= BURST + 1


def test_a_replica_that_goes_is_forgotten_with_its_beginnings() -> None:
    known, parts = Beginnings(), parts_of(SYSTEM)
    known.note(parts, "gone")
    known.note(parts[:2], "stays")
    known.forget("gone")
    assert known.held(parts) == {"stays": 2}
    assert len(known) == 2


def test_what_was_not_asked_for_longest_is_forgotten_long_ends_first() -> None:
    known, first, second = Beginnings(most=5), parts_of("a" * 192), parts_of("b" * 192)
    known.note(first, "a")
    known.note(second, "b")
    assert len(known) == 5
    assert known.held(first) == {"a": 2}
    assert known.held(second) == {"b": 3}
    known.note(first, "a")
    known.note(parts_of("c" * 192), "c")
    assert known.held(first) == {"a": 2}
    assert known.held(second) == {}


def test_parts_are_whole_and_bounded_of_text_and_of_tokens() -> None:
    assert parts_of("a" * (PART_BYTES - 1)) == []
    assert len(parts_of("a" * 10**6)) == MOST_PARTS
    assert parts_of(list(range(40)))[:1] == parts_of(list(range(16)))
    assert len(parts_of(list(range(40)))) == 2
    assert part_of_session("one") == part_of_session("one") != part_of_session("two")


def test_without_replicas_nothing_fails() -> None:
    assert ranked({}, {}) == []


@pytest.mark.parametrize(
    ("requests", "kv_uses", "wanted"),
    [(32, [0.1, 0.1], 4.0), (4, [0.8, 0.8], 2.0), (4, [1.0, 1.0], 2.5), (0, [], 0.0)],
)
def test_replicas_follow_requests_and_pages(
    requests: float, kv_uses: list[float], wanted: float
) -> None:
    assert wanted_replicas(2, requests, 8, kv_uses) == pytest.approx(wanted)
