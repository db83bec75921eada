"""A rank above 0: joins, and runs the plans that rank 0 sends.

    follower = Follower.join(group, identity, phase=print)   # all ranks are there
    follower.agree("ready")
    follower.follow(runner, max_in_flight=2)                 # until the group ends
    follower.leave()

One thread reads, so that a plan is there while the one before it runs; one gives signs of life.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

from jaxserve.errors import UnavailableError
from jaxserve.serving.multihost import messages
from jaxserve.serving.multihost.digest import TokenDigest
from jaxserve.serving.multihost.greeting import AgainError, greeted
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.messages import (
    TO_MEMBER,
    Begin,
    Broke,
    Goodbye,
    GroupLostError,
    Identity,
    Passed,
    Plan,
    Pulse,
    Reached,
    ToLeader,
    packed,
    receive,
)
from jaxserve.serving.multihost.plans import PlanReader
from jaxserve.serving.multihost.ranks import TICK_S, Age, end_process
from jaxserve.serving.outlet import Outlet
from jaxserve.serving.runner import Runner

AGAIN_S = 0.2
"""Pause between attempts to join."""
QUIET_S = 0.05
"""After so long without a plan the results of the oldest step are taken in."""
REPORT_S = 5.0

_log = logging.getLogger(__name__)


class Follower:
    """The group as a rank above 0 sees it.

    Attributes:
        on_lost: see `Ranks`.
    """

    def __init__(self, group: Group, identity: Identity, sock: socket.socket) -> None:
        self.on_lost: Callable[[str], None] = end_process
        self._group = group
        self._identity = identity
        self._sock = sock
        self._outlet = Outlet(sock)
        self._guard = threading.Condition()
        self._passed: dict[str, int] = {}
        self._plans: queue.SimpleQueue[Plan | None] = queue.SimpleQueue()
        self._key = b""
        self._begun = self._serving = self._over = False
        self._silent_s = 0.0
        self._turn, self._busy = 0, False
        self._pulse = Pulse()
        self._newest = 0

    @classmethod
    def join(
        cls, group: Group, identity: Identity, phase: Callable[[str], None] = lambda name: None
    ) -> Self:
        """Returns the group, once every rank is there.

        Raises:
            UnavailableError: rank 0 does not answer within `join_s`, or gave up.
            ConfigError: rank 0 does not take this rank.
        """
        until = time.monotonic() + group.join_s
        host, port = group.plans
        phase("waiting for rank 0")
        said_s = 0.0
        while True:
            try:
                follower = cls(group, identity, greeted(group, identity))
                phase("waiting for the other ranks")
                follower._wait_for_all()
                return follower
            except (AgainError, OSError, EOFError, ValueError) as error:
                now = time.monotonic()
                if now >= until:
                    raise UnavailableError(
                        f"rank 0 at {host}:{port} took no rank {group.process_id} within "
                        f"{group.join_s:g} s ({error}); see whether it runs and can be reached"
                    ) from error
                if now - said_s >= REPORT_S:
                    _log.info("rank %d waits for rank 0: %s", group.process_id, error)
                    said_s = now
            time.sleep(AGAIN_S)

    # For the process.

    def agree(self, point: str, value: int = 0) -> int:
        """Returns the least of the numbers that all ranks bring to a point, where they meet."""
        self._send(Reached(point, value))
        with self._guard:
            self._guard.wait_for(lambda: point in self._passed or self._over)
            if point not in self._passed:
                raise GroupLostError("the group is lost")
            return self._passed[point]

    def follow(self, runner: Runner, max_in_flight: int = 2) -> None:
        """Runs plans until the group ends in good order; a failure ends the process."""
        reader, digest = PlanReader(self._key), TokenDigest()
        tickets: deque[tuple[int, Any]] = deque()

        def collect() -> None:
            number, ticket = tickets.popleft()
            with self._at_work():
                tokens = runner.collect(ticket).tokens
            self._pulse = Pulse(*digest.add(number, tokens))

        try:
            while True:
                try:
                    message = self._plans.get(timeout=QUIET_S if tickets else None)
                except queue.Empty:
                    collect()
                    continue
                if message is None:
                    return
                plan = reader.read(message)
                if plan is None:
                    tickets.clear()
                    digest, self._pulse = digest.next(), Pulse()
                    self._newest = digest.place(0)
                    runner.reset()
                    continue
                with self._at_work():
                    tickets.append((plan.number, runner.dispatch(plan)))
                self._newest = digest.place(plan.number)
                while len(tickets) > max_in_flight:
                    collect()
        except Exception as error:
            _log.exception("a step failed")
            told = str(error) if isinstance(error, GroupLostError) else type(error).__name__
            self.break_off(f"a step failed ({told})")
            self._lose(f"a step failed on rank {self._group.process_id} ({told})")
            raise

    def serve(self) -> None:
        """Expects signs of life as often as from a rank that does not load or compile."""
        self._serving = True

    def break_off(self, message: str) -> None:
        """Tells rank 0 that this rank cannot go on."""
        self._send(Broke(message))
        self._outlet.drain(1.0)

    def leave(self) -> None:
        """Closes the connection."""
        self._over = True
        self._outlet.drain(1.0)
        self._close()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Notes that the block is one turn."""
        self._turn += 1
        self._busy = True
        yield
        self._busy = False

    def _send(self, message: ToLeader) -> None:
        self._outlet.send(packed(message))

    def _close(self) -> None:
        self._outlet.close()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _lose(self, reason: str) -> None:
        """Ends the process; only the first call counts."""
        with self._guard:
            if self._over:
                return
            self._over = True
            self._guard.notify_all()
        _log.critical("the group is lost: %s", reason, extra={"rank": self._group.process_id})
        self.on_lost(reason)

    # The connection.

    def _wait_for_all(self) -> None:
        """Waits for the beginning, and starts the threads.

        Raises:
            AgainError: rank 0 is gone.
        """
        threading.Thread(target=self._beat, name="jaxserve-group", daemon=True).start()
        try:
            while True:
                match receive(self._sock, TO_MEMBER):
                    case Pulse():
                        self._silent_s = 0.0
                    case Begin(nonce):
                        break
                    case Goodbye(reason):
                        raise UnavailableError(reason or "rank 0 ended the group")
                    case other:
                        raise ValueError(f"{type(other).__name__} has no place here")
        except BaseException:
            self._over = True
            self._close()
            raise
        self._key = messages.epoch_key(self._group.secret, nonce, self._identity)
        self._begun = True
        threading.Thread(target=self._read, name="jaxserve-group", daemon=True).start()

    def _read(self) -> None:
        """Hears rank 0 until it is gone."""
        try:
            while self._hear(receive(self._sock, TO_MEMBER)):
                pass
            return
        except (EOFError, ConnectionError):
            why = "closed its connection"
        except (OSError, ValueError) as error:
            why = f"broke its connection: {error}"
        self._lose(f"rank 0 {why}")

    def _hear(self, message: Any) -> bool:
        """Returns whether there is more to hear."""
        self._silent_s = 0.0
        match message:
            case Plan():
                self._plans.put(message)
            case Pulse():
                pass
            case Passed(point, value):
                with self._guard:
                    self._passed[point] = value
                    self._guard.notify_all()
            case Goodbye(""):
                if not self._serving:
                    self._lose("rank 0 ended the group")
                self._plans.put(None)
                return False
            case Goodbye(reason):
                self._lose(reason)
                return False
            case _:
                raise ValueError(f"{type(message).__name__} has no place here")
        return True

    def _beat(self) -> None:
        """Gives signs of life, and notices when rank 0 gives none; see `Leader._watch`."""
        age = Age()
        while not self._over:
            time.sleep(TICK_S)
            turn_s = age.tick(self._turn if self._busy else None)
            done = self._pulse
            self._send(Pulse(done.number, done.digest, turn_s, self._newest))
            self._silent_s += TICK_S
            group = self._group
            patience_s = group.silence_s if self._serving else group.starting_silence_s
            if self._silent_s > patience_s and not self._over:
                if self._begun:
                    self._lose(f"rank 0 gave no sign of life for {patience_s:g} s")
                else:
                    self._close()  # whoever reads from it tries again
