"""The client of programs without asyncio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, Unpack

import grpc

from jaxserve.client import requests
from jaxserve.client.connection import Connection, Retries, Tls, error_of
from jaxserve.client.requests import METHODS, Prompt, Sampling
from jaxserve.serving.rpc.protos import inference_pb2 as pb


class Client:
    """Calls a server. May be used from several threads.

    Args:
        target: "host:port".
        api_key: sent with each call.
        tls: True or `Tls` for an encrypted connection.
        timeout_s: deadline of calls that name none; None waits for ever.
        retries: when calls are tried again.
    """

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
        self._channel: grpc.Channel = self._connection.open(
            grpc.secure_channel, grpc.insecure_channel
        )
        self._metadata = self._connection.metadata()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and the calls under way."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> pb.GenerateUnaryResponse:
        """Returns a whole completion.

        Args:
            request_id: for `abort` and the server's log; the server makes one.
            priority: lower goes first, where the server goes by it.
            timeout_s: deadline of this call.
        """
        message = requests.generate(prompt, sampling, request_id, priority)
        return self._call("GenerateUnary", message, timeout_s)

    def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Returns an iterator over a completion as it comes; arguments as `generate`."""
        method = METHODS["Generate"]
        call = self._channel.unary_stream(
            method.path,
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        message = requests.generate(prompt, sampling, request_id, priority)
        timeout = self._connection.timeout_s if timeout_s is None else timeout_s
        return Stream(call(message, timeout=timeout, metadata=self._metadata))

    def score(
        self, prompt: str | Sequence[int], num_top: int = 0, *, timeout_s: float | None = None
    ) -> pb.ScoreResponse:
        """Returns the log-probabilities of a text's tokens, with the likeliest ones beside."""
        return self._call("Score", requests.score(prompt, num_top), timeout_s)

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Returns the token ids of a text or a chat."""
        return list(self._call("Tokenize", requests.tokenize(prompt)).token_ids)

    def detokenize(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids."""
        message = pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._call("Detokenize", message).text

    def abort(self, *request_ids: str) -> None:
        """Ends requests by the next step; ids that are not under way are left."""
        self._call("Abort", pb.AbortRequest(request_ids=request_ids))

    def model_info(self) -> pb.GetModelInfoResponse:
        """Returns what the server tells of its model."""
        return self._call("GetModelInfo", pb.GetModelInfoRequest())

    def server_info(self) -> pb.GetServerInfoResponse:
        """Returns how the server stands."""
        return self._call("GetServerInfo", pb.GetServerInfoRequest())

    def load(self) -> pb.GetLoadResponse:
        """Returns how busy the server is."""
        return self._call("GetLoad", pb.GetLoadRequest())

    def _call(self, name: str, message: Any, timeout_s: float | None = None) -> Any:
        """Returns the one answer of a call."""
        method = METHODS[name]
        call = self._channel.unary_unary(
            method.path,
            request_serializer=type(message).SerializeToString,
            response_deserializer=method.answer.FromString,
        )
        timeout = self._connection.timeout_s if timeout_s is None else timeout_s
        try:
            return call(message, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as failed:
            raise error_of(failed) from None


class Stream:
    """The chunks of a completion. Leaving it early ends the request.

    Attributes:
        completes: of the samples that are over, in the order of their ends.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self.completes: list[pb.Complete] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def __iter__(self) -> Iterator[pb.Chunk]:
        try:
            for response in self._call:
                if response.WhichOneof("event") == "complete":
                    self.completes.append(response.complete)
                else:
                    yield response.chunk
        except grpc.RpcError as failed:
            raise error_of(failed) from None
        finally:
            self.cancel()  # of a call that is over it does nothing

    def cancel(self) -> None:
        """Ends the request."""
        self._call.cancel()
