"""Two replicas of a model on a local Ray cluster: streams, HTTP, routing, and a dead replica."""

import asyncio
import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import count
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed")

from jaxserve import load
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.wire import Start

from .test_multihost_faults import free_port, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
    pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
]

WAIT_S = 180.0
SMALL = EngineOptions(max_sequences=4, max_step_tokens=32, kv_bytes=16 << 20)
PROMPTS = ("def area(w, h):\n    return", "import os\n", "class Stack:\n    def push(self")
BEGINNINGS = [f"# Part {index} of a program that adds numbers.\n" * 6 for index in range(12)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[Any, int]]:
    """Yields the handle of two replicas and the port of Ray's proxy."""
    import ray  # pyright: ignore[reportMissingImports]
    from ray import serve  # pyright: ignore[reportMissingImports]

    from jaxserve.serving.ray_serve import Replica, application

    class Told(Replica):
        """A replica that tells its process; the router takes the prompt as it does of any call."""

        async def where(self, prompt: str) -> int:
            return os.getpid()

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = application(
            Start("tiny", options=SMALL), replica=Told, num_replicas=2, actor={"num_cpus": 0.5}
        )
        yield serve.run(app), port
    finally:
        serve.shutdown()
        ray.shutdown()


def test_streams_have_the_tokens_of_generate(cluster: tuple[Any, int]) -> None:
    handle = cluster[0].options(stream=True)
    llm = load("tiny")
    for prompt in PROMPTS:
        out = llm.generate(prompt, max_tokens=16, temperature=0.0)
        deltas = list(handle.generate.remote(prompt, max_tokens=16, temperature=0.0))
        assert [token for delta in deltas for token in delta["token_ids"]] == list(out.token_ids)
        assert "".join(delta["text"] for delta in deltas) == out.text
        assert deltas[-1]["finish_reason"] == out.finish_reason
        assert len(deltas) > 2


def test_the_proxy_serves_the_routes_of_a_server(cluster: tuple[Any, int]) -> None:
    out = load("tiny").generate(PROMPTS[0], max_tokens=8, temperature=0.0)
    asked = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster[1]}/v1/completions",
        json.dumps(asked | {"stream": True}).encode(),
        {"content-type": "application/json", "x-session-id": "one"},
    )
    with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
        lines = [line[6:] for line in answer.read().decode().split("\n") if line.startswith("data")]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(pieces) == out.text


def test_many_requests_bring_another_replica(cluster: tuple[Any, int]) -> None:
    from ray import serve  # pyright: ignore[reportMissingImports]

    from jaxserve.serving.fake_service import remote_fake
    from jaxserve.serving.ray_serve import Replica, application

    class Fake(Replica):
        """A replica without a model, whose steps take long."""

        def _make(self, start: Start, options: Any) -> Any:
            return remote_fake(step_s=0.5)

    app = application(
        Start("fake"), replica=Fake, max_replicas=2, requests_each=2, actor={"num_cpus": 0.1}
    )
    handle = serve.run(app, name="scaled", route_prefix="/scaled").options(stream=True)
    assert running("scaled") == 1
    streams = [
        handle.generate.remote("abc", max_tokens=480, temperature=0.0, ignore_eos=True)
        for _ in range(8)
    ]
    wait(lambda: running("scaled") == 2, WAIT_S)
    for stream in streams:
        stream.cancel()
    serve.delete("scaled")


def test_a_replica_outlives_its_engine_while_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jaxserve.serving import ray_serve
    from jaxserve.serving.fake_service import remote_fake
    from jaxserve.serving.server_options import ServerOptions
    from jaxserve.serving.supervisor import Backoff

    service = remote_fake(Backoff(first_s=1000.0))

    class Lost(ray_serve.Replica):
        """A replica whose engine does not come back."""

        def _make(self, start: Start, options: Any) -> Any:
            return service

    async def work() -> None:
        replica: Any = Lost.__new__(Lost)
        await replica.__init__(Start("fake"), ServerOptions(model_name="fake"), start_s=50.0)
        await replica.check_health()
        os.kill(service.engine_pid or 0, signal.SIGKILL)
        while not service.failed:
            await asyncio.sleep(0.01)
        await replica.check_health()
        now = time.monotonic()
        monkeypatch.setattr(ray_serve.time, "monotonic", lambda: now + 49)
        await replica.check_health()
        monkeypatch.setattr(ray_serve.time, "monotonic", lambda: now + 51)
        with pytest.raises(RuntimeError, match="SIGKILL"):
            await replica.check_health()
        monkeypatch.undo()
        await service.stop()

    asyncio.run(asyncio.wait_for(work(), WAIT_S))


def running(name: str) -> int:
    """Returns how many replicas of an application run."""
    from ray import serve  # pyright: ignore[reportMissingImports]

    (deployment,) = serve.status().applications[name].deployments.values()
    return deployment.replica_states.get("RUNNING", 0)


def test_wrong_calls_are_told_apart_from_failures(cluster: tuple[Any, int]) -> None:
    with pytest.raises(Exception, match="temperature"):
        list(cluster[0].options(stream=True).generate.remote("a", temperature=-1.0))


def test_prompts_go_to_where_their_beginning_is_also_after_a_death(
    cluster: tuple[Any, int],
) -> None:
    handle = cluster[0]

    def homes(end: str) -> list[int]:
        return [handle.where.remote(start + end).result() for start in BEGINNINGS]

    first = homes("one end")
    assert len(set(first)) == 2
    assert homes("another end") == first
    victim = first[0]
    os.kill(victim, signal.SIGKILL)
    # The other replica takes all meanwhile; what it had stays with it.
    after = homes("a third end")
    assert victim not in after
    assert all(now == then for now, then in zip(after, first, strict=True) if then != victim)
    fresh = count()

    def both() -> bool:
        """Returns whether prompts that nobody has seen go to two replicas."""
        found = {handle.where.remote(f"{next(fresh)} new. " * 20).result() for _ in range(8)}
        return victim not in found and len(found) == 2

    wait(both, WAIT_S)
    deltas = list(handle.options(stream=True).generate.remote(PROMPTS[0], max_tokens=4))
    assert deltas[-1]["finish_reason"]
