"""Turning generated tokens into text as they arrive.

    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in generated:
        print(detokenizer.push(token_id), end="")
    print(detokenizer.finish())

What is printed is `tokenizer.decode(generated)`, and no piece of it ends inside a character.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.text_stream import REPLACEMENT, TextStream, incomplete_suffix
from jaxserve.tokenizer import Tokenizer

_MAX_CHAR_BYTES = 4
_CONTEXT_TOKENS = 8
_WINDOW_TOKENS = 24
_MAX_WINDOW_TOKENS = 64


class IncrementalDetokenizer:
    """Emits the text of generated tokens piece by piece. Its single writer is its caller.

    All pieces and `finish()` together are what `decode` gives for the tokens at once. With a
    prompt they are what the tokens add to it: `decode(prompt + tokens)` after `decode(prompt)`. So
    a space that SentencePiece drops at the start of a text stays, and a character that the prompt
    leaves incomplete is emitted when the tokens complete it.

    A push costs the same however long the text is.

    Args:
        tokenizer: the tokenizer of the tokens.
        prompt_ids: the tokens that come before; only as many as matter are read.
        skip_special_tokens: whether special tokens are left out of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        stream = tokenizer.text_stream()
        context = self._context(prompt_ids)
        self._decoder = (
            _Window(tokenizer, context) if stream is None else _Exact(tokenizer, stream, context)
        )

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now that this token has come; often empty.

        Raises:
            UsageError: `token_id` is not an unsigned 32-bit integer.
        """
        token = self._shown_token(token_id)
        return "" if token is None else self._decoder.push(token_id, token)

    def finish(self) -> str:
        """Returns the text that was held back for tokens that now do not come."""
        return self._decoder.finish()

    def _shown_token(self, token_id: int) -> str | None:
        """Returns the token with this id, or None for one that is skipped or unknown."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return None
        return self._tokenizer.token(token_id)

    def _context(self, prompt_ids: Sequence[int]) -> list[int]:
        """Returns the last tokens of the prompt that are shown, oldest first."""
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            if len(context) == _CONTEXT_TOKENS:
                break
            if self._shown_token(token_id) is not None:
                context.append(token_id)
        return context[::-1]


class _Exact:
    """Decodes by the streaming form of the tokenizer's decoder."""

    def __init__(self, tokenizer: Tokenizer, stream: TextStream, context: list[int]) -> None:
        self._stream = stream
        if context:
            tail = b"".join(map(tokenizer.token_bytes, context[-_MAX_CHAR_BYTES:]))
            stream.resume(incomplete_suffix(tail))

    def push(self, token_id: int, token: str) -> str:
        return self._stream.push(token)

    def finish(self) -> str:
        return self._stream.finish()


class _Window:
    """Decodes the last few tokens again at each push, for decoders of which nothing is known.

    Text counts as certain when one more token has left it as it was, except that U+FFFD at its end
    may still become a character. Older tokens leave the window when those that stay decode to
    the same end of the text.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = context
        self._text = self._decode(context)
        self._shown = len(self._text.rstrip(REPLACEMENT))  # characters of it already emitted

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        before, self._text = self._text, self._decode(self._ids)
        unchanged = _common_prefix(before, self._text)
        self._shown = min(self._shown, len(unchanged))  # a prompt may end in an unfinished word
        emitted = self._emit(len(unchanged.rstrip(REPLACEMENT)))
        if len(self._ids) >= _WINDOW_TOKENS:
            emitted += self._shorten()
        return emitted

    def finish(self) -> str:
        return self._emit(len(self._text))

    def _emit(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start : self._shown]

    def _shorten(self) -> str:
        """Drops older tokens; returns what has waited too long for that, normally nothing."""
        emitted = ""
        tail = self._ids[-_CONTEXT_TOKENS:]
        tail_text = self._decode(tail)
        if not tail_text.endswith(self._text[self._shown :]):
            if len(self._ids) < _MAX_WINDOW_TOKENS:
                return ""
            emitted = self.finish()
        self._shown = len(tail_text) - len(self._text) + self._shown
        self._ids, self._text = tail, tail_text
        return emitted

    def _decode(self, ids: list[int]) -> str:
        # Tokens to be skipped never come here.
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _common_prefix(before: str, after: str) -> str:
    for length, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return before[:length]
    return min(before, after, key=len)
