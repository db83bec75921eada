"""Decoding a stream of tokens to the text that decoding them at once gives.

    stream = TextStream.from_spec({"type": "ByteLevel"})
    stream.push("âĤ")       # "": two of the three bytes of "€"
    stream.push("¬")        # "€"

A tokenizer's decoder is a chain of steps over the list of its tokens: replace "▁" by a space, join
byte tokens into characters, strip the first space. Each class here is the streaming form of one
step: it takes one token and returns those whose text no later token can change. After a step that
joins all tokens into one, what passes between steps are pieces of that one token.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from tokenizers import Regex, decoders

REPLACEMENT = "\ufffd"
"""What stands in the text for bytes that are not UTF-8."""


class TextStream:
    """The streaming form of a tokenizer's decoder. Its single writer is the caller of `push`."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self._steps = tuple(steps)

    @staticmethod
    def from_spec(spec: Mapping[str, Any] | None) -> TextStream | None:
        """Returns a fresh stream, or None when the decoder has no exact streaming form here.

        Args:
            spec: the `decoder` of a tokenizer.json; None (no decoder) joins tokens by spaces.
        """
        steps: list[_Step] = []
        joined = False
        for part in _flatten(spec):
            make = (_STEPS_ON_JOINED if joined else _STEPS).get(part["type"])
            step = make(part) if make is not None else None
            if step is None:
                return None
            steps.append(step)
            joined = joined or part["type"] in ("Fuse", "ByteLevel")
        return TextStream(steps)

    def push(self, token: str) -> str:
        """Returns the text that is certain now that `token` has followed the earlier tokens."""
        tokens: list[str] = [token]
        for step in self._steps:
            tokens = [out for each in tokens for out in step.push(each)]
        return "".join(tokens)

    def finish(self) -> str:
        """Returns the text still held back, knowing that no token follows."""
        tokens: list[str] = []
        for step in self._steps:
            tokens = [out for each in tokens for out in step.push(each)] + step.finish()
        return "".join(tokens)

    def resume(self, unfinished: bytes) -> None:
        """Makes a fresh stream continue a text.

        Args:
            unfinished: the bytes of a character that this text ends in the middle of, usually none.
        """
        for step in self._steps:
            step.resume(unfinished)

    def token_bytes(self, token: str) -> bytes:
        """Returns the bytes that `token` adds in the middle of a text."""
        piece: str | bytes = token
        for step in self._steps:
            if isinstance(piece, bytes):
                break
            piece = step.piece(piece)
        return piece if isinstance(piece, bytes) else piece.encode()


def incomplete_suffix(data: bytes) -> bytes:
    """Returns the trailing bytes of `data` that begin a character and do not complete it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


class _Step(Protocol):
    """One step of a decoder; its single writer is its `TextStream`."""

    def push(self, token: str) -> list[str]: ...

    def finish(self) -> list[str]: ...

    def resume(self, unfinished: bytes) -> None: ...

    def piece(self, token: str) -> str | bytes: ...


class _PerToken:
    """Rewrites each token alone; the first one of a text may be rewritten differently."""

    def __init__(self, rewrite: Callable[[str], str], first: Callable[[str], str] | None = None):
        self._rewrite = rewrite
        self._first = first
        self._next = rewrite if first is None else first

    def push(self, token: str) -> list[str]:
        rewritten = self._next(token)
        self._next = self._rewrite
        return [rewritten]

    def finish(self) -> list[str]:
        return []

    def resume(self, unfinished: bytes) -> None:
        self._next = self._rewrite

    def piece(self, token: str) -> str:
        return self._rewrite(token)


class _Fuse(_PerToken):
    """Joins all tokens into one. The pieces of a joined token need no change."""

    def __init__(self) -> None:
        super().__init__(lambda token: token)


class _StripText:
    """Drops up to `most` leading characters `char` of the whole text."""

    def __init__(self, char: str, most: int) -> None:
        self._char = char
        self._left = most

    def push(self, token: str) -> list[str]:
        if self._left and token:
            kept = token.lstrip(self._char)
            dropped = min(self._left, len(token) - len(kept))
            self._left = self._left - dropped if dropped == len(token) else 0
            token = token[dropped:]
        return [token]

    def finish(self) -> list[str]:
        return []

    def resume(self, unfinished: bytes) -> None:
        self._left = 0

    def piece(self, token: str) -> str:
        return token


class _ByteLevel:
    """Maps every character of a token to the byte that it stands for, and all bytes to UTF-8."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: str) -> list[str]:
        return [self._utf8.decode(self.piece(token))]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]

    def resume(self, unfinished: bytes) -> None:
        self._utf8.decode(unfinished)

    def piece(self, token: str) -> bytes:
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # not in the byte alphabet: an added token, which is text already
            return token.encode()


class _ByteFallback:
    """Joins each run of byte tokens (`<0xE2>`) into text.

    A run is UTF-8 as a whole or else every byte of it becomes U+FFFD. So a run that may still be
    valid is held until it ends; a byte that cannot be valid releases it at once.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")
        self._text: list[str] = []
        self._num_bytes = 0
        self._broken = False

    def push(self, token: str) -> list[str]:
        byte = _byte_token(token)
        if byte is None:
            return [*self.finish(), token]
        if self._broken:
            return [REPLACEMENT]
        self._num_bytes += 1
        try:
            self._text.append(self._utf8.decode(byte))
        except UnicodeDecodeError:
            self._broken = True
            return [REPLACEMENT] * self._num_bytes
        return []

    def finish(self) -> list[str]:
        held: list[str] = []
        if self._num_bytes and not self._broken:
            unfinished = self._utf8.getstate()[0]
            held = [REPLACEMENT] * self._num_bytes if unfinished else ["".join(self._text)]
        self._utf8.reset()
        self._text, self._num_bytes, self._broken = [], 0, False
        return held

    def resume(self, unfinished: bytes) -> None:
        self._utf8.decode(unfinished)
        self._num_bytes = len(unfinished)

    def piece(self, token: str) -> str | bytes:
        byte = _byte_token(token)
        return token if byte is None else byte


def _byte_token(token: str) -> bytes | None:
    """Returns the byte that a token such as `<0x0A>` stands for, or None for other tokens."""
    match = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return None if match is None else bytes.fromhex(match[1])


def _make_byte_of_char() -> Mapping[str, int]:
    """Returns the byte of each character of the byte-level alphabet.

    Printable Latin-1 characters stand for their own code; the other bytes, in order, for the
    characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(byte): byte for byte in printable}
    return MappingProxyType(table | {chr(256 + i): byte for i, byte in enumerate(others)})


_BYTE_OF_CHAR = _make_byte_of_char()


def decoder_spec(decoder: decoders.Decoder | None) -> Mapping[str, Any] | None:
    """Returns a decoder as it stands in tokenizer.json."""
    if decoder is None:
        return None
    return json.loads(decoder.__getstate__())  # the library's pickled form is this JSON


def _flatten(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        return [{"type": "Join"}]
    if spec["type"] == "Sequence":
        return [part for inner in spec["decoders"] for part in _flatten(inner)]
    return [spec]


def _replace(part: Mapping[str, Any]) -> _Step:
    content = part["content"]
    if (plain := part["pattern"].get("String")) is not None:
        return _PerToken(lambda token: token.replace(plain, content))
    replace = decoders.Replace(Regex(part["pattern"]["Regex"]), content)
    return _PerToken(lambda token: replace.decode([token]))


def _replace_in_joined(part: Mapping[str, Any]) -> _Step | None:
    # A longer pattern could lie across two pieces.
    return _replace(part) if len(part["pattern"].get("String", "")) == 1 else None


def _strip(part: Mapping[str, Any]) -> _Step | None:
    if part["stop"]:
        return None

    def strip(token: str) -> str:
        return token[min(part["start"], len(token) - len(token.lstrip(part["content"]))) :]

    return _PerToken(strip)


def _strip_joined(part: Mapping[str, Any]) -> _Step | None:
    return None if part["stop"] else _StripText(part["content"], part["start"])


def _positional(decoder: decoders.Decoder) -> _Step:
    """Returns the step of a decoder that treats the first token of a text differently."""
    return _PerToken(
        rewrite=lambda token: decoder.decode(["", token]),
        first=lambda token: decoder.decode([token]),
    )


def _metaspace(part: Mapping[str, Any]) -> _Step:
    scheme = part.get("prepend_scheme", "always")
    return _positional(decoders.Metaspace(part["replacement"], scheme))


def _word_piece(part: Mapping[str, Any]) -> _Step:
    return _positional(decoders.WordPiece(part["prefix"], part["cleanup"]))


def _join(part: Mapping[str, Any]) -> _Step:
    return _PerToken(rewrite=lambda token: " " + token, first=lambda token: token)


_STEPS: Mapping[str, Callable[[Mapping[str, Any]], _Step | None]] = MappingProxyType(
    {
        "Join": _join,
        "Replace": _replace,
        "Strip": _strip,
        "Metaspace": _metaspace,
        "WordPiece": _word_piece,
        "Fuse": lambda part: _Fuse(),
        "ByteLevel": lambda part: _ByteLevel(),
        "ByteFallback": lambda part: _ByteFallback(),
    }
)
_STEPS_ON_JOINED: Mapping[str, Callable[[Mapping[str, Any]], _Step | None]] = MappingProxyType(
    {"Fuse": lambda part: _Fuse(), "Replace": _replace_in_joined, "Strip": _strip_joined}
)
