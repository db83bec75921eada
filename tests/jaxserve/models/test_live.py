"""The same tiny models against Hugging Face's own, run here and now, on another prompt."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Forward, Load

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's warnings

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = sorted(path.parent for path in GOLDEN.glob("*/golden.safetensors"))


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch, the reference's framework, is missing")


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_float32_logits_are_those_of_hugging_face(
    case: Path, torch: Any, load: Load, logits_of: Forward
) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(reference.config.vocab_size, size=29)
    with torch.no_grad():
        wanted = reference(torch.from_numpy(tokens)[None]).logits[0].numpy()
    found = logits_of(load(case, "float32"), tokens)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
