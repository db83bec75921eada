"""The kernels compile for an H100 that is not here, with the real compiler, and spill nothing."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.pallas_kernels.hopper import FIRST

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(sys.prefix) / "cuda"
"""Where `.ci/cuda` puts JAX's CUDA plugin: beside an environment, as its start is not silent."""

pytestmark = [
    pytest.mark.skipif(jax.__version_info__ < FIRST, reason="this JAX has no such Mosaic GPU"),
    pytest.mark.skipif(sys.platform != "linux", reason="the CUDA plugin exists for Linux alone"),
]


@cache
def compiled(*options: str) -> dict[str, Any]:
    """Returns what `gpu_compile_for.py` prints; without the plugin, a failure with the remedy."""
    paths = [ROOT, PLUGIN, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    script = Path(__file__).with_name("gpu_compile_for.py")
    done = subprocess.run(
        [sys.executable, str(script), *options],
        capture_output=True, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    remedy = f"JAX's CUDA plugin comes with `.ci/cuda {sys.prefix}`"
    assert done.returncode == 0, f"{done.stderr[-2000:]}\n{remedy}"
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], spilling: frozenset[str] = frozenset()) -> None:
    assert not {name: one["error"] for name, one in found.items() if "error" in one}
    assert all(one["kernels"] and max(one["registers"]) <= 255 for one in found.values())
    spilled = {name for name, one in found.items() if one["spilled_bytes"]}
    assert spilled == spilling, found


def check_two_blocks(*found: dict[str, Any]) -> None:
    """Checks that two blocks of three groups of threads share a multiprocessor's registers."""
    for one in found:
        # Hopper gives them by eights.
        assert 2 * 3 * 128 * (-(-max(one["registers"]) // 8) * 8) <= 65536


def test_gpu_kernels_compile_without_spills() -> None:
    found = compiled()
    check(found)
    check_two_blocks(found["w8a16, 1 row"], found["w8a8, odd"])
    one = {"registers": [88]}
    with pytest.raises(AssertionError):
        check_two_blocks(one)


@pytest.mark.slow
def test_every_gpu_kernel_compiles() -> None:
    # Sums of 256 features leave too few registers for keys that change their type.
    check(compiled("--every"), frozenset({"256, int8"}))


def test_a_gpu_kernel_that_spills_is_found() -> None:
    check({"one": {"kernels": 1, "spilled_bytes": 0, "registers": [255]}})
    with pytest.raises(AssertionError):
        check({"one": {"kernels": 1, "spilled_bytes": 8, "registers": [255]}})
    with pytest.raises(AssertionError):
        check({"one": {"error": "not lowered"}})
