"""The TPU kernel of the int8 matmul: several blocks, its epilogue, and how it runs on a core."""

from dataclasses import replace
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxserve.config import Activation
from jaxserve.pallas_kernels.int8_matmul import Mode, choose, reference, tpu
from jaxserve.pallas_kernels.int8_matmul.tiles import Tile

SMALL = Tile(32, 128, 128)
# (rows, inputs, outputs): one row, odd sides that fill no block, several blocks of everything.
SHAPES = [(1, 300, (200,)), (37, 257, (2, 65)), (70, 256, (384,))]
ROWS_ALONE = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")


def operands(rows: int, inputs: int, outputs: tuple[int, ...]) -> tuple[Any, ...]:
    """Returns x, w [*outputs, inputs], scales and bias."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    w = rng.integers(-127, 128, size=(*outputs, inputs)).astype(np.int8)
    scales = (rng.uniform(0.5, 1, outputs) / 127 / np.sqrt(inputs)).astype(np.float32)
    return x, w, scales, rng.normal(size=outputs).astype(np.float32)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_blocks_give_the_definition(mode: Mode, shape: Any) -> None:
    x, w, scales, bias = operands(*shape)
    out_first = shape[0] != 37
    stored = w if out_first else np.moveaxis(w, -1, 0)
    given = (x, stored, scales, 1, "out_in" if out_first else "in_out", "float32")
    wanted = reference.int8_matmul(*given, mode=mode, bias=bias)
    found = tpu.int8_matmul(*given, mode=mode, bias=bias, tile=SMALL)
    np.testing.assert_allclose(found, wanted, atol=3e-6)


@pytest.mark.parametrize("activation", Activation)
def test_the_non_linearity_is_part_of_it(activation: Activation) -> None:
    x, w, scales, bias = operands(3, 128, (128,))
    given = (x, w, scales * 3, 1, "out_in", "float32")
    wanted = reference.int8_matmul(*given, bias=bias, activation=activation)
    found = tpu.int8_matmul(*given, bias=bias, activation=activation)
    np.testing.assert_allclose(found, wanted, atol=3e-6)
    plain = reference.int8_matmul(*given, bias=bias)
    assert not np.allclose(found, plain, atol=1e-2)


@pytest.mark.parametrize("mode", Mode)
def test_blocks_come_and_go_as_on_a_tpu(mode: Mode) -> None:
    x, w, scales, bias = operands(40, 256, (256,))
    given = (jnp.asarray(x, "bfloat16"), w, scales, 1, "out_in", "float32")
    wanted = reference.int8_matmul(*given, mode=mode, bias=bias)
    found = tpu.int8_matmul(*given, mode=mode, bias=bias, tile=SMALL, interpret=ROWS_ALONE)
    np.testing.assert_allclose(found, wanted, atol=3e-6)


def test_each_core_rounds_the_rows_for_its_share_of_the_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Five blocks of channels: shares are not even.
    x, w, scales, _ = operands(8, 256, (600,))
    given = (x, w, scales, 1, "out_in", "float32")
    params = pltpu.InterpretParams(num_cores_or_threads=2)
    tile = replace(SMALL, cores=2)
    wanted = reference.int8_matmul(*given, mode=Mode.W8A8)
    found = tpu.int8_matmul(*given, mode=Mode.W8A8, tile=tile, interpret=params)
    np.testing.assert_allclose(found, wanted, atol=3e-6)
    begins = tpu._begins
    monkeypatch.setattr(tpu, "_begins", lambda: begins() & (pl.program_id(1) == 0))
    cast(Any, tpu._multiply).clear_cache()
    found = tpu.int8_matmul(*given, mode=Mode.W8A8, tile=tile, interpret=params)
    cast(Any, tpu._multiply).clear_cache()
    assert not np.allclose(found, wanted, atol=1e-2)


def test_a_chip_without_int8_products_gets_w8a16_and_says_so() -> None:
    choice = choose(Mode.W8A8, "v4")
    assert choice.mode is Mode.W8A16
    assert choice.reason is not None and "v4" in choice.reason
    assert choose(Mode.W8A8, "v5e").mode is Mode.W8A8
    assert choose(Mode.W8A16, "v4").reason is None
