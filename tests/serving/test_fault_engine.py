"""The engine's process dies, hangs or is asked too much; what its callers see of that."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jaxserve.errors import (
    CapacityError,
    DeadlineError,
    JaxserveError,
    QueueFullError,
    UnavailableError,
)
from jaxserve.serving import engine_child, streams
from jaxserve.serving.answer import Answer
from jaxserve.serving.fake_service import fake_card, fake_intake, fake_service, remote_fake
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.service import Service, State
from jaxserve.serving.supervisor import Backoff, RemoteService
from jaxserve.serving.wire import Start

WAIT_S = 60.0
QUICK = Backoff(first_s=0.05)
HANG_ID, DIE_ID = 200, 201


def run(work: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work, 2 * WAIT_S)

    return asyncio.run(bounded())


def pause(pid: int) -> None:
    """Stops a child process, and waits until it does nothing more."""
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)


@asynccontextmanager
async def remote(**fields: Any) -> AsyncIterator[RemoteService]:
    service = remote_fake(QUICK, **fields)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def asked(service: Service, prompt: str | list[int] = "abc", max_tokens: int = 8) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    return service.intake.request(prompt, params)


async def count(service: Service, request: Request) -> int:
    """Returns how many tokens a request gets."""
    async with await Answer.open(service, request) as answer:
        return sum([len(delta.token_ids) async for delta in answer])


async def until(true: Callable[[], bool], wait_s: float = WAIT_S) -> float:
    """Returns the seconds until something is true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < wait_s, "it never came true"
        await asyncio.sleep(0.01)
    return time.monotonic() - began


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_killed_engine_is_replaced_and_only_what_had_started_fails() -> None:
    async def work() -> None:
        async with remote(step_s=0.01, num_slots=2) as service:
            tasks = [asyncio.create_task(count(service, asked(service, "abc", 200)))]
            tasks += [asyncio.create_task(count(service, asked(service))) for _ in range(1)]
            await until(lambda: service.metrics().gauges["running"] > 0)
            long = [asyncio.create_task(count(service, asked(service, "x", 300))) for _ in range(6)]
            await until(lambda: len(service._sent) >= 6)
            await until(lambda: sum(sent.started for sent in service._sent.values()) == 2)
            assert service.engine_pid is not None
            os.kill(service.engine_pid, signal.SIGKILL)
            noticed_s = await until(lambda: service.state is not State.READY)
            assert noticed_s < 1.0
            assert "SIGKILL" in service.reason
            with pytest.raises(UnavailableError, match="started again"):
                await service.submit(asked(service))
            results = await asyncio.gather(*tasks, *long, return_exceptions=True)
            failed = [r for r in results if isinstance(r, UnavailableError)]
            assert len(failed) == 2
            assert all("SIGKILL" in str(error) for error in failed)
            assert results.count(300) + results.count(200) + results.count(8) == len(results) - 2
            assert service.state is State.READY
            assert service.restarts == 1
            assert service.metrics().counters["engine_restarts"] == 1
            assert await count(service, asked(service)) == 8

    run(work())


def test_what_was_sent_again_is_not_sent_a_third_time() -> None:
    async def work() -> None:
        async with remote(step_s=0.02, num_slots=1) as service:
            first = asyncio.create_task(count(service, asked(service, "abc", 500)))
            await until(lambda: any(sent.started for sent in service._sent.values()))
            waiting = [
                asyncio.create_task(count(service, asked(service, "x", 500))) for _ in range(2)
            ]
            await until(lambda: len(service._sent) == 3)
            for restarts in (1, 2):
                assert service.engine_pid is not None
                os.kill(service.engine_pid, signal.SIGKILL)
                await until(lambda n=restarts: service.restarts == n)
                await until(lambda: service.state is State.READY)
            results = await asyncio.gather(first, *waiting, return_exceptions=True)
            assert all(isinstance(result, UnavailableError) for result in results)

    run(work())


def test_a_request_that_kills_the_engine_fails_alone() -> None:
    async def work() -> None:
        async with remote(step_s=0.005, die_id=DIE_ID) as service:
            with pytest.raises(UnavailableError, match="status 3"):
                await count(service, asked(service, [DIE_ID]))
            await until(lambda: service.state is State.READY)
            assert service.restarts == 1
            assert await count(service, asked(service)) == 8
            assert service.restarts == 1

    run(work())


def test_a_stopped_engine_is_noticed_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "SILENCE_S", 2.0)

    async def work() -> None:
        async with remote(step_s=0.005) as service:
            task = asyncio.create_task(count(service, asked(service, "abc", 500)))
            await until(lambda: any(sent.started for sent in service._sent.values()))
            pid = service.engine_pid
            assert pid is not None
            pause(pid)
            assert await until(lambda: service.state is not State.READY) > 1.0
            assert "no sign of life for 2 s" in service.reason
            with pytest.raises(UnavailableError, match="no sign of life"):
                await task
            await until(lambda: service.state is State.READY)
            assert gone(pid)
            assert await count(service, asked(service)) == 8

    run(work())


def test_a_step_that_never_ends_is_a_stall() -> None:
    async def work() -> None:
        async with remote(hang_id=HANG_ID) as service:
            task = asyncio.create_task(count(service, asked(service, [HANG_ID])))
            taken_s = await until(lambda: service.state is not State.READY)
            assert taken_s > 4.0
            assert "a step has taken more than 5 s" in service.reason
            with pytest.raises(UnavailableError):
                await task
            await until(lambda: service.state is State.READY)
            assert await count(service, asked(service)) == 8

    run(work())


def test_a_request_larger_than_the_pool_is_refused_and_others_are_served() -> None:
    async def work() -> None:
        groups = fake_pool(pages=4)
        async with remote(groups=groups) as service:
            with pytest.raises(CapacityError, match="need 7 pages"):
                await service.submit(asked(service, "x" * 40, 70))
            assert await count(service, asked(service)) == 8

    run(work())


def fake_pool(pages: int) -> Any:
    from jaxserve.serving.pages import GroupLimits

    return (GroupLimits(num_pages=pages),)


def test_a_full_queue_is_refused_with_its_limit() -> None:
    async def work() -> None:
        async with remote(step_s=0.05, num_slots=1, max_queued_requests=2) as service:
            tasks = [asyncio.create_task(count(service, asked(service, "x", 30)))]
            await until(lambda: any(sent.started for sent in service._sent.values()))
            tasks += [asyncio.create_task(count(service, asked(service))) for _ in range(2)]
            await until(lambda: len(service._sent) == 3)
            with pytest.raises(QueueFullError, match="max_queued_requests=2") as caught:
                await service.submit(asked(service))
            assert caught.value.retry_after_s > 0
            assert await asyncio.gather(*tasks) == [30, 8, 8]

    run(work())


def test_an_engine_that_cannot_be_made_says_why() -> None:
    async def work() -> None:
        with pytest.raises(JaxserveError, match="the engine failed"):
            async with remote(no_such_field=1):
                pass
        broken = RemoteService(
            Start("none"), fake_intake(), fake_card(), (sys.executable, "-c", "raise SystemExit(7)")
        )
        with pytest.raises(JaxserveError, match="status 7"):
            await broken.start()
        await broken.stop()
        assert broken.state is State.DEAD

    run(work())


UNMADE = """
import sys
from jaxserve.errors import CheckpointError
from jaxserve.serving.engine_process import serve

def build(start, phase):
    raise CheckpointError("/secret/place/model.safetensors is gone")

sys.exit(serve(int(sys.argv[1]), build))
"""


def test_an_engine_that_cannot_be_made_again_tells_no_paths() -> None:
    async def work() -> None:
        async with remote() as service:
            assert service.engine_pid is not None
            service._command = (sys.executable, "-c", UNMADE)
            os.kill(service.engine_pid, signal.SIGKILL)
            await until(lambda: "cannot be made" in service.reason)
            assert service.state is State.DEAD
            assert "secret" not in service.reason
            with pytest.raises(UnavailableError) as refused:
                await service.submit(asked(service))
            assert "secret" not in str(refused.value)

    run(work())


def test_a_beam_search_that_is_to_lose_a_beam_harms_nobody() -> None:
    async def work() -> None:
        async with remote(step_s=0.02) as service:
            params = SamplingParams(max_tokens=30, ignore_eos=True, temperature=0.0)
            beams = service.intake.request("abc", params, beam_width=2)
            stream = await service.submit(beams)
            stream.finish(0, 1)
            assert await count(service, asked(service)) == 8
            assert service.restarts == 0
            stream.close()

    run(work())


def test_a_stop_before_the_engine_is_ready_ends_the_start() -> None:
    async def work() -> None:
        service = remote_fake()
        start = asyncio.create_task(service.start())
        await until(lambda: service.engine_pid is not None)
        pid = service.engine_pid
        assert pid is not None
        await service.stop()
        with pytest.raises(UnavailableError, match="stopped"):
            await start
        assert gone(pid)

    run(work())


def test_an_interrupt_does_not_reach_an_engine_that_is_about_to_start() -> None:
    async def work() -> None:
        service = remote_fake()
        start = await service.launch()
        assert service.engine_pid is not None
        os.kill(service.engine_pid, signal.SIGINT)
        await start
        os.kill(service.engine_pid, signal.SIGINT)
        assert await count(service, asked(service)) == 8
        assert service.restarts == 0
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        await service.stop()

    run(work())


def test_a_stop_fails_what_is_under_way_and_leaves_no_process() -> None:
    async def work() -> None:
        service = remote_fake(step_s=0.02)
        await service.start()
        task = asyncio.create_task(count(service, asked(service, "abc", 500)))
        await until(lambda: any(sent.started for sent in service._sent.values()))
        pid = service.engine_pid
        assert pid is not None
        await service.stop(grace_s=0.05)
        with pytest.raises(UnavailableError, match="stopped before"):
            await task
        assert gone(pid)

    run(work())


def test_a_drain_lets_requests_under_way_end() -> None:
    async def work() -> None:
        async with remote(step_s=0.01) as service:
            task = asyncio.create_task(count(service, asked(service, "abc", 50)))
            await until(lambda: any(sent.started for sent in service._sent.values()))
            service.drain()
            assert service.state is State.DRAINING
            with pytest.raises(UnavailableError, match="no new requests"):
                await service.submit(asked(service))
            await service.stop(grace_s=WAIT_S)
            assert await task == 50

    run(work())


def test_the_engine_does_not_outlive_a_server_that_is_killed() -> None:
    code = (
        "import asyncio, os, signal\n"
        "from jaxserve.serving.fake_service import remote_fake\n"
        "async def work():\n"
        "    service = remote_fake()\n"
        "    await service.start()\n"
        "    print(service.engine_pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(work())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    run(until(lambda: gone(int(done.stdout))))


@pytest.mark.parametrize("far", [False, True], ids=["in_process", "own_process"])
def test_leaving_an_answer_frees_its_pages_within_two_steps(far: bool) -> None:
    async def work() -> None:
        fields: dict[str, Any] = {"step_s": 0.03, "prefix_cache": False}
        async with remote(**fields) if far else fake_service(**fields) as service:
            other = asyncio.create_task(count(service, asked(service, "x", 200)))
            async with await Answer.open(service, asked(service, "y" * 60, 400)) as answer:
                async for _ in answer:
                    load = await service.load()
                    if load.total_pages - load.free_pages >= 5:
                        break
            left = steps(service)
            load = await service.load()
            while load.total_pages - load.free_pages > 3 and not other.done():
                load = await service.load()
            assert not other.done()
            assert steps(service) - left <= 3  # one of them was under way when it left
            other.cancel()

    def steps(service: Service) -> float:
        return service.metrics().counters["steps"]

    run(work())


def test_a_slow_reader_gets_all_at_once_and_holds_up_nobody() -> None:
    async def work() -> None:
        async with remote() as service:
            async with await Answer.open(service, asked(service, "abc", 300)) as slow:
                assert await count(service, asked(service)) == 8
                await until(lambda: slow._stream.over)
                deltas = [delta async for delta in slow]
            assert len(deltas) == 1
            assert len(deltas[0].token_ids) == 300
            assert deltas[0].finish_reason == "length"

    run(work())


def test_a_reader_too_far_behind_loses_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_PENDING", 50)

    async def work() -> None:
        async with fake_service() as service:
            async with await Answer.open(service, asked(service, "abc", 300)) as slow:
                await until(lambda: slow._stream.over)
                with pytest.raises(QueueFullError, match="read faster"):
                    async for _ in slow:
                        pass
            await until(lambda: service.metrics().gauges["pages_held"] == 0)

    run(work())


def test_a_late_answer_is_aborted() -> None:
    async def work() -> None:
        async with remote(step_s=0.02) as service:
            with pytest.raises(DeadlineError, match=r"not ready after 0\.2 s"):
                async with await Answer.open(service, asked(service, "abc", 400), 0.2) as answer:
                    async for _ in answer:
                        pass
            await until(lambda: not service._sent)
            while (load := await service.load()).free_pages < load.total_pages:
                await asyncio.sleep(0.01)

    run(work())


def test_a_deadline_that_the_queue_cannot_keep_is_refused_at_once() -> None:
    async def work() -> None:
        async with fake_service(step_s=0.02, num_slots=1) as service:
            tasks = [
                asyncio.create_task(count(service, asked(service, "x", 10))) for _ in range(30)
            ]
            await until(lambda: service.metrics().gauges["expected_wait_s"] > 1.0)
            with pytest.raises(DeadlineError, match="requests wait about"):
                await service.submit(asked(service), deadline_s=0.5)
            await service.submit(asked(service), deadline_s=WAIT_S)
            for task in tasks:
                task.cancel()

    run(work())


def test_a_burst_at_an_idle_engine_is_within_every_deadline() -> None:
    async def work() -> None:
        async with fake_service(num_slots=2) as service:
            opened = [service.submit(asked(service), deadline_s=WAIT_S) for _ in range(40)]
            for stream in await asyncio.gather(*opened):
                stream.close()

    run(work())


def test_a_cancelled_submit_leaves_nothing_behind() -> None:
    async def work() -> None:
        async with remote(step_s=0.01) as service:
            assert service.engine_pid is not None
            pause(service.engine_pid)
            task = asyncio.create_task(service.submit(asked(service, "abc", 500)))
            await until(lambda: len(service._sent) == 1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            os.kill(service.engine_pid, signal.SIGCONT)
            assert not service._sent
            while (load := await service.load()).running or load.waiting:
                await asyncio.sleep(0.01)
            assert load.free_pages == load.total_pages

    run(work())
