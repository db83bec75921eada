"""GPUs that are not here, as meshes x, y, z.

    mesh = Gpus("NVIDIA H100 80GB HBM3", MeshPlan(2, 2, 2)).mesh()     # needs the CUDA plugin alone

The plugin carries descriptions of the GPUs that XLA knows, as text; XLA compiles for one of them.
Products are then not tuned by trial, which takes a GPU.
"""

from __future__ import annotations

import importlib.util
import mmap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jax.experimental import topologies
from jax.sharding import Mesh

from jaxserve.errors import UsageError
from jaxserve.partitioning.mesh import MeshPlan, make_mesh

_LIBRARY = "xla_cuda_plugin.so"
_REMEDY = "pip install 'jaxserve[verify]'"


@dataclass(frozen=True)
class Gpus:
    """GPUs and the mesh on them.

    Attributes:
        kind: as XLA calls the GPU.
        plan: sizes of x, y and z.
        host_chips: GPUs of a host.
    """

    kind: str
    plan: MeshPlan
    host_chips: int = 8

    @property
    def sizes(self) -> dict[str, int]:
        """Returns the devices along x, y and z."""
        return dict(self.plan.sizes)

    def mesh(self) -> Mesh:
        """Returns the mesh of abstract devices.

        Raises:
            UsageError: the plugin is not installed, or does not know the GPU.
        """
        local = min(self.plan.num_devices, self.host_chips)
        shape = f"1x{self.plan.num_devices // local}x{local}"
        try:
            found = topologies.get_topology_desc(
                platform="cuda",
                topology_name="",
                topology=shape,
                target_config=target_config(self.kind),
            )
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"no compiler for {self.kind}: {error}; {_REMEDY}") from error
        return make_mesh(self.plan, found.devices)


@cache
def target_config(kind: str) -> str:
    """Returns XLA's description of a GPU, as the installed plugin carries it.

    Raises:
        UsageError: there is no plugin, or it has no such GPU.
    """
    with (
        library().open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
    ):
        at = text.find(f'device_description_str: "{kind}"'.encode())
        if at < 0:
            raise UsageError(f"the CUDA plugin does not know {kind!r}; update it: {_REMEDY}")
        start, end = text.rfind(b"\0", 0, at) + 1, text.find(b"\0", at)
        return text[start:end].decode()


def known(kind: str) -> bool:
    """Returns whether a plugin is installed that knows a GPU."""
    try:
        return bool(target_config(kind))
    except UsageError:
        return False


def library() -> Path:
    """Returns the plugin's library.

    Raises:
        UsageError: it is not installed.
    """
    for name in ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"):
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        for folder in (spec and spec.submodule_search_locations) or ():
            if (path := Path(folder) / _LIBRARY).is_file():
                return path
    raise UsageError(f"the CUDA plugin is not installed; {_REMEDY}")
