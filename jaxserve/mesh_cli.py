"""Options of every command that runs a model: kernels, rounding, the mesh and its devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from jaxserve.config import ModelConfig
    from jaxserve.partitioning.layout_file import Layout

BackendOption = Annotated[str, typer.Option(help="kernels: xla, tpu, gpu or reference")]
QuantizeOption = Annotated[
    str | None, typer.Option(help="int8: round weights; w8a8: activations too")
]
KvDtypeOption = Annotated[
    str | None, typer.Option("--kv-dtype", help="int8 or fp8: round keys and values")
]
MeshOption = Annotated[
    str | None, typer.Option(help="devices along x, y and z, as 2,2,2; by default one device")
]
LayoutOption = Annotated[
    str | None,
    typer.Option(help="ws1d, ws2d, wg-x, wg-xy or wg-xyz of a mesh; or the file of a layout"),
]
PrefillLayoutOption = Annotated[
    str | None, typer.Option(help="layout of prefill, where it has another")
]
AttentionOption = Annotated[
    str | None,
    typer.Option(help="what keys and values are cut by: heads, batch, heads-batch, ..."),
]
DevicesOption = Annotated[
    str | None, typer.Option(help="cpu:8 takes eight devices on this processor")
]


@dataclass(frozen=True)
class Numbers:
    """What a person says of the numbers that a model runs in; see `api.load`."""

    dtype: str | None = None
    quantize: str | None = None
    kv_dtype: str | None = None


@dataclass(frozen=True)
class Sharding:
    """What a person says of meshes; see `partitioning.layout_file.choose`."""

    mesh: str | None = None
    layout: str | None = None
    prefill_layout: str | None = None
    attention: str | None = None

    def choose(self, config: ModelConfig, dtype: str) -> Layout | None:
        """Returns the layout for a model; None for one device."""
        from jaxserve.partitioning.layout_file import choose

        return choose(
            config,
            dtype,
            mesh=self.mesh,
            layout=self.layout,
            prefill_layout=self.prefill_layout,
            attention=self.attention,
        )
