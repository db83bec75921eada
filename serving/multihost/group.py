"""Which processes serve one model together, and how long they wait for each other. Pure.

    group = Group("10.0.0.1:8476", num_processes=4, process_id=1, secret=b"...")
    group.plans                                     # ("10.0.0.1", 8477): where plans come from

Rank 0 schedules and serves; the others do what its plans say.
"""

from __future__ import annotations

import ipaddress

import msgspec

from jaxserve.errors import UsageError

DEFAULT_PORT = 8476
MIN_SECRET_BYTES = 16
MAX_PROCESSES = 4096


class Group(msgspec.Struct, frozen=True):
    """One process of a group.

    Attributes:
        coordinator: HOST:PORT of rank 0 for JAX; plans take the port after it.
        num_processes: size of the group.
        process_id: rank of this process.
        secret: what all of them know and strangers do not.
        join_s: longest wait for all to be there.
        silence_s: a process that says nothing for so long, while it serves, is lost.
        starting_silence_s: the same while it loads and compiles.
        stall_s: a process that is so long at one step is lost.
    """

    coordinator: str
    num_processes: int
    process_id: int
    secret: bytes = b""
    join_s: float = 300.0
    silence_s: float = 5.0
    starting_silence_s: float = 60.0
    stall_s: float = 30.0

    def __post_init__(self) -> None:
        if not 2 <= self.num_processes <= MAX_PROCESSES:
            raise UsageError(
                f"num_processes={self.num_processes} must be from 2 to {MAX_PROCESSES}; leave the "
                "group out for one process"
            )
        if not 0 <= self.process_id < self.num_processes:
            raise UsageError(
                f"process_id={self.process_id} must be from 0 to {self.num_processes - 1}"
            )
        host, port = self._address
        if not host or not 0 < port < 2**16 - 1:
            raise UsageError(
                f"coordinator={self.coordinator!r} is no HOST:PORT with a port from 1 to 65534 "
                "(plans take the port after it)"
            )
        for name in ("join_s", "silence_s", "starting_silence_s", "stall_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name}={getattr(self, name)} must be above 0")
        if self.secret and len(self.secret) < MIN_SECRET_BYTES:
            raise UsageError(
                f"the group's secret has {len(self.secret)} bytes; use at least {MIN_SECRET_BYTES}"
            )
        if not self.secret and not self.loopback:
            raise UsageError(
                f"coordinator={self.coordinator} is reached by others, who could send plans; give "
                "all processes one file with --group-secret-file"
            )

    @property
    def plans(self) -> tuple[str, int]:
        """Returns where rank 0 takes connections for plans."""
        host, port = self._address
        return host, port + 1

    @property
    def leads(self) -> bool:
        """Returns whether this process schedules and serves."""
        return self.process_id == 0

    @property
    def loopback(self) -> bool:
        """Returns whether only this machine reaches the group."""
        host, _ = self._address
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    @property
    def _address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) if port.isdecimal() else 0


def named(ranks: list[int]) -> str:
    """Returns ranks for people: "rank 3", or "ranks 1, 3 and 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    *most, last = map(str, ranks)
    return f"ranks {', '.join(most)} and {last}"
