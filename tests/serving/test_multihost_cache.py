"""Ranks above 0 keep their compiled programs, by a function inside of JAX that has to be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache, compiler

from jaxserve.serving.multihost.program_cache import keep_programs

from .test_multihost_faults import free_port

CODE = """
import json, sys
from jaxserve.compile_cache import enable
from jaxserve.serving.multihost.group import Group
from jaxserve.serving.multihost.join import start_jax
import jax
from jax import monitoring

rank = int(sys.argv[2])
enable()
start_jax(Group(sys.argv[1], 2, rank))
hits = []
monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name == "/jax/compilation_cache/cache_hits" else None
)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
whole = NamedSharding(sharding.mesh, PartitionSpec())
values = jax.make_array_from_callback((8,), sharding, lambda index: np.arange(8.0)[index])
total = jax.jit(lambda x: (x * x).sum(), out_shardings=whole)(values)
print(json.dumps({"total": float(total), "hits": len(hits)}), flush=True)
jax.distributed.shutdown()
"""


@pytest.fixture
def _restored(monkeypatch):
    monkeypatch.setattr(compiler, "_cache_write", compiler._cache_write)


@pytest.mark.usefixtures("_restored")
def test_a_compiled_program_is_kept_whatever_the_rank(monkeypatch):
    kept = []
    monkeypatch.setattr(
        compilation_cache, "put_executable_and_time", lambda *args: kept.append(args)
    )
    assert keep_programs(), "this JAX writes its cache by another function; see to `keep_programs`"
    jax.jit(lambda x: x * 3.25 + 0.125)(jnp.arange(7.0)).block_until_ready()
    assert len(kept) >= 1
    key, name, *_ = kept[-1]
    assert name in key


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("change", [lambda key: None, 3])
def test_another_jax_costs_a_warning_and_nothing_else(monkeypatch, caplog, change):
    monkeypatch.setattr(compiler, "_cache_write", change)
    assert keep_programs() is False
    assert compiler._cache_write is change
    assert "compile at each start" in caplog.text


@pytest.mark.slow
def test_both_ranks_find_their_programs_at_the_second_start(tmp_path: Path):
    environment = os.environ | {
        "JAXSERVE_CACHE_DIR": str(tmp_path),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
    }

    def start() -> list[dict[str, float]]:
        address = f"127.0.0.1:{free_port()}"
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", CODE, address, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(2)
        ]
        outputs = [rank.communicate(timeout=300) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outputs
        return [json.loads(output.splitlines()[-1]) for output, _ in outputs]

    assert [one["total"] for one in start()] == [140.0, 140.0]
    again = start()
    assert [one["total"] for one in again] == [140.0, 140.0]
    assert all(one["hits"] for one in again), again
