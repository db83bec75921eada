"""In which order the dimensions of a stored weight lie in memory.

    turned("tpu", ("layers", "embed", "heads", "head"))          # (0, 2, 3, 1)

A TPU keeps an array in tiles of the last two dimensions in memory, 8 or more by 128. The first
projections of attention are stored as [embed, heads, features], and of the heads a chip of a slice
has few: a step would turn them before it reads them. With the inputs innermost nothing is moved.
"""

from __future__ import annotations

_PROJECTIONS = (("embed", "heads", "head"), ("embed", "kv_heads", "head"))


def turned(platform: str, axes: tuple[str, ...]) -> tuple[int, ...] | None:
    """Returns the order of dimensions, outermost first; None where it is that of the shape.

    Args:
        axes: logical axes of the dimensions.
    """
    first = len(axes) - 3
    if platform != "tpu" or axes[first:] not in _PROJECTIONS:
        return None
    return (*range(first), first + 1, first + 2, first)
