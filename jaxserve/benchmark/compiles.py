"""Counts what XLA compiles, whoever asks for it.

with CompileCount() as compiles:
    ...
compiles.total
"""

from __future__ import annotations

from typing import Any, Self

from jax import monitoring

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCount:
    """Programs compiled, or loaded from the compilation cache, while it is open; all threads."""

    def __init__(self) -> None:
        self.total = 0
        self.seconds = 0.0

    def __enter__(self) -> Self:
        monitoring.register_event_duration_secs_listener(self._take)
        return self

    def __exit__(self, *exc_info: object) -> None:
        monitoring.unregister_event_duration_listener(self._take)

    def _take(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILE_EVENT:
            self.total += 1
            self.seconds += duration_secs
