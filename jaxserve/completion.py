"""From the tokens of one row to its text, its end and its `Completion`."""

from __future__ import annotations

from jaxserve.detokenize import IncrementalDetokenizer
from jaxserve.serving.request import Completion, FinishReason, TokenLogprob, Usage
from jaxserve.serving.static_batch import Row, RowToken
from jaxserve.stop import StopMatcher
from jaxserve.tokenizer import Tokenizer


class CompletionBuilder:
    """Collects one row. Its single writer is the loop that runs the batch.

    Args:
        tokenizer: turns tokens into text; None leaves the text empty.
        row: what is being completed.
    """

    def __init__(self, tokenizer: Tokenizer | None, row: Row) -> None:
        self._row = row
        self._detokenizer = (
            None
            if tokenizer is None
            else IncrementalDetokenizer(tokenizer, row.prompt, row.params.skip_special_tokens)
        )
        self._matcher = StopMatcher(row.params.stop, row.params.include_stop_str_in_output)
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._num_drawn = 0
        self.finish_reason: FinishReason | None = None

    def push(self, token: RowToken) -> str:
        """Returns the text that is certain now; sets `finish_reason` when the row ends."""
        self._num_drawn += 1
        text = ""
        if not token.stopped:
            self._token_ids.append(token.token_id)
            if token.logprob is not None:
                self._logprobs.append(token.logprob)
            text = self._matched(self._decoded(token.token_id))
        if token.last and self.finish_reason is None:
            text += self._rest()
            if self.finish_reason is None:
                self.finish_reason = "stop" if token.stopped else "length"
        self._text.append(text)
        return text

    def completion(self) -> Completion:
        """Returns the finished completion."""
        assert self.finish_reason is not None, "the row still runs"
        params = self._row.params
        return Completion(
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            seed=params.seed or 0,
            usage=Usage(len(self._row.prompt), self._num_drawn),
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
        )

    def _decoded(self, token_id: int) -> str:
        return "" if self._detokenizer is None else self._detokenizer.push(token_id)

    def _matched(self, text: str) -> str:
        """Returns what may be shown of `text`; a stop string found in it ends the row."""
        if self._num_drawn <= (self._row.params.min_tokens or 0):
            return text
        shown, stop = self._matcher.push(text)
        if stop is not None:
            self.finish_reason = "stop"
        return shown

    def _rest(self) -> str:
        """Returns text held back for tokens that now do not come."""
        held = "" if self._detokenizer is None else self._matched(self._detokenizer.finish())
        return held if self.finish_reason is not None else held + self._matcher.finish()
