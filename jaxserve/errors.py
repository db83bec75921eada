"""The errors a user of jaxserve can meet.

Every message gives the value, the limit and the remedy. The command line prints
the message alone and exits with `exit_code`; a server maps the type to a status.
"""

from __future__ import annotations


class JaxserveError(Exception):
    """Base of every error raised on purpose."""

    exit_code = 1


class UsageError(JaxserveError):
    """A request or option is malformed or out of range."""

    exit_code = 2


class ConfigError(JaxserveError):
    """A configuration has an unknown, missing or inconsistent field."""


class UnsupportedError(JaxserveError):
    """A well-formed option or architecture that this build does not support."""


class CheckpointError(JaxserveError):
    """A checkpoint file is missing, truncated, corrupt or does not fit the model."""


class TokenizerError(JaxserveError):
    """A tokenizer or chat template is missing, broken or refused."""


class ContextLengthError(UsageError):
    """Prompt and requested tokens do not fit the model's context."""


class QueueFullError(JaxserveError):
    """The queue holds as many requests or tokens as it may; the request can be sent again.

    Attributes:
        retry_after_s: seconds after which that is worth while.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CapacityError(UsageError):
    """A request needs more memory than there is, however long it waits."""


class GenerationError(JaxserveError):
    """A request failed while it ran; the message gives the cause."""


class UnavailableError(JaxserveError):
    """Whoever would serve this starts, stops or has failed; the request can be sent again.

    Attributes:
        retry_after_s: seconds after which that is worth while.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(JaxserveError):
    """A request would be, or is, answered later than its sender waits."""


class TooLargeError(JaxserveError):
    """A message is larger than any that is read."""


class NotFoundError(UsageError):
    """A request names a model or a route that is not served."""


class ModelNotFoundError(NotFoundError):
    """A request names a model that is not served here."""


class UnauthenticatedError(JaxserveError):
    """A request has no API key, or one that is not known."""
