"""What streaming over gRPC costs, beside the same engine in its own process.

    python benchmarks/grpc_streams.py [--streams 32] [--tokens 400] [--step-ms 6] [--json]

The engine runs the model that is none, whose steps take a fixed time and little of the processor,
so that the servers' own work shows. The client has a process of its own, on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from typing import Any

from jaxserve.client import AsyncClient
from jaxserve.serving.answer import Answer
from jaxserve.serving.fake_service import fake_service
from jaxserve.serving.pages import GroupLimits
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.rpc.fake_server import fake_server


@dataclass(frozen=True)
class Load:
    """What is asked of a server."""

    streams: int
    tokens: int
    step_s: float

    @property
    def service(self) -> dict[str, Any]:
        """Returns how the engine is sized: every stream has a slot."""
        pages = self.streams * (self.tokens // 16 + 2)
        return {
            "step_s": self.step_s,
            "num_slots": self.streams,
            "max_step_tokens": 8 * self.streams,
            "groups": (GroupLimits(num_pages=pages),),
        }


@dataclass(frozen=True)
class Figures:
    """What came of it; `cpu_s` is the server's."""

    seconds: float
    messages: int
    tokens: int
    cpu_s: float
    steps: int


async def read_in_process(load: Load) -> Figures:
    """Reads all streams where the engine is."""
    params = SamplingParams(max_tokens=load.tokens, temperature=0.0, ignore_eos=True)
    sizes: list[int] = []

    async def read(index: int) -> None:
        request = service.intake.request([index % 250, 1, 2], params)
        async with await Answer.open(service, request) as answer:
            async for deltas in answer.steps():
                sizes.extend(len(delta.token_ids) for delta in deltas)

    async with fake_service(**load.service) as service:
        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*map(read, range(load.streams)))
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        return Figures(seconds, len(sizes), sum(sizes), cpu_s, service.engine.metrics.steps)


def read_over_grpc(load: Load) -> Figures:
    """Reads all streams from another process."""
    context = multiprocessing.get_context("spawn")
    with fake_server(**load.service) as server:
        answers = context.Queue()
        client = context.Process(target=_client, args=(server.target, load, answers))
        client.start()
        answers.get()  # it is connected
        cpu = time.process_time()
        seconds, messages, tokens = answers.get()
        cpu_s = time.process_time() - cpu
        client.join()
        return Figures(seconds, messages, tokens, cpu_s, server.service.engine.metrics.steps)


def _client(target: str, load: Load, answers: Any) -> None:
    sizes: list[int] = []

    async def run() -> None:
        async with AsyncClient(target) as client:

            async def read(index: int) -> None:
                stream = client.stream(
                    [index % 250, 1, 2], max_tokens=load.tokens, temperature=0.0, ignore_eos=True
                )
                sizes.extend([len(chunk.token_ids) async for chunk in stream])

            await client.load()
            answers.put(None)
            began = time.perf_counter()
            await asyncio.gather(*map(read, range(load.streams)))
            answers.put((time.perf_counter() - began, len(sizes), sum(sizes)))

    asyncio.run(run())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures streaming over gRPC.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=6.0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    load = Load(asked.streams, asked.tokens, asked.step_ms / 1000)
    inside, outside = asyncio.run(read_in_process(load)), read_over_grpc(load)
    per_message_us = (outside.cpu_s - inside.cpu_s) / outside.messages * 1e6
    if asked.json:
        figures = {"in_process": asdict(inside), "grpc": asdict(outside)}
        print(json.dumps(figures | {"cpu_us_per_message": per_message_us}))
        return
    for name, one in (("in process", inside), ("gRPC", outside)):
        print(
            f"{name:12} {one.tokens / one.seconds:7.0f} tokens/s "
            f"{one.messages / one.seconds:7.0f} messages/s  {one.steps} steps"
        )
    print(f"a message costs the server {per_message_us:.0f} us of a core")


if __name__ == "__main__":
    main()
