"""Builds the program of a model for one device, or for the mesh of a layout.

program = program_of(config, "bfloat16", kernel_set("xla"), layout)
params = load_params(info, program.model, places_of(program))
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from jax import Array

from jaxserve.config import KvDtype, ModelConfig, Quantization
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare, Parameter, named_parameters, padded, tree_of
from jaxserve.pallas_kernels import KernelSet, int8_matmul
from jaxserve.pallas_kernels.tuning import current_chip
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.partitioning.layout_file import Layout
from jaxserve.partitioning.mesh import Sharding, make_mesh, places
from jaxserve.serving.generation import Program, logits
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.sharded import EVERYWHERE, param_specs, spread
from jaxserve.serving.views import leaves_of, single, stored

_log = logging.getLogger(__name__)


def program_of(
    config: ModelConfig,
    declare: Declare | str,
    kernels: KernelSet,
    layout: Layout | None = None,
    quantize: Quantization | None = None,
    kv_dtype: KvDtype | None = None,
    devices: Sequence[Any] | None = None,
) -> Program:
    """Returns the program of a model.

    Args:
        declare: how weights are stored, or a dtype, for what the devices do best: on a mesh of
            accelerators layers that repeat lie in one array, so that however deep a model is, one
            of them is compiled. A mesh adds its padding.
        layout: None, or one of a single device, takes one device.
        quantize: what is rounded, where `declare` is a dtype; a chip that cannot multiply rounded
            activations rounds weights alone, and a warning says so.
        kv_dtype: type of keys and values, where `declare` is a dtype; None keeps that dtype.
        devices: those of the mesh; None takes what there is.

    Raises:
        UsageError: there are too few devices, or the weights are fused for one.
    """
    if isinstance(declare, str):
        padding = None if layout is None or _one_device(layout) else layout.padding
        platform = jax.default_backend() if devices is None else devices[0].platform
        repeats = padding is not None and config.num_layers > len(config.pattern)
        stack = repeats and platform != "cpu"  # there a loop copies each layer's weights
        best = Declare.best(platform, declare)
        declare = replace(
            best, stack=stack, padding=padding, quantize=_runnable(quantize), kv_dtype=kv_dtype
        )
    if layout is None or _one_device(layout):
        return Program(Model(config, declare), LocalComm(), kernels)
    if declare.fuse and declare.padding is None:
        raise UsageError(
            "a mesh interleaves weights that are fused, and those given lie end to end; use "
            "Declare(fuse=False), or load the model with a mesh"
        )
    model = Model(config, replace(declare, padding=layout.padding))
    mesh = make_mesh(layout.mesh, devices)
    return Program.on(model, kernels, mesh, layout.prefill, layout.decode)


def _runnable(asked: Quantization | None) -> Quantization | None:
    """Returns what the device can round of what was asked for."""
    chip = current_chip()
    if asked is not Quantization.W8A8 or chip is None:
        return asked
    choice = int8_matmul.choose(int8_matmul.Mode.W8A8, chip)
    if choice.reason is not None:
        _log.warning("%s", choice.reason)
    return asked if choice.mode is int8_matmul.Mode.W8A8 else Quantization.INT8


def sized(options: EngineOptions, layout: Layout | None) -> EngineOptions:
    """Returns the options with the sizes that a layout was made for, where it says them.

    Raises:
        UsageError: other sizes were asked for.
    """
    if layout is None or layout.buckets is None:
        return options
    planned = msgspec.structs.asdict(layout.buckets)
    for name, size in planned.items():
        asked = getattr(options, name)
        if asked not in (size, getattr(EngineOptions(), name)):
            raise UsageError(
                f"{name}={asked}, and the layout was made for {size}; leave {name} out, or change "
                "the layout's buckets"
            )
    return replace(options, **planned)


def places_of(program: Program) -> Sharding | None:
    """Returns where each parameter of a program lies, as `load_params` takes it."""
    if program.mesh is None or program.layout is None:
        return None
    return places(program.mesh, program.layout)


def placed(program: Program, params: Params) -> Params:
    """Returns parameters as a program wants them: padded, and where they belong.

    Args:
        params: in the tree of `program.model`, or one by one as `views` gives them; each in the
            model's shape, or without its padding.

    Raises:
        UsageError: one is missing, left over, of another shape or dtype or, without a mesh, on
            other devices; the message names the first.
    """
    model, place = program.model, places_of(program)
    alone, given = single(model), dict(leaves_of(params))
    if (message := _misfit(model, given)) is not None:
        if alone == model or _misfit(alone, given) is not None:
            raise UsageError(message)
        given = dict(leaves_of(stored(model, tree_of(_padded(alone, given).items()))))
    elif place is None:
        _check_devices(given)
        return tree_of((path, jnp.asarray(value)) for path, value in given.items())
    flat = _padded(model, given)
    if place is not None:
        axes = {path: leaf.axes for path, leaf in named_parameters(model.module())}
        flat = {
            path: jax.device_put(value, place(axes[path], value.shape))
            for path, value in flat.items()
        }
    return tree_of(flat.items())


def check_views(program: Program, params: Params) -> None:
    """Checks that parameters given one by one, as `views` gives them, are a program's.

    Raises:
        UsageError: one is missing, left over, or of another shape or dtype.
    """
    if (message := _misfit(single(program.model), dict(leaves_of(params)))) is not None:
        raise UsageError(message)


def spread_logits(program: Program) -> Callable[[Params, Array], Array]:
    """Returns a function (params, tokens int32[B, L]) -> float32[B, L, V], as `logits`.

    On a mesh sequences are added until they divide over it.
    """
    specs = None if program.mesh is None else (param_specs(program), EVERYWHERE)
    whole = spread(program, partial(logits, program), specs, EVERYWHERE)
    comm = program.of(decode_only=False).comm

    def run(params: Params, tokens: Array) -> Array:
        batch, length = tokens.shape
        multiple = comm.token_multiple // math.gcd(comm.token_multiple, length)
        extra = -batch % (comm.num_shards * multiple)
        return whole(params, jnp.pad(tokens, ((0, extra), (0, 0))))[:batch]

    return run


def _misfit(model: Model, given: dict[Any, Any]) -> str | None:
    """Returns what is wrong with parameters of a model, at the first that is; else None."""
    leaves = dict(named_parameters(model.module()))
    for path in [*leaves, *given]:
        expected = _shapes(leaves[path]) if path in leaves else [None]
        shape = given[path].shape if path in given else None
        if shape not in expected:
            return (
                f"params{_written(path)} has shape {shape}, expected {expected[0]}; params are "
                "laid out as Model(config, declare).abstract_params() with the same declare"
            )
        found, dtype = given[path].dtype, leaves[path].get_value().dtype
        if found != dtype:
            return (
                f"params{_written(path)} has dtype {found}, expected {dtype}; convert it, as in "
                "jax.tree.map(lambda new, old: new.astype(old.dtype), params, llm.params)"
            )
    return None


def _check_devices(given: dict[Any, Any]) -> None:
    """Checks that parameters lie where a program of one device runs.

    Raises:
        UsageError: one lies elsewhere.
    """
    home = jnp.zeros(()).devices()
    for path, value in given.items():
        lies = value.devices() if isinstance(value, jax.Array) else home
        if lies != home:
            raise UsageError(
                f"params{_written(path)} lies on {_counted(lies)}, and the model runs on "
                f"{_counted(home)}; use jax.device_put(params, jax.devices()[0]), or a model that "
                "was loaded with a mesh"
            )


def _counted(devices: set[Any]) -> str:
    return str(*devices) if len(devices) == 1 else f"{len(devices)} devices"


def declared(config: ModelConfig, params: Params) -> Declare:
    """Returns how parameters are stored: the first of the usual ways that they fit.

    Where they fit none it is the plain way, which `placed` then says more about.
    """
    given = dict(leaves_of(params))
    dtypes = {str(value.dtype) for value in given.values() if value.dtype != jnp.int8}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    ways = [Declare(dtype), Declare.best("cpu", dtype), Declare.best("tpu", dtype)]
    return next((way for way in ways if _misfit(Model(config, way), given) is None), ways[0])


def _padded(model: Model, given: dict[Any, Any]) -> dict[Any, Any]:
    """Returns parameters in the model's shapes."""
    return {
        path: given[path]
        if given[path].shape == leaf.get_value().shape
        else padded(given[path], leaf.logical)
        for path, leaf in named_parameters(model.module())
    }


def _shapes(leaf: Parameter) -> list[tuple[int, ...]]:
    """Returns the shapes that a parameter may have: with padding, and without."""
    shape = tuple(leaf.get_value().shape)
    real = tuple(axis.real for axis in leaf.logical)
    return [shape, shape[: len(shape) - len(real)] + real]


def _written(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _one_device(layout: Layout | None) -> bool:
    return layout is None or layout.mesh.num_devices == 1
