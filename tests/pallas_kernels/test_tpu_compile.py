"""The kernels compile for TPUs that are not here, with the real compiler, and stay in place."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHIPS = ("v5e", "v6e", "v5p", "v4")
PAGES = 8 * 16 + 1

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'",
)


@cache
def compiled(chip: str) -> dict[str, Any]:
    """Returns what `compile_for.py` prints for a chip."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_for.py")), chip],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_compiles(chip: str) -> None:
    errors = {name: one["error"] for name, one in compiled(chip).items() if "error" in one}
    # The reason why `choose` turns w8a8 into w8a16 there.
    refused = {"w8a8", "experts, w8a8"} if chip == "v4" else set()
    assert set(errors) == refused, errors


@pytest.mark.parametrize("chip", CHIPS)
def test_pages_are_changed_in_place_and_not_padded(chip: str) -> None:
    found = compiled(chip)
    stored = PAGES * 2 * 128 * 256 * 2
    assert found["stored, decode"]["aliased"] == stored
    # Keys and values of 64 features of int8 in pages of 16: no byte of padding. Scales lie flat, by
    # rows of lanes, in groups of eight pages.
    pages = PAGES * 2 * 16 * 128
    scales = (PAGES + 7) // 8 * 8 * 128 * 4
    assert pages + scales <= found["int8, mixed"]["arguments"] < 1.1 * (pages + scales)
