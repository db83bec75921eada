"""The int8 and fp8 matmul of Hopper, interpreted with its races; faults are found."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import Activation
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels import hopper, resolve
from jaxserve.pallas_kernels.hopper import FIRST, SMEM_BYTES, interpreter
from jaxserve.pallas_kernels.int8_matmul import Mode, reference

if jax.__version_info__ < FIRST:
    pytest.skip("this JAX has no Mosaic GPU that is interpreted", allow_module_level=True)

from jaxserve.pallas_kernels.int8_matmul import gpu
from jaxserve.pallas_kernels.int8_matmul.gpu_tiles import HALF, Tile, smem_bytes, swapped, tile_for

SMALL = Tile(64, 8, stages=2, groups=1)
# Rows, mode, rows' type, tile: three parts of a float32 row, shares of the contraction, the weight
# on the right. Every side is odd and fills no block; four steps make three shares.
CASES = {
    "w8a16": (3, Mode.W8A16, "bfloat16", SMALL),
    "w8a16, float32": (2, Mode.W8A16, "float32", SMALL),
    "w8a8, shares": (3, Mode.W8A8, "bfloat16", Tile(64, 8, stages=2, groups=2, splits=3)),
    "w8a8, many rows": (70, Mode.W8A8, "bfloat16", Tile(128, 64, stages=3, groups=1)),
}


def operands(rows: int, dtype: str, weights: Any = np.int8) -> tuple[Any, ...]:
    """Returns x, w [outputs, inputs], scales and bias."""
    rng, inputs, outputs = np.random.default_rng(rows), 391, (5, 41)
    x = jnp.asarray(rng.normal(size=(rows, inputs)), dtype)
    w = jnp.asarray(rng.integers(-127, 128, size=(*outputs, inputs)), weights)
    scales = rng.uniform(0.5, 1, outputs) / 127 / np.sqrt(inputs)
    return x, w, scales.astype(np.float32), rng.normal(size=outputs).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_gpu_blocks_give_the_definition(name: str) -> None:
    rows, mode, dtype, tile = CASES[name]
    x, w, scales, bias = operands(rows, dtype)
    given = (x, w, scales, 1, "out_in", "float32")
    options: dict[str, Any] = {"mode": mode, "bias": bias, "activation": Activation.SILU}
    wanted = reference.int8_matmul(*given, **options)
    found = gpu.int8_matmul(*given, **options, tile=tile, interpret=interpreter())
    np.testing.assert_allclose(found, wanted, atol=3e-6)
    assert swapped(rows, mode) == (name != "w8a8, many rows")


@pytest.mark.parametrize("mode", Mode)
def test_gpu_weights_of_fp8_are_what_they_stand_for(mode: Mode) -> None:
    x, w, scales, _ = operands(3, "bfloat16", jnp.float8_e4m3fn)
    found = gpu.int8_matmul(
        x, w, scales, 1, "out_in", "float32", mode=mode, tile=SMALL, interpret=interpreter()
    )
    rows = np.asarray(x, np.float64)
    if mode is Mode.W8A8:
        unit = np.abs(rows).max(axis=1, keepdims=True) / 448
        rows = np.asarray((rows / unit).astype(jnp.float8_e4m3fn), np.float64) * unit
    wanted = np.einsum("TK,abK->Tab", rows, np.asarray(w, np.float64)) * scales
    np.testing.assert_allclose(found, wanted, atol=1e-2 if mode is Mode.W8A8 else 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("activation", [None, *Activation])
def test_every_gpu_epilogue_is_the_definition(mode: Mode, activation: Activation | None) -> None:
    x, w, scales, bias = operands(3, "bfloat16")
    for orientation, stored in (("out_in", w), ("in_out", jnp.moveaxis(w, -1, 0))):
        given = (x, stored, scales * 3, 1, orientation, "float32")
        options: dict[str, Any] = {"mode": mode, "bias": bias, "activation": activation}
        wanted = reference.int8_matmul(*given, **options)
        found = gpu.int8_matmul(*given, **options, tile=SMALL, interpret=interpreter())
        np.testing.assert_allclose(found, wanted, atol=3e-6)


RACE = r"RACE DETECTED|no threads observed"
"""What the interpreter says: that two met, or that a barrier went on with nobody waiting."""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Compiles anew before and after a change to the code."""
    cast(Any, gpu._multiply).clear_cache()
    yield monkeypatch
    monkeypatch.undo()
    cast(Any, gpu._multiply).clear_cache()
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()


def multiplied(mode: Mode = Mode.W8A8) -> tuple[Any, Any]:
    """Returns what kernel and definition make of 12 steps."""
    x, w, scales, _ = operands(3, "bfloat16")
    given = (jnp.tile(x, (1, 4)), jnp.tile(w, (1, 1, 4)), scales, 1, "out_in", "float32")
    found = gpu.int8_matmul(*given, mode=mode, tile=SMALL, interpret=interpreter())
    return found, reference.int8_matmul(*given, mode=mode)


def test_a_matmul_without_a_wait_is_a_race_on_gpu(broken: pytest.MonkeyPatch) -> None:
    real, calls = gpu.plgpu.barrier_wait, []

    def forgetful(barrier: Any) -> None:
        # The copying group waits twice for free slots; then the other one for a full slot.
        calls.append(None)
        if len(calls) != 3:
            real(barrier)

    broken.setattr(gpu.plgpu, "barrier_wait", forgetful)
    with pytest.raises(Exception, match=RACE):
        multiplied()


def test_a_slot_freed_early_is_a_race_on_gpu(broken: pytest.MonkeyPatch) -> None:
    # The copying group takes every slot for free.
    real, calls = gpu.plgpu.barrier_wait, []

    def hasty(barrier: Any) -> None:
        calls.append(None)
        if len(calls) != 1:
            real(barrier)

    broken.setattr(gpu.plgpu, "barrier_wait", hasty)
    with pytest.raises(Exception, match=RACE):
        multiplied()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("result_bytes", [2, 4])
def test_every_gpu_tile_fits_into_shared_memory(mode: Mode, result_bytes: int) -> None:
    for rows in (1, 9, 17, 40, 65, 129, 200, 8192):
        for inputs, channels in ((4096, 4096), (4096, 28672), (14336, 4096), (100, 100)):
            tile = tile_for(rows, inputs, channels, mode, result_bytes)
            x = 2 if mode is Mode.W8A16 else 1
            left, right = (1, x) if swapped(rows, mode) else (x, 1)
            across = tile.left * tile.groups
            step = tile.inputs * (across * left + tile.right * right)
            element = result_bytes if tile.splits == 1 else 4
            held = tile.stages * step + across * tile.right * element
            assert held < smem_bytes(tile, mode, result_bytes) <= SMEM_BYTES
            # Two blocks of threads on a multiprocessor, but for 64 rows of wider numbers.
            if rows <= (32 if mode is Mode.W8A16 else 64):
                assert smem_bytes(tile, mode, result_bytes) <= HALF
            assert tile.stages >= 2
            assert tile.splits * tile.inputs <= max(inputs, 128)
            assert "sm_90a" in tile.origin


@pytest.mark.parametrize("inputs", [11008, 13696, 9728, 18944, 2304])
def test_a_gpu_weight_of_whole_blocks_is_not_padded(inputs: int) -> None:
    assert tile_for(1, inputs, 4096, Mode.W8A16, 2).splits > 1
    assert not padded_weights(inputs)
    assert padded_weights(4544)


def padded_weights(inputs: int) -> list[Any]:
    """Returns the operations on a whole weight of 4,096 channels that give a greater one."""
    x = jax.ShapeDtypeStruct((1, inputs), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4096, inputs), jnp.int8)

    def call(x: Any, w: Any) -> Any:
        ones = jnp.ones(4096)
        return gpu.int8_matmul(x, w, ones, 1, "out_in", "bfloat16", interpret=False)

    program = jax.make_jaxpr(call)(x, w).jaxpr
    inner = [e.params["jaxpr"] for e in program.eqns if e.params.get("name") == "_multiply"]
    assert len(inner) == 1
    return [
        eqn
        for eqn in jax.tree.leaves([padding(inner[0])], is_leaf=lambda e: hasattr(e, "primitive"))
        if eqn.outvars[0].aval.size > eqn.invars[0].aval.size == w.size
    ]


def padding(jaxpr: Any) -> list[Any]:
    """Returns every `pad` of a program, those of its inner programs too."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pad":
            found.append(eqn)
        if eqn.params.get("name") == "_pad":
            found += padding(eqn.params["jaxpr"])
    return found


def test_a_program_for_a_gpu_carries_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, scales, _ = operands(3, "bfloat16")

    def effects() -> Any:
        def call(x: Any, w: Any) -> Any:  # anew, as traces are kept by function
            return gpu.int8_matmul(x, w, scales, 1, "out_in", "bfloat16")

        return jax.make_jaxpr(call)(x, w).effects

    assert effects()  # the interpreter's, which is traced beside
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not effects()


def test_a_jax_without_the_kernels_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("int8_matmul", "gpu") is gpu.int8_matmul
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(UnsupportedError, match=r"backend='gpu' needs jax >= 0\.11\.2"):
        resolve("int8_matmul", "gpu")
    assert hopper.ROWS == 64


@pytest.mark.parametrize("capability", ["8.0", "10.0"])
def test_a_gpu_that_is_no_hopper_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    device = SimpleNamespace(device_kind="NVIDIA A100", compute_capability="9.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert resolve("int8_matmul", "gpu") is gpu.int8_matmul
    device.compute_capability = capability
    with pytest.raises(UnsupportedError, match=rf"9\.0.* NVIDIA A100 has {capability}; use"):
        resolve("int8_matmul", "gpu")
