"""Attention as a picture: which token looks at which.

AttentionView(probs, pieces, "layer 3")          # probs: [N, T, T], rows are those who look
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.errors import UsageError
from jaxserve.notebook.html import escape, frame, image

MOST_TOKENS = 512
LABELLED = 64
"""Up to so many tokens are written beside a single head."""

_SMALL, _LARGE = 150, 16


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Attention probabilities of one sequence in one layer.

    Attributes:
        probs: float[N, T, T], head by head: query by key.
        pieces: text of each token.
        title: what stands above.

    Raises:
        UsageError: there are too many tokens for a picture, or their number is another.
    """

    probs: np.ndarray
    pieces: tuple[str, ...]
    title: str = "attention"

    def __post_init__(self) -> None:
        object.__setattr__(self, "probs", np.asarray(self.probs, np.float32))
        shape, count = self.probs.shape, len(self.pieces)
        if len(shape) != 3 or shape[1:] != (count, count):
            raise UsageError(f"probs has shape {shape}, expected [heads, {count}, {count}]")
        if count > MOST_TOKENS:
            raise UsageError(
                f"{count} tokens are too many for a picture of at most {MOST_TOKENS}; show some, "
                f"as in AttentionView(probs[:, -{MOST_TOKENS}:, -{MOST_TOKENS}:], pieces[...])"
            )

    def __repr__(self) -> str:
        heads, count, _ = self.probs.shape
        back = np.arange(count)[:, None] - np.arange(count)[None, :]
        lines = [f"{self.title}: {heads} heads, {count} tokens"]
        for head, probs in enumerate(self.probs):
            most = int(np.argmax(probs[-1]))
            distance = float((probs * back).sum() / count)
            lines.append(
                f"  head {head}: {distance:.1f} tokens back on average; the last token looks most "
                f"at {self.pieces[most]!r} ({probs[-1, most]:.0%})"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f'<div class="title">{escape(self.title)}</div>'
        if len(self.probs) == 1 and len(self.pieces) <= LABELLED:
            return frame(title + self._labelled())
        figures = "".join(
            f"<figure>{self._picture(head, _SMALL)}<figcaption class='soft'>head {head}"
            "</figcaption></figure>"
            for head in range(len(self.probs))
        )
        note = '<div class="soft">rows look at columns; the first token is at the top left</div>'
        return frame(f'{title}<div class="heads">{figures}</div>{note}')

    def _picture(self, head: int, width: int) -> str:
        # The square root lets weak attention be seen.
        alpha = np.round(255 * np.sqrt(np.clip(self.probs[head], 0, 1))).astype(np.uint8)
        return f'<img width="{width}" height="{width}" alt="head {head}" src="{image(alpha)}">'

    def _labelled(self) -> str:
        """Returns one head with its tokens at the left and below."""
        side = _LARGE * len(self.pieces)
        names = [escape(repr(piece)[1:-1]) for piece in self.pieces]
        style = f"height:{_LARGE}px;line-height:{_LARGE}px;font-size:11px;white-space:pre"
        left = "".join(f'<div style="{style};text-align:right">{name}</div>' for name in names)
        below = "".join(
            f'<div style="width:{_LARGE}px;font-size:11px;line-height:{_LARGE}px;'
            f'writing-mode:vertical-rl;white-space:pre">{name}</div>'
            for name in names
        )
        return (
            '<div style="display:grid;grid-template-columns:max-content max-content;gap:2px 6px">'
            f"<div>{left}</div><div>{self._picture(0, side)}</div>"
            f'<div></div><div style="display:flex">{below}</div></div>'
        )
