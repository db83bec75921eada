"""How a process of a group begins: the other ranks first, then JAX over all their devices."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxserve.errors import UsageError
from jaxserve.partitioning.layout_file import Layout
from jaxserve.serving.multihost.follower import Follower
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.leader import Leader
from jaxserve.serving.multihost.messages import Identity
from jaxserve.serving.multihost.program_cache import keep_programs


def join(
    group: Group, identity: Identity, phase: Callable[[str], None] = lambda name: None
) -> Leader | Follower:
    """Returns the group as this rank sees it, once every rank is there.

    Raises:
        UnavailableError: ranks are missing.
        ConfigError: a rank has another version, layout or model.
    """
    return (Leader.gather if group.leads else Follower.join)(group, identity, phase)


def start_jax(group: Group) -> None:
    """Has JAX see the devices of all ranks; called before any of them is used."""
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        if not group.leads:
            keep_programs()
    jax.distributed.initialize(
        group.coordinator,
        group.num_processes,
        group.process_id,
        cluster_detection_method="deactivate",  # all it would find is given
    )


def check_mesh(layout: Layout | None) -> None:
    """Checks that a layout takes every device of the group.

    Raises:
        UsageError: it leaves some out, so that a rank may have no part in it.
    """
    found = jax.device_count()
    wanted = 1 if layout is None else layout.mesh.num_devices
    if wanted != found:
        raise UsageError(
            f"the mesh has {wanted} devices and the group {found} ({jax.process_count()} "
            f"processes); use --mesh X,Y,Z whose sizes multiply to {found}"
        )
