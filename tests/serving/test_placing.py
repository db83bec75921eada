"""What a program rounds on the device that it is for."""

import logging

import pytest

from jaxserve.config import Activation, AttentionSpec, LayerSpec, MlpSpec, ModelConfig, NormSpec
from jaxserve.config import Quantization as Q
from jaxserve.pallas_kernels import kernel_set
from jaxserve.serving import placing

LAYER = LayerSpec(AttentionSpec(2, 2, 8), MlpSpec(16, Activation.SILU, gated=True), NormSpec())
CONFIG = ModelConfig("llama", 32, 16, (LAYER,), NormSpec(), max_context_tokens=32)


@pytest.mark.parametrize(
    ("chip", "asked", "runs"),
    [
        ("v4", Q.W8A8, Q.INT8),
        ("v4", Q.INT8, Q.INT8),
        ("v5e", Q.W8A8, Q.W8A8),
        (None, Q.W8A8, Q.W8A8),
        ("v4", None, None),
    ],
)
def test_a_chip_without_integer_products_rounds_weights_alone_and_says_so(
    chip: str | None,
    asked: Q | None,
    runs: Q | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(placing, "current_chip", lambda: chip)
    with caplog.at_level(logging.WARNING):
        program = placing.program_of(CONFIG, "bfloat16", kernel_set("xla"), None, asked)
    assert program.model.declare.quantize is runs
    said = [record.message for record in caplog.records if "w8a16" in record.message]
    assert bool(said) == (asked is not runs)
