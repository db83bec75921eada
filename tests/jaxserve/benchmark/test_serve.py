"""Load on a server whose times are known."""

import asyncio

import pytest

from jaxserve.benchmark.metrics import Record, Slo
from jaxserve.benchmark.serve import ServeJob, measure, offer
from jaxserve.benchmark.serve_openai import Api, OpenAITarget, spread_tokens
from jaxserve.benchmark.serve_report import ServeResult
from jaxserve.benchmark.serve_target import CallError, TargetFacts
from jaxserve.benchmark.trace import TraceRequest
from jaxserve.errors import UsageError

SMALL = {"requests": 4, "seed": 1, "scale": 0.05}


def run(server, api=Api.COMPLETIONS, timeout_s=60.0, **job) -> ServeResult:
    target = OpenAITarget(server.url, api, timeout_s=timeout_s)
    return asyncio.run(measure(target, ServeJob(**{**SMALL, **job})))


def test_times_are_those_of_the_server(fake_server):
    result = run(fake_server(first_s=0.05, gap_s=0.01))
    records = result.runs[0].records
    assert [record.error for record in records] == [None] * 4
    for record in records:
        assert record.ttft_s >= 0.05
        assert record.tpot_s is None or record.tpot_s >= 0.01
        assert len(record.itl_s) == record.output_tokens - 1
    # Nothing was held back: most tokens came alone, each after its own pause.
    gaps = [gap for record in records for gap in record.itl_s]
    assert sum(gap > 0.005 for gap in gaps) > len(gaps) / 2


def test_requests_ask_for_the_lengths_that_were_given(fake_server):
    server = fake_server()
    fields = run(server, prompt_tokens=30, output_tokens=3).fields()
    asked = {(len(body["prompt"]), body["max_tokens"]) for body in server.bodies[1:]}
    assert asked == {(30, 3)}
    assert (fields["trace"]["prompt_tokens"], fields["trace"]["output_tokens"]) == (30, 3)


def test_every_request_asks_for_its_own_numbers_of_tokens(fake_server):
    server = fake_server()
    result = run(server)
    asked = [(len(body["prompt"]), body["max_tokens"]) for body in server.bodies[1:]]
    got = [(record.prompt_tokens, record.output_tokens) for record in result.runs[0].records]
    assert sorted(asked) == sorted(got)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)


def test_rates_have_the_same_lengths_and_other_prompts(fake_server):
    server = fake_server()
    result = run(server, rates=(200.0, 400.0))
    slow, fast = ([r.prompt_tokens for r in one.records] for one in result.runs)
    assert slow == fast
    prompts = [tuple(body["prompt"]) for body in server.bodies[1:]]
    assert len(set(prompts)) == len(prompts) == 8


def test_the_loop_is_open():
    """A request is sent at its time although no earlier one is answered."""

    class Silent:
        def __init__(self) -> None:
            self.open = 0
            self.all_open = asyncio.Event()

        async def call(self, request, record, clock):
            self.open += 1
            if self.open == 3:
                self.all_open.set()
            await self.all_open.wait()
            record.add(clock(), 1)

    trace = [TraceRequest((5,), 1, due) for due in (0.0, 0.01, 0.02)]

    async def go() -> list[Record]:
        async with asyncio.timeout(20):
            records, _, _ = await offer(Silent(), trace)
        return records

    records = asyncio.run(go())
    # All were answered at once, when the last had come, and waited from their own due times.
    assert records[0].ttft_s >= 0.02
    assert records[0].ttft_s > records[1].ttft_s > records[2].ttft_s


def test_a_bound_on_open_requests_is_kept_and_waiting_counts(fake_server):
    server = fake_server(first_s=0.02)
    result = run(server, concurrency=1)
    assert server.most_open == 1
    waits = sorted(record.ttft_s for record in result.runs[0].records)
    assert waits[-1] >= 4 * 0.02


def test_a_duration_gives_the_number_that_arrives_in_it():
    job = ServeJob(rates=(2.0, 5.0), duration_s=10)
    facts = TargetFacts("m", None, 50, "token ids", True, "usage")
    assert [spec.requests for spec in job.specs(facts)] == [20, 50]
    assert job.specs(facts)[0].vocab_size == 50


def test_refused_and_failed_requests_are_told_apart(fake_server):
    refused = run(fake_server(status=429)).fields()["rates"][0]
    assert (refused["completed"], refused["refused"], refused["failed"]) == (0, 4, 0)
    failed = run(fake_server(status=500)).fields()["rates"][0]
    assert (failed["completed"], failed["refused"], failed["failed"]) == (0, 0, 4)
    assert "HTTP 500" in next(iter(failed["errors"]))


def test_an_error_inside_a_stream_fails_the_request(fake_server):
    server = fake_server()
    target = OpenAITarget(server.url)

    async def go():
        await target.prepare()
        server.broken = True
        records, refused, _ = await offer(target, [TraceRequest((5, 6, 7, 8), 3, 0.0)])
        await target.close()
        return records, refused

    (record,), refused = asyncio.run(go())
    assert record.error and "the engine ended" in record.error
    assert record.output_tokens == 1
    assert refused == 0


def test_a_stream_that_ends_without_saying_so_is_not_trusted(fake_server):
    with pytest.raises(CallError, match=r"without \[DONE\]"):
        run(fake_server(ends=False))


def test_a_server_that_never_ends_fails_the_request(fake_server):
    server = fake_server()
    target = OpenAITarget(server.url, timeout_s=0.2)

    async def go():
        await target.prepare()
        server.gap_s = 60.0
        records, _, _ = await offer(target, [TraceRequest((5, 6, 7, 8), 3, 0.0)])
        await target.close()
        return records

    (record,) = asyncio.run(go())
    assert record.error and "no end after 0.2 s" in record.error


@pytest.mark.parametrize(
    ("rejects", "prompts", "ignore_eos", "counted"),
    [
        ((), "token ids", True, "usage"),
        (("prompt",), "words", True, "usage"),
        (("ignore_eos",), "token ids", False, "usage"),
        (("prompt", "ignore_eos"), "words", False, "usage"),
        (("prompt", "ignore_eos", "stream_options"), "words", False, "pieces"),
    ],
)
def test_what_a_server_does_not_take_is_left_out(
    fake_server, rejects, prompts, ignore_eos, counted
):
    result = run(fake_server(rejects=rejects))
    facts = result.facts
    assert (facts.prompts, facts.ignore_eos, facts.counted) == (prompts, ignore_eos, counted)
    assert result.errors == []


def test_a_server_that_takes_nothing_is_named_with_its_first_refusal(fake_server):
    with pytest.raises(CallError, match=r"every way to ask was refused.*temperature"):
        run(fake_server(rejects=("temperature",)))


def test_chats_are_words_and_their_first_piece_is_no_token(fake_server):
    server = fake_server(first_s=0.05)
    result = run(server, Api.CHAT)
    (words,) = [body["messages"][0]["content"] for body in server.bodies[:1]]
    assert len(words.split()) > 4
    assert all(record.ttft_s >= 0.05 for record in result.runs[0].records)
    contents = [body["messages"][0]["content"] for body in server.bodies]
    assert len(set(contents)) == len(contents)


def test_words_make_about_as_many_tokens_as_the_trace_has(fake_server):
    ids = run(fake_server()).runs[0].records
    words = run(fake_server(rejects=("prompt",), tokens_per_word=3)).runs[0].records
    for one, other in zip(ids, words, strict=True):
        assert abs(one.prompt_tokens - other.prompt_tokens) <= 2


def test_tokens_that_come_together_are_all_counted(fake_server):
    server = fake_server(tokens_per_piece=3)
    result = run(server)
    asked = sorted(body["max_tokens"] for body in server.bodies[1:])
    assert sorted(record.output_tokens for record in result.runs[0].records) == asked
    assert all(
        len(record.times_s) == -(-record.output_tokens // 3) for record in result.runs[0].records
    )


def test_tokens_are_spread_evenly_over_the_pieces():
    record = Record(0.0, 1, times_s=[1.0, 2.0, 3.0], counts=[1, 1, 1])
    spread_tokens(record, 7)
    assert record.counts == [2, 2, 3]
    spread_tokens(record, 2)
    assert record.counts == [0, 1, 1]


def test_connections_are_used_again_and_carry_the_key(fake_server):
    server = fake_server()
    target = OpenAITarget(server.url + "/v1/", api_key="secret")
    asyncio.run(measure(target, ServeJob(**SMALL, concurrency=1)))
    assert server.connections == 1
    assert all("authorization: bearer secret\r\n" in head for head in server.headers)


def test_the_cost_of_asking_is_reported(fake_server):
    client = run(fake_server(gap_s=0.001)).fields()["rates"][0]["client"]
    assert 0 < client["cpu_s"] < 10
    assert client["cpu_us_per_token"] > 0
    assert client["late_s"]["p50"] >= 0


def test_goodput_counts_requests_within_the_limits(fake_server):
    server = fake_server(first_s=0.05)
    good = run(server, slo=Slo(60.0, 60.0)).fields()["rates"][0]["goodput"]
    assert good["fraction"] == 1.0
    bad = run(server, slo=Slo(0.04, None)).fields()["rates"][0]["goodput"]
    assert bad["fraction"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "no rate"),
        ({"rates": (0.0,)}, "rate=0.0"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"duration_s": 0.0, "rates": (1.0,)}, "duration=0 s"),
        ({"duration_s": 5.0}, "a duration needs a rate"),
        ({"requests": 0}, "requests=0"),
        ({"scale": -1.0}, "scale=-1.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(UsageError, match=message):
        ServeJob(**change)
