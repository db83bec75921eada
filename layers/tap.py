"""The only place where a forward can be looked into or changed.

taps = Taps(capture=("layers.*.resid",), edit={"layers.5.resid": lambda x: x * 0})
x = taps("layers.5.resid", x)       # x as edited; kept if its name is captured
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from jax import Array


class Taps:
    """Captures and edits by name, for one trace of the forward; that trace is its writer."""

    def __init__(
        self,
        capture: tuple[str, ...] = (),
        edit: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> None:
        self._capture = capture
        self._edit = dict(edit or {})
        self.captured: dict[str, Array] = {}

    def __call__(self, name: str, x: Array) -> Array:
        """Returns x, edited where an edit is registered for `name`."""
        if name in self._edit:
            x = self._edit[name](x)
        if any(fnmatchcase(name, pattern) for pattern in self._capture):
            self.captured[name] = x
        return x
