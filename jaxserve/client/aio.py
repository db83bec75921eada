"""The client of programs with asyncio: `Client`, awaited."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc

from jaxserve.client import requests
from jaxserve.client.connection import Connection, Retries, Tls, error_of
from jaxserve.client.requests import METHODS, Prompt, Sampling
from jaxserve.serving.rpc.protos import inference_pb2 as pb


class AsyncClient:
    """Calls a server, from one event loop; everything as `Client`."""

    def __init__(
        self,
        target: str = "localhost:8001",
        *,
        api_key: str | None = None,
        tls: Tls | bool = False,
        timeout_s: float | None = None,
        retries: Retries | None = None,
    ) -> None:
        self._connection = Connection(target, api_key, tls, timeout_s, retries or Retries())
        self._channel: grpc.aio.Channel = self._connection.open(
            grpc.aio.secure_channel, grpc.aio.insecure_channel
        )
        self._metadata = self._connection.metadata()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and the calls under way."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.GenerateUnaryResponse:
        """Returns a whole completion."""
        message = requests.generate(prompt, sampling, request_id, priority)
        return await self._call("GenerateUnary", message, timeout_s)

    def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Returns an iterator over a completion as it comes."""
        method = METHODS["Generate"]
        call = self._channel.unary_stream(
            method.path,
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        message = requests.generate(prompt, sampling, request_id, priority)
        timeout = self._connection.timeout_s if timeout_s is None else timeout_s
        return AsyncStream(call(message, timeout=timeout, metadata=self._metadata))

    async def score(
        self, prompt: str | Sequence[int], num_top: int = 0, *, timeout_s: float | None = None
    ) -> pb.ScoreResponse:
        """Returns the log-probabilities of a text's tokens, with the likeliest ones beside."""
        return await self._call("Score", requests.score(prompt, num_top), timeout_s)

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the token ids of a text or a chat."""
        return list((await self._call("Tokenize", requests.tokenize(prompt))).token_ids)

    async def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids."""
        message = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._call("Detokenize", message)).text

    async def abort(self, *request_ids: str) -> None:
        """Ends requests by the next step; ids that are not under way are left."""
        await self._call("Abort", pb.AbortRequest(request_ids=request_ids))

    async def model_info(self) -> pb.GetModelInfoResponse:
        """Returns what the server tells of its model."""
        return await self._call("GetModelInfo", pb.GetModelInfoRequest())

    async def server_info(self) -> pb.GetServerInfoResponse:
        """Returns how the server stands."""
        return await self._call("GetServerInfo", pb.GetServerInfoRequest())

    async def load(self) -> pb.GetLoadResponse:
        """Returns how busy the server is."""
        return await self._call("GetLoad", pb.GetLoadRequest())

    async def _call(self, name: str, message: Any, timeout_s: float | None = None) -> Any:
        """Returns the one answer of a call."""
        method = METHODS[name]
        call = self._channel.unary_unary(
            method.path,
            request_serializer=type(message).SerializeToString,
            response_deserializer=method.answer.FromString,
        )
        timeout = self._connection.timeout_s if timeout_s is None else timeout_s
        try:
            return await call(message, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from None


class AsyncStream:
    """The chunks of a completion; as `Stream`.

    `async with` ends the request of one that is left early; without, the end of its loop does.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.completes: list[pb.Complete] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.cancel()

    async def __aiter__(self) -> AsyncIterator[pb.Chunk]:
        try:
            async for response in self._call:
                if response.WhichOneof("event") == "complete":
                    self.completes.append(response.complete)
                else:
                    yield response.chunk
        except grpc.aio.AioRpcError as failed:
            raise error_of(failed) from None
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Ends the request."""
        self._call.cancel()
