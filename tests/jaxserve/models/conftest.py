"""Loads tiny checkpoints and runs them through the one forward."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.checkpoint import inspect, load_params
from jaxserve.layers.decoder import Model, Params
from jaxserve.layers.param import Declare
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm
from jaxserve.serving.generation import Program, logits

Loaded = tuple[Program, Params]
Load = Callable[[Path, str], Loaded]
Forward = Callable[[Loaded, np.ndarray], np.ndarray]

_logits = jax.jit(logits, static_argnums=0)


@pytest.fixture(scope="module", autouse=True)
def few_optimisations(compile_fast: None) -> None:
    """Compiles every model here fast."""


@pytest.fixture(scope="session")
def load() -> Load:
    """Returns a function from a checkpoint directory and a dtype to program and parameters."""

    @cache
    def loaded(directory: Path, dtype: str) -> Loaded:
        checkpoint = inspect(directory)
        model = Model(checkpoint.config, Declare.best("cpu", dtype))
        program = Program(model, LocalComm(), kernel_set("xla"))
        return program, load_params(checkpoint, model)

    return loaded


@pytest.fixture(scope="session")
def logits_of() -> Forward:
    """Returns a function from a loaded model and int[L] tokens to float32[L, V]."""

    def run(loaded: Loaded, tokens: np.ndarray) -> np.ndarray:
        program, params = loaded
        return np.asarray(_logits(program, params, tokens.astype(np.int32)[None])[0])

    return run
