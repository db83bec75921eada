"""The only place where a forward can be looked into or changed.

taps = Taps(capture=("layers.*.resid",), edit={"layers.5.resid": lambda x: x * 0})
x = taps("layers.5.resid", x)       # x as edited; kept if its name is captured
taps.check()                        # the forward has met every name that was asked for
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import jax.numpy as jnp
from jax import Array
from jax.errors import TracerArrayConversionError

from jaxserve.errors import UsageError

Edit = Mapping[str, Callable[[Array], Array]]
"""Name or pattern -> what is done to the activations of that name."""

_OF_LAYER = re.compile(r"layers\.(\d+)\.(\w+)")


class Taps:
    """Captures and edits by name, for one trace of the forward; that trace is its writer.

    Args:
        capture: names or patterns.
        edit: what a function gives has the shape that it was given, and gets its dtype; where
            several fit a name they follow each other.
        shape: of the tokens, as activations are shown: [*shape, ...]; None shows them as they are
            computed, [T, ...].

    Raises:
        UsageError: a name is no text, or an edit no function.
    """

    def __init__(
        self,
        capture: Sequence[str] = (),
        edit: Edit | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        self._capture = tuple(capture)
        self._edit = dict(edit or {})
        self._shape = shape
        self._met: dict[str, bool] = {}  # name -> whether it can be edited
        self.captured: dict[str, Array] = {}
        for name in (*self._capture, *self._edit):
            if not isinstance(name, str):
                raise UsageError(
                    f"{name!r:.80} is no name of an activation; use text, such as 'layers.*.resid'"
                )
        for name, change in self._edit.items():
            if not callable(change):
                raise UsageError(
                    f"edit[{name!r}]={change!r:.80} is no function; give one of the activation, "
                    "such as lambda x: 0 * x"
                )

    @property
    def asked(self) -> bool:
        """Returns whether there is anything to capture or edit."""
        return bool(self._capture or self._edit)

    def __call__(self, name: str, x: Array) -> Array:
        """Returns x[T, ...], edited where an edit is registered for `name`."""
        return self._passed(name, x, self._shape and (*self._shape, *x.shape[1:]))

    def pairs(self, name: str, x: Array) -> Array:
        """Returns x[B, N, L, S] of B sequences, edited likewise."""
        return self._passed(name, x, self._shape and (*self._shape[:-1], *x.shape[1:]))

    def show(self, name: str, x: Array) -> None:
        """Captures x, whose change would change nothing."""
        self._met[name] = False
        if self._captures(name):
            self.captured[name] = x

    def wants(self, name: str) -> bool:
        """Returns whether `name`, which the forward can compute, is captured or edited."""
        self._met[name] = True
        return self._captures(name) or self.edits(name)

    def edits(self, name: str) -> bool:
        """Returns whether `name` is edited."""
        return any(_fits(name, pattern) for pattern in self._edit)

    def check(self) -> None:
        """Checks, after a forward, that nothing asked for was passed over.

        Raises:
            UsageError: an edit or a captured pattern names no activation of this forward, or an
                edit one that is only shown.
        """
        self._refuse("edit", self._edit, [name for name, free in self._met.items() if free])
        self._refuse("capture", self._capture, self._met)

    def _captures(self, name: str) -> bool:
        return any(_fits(name, pattern) for pattern in self._capture)

    def _passed(self, name: str, x: Array, shape: tuple[int, ...] | None) -> Array:
        self._met[name] = True
        captured, edited = self._captures(name), self.edits(name)
        if not (captured or edited):
            return x
        shown = x if shape is None else x.reshape(shape)
        for pattern, change in self._edit.items():
            if _fits(name, pattern):
                shown = _changed(name, change, shown)
        if captured:
            self.captured[name] = shown
        return shown.reshape(x.shape) if edited else x

    def _refuse(self, option: str, asked: Iterable[str], known: Iterable[str]) -> None:
        known = list(known)
        unknown = [p for p in asked if not any(_fits(name, p) for name in known)]
        if unknown:
            raise UsageError(
                f"{option}={', '.join(unknown)} names no activation; "
                f"this model has {_listed(known)}"
            )


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern)


def _changed(name: str, change: Callable[[Array], Array], x: Array) -> Array:
    """Returns what an edit gives."""
    try:
        given = change(x)
    except TracerArrayConversionError as error:
        raise UsageError(
            f"the edit of {name} needs the numbers of the activation, and is compiled before there "
            "are any; use jax.numpy and functions of JAX in it"
        ) from error
    try:
        found = jnp.asarray(given)
    except (TypeError, ValueError):  # None, as of a function without return, or text
        found = None
    if found is None or jnp.iscomplexobj(found):
        raise UsageError(
            f"the edit of {name} gave {given!r:.80}, which is no array of real numbers; give back "
            f"one of shape {x.shape}"
        )
    if found.shape != x.shape:
        raise UsageError(
            f"the edit of {name} gave shape {found.shape}, and the activation has {x.shape}; "
            "give back that shape"
        )
    return found.astype(x.dtype)


def _listed(names: Sequence[str]) -> str:
    """Returns names for people, those of all layers as one."""
    words: dict[str, None] = {}
    layers: list[int] = []
    for name in names:
        if (found := _OF_LAYER.fullmatch(name)) is not None:
            layers.append(int(found[1]))
            name = f"layers.N.{found[2]}"
        words[name] = None
    last = f" (N from {min(layers)} to {max(layers)})" if layers else ""
    return ", ".join(words) + last
