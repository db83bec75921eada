"""Traced steps that a second start finds on disk."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from jaxserve.layers.decoder import Params
from jaxserve.serving import program_store
from jaxserve.serving import runner as runner_module
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


class Count:
    """Counts how many steps are traced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.traced = 0
        exported = runner_module._exported

        def counted(*args: Any) -> Any:
            self.traced += 1
            return exported(*args)

        monkeypatch.setattr(runner_module, "_exported", counted)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    return Count(monkeypatch)


def warmed(program: Program, params: Params) -> ModelEngine:
    """Returns an engine with every program ready."""
    made = ModelEngine.create(program, params, OPTIONS)
    made.runner.warm_up()
    return made


def tokens(made: ModelEngine) -> list[int]:
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=4, ignore_eos=True).resolved({})
    events: list[TokenEvent] = []
    made.engine.submit(Request(id="a", prompt=(3, 1, 4, 1, 5), params=params), events.append)
    while made.engine.step():
        pass
    return [token for event in events for token in event.token_ids]


def test_a_second_start_traces_no_step_and_gives_the_same_tokens(
    cache: Path, program: Program, params: Params, count: Count
) -> None:
    first = warmed(program, params)
    steps = len(first.runner.ladder.shapes())
    assert count.traced == steps
    second = warmed(program, params)
    assert count.traced == steps
    found = tokens(second)
    assert found == tokens(first)
    assert len(found) == 12
    assert second.runner.compiles_after_ready == 0
    untraced = ModelEngine.create(program, params, OPTIONS)  # compiles on first use
    assert tokens(untraced) == found


def test_a_damaged_program_is_not_used(cache: Path) -> None:
    store = ProgramStore.of(["model"], jax.devices()[0])
    assert store is not None
    store.save("double", export.export(jax.jit(lambda x: 2 * x))(jnp.zeros(3)))
    found = store.load("double")
    assert found is not None
    assert found.call(jnp.ones(3)).tolist() == [2, 2, 2]
    path = store._path("double")
    path.write_bytes(path.read_bytes()[:-1])
    assert store.load("double") is None
    assert store.load("another") is None


def test_a_folder_that_others_may_write_to_is_not_used(cache: Path) -> None:
    assert ProgramStore.of(["model"], jax.devices()[0]) is not None
    cache.chmod(0o777)
    assert ProgramStore.of(["model"], jax.devices()[0]) is None


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
