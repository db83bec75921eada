"""Looking into a forward, and changing it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import UsageError
from jaxserve.layers.tap import Taps

ONE = jnp.ones(2)


def run(taps: Taps) -> list[float]:
    """Meets a few names as a forward would; returns what went on from each."""
    names = ["embed", "layers.0.resid", "layers.1.resid", "final"]
    return [float(taps(name, ONE * index)[0]) for index, name in enumerate(names)]


def test_names_and_patterns_are_captured() -> None:
    taps = Taps(capture=("layers.*.resid", "final"))
    run(taps)
    assert list(taps.captured) == ["layers.0.resid", "layers.1.resid", "final"]
    np.testing.assert_array_equal(taps.captured["layers.1.resid"], ONE * 2)


def test_an_edit_is_what_goes_on_and_what_is_captured() -> None:
    taps = Taps(capture=("*",), edit={"layers.0.resid": lambda x: x + 10})
    assert run(taps) == [0.0, 11.0, 2.0, 3.0]
    np.testing.assert_array_equal(taps.captured["layers.0.resid"], ONE * 11)


def test_nothing_is_captured_unasked() -> None:
    taps = Taps()
    assert run(taps) == [0.0, 1.0, 2.0, 3.0]
    assert taps.captured == {}
    taps.check()


def test_an_edit_that_met_no_activation_is_refused_by_name() -> None:
    taps = Taps(edit={"final": jnp.negative, "layers.2.resid": jnp.negative})
    run(taps)
    message = (
        r"^edit=layers\.2\.resid names no activation; "
        r"this model has embed, layers\.0\.resid, layers\.1\.resid, final$"
    )
    with pytest.raises(UsageError, match=message):
        taps.check()


def test_a_pattern_that_met_no_activation_is_refused() -> None:
    taps = Taps(capture=("layers.*.resid", "layers.*.mlp", "logits"))
    run(taps)
    with pytest.raises(UsageError, match=r"^capture=layers\.\*\.mlp, logits names no activation"):
        taps.check()


def test_a_long_list_of_names_is_shortened_in_the_message() -> None:
    taps = Taps(edit={"wrong": jnp.negative})
    for layer in range(40):
        taps(f"layers.{layer}.resid", ONE)
    with pytest.raises(UsageError, match=r"layers\.3\.resid, \.\.\., layers\.36\.resid") as caught:
        taps.check()
    assert "layers.4.resid" not in str(caught.value)


def test_captures_leave_a_compiled_forward() -> None:
    @jax.jit
    def forward(x: jax.Array) -> dict[str, jax.Array]:
        taps = Taps(capture=("half",), edit={"half": lambda x: x / 2})
        taps("half", x)
        return taps.captured

    np.testing.assert_array_equal(forward(ONE)["half"], ONE / 2)
