"""The calls of `jaxserve.v1.Inference`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import jaxserve
from jaxserve.errors import TokenizerError, UsageError
from jaxserve.serving.answer import Answer, check_logprobs
from jaxserve.serving.request import Request, SamplingParams
from jaxserve.serving.rpc import convert
from jaxserve.serving.rpc.call import Call, Method
from jaxserve.serving.rpc.protos import inference_pb2 as pb
from jaxserve.serving.server_options import ServerOptions
from jaxserve.serving.service import Service
from jaxserve.tokenizer import Tokenizer

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]

LONG_BYTES = 1 << 14
"""A message from this size on is tokenised in a thread, so that no stream waits for it."""

MAX_ABORTS = 1024

T = TypeVar("T")


class Inference:
    """Generates, scores and tells of the model."""

    def __init__(self, service: Service, options: ServerOptions) -> None:
        self._service = service
        self._options = options

    def methods(self) -> dict[str, Method]:
        """Returns what serves each method of the definition."""
        return {
            "Generate": self.generate,
            "GenerateUnary": self.generate_unary,
            "Score": self.score,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
            "Abort": self.abort,
            "GetModelInfo": self.model_info,
            "GetServerInfo": self.server_info,
            "GetLoad": self.load,
        }

    async def generate(self, message: pb.GenerateRequest, call: Call) -> None:
        """Streams a completion: a chunk a step, then a complete for each sample."""
        request = await self._request(message, call)
        tokenizer = self._service.intake.tokenizer
        async with await self._open(request, call) as answer:
            scored = request.params.prompt_logprobs is not None
            async for deltas in answer.steps():
                for delta in deltas:
                    if delta.text or delta.token_ids or scored:
                        scores = answer.prompt_logprobs if scored else None
                        scored = False
                        await call.send(convert.chunk(request, delta, scores, tokenizer))
                    if delta.finish_reason is not None:
                        await call.send(convert.complete(delta, answer))

    async def generate_unary(
        self, message: pb.GenerateRequest, call: Call
    ) -> pb.GenerateUnaryResponse:
        """Returns a whole completion."""
        request = await self._request(message, call)
        tokenizer = self._service.intake.tokenizer
        async with await self._open(request, call) as answer:
            done = await answer.completions()
            return pb.GenerateUnaryResponse(
                request_id=call.request_id,
                model=self._service.card.name,
                completions=[convert.completion(i, one, tokenizer) for i, one in enumerate(done)],
                prompt_logprobs=convert.prompt_logprobs(
                    request.prompt, answer.prompt_logprobs, tokenizer
                ),
                usage=convert.usage(answer.usage),
                seed=answer.seed,
            )

    async def score(self, message: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        """Returns the log-probabilities of given tokens, by a prompt that one token follows."""
        params = SamplingParams(
            temperature=0.0, max_tokens=1, min_tokens=0, prompt_logprobs=message.num_top
        )
        request = await self._request(message, call, params)
        async with await self._open(request, call) as answer:
            await answer.completions()
            return pb.ScoreResponse(
                request_id=call.request_id,
                logprobs=convert.prompt_logprobs(
                    request.prompt, answer.prompt_logprobs, self._service.intake.tokenizer
                ),
                usage=convert.usage(answer.usage),
            )

    async def tokenize(self, message: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """Returns the tokens of a text or a chat."""
        intake = self._service.intake

        def tokens() -> list[int]:
            prompt = convert.prompt_of(self._service, message)
            return intake.encode(prompt) if prompt else []

        return pb.TokenizeResponse(
            token_ids=await _aside(message.ByteSize(), tokens),
            max_context_tokens=intake.max_context_tokens,
        )

    async def detokenize(self, message: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """Returns the text of tokens."""
        tokenizer = self._tokenizer()
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True

        def text() -> str:
            ids = list(message.token_ids)
            self._service.intake.check_ids(ids)
            return tokenizer.decode(ids, skip)

        return pb.DetokenizeResponse(text=await _aside(message.ByteSize(), text))

    async def abort(self, message: pb.AbortRequest, call: Call) -> pb.AbortResponse:
        """Ends requests of the same caller."""
        if len(message.request_ids) > MAX_ABORTS:
            raise UsageError(
                f"{len(message.request_ids)} request ids; at most {MAX_ABORTS} are allowed"
            )
        for request_id in message.request_ids:
            self._service.abort(call.engine_id(request_id))
        return pb.AbortResponse()

    async def model_info(
        self, message: pb.GetModelInfoRequest, call: Call
    ) -> pb.GetModelInfoResponse:
        """Returns what is known of the model."""
        card = self._service.card
        return pb.GetModelInfoResponse(
            name=card.name,
            owner=card.owner,
            architecture=card.architecture,
            dtype=card.dtype,
            created=card.created,
            max_context_tokens=card.max_context_tokens,
            vocab_size=card.vocab_size,
            num_parameters=card.num_parameters,
        )

    async def server_info(
        self, message: pb.GetServerInfoRequest, call: Call
    ) -> pb.GetServerInfoResponse:
        """Returns how the server stands."""
        answer = pb.GetServerInfoResponse(
            version=jaxserve.__version__,
            state=str(self._service.state),
            reason=self._service.reason,
        )
        convert.set_struct(answer.details, await self._service.server_info())
        return answer

    async def load(self, message: pb.GetLoadRequest, call: Call) -> pb.GetLoadResponse:
        """Returns how busy the engine is."""
        load = await self._service.load()
        return pb.GetLoadResponse(
            running=load.running,
            waiting=load.waiting,
            waiting_tokens=load.waiting_tokens,
            total_pages=load.total_pages,
            free_pages=load.free_pages,
            generated_tokens=load.generated_tokens,
            tokens_per_s=load.tokens_per_s,
            expected_wait_s=load.expected_wait_s,
        )

    async def _request(
        self,
        message: pb.GenerateRequest | pb.ScoreRequest,
        call: Call,
        params: SamplingParams | None = None,
    ) -> Request:
        """Returns what a message asks for, ready for the engine.

        Args:
            params: in place of those of the message.
        """
        convert.check_model(self._service, message.model)
        if params is None:
            assert isinstance(message, pb.GenerateRequest)
            params = convert.sampling_params(message.sampling)
        convert.check_limits(self._options, params)

        def made() -> Request:
            return self._service.intake.request(
                convert.prompt_of(self._service, message),
                params,
                id=call.engine_id(),
                priority=message.priority,
                client=call.caller.name,
                salt=call.caller.salt,
            )

        request = await _aside(message.ByteSize(), made)
        convert.check_prompt(self._options, len(request.prompt))
        check_logprobs([request])
        return request

    async def _open(self, request: Request, call: Call) -> Answer:
        return await Answer.open(self._service, request, call.time_left_s())

    def _tokenizer(self) -> Tokenizer:
        if self._service.intake.tokenizer is None:
            raise TokenizerError("this model has no tokenizer; there are only token ids")
        return self._service.intake.tokenizer


async def _aside(num_bytes: int, work: Callable[[], T]) -> T:
    """Returns what the work returns; done in a thread where it can take long."""
    return await asyncio.to_thread(work) if num_bytes >= LONG_BYTES else work()
