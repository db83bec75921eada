"""Runs open-weight language models with JAX on TPU, GPU and CPU.

    import jaxserve as js

    llm = js.load("tiny")
    print(llm.generate("def area(", max_tokens=32).text)

Public names load on first use, so `import jaxserve` itself costs nothing and imports no JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.api import LLM, load
    from jaxserve.config import ModelConfig, StreamingCache
    from jaxserve.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        JaxserveError,
        TokenizerError,
        UnsupportedError,
        UsageError,
    )
    from jaxserve.serving.options import EngineOptions
    from jaxserve.serving.request import Completion, SamplingParams, Usage

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "EngineOptions",
    "JaxserveError",
    "ModelConfig",
    "SamplingParams",
    "StreamingCache",
    "TokenizerError",
    "UnsupportedError",
    "Usage",
    "UsageError",
    "__version__",
    "load",
]

_HOMES = {
    "jaxserve.api": ("LLM", "load"),
    "jaxserve.config": ("ModelConfig", "StreamingCache"),
    "jaxserve.errors": (
        "CheckpointError",
        "ConfigError",
        "ContextLengthError",
        "JaxserveError",
        "TokenizerError",
        "UnsupportedError",
        "UsageError",
    ),
    "jaxserve.serving.options": ("EngineOptions",),
    "jaxserve.serving.request": ("Completion", "SamplingParams", "Usage"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
