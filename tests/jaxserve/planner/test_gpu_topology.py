"""The CUDA plugin's descriptions of GPUs."""

from pathlib import Path

import pytest

from jaxserve.errors import UsageError
from jaxserve.planner import gpu_topology
from jaxserve.planner.gpu_topology import known, target_config

OTHER = b'name: "A"\ndevice_description_str: "Kind A MIG"\n\0'
WANTED = b'name: "B"\ndevice_description_str: "Kind A"\n'


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "plugin.so"
    path.write_bytes(b"\x7fELF\0" + OTHER + WANTED + b"\0rest")
    monkeypatch.setattr(gpu_topology, "library", lambda: path)
    target_config.cache_clear()
    yield
    target_config.cache_clear()


def test_a_description_is_found_among_others():
    assert target_config("Kind A") == WANTED.decode()
    assert known("Kind A")


def test_a_gpu_that_is_not_described_is_refused():
    assert not known("Kind B")
    with pytest.raises(UsageError, match="does not know 'Kind B'"):
        target_config("Kind B")
