"""From the tokens of one completion to its text, its end and its `Completion`."""

from __future__ import annotations

from jaxserve.detokenize import IncrementalDetokenizer
from jaxserve.errors import GenerationError
from jaxserve.serving.request import (
    Completion,
    FinishReason,
    Request,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from jaxserve.stop import StopMatcher
from jaxserve.tokenizer import Tokenizer


class CompletionBuilder:
    """Collects one completion. Its single writer is whoever receives the request's events.

    Args:
        tokenizer: turns tokens into text; None leaves the text empty.
        request: what is being completed.
    """

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        params = request.params
        self._request = request
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(tokenizer, request.prompt, params.skip_special_tokens)
        )
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self._cached_tokens = 0
        self._error: str | None = None
        self.num_drawn = 0
        self.finish_reason: FinishReason | None = None

    def push(self, event: TokenEvent) -> str:
        """Returns the text that is certain now; sets `finish_reason` when the completion ends.

        Tokens after a stop string are dropped.
        """
        self._error = event.error
        self._cached_tokens = max(self._cached_tokens, event.cached_tokens)
        if event.prompt_logprobs is not None:
            self._prompt_logprobs = event.prompt_logprobs
        pieces: list[str] = []
        for index, token in enumerate(event.token_ids):
            last = index == len(event.token_ids) - 1
            logprob = None if event.logprobs is None else event.logprobs[index]
            pieces.append(self._push(token, last and event.stop_token, logprob))
            if self.finish_reason is not None:
                break
        if event.finish_reason is not None and self.finish_reason is None:
            pieces.append(self._rest())
            if self.finish_reason is None:
                self.finish_reason = event.finish_reason
        self._text += pieces
        return "".join(pieces)

    @property
    def num_tokens(self) -> int:
        """Returns how many tokens the completion has; a stop token is not one of them."""
        return len(self._token_ids)

    def tokens_from(self, start: int) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...] | None]:
        """Returns the token ids from `start` on, and their log-probabilities where asked for."""
        asked = self._request.params.logprobs is not None
        return tuple(self._token_ids[start:]), tuple(self._logprobs[start:]) if asked else None

    def completion(self) -> Completion:
        """Returns the finished completion.

        Raises:
            GenerationError: the request failed while it ran.
        """
        if self._error is not None:
            raise GenerationError(self._error)
        assert self.finish_reason is not None, "the completion still runs"
        params = self._request.params
        usage = Usage(len(self._request.prompt), self.num_drawn, self._cached_tokens)
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            seed=params.seed or 0,
            usage=usage,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
        )

    def _push(self, token: int, stopped: bool, logprob: TokenLogprob | None) -> str:
        """Returns the text of one token as far as it is certain."""
        self.num_drawn += 1
        if stopped:
            return ""
        self._token_ids.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        return self._matched("" if self._detokenizer is None else self._detokenizer.push(token))

    def _matched(self, text: str) -> str:
        """Returns what may be shown of `text`; a stop string found in it ends the completion."""
        if self.num_drawn <= (self._request.params.min_tokens or 0):
            return text
        shown, stop = self._matcher.push(text)
        if stop is not None:
            self.finish_reason = "stop"
        return shown

    def _rest(self) -> str:
        """Returns text held back for tokens that now do not come."""
        held = "" if self._detokenizer is None else self._matched(self._detokenizer.finish())
        return held if self.finish_reason is not None else held + self._matcher.finish()
