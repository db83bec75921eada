"""A plan beside its compiler, and what is said where they differ."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve import planner
from jaxserve.errors import JaxserveError, UnsupportedError
from jaxserve.planner.verify import Step, Verified, _reason, verified

STEP = Step(
    name="decode",
    on="v5e:2x2",
    exact=True,
    predicted={"all-gather over x, bf16, a layer": 1000},
    compiled={"all-gather over x, bf16, a layer": 1000},
    copies=(),
    planned_bytes=500,
    argument_bytes=500,
    estimated_temp_bytes=10,
    temp_bytes=20,
    beside_bytes=30,
    device_bytes=1000,
    compile_s=1.0,
)


def test_agreement_says_nothing():
    Verified((STEP,)).check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"compiled": {}}, "all-gather over x, bf16, a layer: 1,000 bytes predicted, 0 compiled"),
        (
            {"compiled": {**STEP.compiled, "all-reduce over y, bf16, a layer": 5}},
            "all-reduce over y, bf16, a layer: 0 bytes predicted, 5 compiled",
        ),
        ({"compiled": {"all-gather over x, bf16, a layer": 1030}}, "1,030 compiled"),
        ({"copies": ("copy of 1 MiB",)}, "copy: none predicted, copy of 1 MiB compiled"),
        ({"temp_bytes": 600}, "GB short"),
        ({"beside_bytes": 600}, "GB short"),
        ({"argument_bytes": 600}, "weights and cache: 500 bytes predicted, 600 compiled"),
    ],
)
def test_the_term_that_differs_is_named(fields: dict[str, object], message: str):
    with pytest.raises(JaxserveError) as caught:
        Verified((replace(STEP, **fields),)).check()  # type: ignore[arg-type]
    assert "decode: " in str(caught.value) and message in str(caught.value)


def test_a_compiler_may_pad_a_little():
    Verified((replace(STEP, compiled={"all-gather over x, bf16, a layer": 1015}),)).check()


def test_the_permutes_of_padding_are_no_difference_unless_they_are_large():
    term = "collective-permute over x, bf16, a layer"
    for size, differing in ((20, 0), (21, 1)):
        padded = replace(STEP, compiled={**STEP.compiled, term: size})
        assert len(padded.differing) == differing
    elsewhere = {**STEP.compiled, "collective-permute over x, bf16, ends": 20}
    assert replace(STEP, compiled=elsewhere).differing


def test_a_stand_in_is_asked_for_kinds_alone():
    half = replace(STEP, exact=False, compiled={"all-gather over x, bf16, a layer": 2000})
    assert half.differing == []
    assert replace(half, compiled={}).differing


@pytest.mark.slow
def test_a_small_model_is_compiled_for_a_slice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    plan = planner.search(
        "llama-3.2-1b",
        "v5e:2x4",
        input_tokens=256,
        output_tokens=64,
        batch=(16, 16),
        max_replicas=1,
        weights=("int8",),
        kv=("fp8",),
    )
    first = verified(plan)
    first.check()
    assert [step.name for step in first.steps] == ["prefill", "decode"]
    assert all(step.predicted and not step.cached for step in first.steps)
    assert all(step.cached for step in verified(plan).steps)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="the CUDA plugin, a compiler for GPUs, is not installed: pip install 'jaxserve[verify]'",
)
def test_a_small_model_is_compiled_for_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    plan = planner.search(
        "llama-3.2-1b",
        "h100:4",
        input_tokens=256,
        output_tokens=64,
        batch=(16, 16),
        max_replicas=1,
    )
    found = verified(plan)
    found.check()
    assert [step.on for step in found.steps] == ["h100:4", "h100:4"]
    assert all(step.exact and step.predicted for step in found.steps)


def test_what_cannot_be_built_is_refused():
    plan = planner.search(
        "llama-3-8b",
        "v5e:2x2",
        input_tokens=100,
        output_tokens=10,
        batch=(1, 4),
        weights=("int4",),
    )
    with pytest.raises(UnsupportedError, match="weights in int4"):
        verified(plan)


def test_the_compilers_reason_is_told():
    said = "Traceback:\n  x = 1\njax.errors.JaxRuntimeError: ran out of memory\nSee elsewhere.\n"
    assert _reason(said) == "jax.errors.JaxRuntimeError: ran out of memory"
    assert _reason("killed\n") == "killed"
    assert _reason("") == "it said nothing"


def test_a_compile_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    plan = planner.search(
        "llama-3-8b", "v5e:2x2", input_tokens=100, output_tokens=10, batch=(1, 4), max_replicas=1
    )
    with pytest.raises(JaxserveError, match=r"took more than 0\.01 s"):
        verified(plan, limit_s=0.01)


@pytest.mark.parametrize(
    "on", [pytest.param("h100:2", marks=pytest.mark.slow), "v5e:2x2"], ids=["GPU", "TPU"]
)
def test_devices_of_a_processor_stand_in_for_other_chips(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, on: str
):
    monkeypatch.setenv("JAXSERVE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("jaxserve.planner.verify.known", lambda kind: False)
    monkeypatch.setattr("jaxserve.planner.verify.COMPILED", ())
    plan = planner.search(
        "tiny", on, input_tokens=64, output_tokens=16, batch=(8, 8), max_replicas=1
    )
    devices = plan.best.option.part.num_devices
    first = verified(plan)
    first.check()
    assert [step.on for step in first.steps] == [f"cpu:{devices}"] * 2
    assert not any(step.exact or step.cached for step in first.steps)
    # Kinds and axes are asked for; the bytes agree too.
    assert all(step.predicted == step.compiled for step in first.steps)
    assert all(step.cached for step in verified(plan).steps)
