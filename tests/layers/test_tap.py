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
        r"this model has embed, layers\.N\.resid, final \(N from 0 to 1\)$"
    )
    with pytest.raises(UsageError, match=message):
        taps.check()


def test_a_pattern_that_met_no_activation_is_refused() -> None:
    taps = Taps(capture=("layers.*.resid", "layers.*.mlp", "logits"))
    run(taps)
    with pytest.raises(UsageError, match=r"^capture=layers\.\*\.mlp, logits names no activation"):
        taps.check()


def test_edits_by_pattern_follow_each_other() -> None:
    edit = {"layers.*.resid": lambda x: x + 1, "layers.1.*": lambda x: x * 10}
    assert run(Taps(edit=edit)) == [0.0, 2.0, 30.0, 3.0]


def test_an_edit_keeps_shape_and_dtype() -> None:
    assert Taps(edit={"a": lambda x: x + jnp.ones(2)})("a", jnp.ones(2, jnp.bfloat16)).dtype == (
        jnp.bfloat16
    )
    with pytest.raises(UsageError, match=r"the edit of a gave shape \(1,\), .* has \(2,\)"):
        Taps(edit={"a": lambda x: x[:1]})("a", ONE)
    with pytest.raises(UsageError, match=r"edit\['a'\]=2 is no function"):
        Taps(edit={"a": 2})  # pyright: ignore[reportArgumentType]


def test_what_is_only_shown_is_not_edited() -> None:
    taps = Taps(capture=("load",), edit={"load": jnp.negative})
    taps.show("load", ONE)
    taps("embed", ONE)
    np.testing.assert_array_equal(taps.captured["load"], ONE)
    with pytest.raises(UsageError, match=r"edit=load names no activation; this model has embed$"):
        taps.check()


def test_activations_are_shown_in_the_shape_of_the_tokens() -> None:
    seen: list[tuple[int, ...]] = []

    def note(x: jax.Array) -> jax.Array:
        seen.append(x.shape)
        return x + 1

    taps = Taps(capture=("*",), edit={"*": note}, shape=(2, 3, 4))
    assert taps("tokens", jnp.zeros((24, 5))).shape == (24, 5)
    assert taps.pairs("pairs", jnp.zeros((6, 7, 4, 4))).shape == (6, 7, 4, 4)
    assert seen == [(2, 3, 4, 5), (2, 3, 7, 4, 4)]
    assert {name: x.shape for name, x in taps.captured.items()} == dict(
        tokens=(2, 3, 4, 5), pairs=(2, 3, 7, 4, 4)
    )


def test_captures_leave_a_compiled_forward() -> None:
    @jax.jit
    def forward(x: jax.Array) -> dict[str, jax.Array]:
        taps = Taps(capture=("half",), edit={"half": lambda x: x / 2})
        taps("half", x)
        return taps.captured

    np.testing.assert_array_equal(forward(ONE)["half"], ONE / 2)
