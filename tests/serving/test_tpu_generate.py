"""`LLM.generate` with the TPU kernels, interpreted: the tokens of XLA's program."""

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
from jaxserve.serving.options import EngineOptions

pytestmark = pytest.mark.usefixtures("compile_fast")

SMALL = EngineOptions(max_sequences=2, max_step_tokens=16, page_size=16, kv_bytes=1 << 20)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def generated(config: ModelConfig, backend: str, **declared: object) -> list[tuple[int, ...]]:
    declare = Declare("float32", **declared)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)
    shapes = Model(config, Declare("float32")).abstract_params()
    params = jax.tree.map(
        lambda x: (rng.normal(size=x.shape) * (0.3 if x.ndim > 1 else 1)).astype("float32"), shapes
    )
    llm = js.LLM(config, params, declare=declare, backend=backend, engine=SMALL)
    outs = llm.generate(PROMPTS, max_tokens=4, temperature=0)
    return [out.token_ids for out in outs]


def test_small_models_draw_the_tokens_of_xla() -> None:
    layer = LayerSpec(
        AttentionSpec(4, 2, 16, rope=RopeSpec(16)),
        MlpSpec(32, Activation.SILU, gated=True),
        NormSpec(),
    )
    config = ModelConfig("llama", 64, 32, (layer,), NormSpec(), max_context_tokens=32)
    found = generated(config, "tpu", kv_dtype=KvDtype.INT8)
    assert found == generated(config, "xla", kv_dtype=KvDtype.INT8)
    assert len(set(found[0])) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "kv_dtype"), [(None, None), ("w8a8", "int8"), ("int8", "fp8"), (None, "int8")]
)
def test_tiny_draws_the_tokens_of_xla(quantize: str | None, kv_dtype: str | None) -> None:
    options = EngineOptions(max_sequences=2, max_step_tokens=16, kv_bytes=1 << 24)
    found = [
        js.load(
            "tiny", dtype="float32", quantize=quantize, kv_dtype=kv_dtype, backend=backend,
            engine=options, show="silent",
        ).generate(["def f(", "import "], max_tokens=6, temperature=0)
        for backend in ("tpu", "xla")
    ]  # fmt: skip
    assert [out.token_ids for out in found[0]] == [out.token_ids for out in found[1]]
