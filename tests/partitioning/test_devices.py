"""Devices asked for by name: before JAX starts, or not at all."""

import os
import subprocess
import sys

import jax
import pytest

from jaxserve.errors import UsageError
from jaxserve.partitioning.devices import use_devices


@pytest.mark.parametrize("devices", ["gpu:2", "cpu:", "cpu:x", "", "8", "cpu:-1"])
def test_unknown_names_are_refused(devices: str) -> None:
    with pytest.raises(UsageError, match="use 'cpu:N'"):
        use_devices(devices)


def test_none_is_too_few() -> None:
    with pytest.raises(UsageError, match="at least one"):
        use_devices("cpu:0")


def test_what_runs_already_may_do() -> None:
    assert len(jax.devices()) == 8
    use_devices("cpu:8")
    use_devices("cpu:2")
    with pytest.raises(UsageError, match="comes too late: JAX runs on 8 cpu devices already"):
        use_devices("cpu:16")


def test_devices_are_there_when_jax_starts() -> None:
    code = (
        "from jaxserve.partitioning.devices import use_devices; use_devices('cpu:3');"
        "import jax; print(len(jax.devices()), jax.default_backend())"
    )
    env = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    assert done.stdout.split() == ["3", "cpu"]
