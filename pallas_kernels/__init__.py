"""Kernels by operation; one folder each, `reference.py` the definition.

    kernels = kernel_set("xla")
    out = kernels.attention(q, k, v, q_positions, k_positions, spec)

A set is resolved once, when a program is built. What a backend lacks is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from jax import Array

from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels import hopper

BACKENDS = ("xla", "reference", "tpu")
"""Backends whose kernels take every type."""

GPU = "gpu"
"""Backend for Hopper: activations of two bytes, and a JAX that has Mosaic GPU."""

FOLDERS = {
    "matmul": "matmul",
    "ragged_matmul": "ragged_matmul",
    "int8_matmul": "int8_matmul",
    "attention": "attention",
    "init_pages": "paged_attention",
    "write_pages": "paged_attention",
    "copy_pages": "paged_attention",
    "write_and_attend": "paged_attention",
    "paged_attention": "paged_attention",
}
"""Where each kernel of a set lives."""


@dataclass(frozen=True)
class KernelSet:
    """The kernels of one backend.

    Attributes:
        backend: name they were resolved for.
        matmul: see `matmul.reference`.
        ragged_matmul: see `ragged_matmul.reference`.
        int8_matmul: see `int8_matmul.reference`.
        attention: see `attention.reference`.
        init_pages, write_pages, copy_pages, paged_attention, write_and_attend: see
            `paged_attention.reference`.
    """

    backend: str
    matmul: Callable[..., Array]
    ragged_matmul: Callable[..., Array]
    int8_matmul: Callable[..., Array]
    attention: Callable[..., Array]
    init_pages: Callable[..., Any]
    write_pages: Callable[..., Any]
    copy_pages: Callable[..., Any]
    paged_attention: Callable[..., Any]
    write_and_attend: Callable[..., Any]


def resolve(op: str, backend: str) -> Callable[..., Any]:
    """Returns the function that computes `op` on `backend`.

    Raises:
        UnsupportedError: the backend is unknown or has no such kernel, or JAX is too old for it.
    """
    if backend not in (*BACKENDS, GPU):
        raise UnsupportedError(
            f"backend={backend!r} has no {op} kernel; use one of {', '.join(BACKENDS)}, {GPU}"
        )
    if backend == GPU:
        hopper.require()
    return getattr(import_module(f"{__name__}.{FOLDERS[op]}.{backend}"), op)


def kernel_set(backend: str = "xla") -> KernelSet:
    """Returns the kernels of `backend`."""
    return KernelSet(backend, **{op: resolve(op, backend) for op in FOLDERS})
