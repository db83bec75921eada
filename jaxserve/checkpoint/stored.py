"""How the parameters of a model are made of the weights of a checkpoint.

A checkpoint has *logical* weights: one array each, outputs first, named "layers.3.attention.q".
A model *stores* them as its backend likes: inputs first, several in one array, those of layers
that repeat in one array, or with zeros between and behind so that they divide over a mesh.

    for stored in stored_parameters(model):
        stored.path        # ("layers", 3, "attention", "qkv", "fused", "values")
        stored.pieces      # q, k, v: their logical names and shapes
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from flax import nnx

from jaxserve.checkpoint.tensors import Index
from jaxserve.layers.decoder import Decoder, Model
from jaxserve.layers.param import (
    Axes,
    Joined,
    Orientation,
    Parameter,
    Weight,
    WeightGroup,
    named_parameters,
)

TreePath = tuple[str | int, ...]


@dataclass(frozen=True)
class Piece:
    """A logical weight that a stored parameter holds.

    Attributes:
        name: its name in a checkpoint.
        outputs, inputs: its shape is [*outputs, *inputs]; a vector has outputs alone.
    """

    name: str
    outputs: tuple[int, ...]
    inputs: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the logical weight."""
        return self.outputs + self.inputs


@dataclass(frozen=True)
class Stored:
    """One array of a model's parameters.

    Its *canonical* form has outputs first: the one piece as it is, or, fused, the pieces with
    their outputs flattened, end to end, share by share: [rows, *inputs]. The stored form may turn
    inputs first. Of layers that repeat there is one canonical form for each turn, and the turns
    come first.

    Attributes:
        path: its place in the tree of parameters.
        shape, dtype, axes: of the stored form; axes are logical.
        pieces: the logical weights it is made of, turn by turn.
        outputs, inputs: axes of the canonical form.
        inputs_first: the stored form has inputs first (a vector has none).
        turns: layers that lie in it; None where it is of one layer, or of none.
    """

    path: TreePath
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str, ...]
    pieces: tuple[Piece, ...]
    outputs: Axes
    inputs: Axes
    inputs_first: bool
    turns: int | None = None

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the array, zeros that pad it included."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def padded(self) -> bool:
        """Returns whether some of the array is no weight of the checkpoint."""
        return any(axis.padded for axis in self.outputs + self.inputs)

    @property
    def joined(self) -> Joined | None:
        """Returns how several weights lie in one array; None of one weight."""
        return self.outputs[0].joined if self.outputs else None

    @property
    def order(self) -> tuple[int, ...]:
        """Returns, for each dimension of the stored form, that of the canonical form."""
        dims = tuple(range(len(self.shape)))
        if not self.inputs_first:
            return dims
        first = 0 if self.turns is None else 1
        end = first + len(self.outputs)
        return dims[:first] + dims[end:] + dims[first:end]

    def canonical(self, index: Index) -> Index:
        """Returns an index of the stored form as one of the canonical form, starts and stops set.

        Args:
            index: one slice per dimension, without steps.
        """
        found = [slice(0)] * len(self.shape)
        for dim, part, size in zip(self.order, index, self.shape, strict=True):
            start, stop, _ = part.indices(size)
            found[dim] = slice(start, stop)
        return tuple(found)

    def of_turn(self, turn: int) -> tuple[Piece, ...]:
        """Returns the logical weights of one turn."""
        count = len(self.pieces) // (self.turns or 1)
        return self.pieces[turn * count : (turn + 1) * count]


def stored_parameters(model: Model) -> list[Stored]:
    """Returns every parameter of the model, in the order of its tree."""
    module = model.module()
    return [_stored(module, path, leaf) for path, leaf in named_parameters(module)]


def _stored(module: Decoder, path: TreePath, leaf: Parameter) -> Stored:
    value = leaf.get_value()
    owners = _owners(module, path)
    weight = owners[-1] if isinstance(owners[-1], Weight) else None
    in_layer = path[0] == "layers"
    turns = module.turns if in_layer else None
    names = [path]
    if turns is not None:
        names = [_in_turn(path, turn, len(module.layers)) for turn in range(turns)]
    outputs, inputs = leaf.logical, ()
    if weight is not None:
        outputs, inputs = weight.outputs, weight.inputs if path[-1] == "values" else ()
    return Stored(
        path=path,
        shape=tuple(value.shape),
        dtype=value.dtype,
        axes=tuple(leaf.axes),
        pieces=tuple(piece for name in names for piece in _pieces(name, owners, outputs, inputs)),
        outputs=outputs,
        inputs=inputs,
        inputs_first=weight is not None and weight.orientation is Orientation.IN_OUT,
        turns=turns,
    )


def _in_turn(path: TreePath, turn: int, num_layers: int) -> TreePath:
    """Returns the path that a repeated layer's parameter has where every layer has its own."""
    _, index, *rest = path
    return ("layers", turn * num_layers + int(index), *rest)


def _owners(module: nnx.Module, path: TreePath) -> list[Any]:
    """Returns the modules on the way to a parameter: the i-th is reached by `path[:i]`."""
    owners: list[Any] = [module]
    for key in path[:-1]:
        here: Any = owners[-1]
        if isinstance(here, nnx.List | nnx.Dict):
            owners.append(cast(Any, here)[key])
        else:
            owners.append(getattr(here, str(key)))
    return owners


def _pieces(path: TreePath, owners: list[Any], outputs: Axes, inputs: Axes) -> tuple[Piece, ...]:
    """Returns the logical weights of the parameter at `path`."""
    if not isinstance(owners[-1], Weight):
        return (Piece(_dotted(path), _sizes(outputs)),)
    assert path[-1] in ("values", "scales", "bias"), path
    suffix = () if path[-1] == "values" else (path[-1],)
    groups = [i for i, owner in enumerate(owners) if isinstance(owner, WeightGroup)]
    if not groups:
        return (Piece(_dotted(path[:-1] + suffix), _sizes(outputs), _sizes(inputs)),)
    # A group has no name of its own in a checkpoint: layers.0.attention.(qkv.separate.)q
    prefix = path[: groups[0] - 1]
    joined = outputs[0].joined
    held = [(path[-2], outputs)] if joined is None else joined.members
    return tuple(
        Piece(_dotted((*prefix, member, *suffix)), _sizes(axes), _sizes(inputs))
        for member, axes in held
    )


def _dotted(path: TreePath) -> str:
    return ".".join(str(key) for key in path)


def _sizes(axes: Axes) -> tuple[int, ...]:
    """Returns the sizes that a checkpoint has."""
    return tuple(axis.real for axis in axes)
