"""Compiled steps that a second start finds on disk."""

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from jaxserve.layers.decoder import Params
from jaxserve.serving import program_store
from jaxserve.serving.build import ModelEngine
from jaxserve.serving.generation import Program
from jaxserve.serving.options import EngineOptions
from jaxserve.serving.program_store import ProgramStore
from jaxserve.serving.request import Request, SamplingParams, TokenEvent
from jaxserve.serving.runner import ModelRunner

OPTIONS = EngineOptions(max_sequences=1, max_step_tokens=16, page_size=8, kv_bytes=1 << 20)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Returns the folder of stores, beside a cache of JAX's."""
    monkeypatch.delenv("JAXSERVE_COMPILE_CACHE", raising=False)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def warmed(program: Program, params: Params) -> tuple[ModelEngine, list[str]]:
    """Returns an engine with every program ready, and what had to be compiled."""
    compiled: list[str] = []
    made = ModelEngine.create(program, params, OPTIONS, lambda what, seconds: compiled.append(what))
    made.runner.warm_up()
    return made, compiled


def tokens(made: ModelEngine) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=4, ignore_eos=True).resolved({})
    events: list[TokenEvent] = []
    made.engine.submit(Request(id="a", prompt=(3, 1, 4, 1, 5), params=params), events.append)
    while made.engine.step():
        pass
    return [token for event in events for token in event.token_ids]


def test_a_second_start_compiles_no_step_and_gives_the_same_tokens(
    cache: Path, program: Program, params: Params
) -> None:
    first, compiled = warmed(program, params)
    assert sum(what.startswith("step") for what in compiled) == len(first.runner.ladder.shapes())
    second, compiled = warmed(program, params)
    assert not any(what.startswith("step") for what in compiled)
    assert tokens(second) == tokens(first)
    assert len(tokens(second)) == 12
    assert second.runner.compiles_after_ready == 0


def test_a_damaged_program_is_compiled_again(cache: Path, program: Program, params: Params) -> None:
    first, _ = warmed(program, params)
    (folder,) = cache.iterdir()
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    second, compiled = warmed(program, params)
    assert sum(what.startswith("step") for what in compiled) == len(first.runner.ladder.shapes())
    assert tokens(second) == tokens(first)


def test_a_folder_that_others_may_write_to_is_not_used(
    cache: Path, program: Program, params: Params
) -> None:
    warmed(program, params)
    cache.chmod(0o777)
    _, compiled = warmed(program, params)
    assert any(what.startswith("step") for what in compiled)


@pytest.mark.usefixtures("cache")
def test_other_options_of_jax_are_another_store() -> None:
    device = jax.devices()[0]
    one = ProgramStore.of(["model"], device)
    with jax.default_matmul_precision("highest"):
        other = ProgramStore.of(["model"], device)
    again = ProgramStore.of(["model"], device)
    assert one is not None and other is not None and again is not None
    assert one._folder == again._folder
    assert one._folder != other._folder
    assert one._folder != getattr(ProgramStore.of(["another"], device), "_folder", None)


def test_without_a_cache_nothing_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_COMPILE_CACHE", "off")
    assert ProgramStore.of(["model"], jax.devices()[0]) is None
    assert not cache.exists()


def test_the_programs_unused_for_longest_make_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ProgramStore.of(["model"], jax.devices()[0])
    assert store is not None
    for age, name in enumerate(("new", "old")):
        path = store._path(name)
        path.write_bytes(b"x" * 600)
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(program_store, "MAX_BYTES", 1000)
    store.prune()
    assert store._path("new").exists()
    assert not store._path("old").exists()


def test_abstract_weights_have_the_store_of_real_ones(
    cache: Path, program: Program, params: Params
) -> None:
    def made(weights: Params) -> ModelRunner:
        return ModelEngine.create(program, weights, OPTIONS).runner

    real, abstract = made(params)._store(), made(program.model.abstract_params())._store()
    assert real is not None and abstract is not None
    assert real._folder == abstract._folder
