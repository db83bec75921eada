"""A client of a jaxserve server, over gRPC. It needs grpcio and protobuf, and no JAX.

    from jaxserve.client import Client

    with Client("localhost:8001") as client:
        print(client.generate("def f(", max_tokens=32).completions[0].text)
        for chunk in client.stream("def f(", max_tokens=32):
            print(chunk.text, end="")

A prompt is text, token ids, or a chat: mappings with "role" and "content". Sampling parameters are
keywords, those of `jaxserve.SamplingParams`. Answers are the messages of
serving/rpc/protos/jaxserve/v1/inference.proto, which are typed. `AsyncClient` is the same for
asyncio. Errors are those of `jaxserve.errors`.
"""

from jaxserve.client.aio import AsyncClient, AsyncStream
from jaxserve.client.blocking import Client, Stream
from jaxserve.client.connection import Retries, Tls
from jaxserve.client.requests import Prompt, Sampling

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Prompt",
    "Retries",
    "Sampling",
    "Stream",
    "Tls",
]
