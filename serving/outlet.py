"""A socket that messages are sent to without waiting.

outlet = Outlet(sock)
outlet.send(frame(message))
outlet.drain(1.0)
"""

from __future__ import annotations

import socket
import threading


class Outlet:
    """Sends bytes, and never waits in the thread that has some to send. Safe from any thread.

    What the socket does not take at once is sent by a thread of its own.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._guard = threading.Condition()
        self._rest = bytearray()
        self._closed = False
        threading.Thread(target=self._write_on, name="jaxserve-outlet", daemon=True).start()

    def send(self, data: bytes) -> None:
        """Sends bytes after those before them."""
        with self._guard:
            if self._rest:
                self._rest += data
                return
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:  # the other side is gone; whoever reads from it deals with that
                return
            if sent < len(data):
                self._rest += data[sent:]
                self._guard.notify_all()

    def drain(self, patience_s: float) -> None:
        """Waits until all is sent."""
        with self._guard:
            self._guard.wait_for(lambda: not self._rest, patience_s)

    def close(self) -> None:
        """Ends the thread; what is not sent is lost."""
        with self._guard:
            self._closed = True
            self._rest.clear()
            self._guard.notify_all()

    def _write_on(self) -> None:
        while True:
            with self._guard:
                self._guard.wait_for(lambda: self._rest or self._closed)
                if self._closed:
                    return
                data = bytes(self._rest)
            try:
                sent = self._sock.send(data)  # blocks; the guard is free
            except OSError:
                return
            with self._guard:
                del self._rest[:sent]
                self._guard.notify_all()
