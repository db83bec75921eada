"""The only place where a forward can be looked into or changed.

taps = Taps(capture=("layers.*.resid",), edit={"layers.5.resid": lambda x: x * 0})
x = taps("layers.5.resid", x)       # x as edited; kept if its name is captured
taps.check()                        # the forward has met every name that was asked for
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

from jax import Array

from jaxserve.errors import UsageError

_MANY = 8


class Taps:
    """Captures and edits by name, for one trace of the forward; that trace is its writer."""

    def __init__(
        self,
        capture: tuple[str, ...] = (),
        edit: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> None:
        self._capture = capture
        self._edit = dict(edit or {})
        self._met: list[str] = []
        self.captured: dict[str, Array] = {}

    def __call__(self, name: str, x: Array) -> Array:
        """Returns x, edited where an edit is registered for `name`."""
        self._met.append(name)
        if name in self._edit:
            x = self._edit[name](x)
        if any(fnmatchcase(name, pattern) for pattern in self._capture):
            self.captured[name] = x
        return x

    def check(self) -> None:
        """Checks, after a forward, that nothing asked for was passed over.

        Raises:
            UsageError: an edit or a captured pattern names no activation of this forward.
        """
        self._refuse("edit", [name for name in self._edit if name not in self._met])
        self._refuse(
            "capture",
            [p for p in self._capture if not any(fnmatchcase(name, p) for name in self._met)],
        )

    def _refuse(self, option: str, unknown: list[str]) -> None:
        if not unknown:
            return
        known = self._met
        if len(known) > _MANY:
            known = [*known[: _MANY // 2], "...", *known[-_MANY // 2 :]]
        raise UsageError(
            f"{option}={', '.join(unknown)} names no activation; this model has {', '.join(known)}"
        )
