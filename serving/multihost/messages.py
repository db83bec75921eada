"""What the ranks of a group say to each other, over one TCP connection from each to rank 0.

    sock.sendall(packed(Pulse()))
    message = receive(sock, TO_LEADER)

A frame is its length in 4 bytes, little-endian, and a message in MessagePack.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
import time
from typing import TypeVar

import msgspec

from jaxserve.errors import UnavailableError

PROTOCOL = 2
PROOF_BYTES = 32
MAX_GREETING_BYTES = 1 << 14
MAX_MESSAGE_BYTES = 1 << 28

M = TypeVar("M")
_LENGTH = struct.Struct("<I")
_ENCODER = msgspec.msgpack.Encoder()


class GroupLostError(UnavailableError):
    """A rank of the group is gone, or does not do what the others do."""


class Identity(msgspec.Struct, frozen=True):
    """What all ranks must have in common.

    Attributes:
        jaxserve, jax, jaxlib, libtpu, python: versions; of libtpu "none" where it is absent.
        layout: hash of layout, sizes and kernels.
        model: hash of the checkpoint's files.
        num_processes: size of the group.
    """

    jaxserve: str
    jax: str
    jaxlib: str
    libtpu: str
    python: str
    layout: str
    model: str
    num_processes: int

    def differs(self, other: Identity) -> str | None:
        """Returns the first thing in which another rank differs, for people."""
        for name, noun in _NOUNS.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"another {noun} ({theirs}) than rank 0 ({ours})"
        return None


_NOUNS = {
    "jaxserve": "version of jaxserve",
    "jax": "version of JAX",
    "jaxlib": "version of jaxlib",
    "libtpu": "version of libtpu",
    "python": "version of Python",
    "num_processes": "number of processes",
    "model": "model",
    "layout": "layout or other sizes",
}


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 asks who is there."""

    nonce: bytes
    protocol: int = PROTOCOL


class Answer(msgspec.Struct, frozen=True, tag=True):
    """A rank says who it is.

    Attributes:
        identity: an encoded `Identity`, as it is proved.
        proof: of the secret, over everything else and the challenge.
    """

    rank: int
    nonce: bytes
    identity: bytes
    proof: bytes
    protocol: int = PROTOCOL


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Rank 0 proves the secret, too."""

    proof: bytes


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """A rank is not taken; `again`: it may ask again."""

    message: str
    again: bool


class Begin(msgspec.Struct, frozen=True, tag=True):
    """All ranks are there; `nonce` is new for every such moment."""

    nonce: bytes


class Pulse(msgspec.Struct, frozen=True, tag=True):
    """A sign of life.

    Attributes:
        number: newest plan whose tokens are known here.
        digest: over the tokens of all plans up to it.
        turn_s: how long the rank has been at the same step.
        begun: newest plan that the rank's device was given.
    """

    number: int = 0
    digest: bytes = b""
    turn_s: float = 0.0
    begun: int = 0


class Reached(msgspec.Struct, frozen=True, tag=True):
    """A rank has come to a point at which all wait for each other, with a number."""

    point: str
    value: int = 0


class Passed(msgspec.Struct, frozen=True, tag=True):
    """All have come to a point; `value` is the least of their numbers."""

    point: str
    value: int


class Broke(msgspec.Struct, frozen=True, tag=True):
    """A rank cannot go on."""

    message: str


class Plan(msgspec.Struct, frozen=True, tag=True):
    """A plan; see `plans`.

    Attributes:
        chain: keyed hash over this body and all before it.
        body: what to do.
    """

    chain: bytes
    body: bytes


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The group ends: in good order where there is no reason."""

    reason: str = ""


ToMember = Challenge | Welcome | Rejected | Begin | Pulse | Passed | Plan | Goodbye
ToLeader = Answer | Pulse | Reached | Broke

TO_MEMBER: msgspec.msgpack.Decoder[ToMember] = msgspec.msgpack.Decoder(ToMember)
TO_LEADER: msgspec.msgpack.Decoder[ToLeader] = msgspec.msgpack.Decoder(ToLeader)
IDENTITY: msgspec.msgpack.Decoder[Identity] = msgspec.msgpack.Decoder(Identity)


class Deadline:
    """When something has to be over, however many calls of a socket it takes."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until = time.monotonic() + seconds

    def bind(self, sock: socket.socket) -> None:
        """Lets the next call of a socket take what is left.

        Raises:
            TimeoutError: nothing is left.
        """
        left_s = self._until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"it took more than {self._seconds:g} s")
        sock.settimeout(left_s)


def packed(message: ToMember | ToLeader) -> bytes:
    """Returns a message as it is sent."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def receive(
    sock: socket.socket,
    decoder: msgspec.msgpack.Decoder[M],
    most: int = MAX_MESSAGE_BYTES,
    until: Deadline | None = None,
) -> M:
    """Returns the next message, and reads nothing beyond it.

    Args:
        until: when all of it has to be there.

    Raises:
        EOFError: the other side has closed the connection.
        OSError: it broke, or took too long.
        ValueError: what came is no message.
    """
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size, until))
    if length > most:
        raise ValueError(f"a frame of {length:,} bytes; the limit is {most:,}")
    return decoder.decode(_exactly(sock, length, until))  # its error is a ValueError


def _exactly(sock: socket.socket, size: int, until: Deadline | None) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        if until is not None:
            until.bind(sock)
        got = sock.recv_into(view[at:])
        if not got:
            raise EOFError("the connection is closed")
        at += got
    return data


def proof(secret: bytes, role: str, *parts: bytes) -> bytes:
    """Returns what only those can make who know the secret."""
    made = hmac.new(secret, role.encode(), hashlib.sha256)
    for part in parts:
        made.update(_LENGTH.pack(len(part)) + part)
    return made.digest()


def answer_proof(secret: bytes, challenge: bytes, answer: Answer) -> bytes:
    """Returns the proof that belongs to an answer."""
    rank = str(answer.rank).encode()  # a stranger's may be of any size
    return proof(secret, "answer", challenge, answer.nonce, rank, answer.identity)


def encode_identity(identity: Identity) -> bytes:
    """Returns an identity as it travels."""
    return _ENCODER.encode(identity)


def epoch_key(secret: bytes, nonce: bytes, identity: Identity) -> bytes:
    """Returns the key of the plans of one moment at which all ranks were there."""
    return proof(secret, "plans", nonce, encode_identity(identity))
