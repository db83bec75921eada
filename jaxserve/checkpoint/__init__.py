"""Checkpoints: what is in a directory, and its weights on devices.

    info = inspect(locate("tiny"))                     # config, tensors, defaults; no weights read
    model = Model(info.config, Declare(info.dtype))
    params = load_params(info, model, places(mesh, phase), progress=reporter())
    convert("llama-hf", "llama-orbax")                 # loads by the same call, onto any mesh

Names load on first use: looking into a directory needs no JAX. (`locate` is in a module of its own
name, which Python puts in the place of such a name here.)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.checkpoint.generation_config import GenerationDefaults
    from jaxserve.checkpoint.info import CheckpointInfo, Format, inspect
    from jaxserve.checkpoint.load import load_params
    from jaxserve.checkpoint.orbax import convert
    from jaxserve.checkpoint.tensors import TensorInfo

__all__ = [
    "CheckpointInfo",
    "Format",
    "GenerationDefaults",
    "TensorInfo",
    "convert",
    "inspect",
    "load_params",
]

_HOMES = {
    "CheckpointInfo": "info",
    "Format": "info",
    "GenerationDefaults": "generation_config",
    "TensorInfo": "tensors",
    "convert": "orbax",
    "inspect": "info",
    "load_params": "load",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve.checkpoint' has no attribute {name!r}")
    return getattr(import_module(f"jaxserve.checkpoint.{_HOMES[name]}"), name)
