"""Weights one by one, of a model that stores several in one array.

    tree = views(program, params)
    tree["layers"][3]["attention"]["qkv"]["separate"]["q"]["values"]     # [embed, heads, head]
    stored(program, tree)                                                # as `params`

On a mesh weights with a common input are interleaved, and layers that repeat may lie in one array.
A view is the tree that the model would have without either, in which an array is cut out where it
is asked for: a whole copy of a large model would not fit beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.checkpoint.stored import Stored, stored_parameters
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import interleaved, tree_of
from jaxserve.partitioning.mesh import Sharding

_MOST_LINES = 40
"""Of the text of a tree."""


class Later(NamedTuple):
    """An array that is made when it is asked for."""

    make: Callable[[], Array]
    shape: tuple[int, ...]
    dtype: Any


class Views(Mapping[Any, Any]):
    """A branch of the tree: keys in order, each with a branch, an array, or how to make one.

    To JAX it is a tree like a dict, all of whose arrays are made when it is taken apart. Its text
    names what there is, and shows no numbers.
    """

    def __init__(self, entries: Mapping[Any, Any]) -> None:
        self._entries = entries

    def __getitem__(self, key: Any) -> Any:
        found = self._entries[key]
        return found.make() if isinstance(found, Later) else found

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        lines = list(self._lines(""))
        more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        return "\n".join([*lines[:_MOST_LINES], *more])

    def _lines(self, before: str) -> Iterator[str]:
        """Yields the name, dtype and shape of every array below."""
        for key, found in self._entries.items():
            name = f"{before}{key}"
            if isinstance(found, Views):
                yield from found._lines(f"{name}.")
            elif hasattr(found, "shape") and hasattr(found, "dtype"):
                yield f"{name:<52} {found.dtype}{list(found.shape)}"
            else:
                yield f"{name:<52} {type(found).__name__}"


def _with_keys(tree: Views) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
    return [(jax.tree_util.DictKey(key), tree[key]) for key in tree], tuple(tree)


def _of_keys(keys: tuple[Any, ...], values: Iterable[Any]) -> Views:
    return Views(dict(zip(keys, values, strict=True)))


jax.tree_util.register_pytree_with_keys(Views, _with_keys, _of_keys)


def single(model: Model) -> Model:
    """Returns the model that stores every weight of every layer by itself, as far as a mesh goes.

    On one device fused weights stay so: they lie end to end.
    """
    declare = model.declare
    fuse = declare.fuse and declare.padding is None
    return Model(model.config, replace(declare, fuse=fuse, stack=False))


def views(model: Model, params: Params, place: Sharding | None) -> Views:
    """Returns parameters in the tree of `single(model)`.

    Args:
        place: where each lies; None leaves that open.
    """
    alone = single(model)
    if alone == model:
        return _branches(tree_of(leaves_of(params)))
    arrays = dict(leaves_of(params))
    held = _held(model)
    tree: dict[Any, Any] = {}
    for one in stored_parameters(alone):
        place_of = None if place is None else place(one.axes, one.shape)
        branch = tree
        for key in one.path[:-1]:
            branch = branch.setdefault(key, {})
        part = held[one.pieces[0].name]
        value = arrays[part.stored.path]
        made = partial(_taken, value, one, part, place_of)
        branch[one.path[-1]] = Later(made, tuple(one.shape), value.dtype)
    return _branches(tree)


def stored(model: Model, params: Params) -> Params:
    """Returns parameters as a model stores them, given in the tree of `single(model)`."""
    given = {one.pieces[0].name: one for one in stored_parameters(single(model))}
    values = dict(leaves_of(params))
    tree: dict[Any, Any] = {}
    for whole in stored_parameters(model):
        turns = [
            _joined(whole, [values[given[name].path] for name in names], given[names[0]])
            for names in _names(whole, given)
        ]
        branch = tree
        for key in whole.path[:-1]:
            branch = branch.setdefault(key, {})
        branch[whole.path[-1]] = turns[0] if whole.turns is None else jnp.stack(turns)
    return tree


class _Part(NamedTuple):
    """Where a weight lies: in an array, of a turn, as a member of several."""

    stored: Stored
    turn: int
    member: int


def _held(model: Model) -> dict[str, _Part]:
    """Returns where each logical weight lies."""
    return {
        piece.name: _Part(one, turn, member)
        for one in stored_parameters(model)
        for turn in range(one.turns or 1)
        for member, piece in enumerate(one.of_turn(turn))
    }


def _names(whole: Stored, given: Mapping[str, Stored]) -> list[list[str]]:
    """Returns, turn by turn, the weights that an array is made of, as they are given."""
    turns = range(whole.turns or 1)
    return [[p.name for p in whole.of_turn(turn) if p.name in given] for turn in turns]


def _taken(value: Array, one: Stored, part: _Part, place: Any) -> Array:
    """Returns one weight of an array."""
    run: Callable[..., Array] = partial(_cut, part=part, one=one)
    return jax.jit(run, out_shardings=place)(value)


def _cut(value: Array, part: _Part, one: Stored) -> Array:
    whole = part.stored
    value = value if whole.turns is None else value[part.turn]
    if whole.joined is None or one.joined is not None:
        return value
    joined, last = whole.joined, whole.inputs_first
    value = value if last else jnp.moveaxis(value, 0, -1)
    start = sum(joined.widths[: part.member])
    end = start + joined.widths[part.member]
    shares = value.reshape(*value.shape[:-1], joined.shares, -1)[..., start:end]
    own = shares.reshape(*value.shape[:-1], *(axis.size for axis in one.outputs))
    count = len(one.outputs)
    return own if last else jnp.moveaxis(own, range(-count, 0), range(count))


def _joined(whole: Stored, values: list[Array], one: Stored) -> Array:
    """Returns the array of one turn."""
    if whole.joined is None or one.joined is not None:
        return values[0]
    last, members = whole.inputs_first, whole.joined.members
    flat: list[Array] = []
    for value, (_, axes) in zip(values, members, strict=True):
        count = len(axes)
        turned = value if last else jnp.moveaxis(value, range(count), range(-count, 0))
        flat.append(turned.reshape(*turned.shape[: turned.ndim - count], -1))
    found = interleaved(flat, whole.joined.shares)
    return found if last else jnp.moveaxis(found, -1, 0)


def leaves_of(params: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yields (path, array) of a tree."""
    for keys, value in jax.tree.leaves_with_path(params):
        yield tuple(getattr(key, "key", key) for key in keys), value


def _branches(tree: dict[Any, Any]) -> Views:
    return Views({k: _branches(v) if isinstance(v, dict) else v for k, v in tree.items()})
