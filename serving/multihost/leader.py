"""Rank 0: waits for the other ranks, sends them plans, and notices when one is lost.

    leader = Leader.gather(group, identity, phase=print)    # all ranks are there
    engine = Engine(LeadingRunner(runner, leader), config)
    leader.leave()

The engine's thread sends; a thread for each rank reads, and one watches all of them. Whatever is
wrong with one rank ends them all: a step needs every part of the model.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

from jaxserve.errors import ConfigError, JaxserveError, UnavailableError
from jaxserve.serving.multihost import messages
from jaxserve.serving.multihost.digest import EPOCH_BITS
from jaxserve.serving.multihost.greeting import listen, proved, refusal
from jaxserve.serving.multihost.group import Group, named
from jaxserve.serving.multihost.messages import (
    TO_LEADER,
    Answer,
    Begin,
    Broke,
    Challenge,
    Deadline,
    Goodbye,
    GroupLostError,
    Identity,
    Passed,
    Pulse,
    Reached,
    Rejected,
    ToMember,
    Welcome,
    packed,
    receive,
)
from jaxserve.serving.multihost.plans import PlanWriter
from jaxserve.serving.multihost.progress import At, who_holds
from jaxserve.serving.multihost.ranks import GREETING_S, TICK_S, end_process
from jaxserve.serving.outlet import Outlet
from jaxserve.serving.plan import StepPlan

REPORT_S = 5.0
LEAVING_S = 5.0
LAST_CALL_S = 5.0
"""So long after a rank was turned away the others may come to be told."""
KEPT_DIGESTS = 4096

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Link:
    """A rank's connection; its reader and the watch write it."""

    rank: int
    sock: socket.socket
    outlet: Outlet
    address: str
    silent_s: float = 0.0
    pulse: Pulse = field(default_factory=Pulse)
    points: dict[str, int] = field(default_factory=dict[str, int])
    closed: bool = False

    def send(self, message: ToMember) -> None:
        self.outlet.send(packed(message))


class Leader:
    """The group as rank 0 sees it.

    Attributes:
        on_lost: see `Ranks`.
    """

    def __init__(self, group: Group, identity: Identity) -> None:
        self.on_lost: Callable[[str], None] = end_process
        self._group = group
        self._identity = identity
        self._guard = threading.Condition()
        self._links: dict[int, _Link] = {}
        self._begun = self._serving = self._over = False
        self._refusal = ""
        self._refused_s = 0.0
        self._turned_away: set[int] = set()
        self._digests: dict[int, bytes] = {}
        self._at = At(0, 0)
        self._open: deque[int] = deque()
        self._plans = PlanWriter(b"")

    @classmethod
    def gather(
        cls, group: Group, identity: Identity, phase: Callable[[str], None] = lambda name: None
    ) -> Self:
        """Returns the group, once every rank is there.

        Args:
            phase: told who is missing.

        Raises:
            UnavailableError: ranks are missing after `join_s`, or the address is taken.
            ConfigError: a rank has another version, layout or model.
        """
        leader = cls(group, identity)
        listener = listen(group)
        try:
            for work in (lambda: leader._accept(listener), leader._watch):
                threading.Thread(target=work, name="jaxserve-group", daemon=True).start()
            leader._wait_for_all(phase)
        except JaxserveError as error:
            leader.break_off(str(error))
            raise
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes who accepts
            listener.close()
        return leader

    # For the process.

    def broadcast(self, plan: StepPlan) -> None:
        """Sends a plan to all ranks."""
        self._send_all(packed(self._plans.plan(plan)))

    def reset(self) -> None:
        """Has all ranks forget pages and slots."""
        self._open.clear()
        self._send_all(packed(self._plans.reset(0)))

    def note_open(self, number: int) -> None:
        """Remembers a plan that the ranks were sent."""
        self._open.append(number)

    def note_begun(self, number: int) -> None:
        """Remembers the newest plan that the device of rank 0 was given."""
        self._at = self._at._replace(begun=number)

    def note_done(self, number: int, digest: bytes) -> None:
        """Remembers the tokens of the oldest open plan, for comparison."""
        self._open.popleft()
        self._at = self._at._replace(done=number)
        self._digests[number] = digest
        self._digests.pop(number - KEPT_DIGESTS, None)

    def stalled(self, seconds: float) -> None:
        """Ends the group whose step does not end, and names who holds it up."""
        plan = next(iter(self._open), None)
        if plan is None:
            self.lose(f"rank 0 has been busy between two plans for {seconds:.0f} s")
            return
        ranks = {0: self._at}
        for rank, link in sorted(self._links.items()):
            ranks[rank] = At(link.pulse.begun, link.pulse.number, link.silent_s)
        number = plan & (1 << EPOCH_BITS) - 1
        self.lose(f"plan {number} has taken more than {seconds:.0f} s: {who_holds(plan, ranks)}")

    def agree(self, point: str, value: int = 0) -> int:
        """Returns the least of the numbers that all ranks bring to a point, where they meet."""
        with self._guard:
            self._guard.wait_for(
                lambda: self._over or all(point in link.points for link in self._links.values())
            )
            if self._over:
                raise GroupLostError("the group is lost")
            least = min([value, *(link.points[point] for link in self._links.values())])
        self._send_all(packed(Passed(point, least)))
        return least

    def serve(self) -> None:
        """Expects signs of life as often as from ranks that do not load or compile."""
        self._serving = True

    def break_off(self, message: str) -> None:
        """Tells all ranks that the group ends, and why."""
        self._end(Goodbye(f"rank 0 broke off: {message}"))

    def leave(self) -> None:
        """Ends the group in good order, once the ranks have closed their connections."""
        if not self._end(Goodbye()):
            return
        with self._guard:
            self._guard.wait_for(
                lambda: all(link.closed for link in self._links.values()), LEAVING_S
            )

    def lose(self, reason: str) -> None:
        """Ends the group because of something that cannot be mended; only the first call counts."""
        if self._end(Goodbye(reason), lambda: self._report(reason)):
            self.on_lost(reason)

    def _report(self, reason: str) -> None:
        _log.critical("the group is lost: %s", reason, extra={"rank": 0})

    def _end(self, goodbye: Goodbye, before: Callable[[], None] = lambda: None) -> bool:
        """Returns whether this call ended the group."""
        with self._guard:
            if self._over:
                return False
            self._over = True
            self._guard.notify_all()
            links = list(self._links.values())
        before()
        for link in links:
            link.send(goodbye)
        for link in links:
            link.outlet.drain(0.2)
        return True

    def _send_all(self, data: bytes) -> None:
        for link in self._links.values():
            link.outlet.send(data)

    # Until all are there.

    def _missing(self) -> list[int]:
        known = {*self._links, *self._turned_away}
        return [rank for rank in range(1, self._group.num_processes) if rank not in known]

    def _wait_for_all(self, phase: Callable[[str], None]) -> None:
        began, told, said_s = time.monotonic(), [], 0.0
        size, until = self._group.num_processes, began + self._group.join_s
        with self._guard:
            while (missing := self._missing()) or self._refusal:
                now = time.monotonic()
                if self._refusal and (not missing or now >= self._refused_s + LAST_CALL_S):
                    raise ConfigError(self._refusal)
                if now >= until:
                    raise UnavailableError(
                        f"{named(missing)} of {size} did not come within {self._group.join_s:g} s; "
                        "see whether their processes run and reach "
                        f"{self._group.plans[0]}:{self._group.plans[1]}"
                    )
                if missing != told or now - said_s >= REPORT_S:
                    _log.info("waits for %s of %d", named(missing), size)
                    if missing != told:
                        phase(f"waiting for {named(missing)} of {size}")
                    told, said_s = missing, now
                self._guard.wait(min(until - now, LAST_CALL_S if self._refusal else REPORT_S))
            self._begun = True
        nonce = secrets.token_bytes(32)
        self._plans = PlanWriter(messages.epoch_key(self._group.secret, nonce, self._identity))
        self._send_all(packed(Begin(nonce)))
        _log.info("all %d ranks are there", size, extra={"seconds": time.monotonic() - began})

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, address = listener.accept()
            except OSError:  # it is closed
                return
            threading.Thread(
                target=self._greet,
                args=(sock, address[0].removeprefix("::ffff:")),  # IPv4 on a socket of both
                name="jaxserve-group",
                daemon=True,
            ).start()

    def _greet(self, sock: socket.socket, address: str) -> None:
        """Lets in who proves the secret and is what a rank must be."""
        try:
            until = Deadline(GREETING_S)
            until.bind(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            challenge = Challenge(secrets.token_bytes(32))
            sock.sendall(packed(challenge))
            answer = receive(sock, TO_LEADER, messages.MAX_GREETING_BYTES, until)
            if not isinstance(answer, Answer):
                raise ValueError("it did not answer the challenge")
            link = self._admit(sock, address, challenge, answer)
            if link is None:
                sock.close()
                return
            sock.settimeout(None)
        except (OSError, EOFError, ValueError) as error:
            _log.warning("%s failed to join: %s", address, error)
            sock.close()
            return
        self._read(link)

    def _admit(
        self, sock: socket.socket, address: str, challenge: Challenge, answer: Answer
    ) -> _Link | None:
        """Returns the connection of a rank that is welcome; another one is told why not."""
        group, rank = self._group, answer.rank
        refused = refusal(group, self._identity, challenge, answer)
        with self._guard:
            again = False
            refused = refused or self._refusal or None
            if refused is None and (self._begun or self._over or rank in self._links):
                refused, again = f"rank {rank} is there already, or was until just now", True
            if refused is None:
                outlet = Outlet(sock)
                link = _Link(rank, sock, outlet, address)
                nonces = answer.nonce, challenge.nonce
                link.send(Welcome(messages.proof(group.secret, "welcome", *nonces)))
                self._links[rank] = link
                self._guard.notify_all()
                _log.info("rank %d has joined", rank, extra={"address": address})
                return link
        _log.log(
            logging.INFO if again else logging.ERROR,
            "rank %d is not taken: %s",
            rank,
            refused,
            extra={"address": address},
        )
        sock.sendall(packed(Rejected(refused, again)))
        if not again and proved(group, challenge, answer):
            with self._guard:
                if not self._refusal:
                    self._refusal, self._refused_s = refused, time.monotonic()
                self._turned_away.add(rank)
                self._guard.notify_all()
        return None

    # While it lasts.

    def _read(self, link: _Link) -> None:
        """Reads what a rank says, until it is gone."""
        try:
            while True:
                self._hear(link, receive(link.sock, TO_LEADER))
        except (EOFError, ConnectionError):
            why = "closed its connection"
        except (OSError, ValueError) as error:
            why = f"broke its connection: {error}"
        link.outlet.close()
        link.sock.close()
        with self._guard:
            link.closed = True
            if not self._begun and self._links.get(link.rank) is link:
                del self._links[link.rank]
                _log.warning("rank %d has left: it %s", link.rank, why)
            self._guard.notify_all()
            begun = self._begun
        if begun:
            self.lose(f"rank {link.rank} {why}")

    def _hear(self, link: _Link, message: Any) -> None:
        link.silent_s = 0.0
        match message:
            case Pulse(number, digest, turn_s):
                link.pulse = message
                if turn_s > self._group.stall_s:
                    self.lose(f"rank {link.rank} has been at one step for {turn_s:.0f} s")
                if self._digests.get(number, digest) != digest:
                    self.lose(f"rank {link.rank} computed other tokens than rank 0")
            case Reached(point, value):
                with self._guard:
                    link.points[point] = value
                    self._guard.notify_all()
            case Broke(text):
                self.lose(f"rank {link.rank} broke off: {text}")
            case _:
                raise ValueError(f"{type(message).__name__} has no place here")

    def _watch(self) -> None:
        """Gives signs of life, and notices who gives none.

        Time counts by ticks: while the whole machine sleeps nobody is late.
        """
        pulse = packed(Pulse())
        while not self._over:
            time.sleep(TICK_S)
            group = self._group
            patience_s = group.silence_s if self._serving else group.starting_silence_s
            for link in list(self._links.values()):
                link.outlet.send(pulse)
                link.silent_s += TICK_S
                if link.silent_s > patience_s:
                    if self._begun:
                        self.lose(f"rank {link.rank} gave no sign of life for {patience_s:g} s")
                    else:
                        with contextlib.suppress(OSError):
                            link.sock.shutdown(socket.SHUT_RDWR)  # its reader lets it go
