"""Keeps compiled programs on disk, so that a second start does not compile again.

On by default in `~/.cache/jaxserve/xla` (under `XDG_CACHE_HOME` where that is set).
`JAXSERVE_CACHE_DIR=DIR` moves it to `DIR/xla`; `JAXSERVE_COMPILE_CACHE=off` switches it off.
A cache directory that JAX was already given (`JAX_COMPILATION_CACHE_DIR`) is left alone.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from jaxserve.errors import UsageError

_log = logging.getLogger(__name__)

_SWITCH = {"on": True, "off": False}


def directory() -> Path:
    """Returns the folder of compiled programs that the environment asks for."""
    if moved := os.environ.get("JAXSERVE_CACHE_DIR"):
        return Path(moved).expanduser() / "xla"
    caches = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification has relative paths ignored.
    root = Path(caches) if caches and Path(caches).is_absolute() else Path.home() / ".cache"
    return root / "jaxserve" / "xla"


def wanted() -> bool:
    """Returns whether the environment leaves the cache switched on.

    Raises:
        UsageError: `JAXSERVE_COMPILE_CACHE` is neither `on` nor `off`.
    """
    value = os.environ.get("JAXSERVE_COMPILE_CACHE", "on")
    if value not in _SWITCH:
        raise UsageError(f"JAXSERVE_COMPILE_CACHE={value!r} is not a switch; use on or off")
    return _SWITCH[value]


def enable() -> None:
    """Points JAX's persistent compilation cache at `directory()`, unless switched off.

    Small programs are kept too: a decode step of a small model compiles in less time than JAX's
    own threshold, and there are many of them. A folder that cannot be written costs a warning,
    never the run.
    """
    if not wanted():
        return
    import jax  # here, so that the settings can be read without loading JAX

    if jax.config.jax_compilation_cache_dir is not None:
        return
    path = directory()
    try:
        # Private: whoever can write an entry can run code in our process.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if not writable:
        _log.warning(
            "cannot write compiled programs to %s, so each start compiles again; "
            "set JAXSERVE_CACHE_DIR to a writable folder, or JAXSERVE_COMPILE_CACHE=off",
            path,
        )
        return
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_compilation_cache_dir", str(path))
