"""What a look into the forward gives: arrays by name, shown by name and shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax import Array

from jaxserve.errors import UsageError
from jaxserve.notebook.html import escape, frame, size, table


class Activations(dict[str, Array]):
    """Captured activations by name, in the order of the forward. Its text has no numbers."""

    @property
    def nbytes(self) -> int:
        """Returns the bytes of all."""
        return sum(map(_bytes, self.values()))

    def __repr__(self) -> str:
        lines = [f"{name:<28} {kind:<28} {amount}" for name, kind, amount in self._rows()]
        return "\n".join([*lines, f"{len(self)} activations, {size(self.nbytes)}"])

    def _repr_html_(self) -> str:
        title = f"{len(self)} activations, {size(self.nbytes)}"
        return frame(f'<div class="title">{escape(title)}</div>{table(self._rows())}')

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(n, f"{x.dtype}{list(x.shape)}", size(_bytes(x))) for n, x in self.items()]


def _flattened(found: Activations) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(name), x) for name, x in found.items()], tuple(found)


def _restored(names: tuple[str, ...], values: Iterable[Any]) -> Activations:
    return Activations(zip(names, values, strict=True))


jax.tree_util.register_pytree_with_keys(Activations, _flattened, _restored)


def check_size(shapes: Mapping[str, Any], most: int) -> None:
    """Checks, before anything runs, what captured activations take.

    Raises:
        UsageError: it is more than `most` bytes.
    """
    each = {name: _bytes(x) for name, x in shapes.items()}
    total = sum(each.values())
    if total > most:
        largest = max(each, key=lambda name: each[name])
        raise UsageError(
            f"capture takes {size(total)} (of {len(each)} activations, {largest} alone "
            f"{size(each[largest])}), more than max_bytes={most} ({size(most)}); capture fewer "
            f"names, fewer tokens at a time, or use max_bytes={total}"
        )


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize
