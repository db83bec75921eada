"""`LLM.generate` with the kernels for Hopper, interpreted: the tokens of XLA's program."""

import jax
import numpy as np
import pytest

import jaxserve as js
from jaxserve.config import (
    Activation,
    AttentionSpec,
    KvDtype,
    LayerSpec,
    MlpSpec,
    ModelConfig,
    NormSpec,
    RopeSpec,
)
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels.hopper import FIRST
from jaxserve.serving.options import EngineOptions

pytestmark = [
    pytest.mark.skipif(
        jax.__version_info__ < FIRST, reason="this JAX has no Mosaic GPU that is interpreted"
    ),
    pytest.mark.usefixtures("compile_fast"),
]
SMALL = EngineOptions(max_sequences=1, max_step_tokens=16, page_size=16, kv_bytes=1 << 20)
LAYER = LayerSpec(
    AttentionSpec(4, 2, 16, rope=RopeSpec(16)), MlpSpec(32, Activation.SILU, gated=True), NormSpec()
)
CONFIG = ModelConfig("llama", 64, 32, (LAYER,), NormSpec(), max_context_tokens=32)


def generated(backend: str) -> tuple[int, ...]:
    declare = Declare("bfloat16", kv_dtype=KvDtype.INT8)
    rng = np.random.default_rng(0)
    shapes = Model(CONFIG, declare).abstract_params()
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * (0.3 if x.ndim > 1 else 1)).astype(x.dtype), shapes
    )
    llm = js.LLM(CONFIG, params, declare=declare, backend=backend, engine=SMALL)
    return llm.generate([3, 1, 4, 1, 5], max_tokens=4, temperature=0).token_ids


def test_a_small_model_on_gpu_draws_the_tokens_of_xla() -> None:
    found = generated("gpu")
    assert found == generated("xla")
    assert len(set(found)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "kv_dtype"), [(None, None), ("w8a8", "int8")])
def test_tiny_on_gpu_draws_the_tokens_of_xla(quantize: str | None, kv_dtype: str | None) -> None:
    options = EngineOptions(max_sequences=2, max_step_tokens=16, kv_bytes=1 << 22)
    found = [
        js.load(
            "tiny", dtype="bfloat16", quantize=quantize, kv_dtype=kv_dtype, backend=backend,
            engine=options, show="silent",
        ).generate("def f(", max_tokens=4, temperature=0)
        for backend in ("gpu", "xla")
    ]  # fmt: skip
    assert found[0].token_ids == found[1].token_ids
