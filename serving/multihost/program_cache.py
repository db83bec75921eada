"""Compiled programs on disk, of the ranks that JAX keeps none for.

JAX lets process 0 alone write its cache. On TPU the others find those programs, since all ranks
look for the same key. On CPU a key covers the rank, so that ranks above 0 would compile again at
each start.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

_NEEDED = {"cache_key", "module_name", "executable", "backend", "compile_time_secs"}

_log = logging.getLogger(__name__)


def keep_programs() -> bool:
    """Returns whether this process, of whatever rank, now keeps what it compiles.

    JAX has no option for that, so a function of its inside is replaced. Where a later JAX has
    another one, a rank compiles at each start.
    """
    try:
        from jax._src import compilation_cache, compiler

        known = inspect.signature(compiler._cache_write)
        put = compilation_cache.put_executable_and_time
        if not known.parameters.keys() >= _NEEDED:
            raise ValueError("it takes other arguments")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        _log.warning("ranks above 0 compile at each start, in this JAX (%s)", error)
        return False

    def write(*args: Any, **keywords: Any) -> None:
        given = known.bind(*args, **keywords).arguments
        try:
            put(
                given["cache_key"],
                given["module_name"],
                given["executable"],
                given["backend"],
                int(given["compile_time_secs"]),
            )
        except Exception as error:  # a start must not fail for want of the next one's speed
            _log.warning("a compiled program cannot be kept: %s", error)

    compiler._cache_write = write
    return True
