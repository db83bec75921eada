"""Functions of a program on its mesh: what one device computes, as one function of global arrays.

    run = spread(program, step, in_specs=(param_specs(program), P()), out_specs=P())
    jax.jit(run)(params, tokens)

Inside, arrays are one device's and the program's `Comm` moves them; without a mesh nothing is
wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.layers.param import named_parameters, tree_of
from jaxserve.partitioning.mesh import places
from jaxserve.partitioning.placement import AXES
from jaxserve.serving.generation import Program

EVERYWHERE = PartitionSpec()
"""The same on every device."""

BY_DEVICE = PartitionSpec(AXES)
"""A first dimension of one entry per device."""


def spread(
    program: Program, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Returns `function` of one device's arrays as one of global arrays."""
    if program.mesh is None:
        return function
    return jax.shard_map(
        function, mesh=program.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def param_specs(program: Program) -> Any:
    """Returns how each parameter lies on the mesh, in the tree of the parameters."""
    assert program.mesh is not None and program.layout is not None
    sizes, cuts = dict(program.mesh.shape), program.layout.cuts
    return tree_of(
        (path, PartitionSpec(*(c or None for c in cuts(leaf.axes, leaf.get_value().shape, sizes))))
        for path, leaf in named_parameters(program.model.module())
    )


def abstract_params(program: Program) -> Any:
    """Returns shapes, dtypes and places of parameters, as `load_params` puts them on the mesh."""
    if program.mesh is None or program.layout is None:
        return program.model.abstract_params()
    place = places(program.mesh, program.layout)
    return tree_of(
        (path, jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place(leaf.axes, a.shape)))
        for path, leaf in named_parameters(program.model.module())
        for a in (leaf.get_value(),)
    )


def own(program: Program, tree: Any) -> Any:
    """Returns one device's entry of arrays that lie `BY_DEVICE`; inside `spread`."""
    return tree if program.mesh is None else jax.tree.map(lambda x: x[0], tree)


def shown(program: Program, tree: Any) -> Any:
    """Returns arrays as the one entry of a device; inside `spread`."""
    return tree if program.mesh is None else jax.tree.map(lambda x: x[None], tree)


def abstract(program: Program, tree: Any, specs: Any = EVERYWHERE) -> Any:
    """Returns shapes and dtypes of arrays that lie as `specs` say, one spec or a tree of them."""
    mesh = program.mesh
    if mesh is None:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    if isinstance(specs, PartitionSpec):
        one = specs
        specs = jax.tree.map(lambda _: one, tree)
    return jax.tree.map(
        lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
        tree,
        specs,
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Returns specs as shardings on a mesh."""
    is_spec: Callable[[Any], bool] = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)
