"""Sets the ground for every test: eight fake CPU devices, strict numerics, a throw-away cache.

JAX reads these settings when it starts, so they stand before anything imports it; they are
environment variables, so that processes started by tests inherit them.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NUM_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), f"--xla_force_host_platform_device_count={NUM_DEVICES}"]
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

if "JAXSERVE_TEST_CACHE" not in os.environ:
    # One folder for all workers of a run, removed by the process that made it.
    os.environ["JAXSERVE_TEST_CACHE"] = tempfile.mkdtemp(prefix="jaxserve-tests-")
    atexit.register(shutil.rmtree, os.environ["JAXSERVE_TEST_CACHE"], ignore_errors=True)
os.environ["JAXSERVE_CACHE_DIR"] = os.environ["JAXSERVE_TEST_CACHE"]

MOST_MAPPINGS = 6_000
"""Of memory, which compiled programs take, behind a module. XLA on CPU was seen to crash, while it
wrote a program into the cache, in processes that had run some 1,500 tests and held on to all of
their programs.
"""

MOST_IN_MODULE = 30_000
"""The same behind each test. Linux allows 65,530, and XLA crashes where it gets no more."""


@pytest.fixture(autouse=True, scope="module")
def _few_mappings() -> Iterator[None]:
    """Lets go of compiled programs before there are too many: each takes mappings of memory."""
    yield
    _let_go(MOST_MAPPINGS)


@pytest.fixture(autouse=True)
def _not_all_mappings() -> Iterator[None]:
    """Lets go of compiled programs within a module that makes very many."""
    yield
    _let_go(MOST_IN_MODULE)


def _let_go(most: int) -> None:
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_text().count("\n") > most:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def compile_fast() -> Iterator[None]:
    """Compiles with few optimisations: for tests of what is computed, not of its bits or its speed.

    They spend most of their time on compiling, and a third of it goes to optimising.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
