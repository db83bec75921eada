from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxserve.errors import UsageError
from jaxserve.training.objective import held_out_loss, loss, token_losses
from jaxserve.training.schedule import Plan
from jaxserve.training.shapes import TINY, TINY_DRAFT, Shape
from jaxserve.training.trainer import Trainer, training_model

SMALL = Shape("small", 32, 1, 2, 1, 16, 32)
PLAN = Plan(
    steps=6,
    warmup_steps=2,
    decay_steps=2,
    long_steps=2,
    batch_tokens=64,
    short_tokens=16,
    long_tokens=32,
)
TOKENS = np.tile(np.arange(50, dtype=np.uint16), 40)


def trainer(folder: Path, plan: Plan = PLAN) -> Trainer:
    return Trainer(SMALL, plan, TOKENS, TOKENS[:200], 0, folder, lambda line: None)


@pytest.mark.slow
def test_a_run_ended_by_a_signal_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxserve.training.trainer.LOG_STEPS", 1)

    def end_after_three(line: str) -> None:
        if line.startswith("step 3/"):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = trainer(tmp_path / "whole")
    expected = whole.run(whole.fresh())
    part = replace(trainer(tmp_path / "part"), say=end_after_three)
    assert part.run(part.fresh()).step == 3
    resumed = part.run(part.restored())
    assert resumed.step == expected.step == 6
    jax.tree.map(np.testing.assert_array_equal, resumed.params, expected.params)


def test_training_learns_a_repeating_stream(tmp_path: Path) -> None:
    plan = replace(PLAN, steps=60, decay_steps=20, long_steps=0)
    run = trainer(tmp_path, plan)
    state = run.fresh()
    model = training_model(SMALL)
    before = held_out_loss(model, state.params, run.held_out, 16)
    after = held_out_loss(model, run.run(state).params, run.held_out, 16)
    assert before > 7 and after < 3.5


def test_loss_counts_every_position_the_same() -> None:
    model = training_model(SMALL)
    params = model.init(jax.random.key(0))
    rows = jax.random.randint(jax.random.key(1), (3, 17), 0, 2048)
    each = token_losses(model, params, rows)
    assert each.shape == (3, 16)
    np.testing.assert_allclose(loss(model, params, rows), each.mean(), rtol=1e-6)
    changed = rows.at[:, 10].set((rows[:, 10] + 1) % 2048)
    again = token_losses(model, params, changed)
    np.testing.assert_array_equal(np.asarray(each)[:, :9], np.asarray(again)[:, :9])


def test_the_rate_rises_holds_and_falls() -> None:
    plan = replace(PLAN, steps=100, warmup_steps=10, decay_steps=50)
    rate = plan.rate(1.0)
    assert [float(np.asarray(rate(step))) for step in (0, 5, 10, 49, 75, 100)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    )
    assert [plan.length_at(step) for step in (0, 97, 98)] == [16, 16, 32]


def test_a_batch_that_is_no_whole_number_of_sequences_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_tokens=65"):
        replace(PLAN, batch_tokens=65)


@pytest.mark.parametrize(("shape", "limit"), [(TINY, 6_000_000), (TINY_DRAFT, 1_500_000)])
def test_embedded_models_fit_their_size_in_bfloat16(shape: Shape, limit: int) -> None:
    leaves = jax.tree.leaves(training_model(shape).abstract_params())
    assert sum(leaf.size for leaf in leaves) < limit
