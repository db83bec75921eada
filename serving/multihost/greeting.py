"""How a rank and rank 0 come to trust each other, and that they are of one group.

    listener = listen(group)                     # rank 0
    sock = greeted(group, identity)              # another rank: connected, both have the secret
    refusal(group, identity, challenge, answer)  # rank 0: None, or why a rank is not taken

Rank 0 sends a challenge; the answer proves the secret over it and over who answers; the welcome
proves it over what came with the answer.
"""

from __future__ import annotations

import errno
import hmac
import secrets
import socket

from jaxserve.errors import ConfigError, UnavailableError
from jaxserve.serving.multihost import messages
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.messages import (
    PROTOCOL,
    TO_MEMBER,
    Answer,
    Challenge,
    Deadline,
    Identity,
    Rejected,
    Welcome,
    packed,
    receive,
)
from jaxserve.serving.multihost.ranks import GREETING_S


class AgainError(Exception):
    """Rank 0 is not there yet, or still ends its last group."""


def listen(group: Group) -> socket.socket:
    """Returns what takes the other ranks' connections.

    Raises:
        UnavailableError: the port is taken.
    """
    host, port = group.plans
    try:
        if group.loopback:
            family, _, _, _, (host, *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server((host, port), family=family)
        # A name may be one that others know this machine by, of an address it does not have.
        return _server_of_any(port)
    except OSError as error:
        raise UnavailableError(
            f"rank 0 cannot take plans' connections on port {port}: {error.strerror}; the "
            "coordinator's port and the one after it must be free"
        ) from error


def _server_of_any(port: int) -> socket.socket:
    """Returns what takes connections on a port of every address, of IPv4 and IPv6."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port))


def greeted(group: Group, identity: Identity) -> socket.socket:
    """Returns a connection to rank 0 over which both have proved the secret.

    Raises:
        ConfigError: one of the two does not take the other.
        AgainError: it is worth while to try again.
    """
    host, port = group.plans
    until = Deadline(GREETING_S)
    try:
        sock = socket.create_connection((host, port), timeout=GREETING_S)
    except OSError as error:
        raise AgainError(f"it cannot be reached ({error.strerror or error})") from error
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        challenge = receive(sock, TO_MEMBER, messages.MAX_GREETING_BYTES, until)
        if not isinstance(challenge, Challenge):
            raise ValueError("rank 0 sent no challenge")
        answer = Answer(
            group.process_id, secrets.token_bytes(32), messages.encode_identity(identity), b""
        )
        proved = messages.answer_proof(group.secret, challenge.nonce, answer)
        until.bind(sock)
        sock.sendall(
            packed(Answer(answer.rank, answer.nonce, answer.identity, proved, answer.protocol))
        )
        reply = receive(sock, TO_MEMBER, messages.MAX_GREETING_BYTES, until)
        if isinstance(reply, Rejected):
            if reply.again:
                raise AgainError(reply.message)
            raise ConfigError(f"rank 0 does not take this rank: {reply.message}")
        wanted = messages.proof(group.secret, "welcome", answer.nonce, challenge.nonce)
        if not isinstance(reply, Welcome) or not hmac.compare_digest(reply.proof, wanted):
            raise ConfigError("what answers as rank 0 has another secret than this rank")
        sock.settimeout(None)
        return sock
    except BaseException:
        sock.close()
        raise


def proved(group: Group, challenge: Challenge, answer: Answer) -> bool:
    """Returns whether who answers knows the secret."""
    wanted = messages.answer_proof(group.secret, challenge.nonce, answer)
    return hmac.compare_digest(wanted, answer.proof)


def refusal(group: Group, identity: Identity, challenge: Challenge, answer: Answer) -> str | None:
    """Returns why who answered is not taken."""
    rank = answer.rank
    if not proved(group, challenge, answer):
        return f"rank {rank} has another secret than rank 0"
    if answer.protocol != PROTOCOL:
        return f"rank {rank} speaks protocol {answer.protocol}, rank 0 speaks {PROTOCOL}"
    difference = identity.differs(messages.IDENTITY.decode(answer.identity))
    if difference is not None:
        return f"rank {rank} has {difference}"
    if not 0 < rank < group.num_processes:
        return f"rank {rank} is none of 1 to {group.num_processes - 1}"
    return None
