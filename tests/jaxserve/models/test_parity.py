"""Tiny models against what Hugging Face computed for them: see tests/golden/make.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file

from jaxserve.models.family import families as families_known
from jaxserve.serving.generation import Prompts, generate
from jaxserve.serving.request import SamplingParams
from jaxserve.serving.sampler import Sampling

from .conftest import Forward, Load

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.safetensors"))
PROMPTS = (0, 1)
REMOTE = {"baichuan", "chatglm", "decilm", "palm"}
"""Families without a class in transformers; they have references of their own."""

Golden = dict[str, np.ndarray]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


@pytest.fixture(scope="module")
def golden(case: Path) -> Golden:
    return {name: np.asarray(a) for name, a in load_file(case / "golden.safetensors").items()}


def test_float32_logits_are_those_of_hugging_face(
    case: Path, golden: Golden, load: Load, logits_of: Forward
) -> None:
    found = logits_of(load(case, "float32"), golden["prompt.0"])
    error = np.abs(found - golden["logits"]).max()
    assert error < 1e-4 * np.abs(golden["logits"]).max()


def test_greedy_continuation_is_that_of_hugging_face(
    case: Path, golden: Golden, load: Load
) -> None:
    # Both prompts in one batch, the shorter one padded.
    program, params = load(case, "float32")
    prompts = [golden[f"prompt.{index}"] for index in PROMPTS]
    wanted = np.stack([golden[f"greedy.{index}"] for index in PROMPTS])
    longest = max(map(len, prompts))
    tokens = np.stack([np.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
    lengths = [len(prompt) for prompt in prompts]
    greedy = SamplingParams(temperature=0.0, logprobs=0).resolved({})
    sampling = Sampling.create(
        [greedy] * len(prompts),
        [prompt.tolist() for prompt in prompts],
        [()] * len(prompts),
        program.model.config.vocab_size,
    )
    result = jax.jit(generate, static_argnames=("program", "slots", "max_tokens"))(
        program,
        params,
        Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths, jnp.int32)),
        sampling,
        slots=longest + wanted.shape[1],
        max_tokens=wanted.shape[1],
    )
    np.testing.assert_array_equal(result.tokens, wanted)
    logprobs = np.stack([golden[f"logprobs.{index}"] for index in PROMPTS])
    np.testing.assert_allclose(np.asarray(result.logprobs), logprobs, atol=1e-4)


def test_bfloat16_agrees_on_the_likeliest_token(
    case: Path, golden: Golden, load: Load, logits_of: Forward
) -> None:
    whole = np.concatenate([golden["prompt.0"], golden["greedy.0"]])
    found = logits_of(load(case, "bfloat16"), whole)
    assert (found.argmax(-1) == golden["bfloat16"].argmax(-1)).mean() >= 0.95


def test_every_family_with_a_reference_has_a_case() -> None:
    families = {name.split("-")[0] for name in CASES}
    assert families == {family.name for family in families_known()} - REMOTE
