"""The kernel for Hopper, interpreted with its races, against the definition; faults are found."""

from collections.abc import Iterator
from itertools import product
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import AlibiSpec, AttentionSpec, cache_spec
from jaxserve.errors import UnsupportedError
from jaxserve.pallas_kernels import kernel_set
from jaxserve.pallas_kernels.hopper import FIRST
from jaxserve.pallas_kernels.paged_attention import reference
from jaxserve.pallas_kernels.paged_attention.places import Extra, row_of_tokens

if jax.__version_info__ < FIRST:
    pytest.skip("this JAX has no Mosaic GPU that is interpreted", allow_module_level=True)

from jaxserve.pallas_kernels.paged_attention import gpu, gpu_kernel
from jaxserve.pallas_kernels.paged_attention.gpu_tiles import Tile

from .gpu_pages import both, gpu_pages
from .random_pages import Both, Case, arrays, filled

MIXED = [(0, 9), (140, 1), (7, 0), (70, 5), (0, 1), (3, 40)]
"""Whole prompts, decode rows, a row without tokens, chunks across blocks of keys and queries."""

ONE, TWO = Tile(2, groups=1), Tile(2)


def brain(*args: Any, **kwargs: Any) -> Case:
    return Case(*args, dtype="bfloat16", **kwargs)


DECODE = brain(AttentionSpec(6, 2, 64), [(100, 1), (299, 1), (9, 0), (0, 1)], tokens=3, max_query=1)
CASES = {
    "gqa 64, decode in shares": (DECODE, Tile(2, splits=2)),
    "mha 80, window, mixed": (
        brain(AttentionSpec(3, 3, 80, window=37), MIXED, page_size=32, width=10), TWO,
    ),
    "mqa 71, alibi as bfloat16": (
        brain(
            AttentionSpec(71, 1, 64, alibi=AlibiSpec(bfloat16=True)), [(100, 1), (199, 1)],
            width=13, tokens=2, max_query=1, options=["sink_logits"],
        ), TWO,
    ),
    "mqa 256, sinks, fp8": (
        brain(
            AttentionSpec(2, 1, 256, window=37, soft_cap=0.7), [(290, 1), (129, 9)],
            page_size=256, width=2, pages_dtype="float8_e4m3fn", sinks=4,
            options=["q_sink", "scales"],
        ), ONE,
    ),
}  # fmt: skip
SLOW = {
    "gqa 64": (brain(AttentionSpec(6, 2, 64), MIXED, options=["sink_logits"]), TWO),
    "mqa 96, alibi": (
        brain(AttentionSpec(5, 1, 96, alibi=AlibiSpec(scale=0.5)), MIXED, page_size=64, width=5),
        TWO,
    ),
    "gqa 128, soft cap, int8": (
        brain(
            AttentionSpec(4, 2, 128, soft_cap=0.7), MIXED, 128, 3, pages_dtype="int8",
            options=["scales"],
        ), ONE,
    ),
    "turning pages, pinned, int8": (
        brain(
            AttentionSpec(4, 2, 64, window=37), [(300, 5), (70, 1), (0, 6), (399, 1)], width=7,
            sinks=20, pinned=2, pages_dtype="int8", options=["scales", "sink_logits"],
        ), Tile(2, groups=1, splits=2),
    ),
    "float16": (
        Case(AttentionSpec(6, 2, 64), [(100, 1), (40, 7)], dtype="float16", page_size=16), TWO,
    ),
}  # fmt: skip


def check(found: Both) -> None:
    # bfloat16 keeps 8 bits: of weights inside, of results outside. Denominators are float32.
    largest = np.abs(found.wanted[0]).max()
    np.testing.assert_allclose(found.found[0], found.wanted[0], atol=largest / 128)
    np.testing.assert_allclose(found.found[1], found.wanted[1], atol=2e-5)
    assert largest > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_gpu_kernel_is_the_definition(name: str) -> None:
    check(both(*CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_gpu_kernel_is_the_definition_in_more_cases(name: str) -> None:
    check(both(*SLOW[name]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "page_size", "pages"),
    list(product([64, 80, 96, 128, 256], [16, 32, 64, 128, 256], ["bfloat16", "int8"])),
)
def test_every_gpu_shape_meets_every_page(head: int, page_size: int, pages: str) -> None:
    runs = [(100, 1), (0, 30), (4, 0)]
    case = brain(
        AttentionSpec(4, 2, head), runs, page_size, -(-128 // page_size), pages_dtype=pages
    )
    check(both(case, ONE))


RACE = r"RACE DETECTED|no threads observed"
"""What the interpreter says: that two met, or that a barrier went on with nobody waiting."""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Compiles anew before and after a change to the code."""
    cast(Any, gpu._attention).clear_cache()
    yield monkeypatch
    monkeypatch.undo()
    cast(Any, gpu._attention).clear_cache()
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    interpret_pallas_call.reset_gpu_interpret_mode_state()


def fails(found: Both) -> bool:
    return not np.allclose(found.found[0], found.wanted[0], atol=0.05)


def test_a_missing_wait_is_a_race_on_gpu(broken: pytest.MonkeyPatch) -> None:
    real = gpu_kernel.plgpu.barrier_wait
    calls = []

    def forgetful(barrier: Any) -> None:
        # The copying group waits twice for free slots; then the other one for queries, for keys.
        calls.append(None)
        if len(calls) != 4:
            real(barrier)

    broken.setattr(gpu_kernel.plgpu, "barrier_wait", forgetful)
    with pytest.raises(Exception, match=RACE):
        both(DECODE, ONE)


def test_a_wrong_page_is_found_on_gpu(broken: pytest.MonkeyPatch) -> None:
    column = gpu_kernel._column
    broken.setattr(gpu_kernel, "_column", lambda build, page: column(build, page) ^ 1)
    assert fails(both(DECODE, ONE))


def test_a_mask_off_by_one_is_found_on_gpu(broken: pytest.MonkeyPatch) -> None:
    masked = gpu_kernel._masked

    def late(build: Any, q_pos: Any, start: Any, scores: Any) -> Any:
        return masked(build, q_pos - 1, start, scores)

    broken.setattr(gpu_kernel, "_masked", late)
    assert fails(both(DECODE, ONE))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_gpu_pages_hold_what_the_definition_writes(dtype: str) -> None:
    case = brain(AttentionSpec(6, 2, 64), MIXED, page_size=32, width=10, pages_dtype=dtype)
    rng = np.random.default_rng(0)
    plain, _ = filled(case, rng)
    q, table, q_start, _, q_pos = arrays(case, rng)
    k, v = (jnp.asarray(rng.normal(size=(q.shape[0], 2, 64)) * 9, "bfloat16") for _ in "kv")
    at = table, row_of_tokens(q_start, q.shape[0]), q_pos
    wanted = gpu_pages(reference.write_pages(plain, k, v, *at, page_size=32))
    found = gpu.write_pages(gpu_pages(plain), k, v, *at, page_size=32)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert not np.array_equal(np.asarray(wanted.keys), np.asarray(gpu_pages(plain).keys))


def test_what_the_gpu_kernel_cannot_do_is_refused_by_name() -> None:
    rng = np.random.default_rng(0)
    plain, _ = filled(DECODE, rng)
    q, *others = arrays(DECODE, rng)
    table, q_start, kv_len, q_pos = others
    rest = table, q_start, kv_len, q_pos, DECODE.spec

    def call(q: Any, **given: Any) -> None:
        gpu.paged_attention(q, gpu_pages(plain), *rest, page_size=16, **given)

    with pytest.raises(UnsupportedError, match="'gpu' has no outputs=key_mass, mask"):
        call(q, outputs=(Extra.KEY_MASS,), mask=np.ones((3, 2), bool))
    with pytest.raises(UnsupportedError, match="not with float32"):
        call(q.astype("float32"))
    for head, page_size, named in ((40, 16, "head_dim=40"), (192, 16, "=192"), (64, 8, "size=8")):
        with pytest.raises(UnsupportedError, match=named):
            spec = cache_spec(AttentionSpec(2, 1, head), "bfloat16")
            kernel_set("gpu").init_pages(2, page_size, spec)
