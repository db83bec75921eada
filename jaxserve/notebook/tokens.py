"""Tokens coloured by how likely the model found them.

view = TokenView(pieces=("def", " area"), logprobs=(None, -2.3))
print(view)                     # a line a token; in a notebook, the text in colours
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from jaxserve.detokenize import IncrementalDetokenizer
from jaxserve.notebook.html import escape, frame
from jaxserve.tokenizer import Tokenizer

UNLIKELY = 8.0
"""Negative log-probability, in nats, from which a token has the full colour: one in 3,000."""

_SHOWN = str.maketrans({"\n": "⏎\n", "\t": "⇥\t"})


@dataclass(frozen=True)
class TokenView:
    """Pieces of a text with a log-probability each.

    Attributes:
        pieces: text of each token.
        logprobs: natural log-probability of each, None where there is none.
        top: likeliest pieces in its place, with their log-probabilities, or nothing.
    """

    pieces: tuple[str, ...]
    logprobs: tuple[float | None, ...]
    top: tuple[tuple[tuple[str, float], ...], ...] = ()

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        token_ids: Sequence[int],
        logprobs: Sequence[float | None],
        tops: Sequence[Sequence[tuple[int, float]]],
    ) -> Self:
        """Returns the view of tokens; `tops` are the likeliest in the place of each."""
        named = (
            tuple((pieces_of(tokenizer, [token])[0], chance) for token, chance in top)
            for top in tops
        )
        return cls(tuple(pieces_of(tokenizer, token_ids)), tuple(logprobs), tuple(named))

    def __repr__(self) -> str:
        width = max((len(repr(piece)) for piece in self.pieces), default=0)
        lines = [
            f"{piece!r:<{width}} {'' if logprob is None else f'{logprob:9.3f}'}".rstrip()
            for piece, logprob in zip(self.pieces, self.logprobs, strict=True)
        ]
        return "\n".join(lines)

    def html(self) -> str:
        """Returns the text in colours, without a frame."""
        spans = []
        for index, (piece, logprob) in enumerate(zip(self.pieces, self.logprobs, strict=True)):
            shown = escape(piece.translate(_SHOWN))
            top = self.top[index] if self.top else ()
            spans.append(
                f'<span title="{escape(_told(piece, logprob, top))}" style="border-radius:2px;'
                f'background:rgba(234,88,12,{_strength(logprob):.2f})">{shown}</span>'
            )
        return f"<pre>{''.join(spans)}</pre>"

    def _repr_html_(self) -> str:
        note = '<div class="soft">the stronger the colour, the less likely the token</div>'
        return frame(self.html() + note)


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text, token by token.

    Attributes:
        token_ids: of the text.
        logprobs: natural log-probability of each token after those before it; None of the first.
        view: the tokens, to look at.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    view: TokenView

    @property
    def total(self) -> float:
        """Returns the log-probability of the text after its first token."""
        return sum(one for one in self.logprobs if one is not None)

    @property
    def perplexity(self) -> float:
        """Returns exp of the mean negative log-probability; nan of a single token."""
        count = len(self.logprobs) - 1
        return math.exp(-self.total / count) if count else math.nan

    def __repr__(self) -> str:
        return (
            f"Score of {len(self.token_ids)} tokens: total {self.total:.4f}, "
            f"perplexity {self.perplexity:.3f}"
        )

    def _repr_html_(self) -> str:
        return frame(f'<div class="title">{escape(repr(self))}</div>{self.view.html()}')


def pieces_of(tokenizer: Tokenizer | None, token_ids: Sequence[int]) -> list[str]:
    """Returns the text that each token adds: that of a character in the token that ends it.

    Without a tokenizer the pieces are the ids.
    """
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    made = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    pieces = [made.push(token) for token in token_ids]
    if pieces:
        pieces[-1] += made.finish()
    return pieces


def _strength(logprob: float | None) -> float:
    """Returns the opacity of a token's colour; text stays legible upon the strongest."""
    return 0.0 if logprob is None else 0.6 * min(max(-logprob, 0.0) / UNLIKELY, 1.0)


def _told(piece: str, logprob: float | None, top: tuple[tuple[str, float], ...]) -> str:
    """Returns what is told of a token that is pointed at."""
    if logprob is None:
        return f"{piece!r}: first"
    lines = [f"{piece!r}: {math.exp(logprob):.2%} ({logprob:.3f})"]
    lines += [f"{other!r}: {math.exp(chance):.2%}" for other, chance in top]
    return "\n".join(lines)
