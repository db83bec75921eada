"""The API keys of a server, and who a request comes from.

keys = Keys.of(options)                                  # None where no key is asked for
caller = keys.caller(headers.get("authorization"))       # of "Bearer KEY"

A key file has a name and a key on each line; a name may have several keys, while they are being
exchanged. Empty lines and lines that begin with # say nothing.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import ConfigError, UnauthenticatedError
from jaxserve.serving.server_options import ServerOptions

MIN_KEY_CHARS = 16
"""A shorter key could be guessed."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from.

    Attributes:
        name: of the key; empty where no key is asked for.
        salt: keeps cached prompts of different keys apart.
    """

    name: str = ""
    salt: str = ""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key as it is kept: nobody reads it back from here."""

    digest: bytes
    caller: Caller


class Keys:
    """Knows callers by their keys.

    Args:
        keys: pairs of a name and a key.
    """

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        self._entries = [
            _Entry(_digest("key", key), Caller(name, _digest("salt", key).hex()[:32]))
            for name, key in keys
        ]

    @classmethod
    def of(cls, options: ServerOptions) -> Keys | None:
        """Returns the keys of a server; None where it asks for none."""
        return None if options.api_key_file is None else cls.read(options.api_key_file)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Returns the keys of a file.

        Raises:
            ConfigError: it cannot be read, or a line is malformed; keys are not repeated there.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the API key file {path} cannot be read: {error}") from error
        keys: list[tuple[str, str]] = []
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or len(words[1]) < MIN_KEY_CHARS:
                raise ConfigError(
                    f"line {number} of the API key file {path} must be a name and a key of at "
                    f"least {MIN_KEY_CHARS} characters, with a space between"
                )
            keys.append((words[0], words[1]))
        if not keys:
            raise ConfigError(f"the API key file {path} has no keys; every request would fail")
        return cls(keys)

    def caller(self, authorization: str | None) -> Caller:
        """Returns who sends an `authorization` header.

        It takes as long for a wrong key as for a right one.

        Raises:
            UnauthenticatedError: the header is missing, malformed, or has a key that is not known.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise UnauthenticatedError(
                "this server needs an API key; send the header 'authorization: Bearer KEY'"
            )
        digest = _digest("key", key.strip())
        found: Caller | None = None
        for entry in self._entries:
            if hmac.compare_digest(entry.digest, digest):
                found = entry.caller
        if found is None:
            raise UnauthenticatedError("the API key is not known here")
        return found


def _digest(purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{purpose}:{key}".encode("utf-8", "surrogateescape")).digest()
