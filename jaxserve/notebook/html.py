"""Pieces of HTML that look well on light and dark pages: they inherit the page's colour of text.

page = frame("tokens", f"<b>{escape(text)}</b>")
image(alpha)                                # uint8[H, W] as a picture of one colour
"""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

INK = (59, 130, 246)
"""Colour of pictures and bars; it stands out on white and on black."""

PARTS = ("#3b82f6", "#d97706", "#7c3aed", "#0d9488", "#db2777")
"""Colours of the parts of a bar."""

_STYLE = """
.jaxserve{font:13px/1.5 system-ui,sans-serif;color:inherit;max-width:60em}
.jaxserve .title{font-weight:600;font-size:15px}
.jaxserve .soft{opacity:.7}
.jaxserve table{border-collapse:collapse;margin:.4em 0;font:inherit;color:inherit;
background:none}
.jaxserve td,.jaxserve th{padding:.1em .9em .1em 0;text-align:left;border:0;background:none;
vertical-align:top;color:inherit}
.jaxserve .bar{display:flex;height:12px;border-radius:3px;overflow:hidden;margin:.4em 0;
background:rgba(128,128,128,.25)}
.jaxserve .dot{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.4em}
.jaxserve pre{white-space:pre-wrap;font:13px/1.7 ui-monospace,monospace;color:inherit;
background:none;margin:.4em 0}
.jaxserve .heads{display:flex;flex-wrap:wrap;gap:12px}
.jaxserve figure{margin:0}
.jaxserve img{image-rendering:pixelated;border:1px solid rgba(128,128,128,.4);display:block}
"""


def escape(text: object) -> str:
    """Returns text as HTML shows it."""
    return html.escape(str(text), quote=True)


def frame(body: str) -> str:
    """Returns a body within the style that all of it shares."""
    return f'<div class="jaxserve"><style>{_STYLE}</style>{body}</div>'


def table(rows: Iterable[Sequence[object]]) -> str:
    """Returns rows of text as a table, the first cell of each soft."""
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><td class="soft">{escape(first)}</td>{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def bar(parts: Sequence[tuple[str, float]], total: float) -> str:
    """Returns a bar of named parts of a total, and what each colour means."""
    shown = [(name, amount, colour) for (name, amount), colour in zip(parts, PARTS, strict=False)]
    pieces = "".join(
        f'<span style="width:{100 * amount / max(total, 1):.2f}%;background:{colour}" '
        f'title="{escape(name)}"></span>'
        for name, amount, colour in shown
    )
    names = " &nbsp; ".join(
        f'<span class="dot" style="background:{colour}"></span>{escape(name)} {size(amount)}'
        for name, amount, colour in shown
    )
    return f'<div class="bar">{pieces}</div><div>{names}</div>'


def size(count: float) -> str:
    """Returns bytes for people, in a unit that leaves at most four digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def image(alpha: np.ndarray, colour: tuple[int, int, int] = INK) -> str:
    """Returns uint8[H, W] as an address that is itself a PNG: one colour, alpha its strength."""
    height, width = alpha.shape
    rows = np.zeros((height, 1 + 4 * width), np.uint8)  # each row begins with its filter, none
    pixels = rows[:, 1:].reshape(height, width, 4)
    pixels[..., :3], pixels[..., 3] = colour, alpha
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    whole = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    return f"data:image/png;base64,{base64.b64encode(whole).decode()}"
