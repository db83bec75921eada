"""Events of requests between the engine and their readers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from jaxserve.errors import DeadlineError, UnavailableError, UsageError
from jaxserve.serving.answer import Answer
from jaxserve.serving.fake_service import fake_intake, fake_service
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.streams import Streams


class Desk:
    """Streams, and what they ask of the engine."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.streams = Streams(
            lambda *args: self.asked.append(("abort", *args)),
            lambda *args: self.asked.append(("finish", *args)),
        )


def request(name: str, n: int = 1) -> Request:
    params = SamplingParams(n=n, temperature=1.0, max_tokens=9, seed=1, ignore_eos=True)
    return fake_intake().request("abc", params, id=name)


def run(work: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work(Desk()), 30.0)

    asyncio.run(main())


def test_a_turn_gives_all_that_came_since_the_last() -> None:
    async def work(desk: Desk) -> None:
        stream = desk.streams.open(request("r", n=2))
        first, second, last = (
            TokenEvent("r", 0, (1,)),
            TokenEvent("r", 1, (2,), "length"),
            TokenEvent("r", 0, (3,), "stop"),
        )
        desk.streams.route([first, TokenEvent("other", 0, (9,)), second])
        assert await anext(stream) == [first, second]
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        assert not waiting.done()
        desk.streams.route([last, TokenEvent("r", 0, (4,))])  # none after the last counts
        assert await waiting == [last]
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert len(desk.streams) == 0
        assert desk.asked == []

    run(work)


def test_closing_aborts_once_and_only_what_is_not_over() -> None:
    async def work(desk: Desk) -> None:
        stream = desk.streams.open(request("r"))
        stream.close()
        stream.close()
        assert desk.asked == [("abort", "r")]
        over = desk.streams.open(request("s"))
        desk.streams.route([TokenEvent("s", 0, finish_reason="stop")])
        over.close()
        assert desk.asked == [("abort", "r")]

    run(work)


def test_a_stop_string_ends_a_sample() -> None:
    async def work(desk: Desk) -> None:
        stream = desk.streams.open(request("r", n=2))
        stream.finish(0, 3)
        stream.finish(0, 3)
        assert desk.asked == [("finish", "r", 0, 3)]
        assert not stream.over
        stream.finish(1, 4)
        assert stream.over

    run(work)


def test_an_id_is_one_open_request_and_free_afterwards() -> None:
    async def work(desk: Desk) -> None:
        first = desk.streams.open(request("r"))
        with pytest.raises(UsageError, match="open already"):
            desk.streams.open(request("r"))
        desk.streams.route([TokenEvent("r", 0, finish_reason="stop")])
        second = desk.streams.open(request("r"))
        first.close()  # late, as when a handler ends after the next one began
        event = TokenEvent("r", 0, (5,), "stop")
        desk.streams.route([event])
        assert await anext(second) == [event]

    run(work)


def test_an_error_comes_after_what_was_there() -> None:
    async def work(desk: Desk) -> None:
        stream = desk.streams.open(request("r"))
        event = TokenEvent("r", 0, (1,))
        desk.streams.route([event])
        desk.streams.fail_all(UnavailableError("gone"))
        assert await anext(stream) == [event]
        with pytest.raises(UnavailableError, match="gone"):
            await anext(stream)
        assert await desk.streams.empty(0.0)

    run(work)


def test_a_deadline_aborts_what_is_late() -> None:
    async def work(desk: Desk) -> None:
        stream = desk.streams.open(request("r"), deadline_s=0.01)
        with pytest.raises(DeadlineError, match=r"0\.01 s"):
            await anext(stream)
        assert desk.asked == [("abort", "r")]

    run(work)


def test_an_answer_has_text_usage_and_one_delta_a_sample() -> None:
    async def work(_: Desk) -> None:
        async with fake_service() as service:
            asked = SamplingParams(n=3, temperature=1.0, max_tokens=6, seed=5, ignore_eos=True)
            made = service.intake.request("abc", asked)
            async with await Answer.open(service, made) as answer:
                while not answer._stream.over:
                    await asyncio.sleep(0.001)
                deltas = [delta async for delta in answer]
            rule: Any = service.engine._runner
            for index, delta in enumerate(deltas):
                tokens = rule.rule.continue_prompt(made.prompt, made.params, 6, index)
                assert delta.sample_index == index
                assert list(delta.token_ids) == tokens
                assert delta.text == bytes(tokens).decode("utf-8", "replace")
                assert delta.finish_reason == "length"
            usage = answer.usage
            assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (3, 18, 21)
            assert answer.seed == 5
            assert usage.queue_s is not None and usage.queue_s >= 0
            assert usage.decode_s is not None and usage.decode_s > 0

    run(work)


def test_a_stop_string_cuts_text_and_frees_the_engine() -> None:
    async def work(_: Desk) -> None:
        async with fake_service() as service:
            free = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
            async with await Answer.open(service, service.intake.request("abc", free)) as answer:
                (whole,) = await answer.completions()
            stop = whole.text[20:23]
            cut = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, stop=(stop,))
            async with await Answer.open(service, service.intake.request("abc", cut)) as answer:
                (done,) = await answer.completions()
            assert done.text == whole.text[: whole.text.index(stop)]
            assert done.finish_reason == "stop"
            while service.engine.busy:
                await asyncio.sleep(0.001)
            assert service.metrics().gauges["pages_held"] == 0

    run(work)
