"""Asks jaxserve through its own gRPC interface, for the same figures as over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxserve.benchmark.metrics import Record
from jaxserve.benchmark.serve_target import CallError, Note, RefusedError, TargetFacts
from jaxserve.benchmark.trace import FIRST_ID, TraceRequest
from jaxserve.errors import UnsupportedError

if TYPE_CHECKING:
    from jaxserve.serving.rpc.protos import inference_pb2

SERVICE = "/jaxserve.v1.Inference/"
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")


class GrpcTarget:
    """A server of `jaxserve.v1.Inference`, without TLS."""

    def __init__(self, address: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        try:
            import grpc
            from grpc import aio
        except ImportError as error:
            raise UnsupportedError(
                "--grpc needs grpcio, which is not installed; pip install 'jaxserve[serve]'"
            ) from error
        from jaxserve.serving.rpc.protos import inference_pb2

        self._messages = inference_pb2
        self._errors = grpc.RpcError
        self._channel = aio.insecure_channel(address)
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._timeout_s = timeout_s
        self._generate: Any = self._channel.unary_stream(
            SERVICE + "Generate",
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        self._model_info: Any = self._channel.unary_unary(
            SERVICE + "GetModelInfo",
            request_serializer=inference_pb2.GetModelInfoRequest.SerializeToString,
            response_deserializer=inference_pb2.GetModelInfoResponse.FromString,
        )

    async def prepare(self) -> TargetFacts:
        """Returns what the server tells of itself, after one request that is not measured."""
        try:
            card = await self._model_info(
                self._messages.GetModelInfoRequest(),
                timeout=self._timeout_s,
                metadata=self._metadata,
            )
        except self._errors as error:
            raise _call_error(error) from error
        probe = TraceRequest(tuple(range(FIRST_ID, FIRST_ID + 8)), 2, 0.0)
        await self.call(probe, Record(0.0, 8), lambda: 0.0)
        return TargetFacts(
            card.name, card.max_context_tokens, card.vocab_size, "token ids", True, "usage"
        )

    async def call(self, request: TraceRequest, record: Record, clock: Note) -> None:
        """Sends a request and notes the arrival of its tokens."""
        stream = self._generate(
            self._message(request), timeout=self._timeout_s, metadata=self._metadata
        )
        try:
            async for answer in stream:
                if count := len(answer.chunk.token_ids):
                    record.add(clock(), count)
                elif answer.HasField("complete"):
                    record.cached_tokens = answer.complete.usage.cached_tokens
        except self._errors as error:
            raise _call_error(error) from error
        if not record.times_s:
            raise CallError("the answer held no token")

    async def close(self) -> None:
        """Closes the channel."""
        await self._channel.close()

    def _message(self, request: TraceRequest) -> inference_pb2.GenerateRequest:
        return self._messages.GenerateRequest(
            tokens=self._messages.Tokens(ids=request.prompt),
            sampling=self._messages.SamplingParams(
                temperature=0, max_tokens=request.output_tokens, ignore_eos=True
            ),
        )


def _call_error(error: Any) -> CallError:
    """Returns the error of a call that gRPC ended."""
    code = error.code().name
    kind = RefusedError if code in REFUSALS else CallError
    return kind(f"{code}: {error.details()}")
