"""Which group a process belongs to, from what it was told or from where it was started.

    found = find(dict(os.environ))          # Found("10.0.0.2:8476", 4, 1), or None
    group = choose(coordinator=None, num_processes=None, process_id=None, environ=os.environ)

LeaderWorkerSet, Slurm and GKE say it in the environment, Cloud TPU VMs through the metadata server.
What is found goes to `jax.distributed.initialize`.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from jaxserve.errors import ConfigError, UsageError
from jaxserve.serving.multihost.group import DEFAULT_PORT, Group

METADATA_S = 2.0

_SLURM_PORTS = 5000
_FIRST_SLURM_PORT = 21000


class Found(NamedTuple):
    """What an environment says; `where` is its name."""

    where: str
    host: str
    num_processes: int
    process_id: int
    port: int = DEFAULT_PORT


class _Names(NamedTuple):
    """The variables of an environment, and how rank 0's host is read from one of them."""

    host: str
    host_of: Callable[[str], str]
    num_processes: str
    num_of: Callable[[str], int]
    process_id: str


def _first(hosts: str) -> str:
    return hosts.split(",")[0].strip()


def _count(hosts: str) -> int:
    return len([host for host in hosts.split(",") if host.strip()])


def first_node(nodes: str) -> str:
    """Returns the first of Slurm's compressed list: r1n003 of r[1-2]n[003-007,012],other.

    Raises:
        ConfigError: it is no such list.
    """
    first = re.match(r"(?:[^,\[\]\s]|\[[^\[\]]*\])+", nodes)
    name = re.sub(r"\[(\d+)[\d,-]*\]", r"\1", first[0]) if first else ""
    # What follows is the next node, or nothing.
    if first is None or "[" in name or nodes[first.end() : first.end() + 1] not in ("", ","):
        raise ConfigError(
            f"SLURM_STEP_NODELIST={nodes!r} is no list of nodes such as r[1-2]n[003-007],x; "
            "say --coordinator HOST:PORT"
        )
    return name


ENVIRONMENTS = {
    "LeaderWorkerSet": _Names(
        "LWS_LEADER_ADDRESS", str.strip, "LWS_GROUP_SIZE", int, "LWS_WORKER_INDEX"
    ),
    "Slurm": _Names("SLURM_STEP_NODELIST", first_node, "SLURM_NTASKS", int, "SLURM_PROCID"),
    "GKE": _Names("TPU_WORKER_HOSTNAMES", _first, "TPU_WORKER_HOSTNAMES", _count, "TPU_WORKER_ID"),
}


def find(
    environ: Mapping[str, str], metadata: Callable[[str], str | None] | None = None
) -> Found | None:
    """Returns the group that a process was started in; None where it is alone.

    Args:
        metadata: returns an attribute of this machine; None asks nobody.

    Raises:
        ConfigError: a variable is not what it must be.
    """
    for where, names in ENVIRONMENTS.items():
        if {names.host, names.num_processes, names.process_id} <= environ.keys():
            try:
                size = names.num_of(environ[names.num_processes])
                rank = int(environ[names.process_id])
            except ValueError as error:
                raise ConfigError(
                    f"{names.num_processes}={environ[names.num_processes]!r} and "
                    f"{names.process_id}={environ[names.process_id]!r} must be numbers"
                ) from error
            if size > 1:
                host = names.host_of(environ[names.host])
                return Found(where, host, size, rank, _port(where, environ))
    if metadata is None or "TPU_SKIP_MDS_QUERY" in environ:
        return None
    return _of_tpu_vm(metadata)


def _port(where: str, environ: Mapping[str, str]) -> int:
    """Returns the coordinator's port: of Slurm one for each job, which may share a node."""
    job = environ.get("SLURM_JOB_ID", "")
    if where != "Slurm" or not job.isdecimal():
        return DEFAULT_PORT
    return _FIRST_SLURM_PORT + 2 * (int(job) % _SLURM_PORTS)


def _of_tpu_vm(metadata: Callable[[str], str | None]) -> Found | None:
    rank, hosts = metadata("agent-worker-number"), metadata("worker-network-endpoints")
    if rank is None or hosts is None or not rank.strip().isdecimal() or _count(hosts) < 2:
        return None
    # An entry is an address, or "name:id:address".
    return Found("Cloud TPU", _first(hosts).rsplit(":", 1)[-1], _count(hosts), int(rank))


def metadata_server(environ: Mapping[str, str]) -> Callable[[str], str | None] | None:
    """Returns how to ask the metadata server of a TPU VM; None on other machines."""
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        return None
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    return lambda name: attribute(host, name)


def attribute(host: str, name: str) -> str | None:
    """Returns an attribute that a metadata server gives; None where it has none, or is none."""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{name}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=METADATA_S) as answer:
            return answer.read().decode()
    except OSError:
        return None


def choose(
    environ: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    secret: bytes = b"",
    join_s: float = 300.0,
) -> Group | None:
    """Returns the group that was asked for, or else the one that the environment tells of.

    Raises:
        UsageError: a part of it is missing.
    """
    asked = {
        "--coordinator": coordinator,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [flag for flag, value in asked.items() if value is None]
    if not missing:
        if num_processes == 1:
            return None
        assert coordinator is not None and num_processes is not None and process_id is not None
        return Group(coordinator, num_processes, process_id, secret, join_s)
    found = find(environ, metadata_server(environ))
    if found is None:
        if len(missing) < len(asked):
            raise UsageError(
                f"{', '.join(missing)} is missing, and nothing here tells it; a group needs "
                "--coordinator, --num-processes and --process-id"
            )
        return None
    return Group(
        coordinator or f"{found.host}:{found.port}",
        num_processes or found.num_processes,
        found.process_id if process_id is None else process_id,
        secret,
        join_s,
    )
