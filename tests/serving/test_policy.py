"""Waiting requests start in the order of their policy."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.serving import policy as policies
from jaxserve.serving.policy import FairByClient, OldestFirst, Policy, cost, make_policy
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.sequence import Sequence

ARRIVALS = iter(range(1, 10**9))


def waiting(
    client: str = "", priority: int = 0, prompt: int = 10, max_tokens: int = 10, n: int = 1
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, seed=0, n=n)
    arrival = next(ARRIVALS)
    request = Request(
        id=str(arrival),
        prompt=tuple(range(prompt)),
        params=params,
        client=client,
        priority=priority,
    )
    return Sequence(request, 0, prompt + max_tokens, arrival)


def filled(policy: Policy, *sequences: Sequence) -> Policy:
    for sequence in sequences:
        policy.push(sequence)
    return policy


def clients(policy: Policy, count: int) -> str:
    """Returns whose requests start next."""
    return "".join(policy.pop().request.client for _ in range(count))


@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_the_oldest_of_one_client_starts_first(name: policies.PolicyName) -> None:
    a, b, c = waiting(), waiting(), waiting()
    policy = filled(make_policy(name, {}), a, b, c)
    assert policy.head() is a
    assert [policy.pop() for _ in range(3)] == [a, b, c]
    assert policy.head() is None
    assert len(policy) == 0


@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_a_lower_priority_number_goes_first(name: policies.PolicyName) -> None:
    late, urgent, usual = waiting(priority=1), waiting(priority=-2), waiting()
    policy = filled(make_policy(name, {}), late, urgent, usual)
    assert [policy.pop() for _ in range(3)] == [urgent, usual, late]


@pytest.mark.parametrize("name", ["fcfs", "fair"])
def test_a_removed_request_never_starts(name: policies.PolicyName) -> None:
    a, b, c = waiting("a"), waiting("b"), waiting("a")
    policy = filled(make_policy(name, {}), a, b, c)
    policy.remove(a)
    assert set(policy) == {b, c}
    assert {policy.pop(), policy.pop()} == {b, c}


def test_a_request_costs_its_prompt_and_all_its_output() -> None:
    assert cost(waiting(prompt=7, max_tokens=5)) == 12
    assert cost(waiting(prompt=7, max_tokens=5, n=3)) == 22


def test_oldest_first_does_not_look_at_clients() -> None:
    policy = filled(OldestFirst(), *(waiting(client) for client in "aaab"))
    assert clients(policy, 4) == "aaab"


def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    policy = filled(FairByClient({}), *(waiting(client) for client in "aaaaabb"))
    assert clients(policy, 7) == "ababaaa"


def test_shares_follow_the_weights() -> None:
    policy = filled(FairByClient({"a": 2.0}), *(waiting(c) for c in "a" * 40 + "b" * 40))
    assert Counter(clients(policy, 30)) == {"a": 20, "b": 10}


def test_long_requests_count_for_more() -> None:
    long = [waiting("a", prompt=30, max_tokens=30) for _ in range(10)]
    short = [waiting("b", prompt=10, max_tokens=10) for _ in range(30)]
    policy = filled(FairByClient({}), *long, *short)
    assert Counter(clients(policy, 20)) == {"a": 5, "b": 15}


def test_output_that_was_not_generated_is_given_back() -> None:
    policy = FairByClient({"b": 2.0})
    first = waiting("a", max_tokens=90)
    filled(policy, first, waiting("a"), waiting("b", max_tokens=90), waiting("b"))
    assert clients(policy, 2) == "ab"  # a has 100 on its account, b 50
    policy.refund(first, 80)
    assert clients(policy, 1) == "a"


def test_waiting_saves_up_no_claim() -> None:
    policy = filled(FairByClient({}), *(waiting("a") for _ in range(20)))
    assert clients(policy, 10) == "a" * 10
    filled(policy, *(waiting("b") for _ in range(10)))
    assert clients(policy, 8) in ("babababa", "abababab")


def test_nobody_waits_for_the_whole_queue_of_a_client_that_was_given_back() -> None:
    long = [waiting("a", max_tokens=4000) for _ in range(4)]
    policy = filled(FairByClient({}), *long, *(waiting("a") for _ in range(100)))
    assert clients(policy, 4) == "aaaa"
    for sequence in long:
        policy.refund(sequence, 3999)  # they ended after a token
    policy.push(waiting("b"))
    assert "b" in clients(policy, 2)


def test_low_accounts_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "REMEMBERED_CLIENTS", 4)
    policy = FairByClient({})
    for number in range(100):
        policy.push(waiting(str(number)))
        policy.pop()
    assert len(policy._accounts) <= 10


def test_a_high_account_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies, "REMEMBERED_CLIENTS", 4)
    policy = filled(FairByClient({}), waiting("greedy", prompt=10_000))
    policy.pop()
    for number in range(50):
        policy.push(waiting(str(number)))
        policy.pop()
    filled(policy, waiting("greedy"), waiting("new"))
    assert clients(policy, 1) == "new"


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(1, 50), st.integers(1, 50)),
        min_size=30,
        max_size=60,
    )
)
def test_clients_that_always_wait_never_differ_by_more_than_two_requests(
    requests: list[tuple[str, int, int]],
) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    policy = FairByClient(weights)
    for client, prompt, output in requests:
        policy.push(waiting(client, prompt=prompt, max_tokens=output))
    left = Counter(client for client, _, _ in requests)
    served = dict.fromkeys(left, 0.0)
    while all(left.values()):
        taken = policy.pop()
        client = taken.request.client
        left[client] -= 1
        served[client] += cost(taken) / weights[client]
        bound = 100 / min(weights[c] for c in served)
        assert max(served.values()) - min(served.values()) <= bound
