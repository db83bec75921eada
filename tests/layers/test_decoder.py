"""The one forward: storage, ends of the model, taps, transformations and communication.

`MIXED` has a layer of every kind, so what holds for it holds for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from jaxserve.errors import UsageError
from jaxserve.layers.cache import NoCache
from jaxserve.layers.decoder import Model, Output, Params, forward
from jaxserve.layers.param import Declare, Orientation
from jaxserve.layers.step import Step
from jaxserve.layers.tap import Taps
from jaxserve.pallas_kernels import kernel_set
from jaxserve.partitioning.collectives import LocalComm, Part, Product
from jaxserve.partitioning.layout import Stage

from .tiny_models import MIXED, PARALLEL, POST_NORMED, SERIAL, random_params, restored, sequences

LENGTH = 11
ROWS = np.random.default_rng(7).integers(0, MIXED.vocab_size, (2, LENGTH)).tolist()
MODEL = Model(MIXED, Declare())
SMALL = Model(replace(MIXED, layers=(SERIAL,), tied=True, logits_soft_cap=None), Declare())


@partial(jax.jit, static_argnames=("model", "batch", "backend", "capture"))
def compiled(
    model: Model,
    params: Params,
    step: Step,
    batch: int,
    backend: str = "xla",
    capture: tuple[str, ...] = (),
) -> Output:
    kernels = kernel_set(backend)
    taps = Taps(capture)
    return forward(model, params, step, NoCache(batch), LocalComm(), kernels, taps=taps)[0]


@pytest.fixture(scope="module")
def params() -> Params:
    return random_params(MODEL.module())


@pytest.fixture(scope="module")
def small() -> Params:
    return random_params(SMALL.module())


def logits(params: Params, rows: list[list[int]], model: Model = MODEL) -> np.ndarray:
    """Returns float32[B, L, V]."""
    out = compiled(model, params, sequences(rows), len(rows))
    return np.asarray(out.logits).reshape(len(rows), -1, model.config.vocab_size)


@pytest.mark.parametrize(
    "declare",
    [
        Declare(fuse=True),
        Declare(orientation=Orientation.OUT_IN),
        Declare(orientation=Orientation.OUT_IN, fuse=True),
    ],
)
def test_storage_changes_no_logits(declare: Declare) -> None:
    config = replace(MIXED, layers=(SERIAL, PARALLEL))
    plain = Model(config, Declare())
    params = random_params(plain.module())
    found = logits(restored(params, config, declare), ROWS, Model(config, declare))
    np.testing.assert_allclose(found, logits(params, ROWS, plain), atol=1e-5)


def test_fast_kernels_give_what_the_reference_gives(params: Params) -> None:
    out = compiled(MODEL, params, sequences(ROWS), 2, "reference")
    found = np.asarray(out.logits).reshape(2, LENGTH, -1)
    np.testing.assert_allclose(found, logits(params, ROWS), atol=1e-5)


def test_a_token_changes_nothing_before_it(params: Params) -> None:
    changed = [[*ROWS[0][:6], (ROWS[0][6] + 1) % 19, *ROWS[0][7:]], ROWS[1]]
    found, wanted = logits(params, changed)[0], logits(params, ROWS)[0]
    np.testing.assert_array_equal(found[:6], wanted[:6])
    assert (np.abs(found[6:] - wanted[6:]).max(axis=1) > 1e-3).all()


def test_a_row_depends_neither_on_its_neighbour_nor_on_padding(params: Params) -> None:
    whole = logits(params, ROWS)
    padded = logits(params, [ROWS[0], ROWS[1][:7]])
    np.testing.assert_array_equal(padded[0], whole[0])
    np.testing.assert_allclose(padded[1, :7], whole[1, :7], atol=1e-6)
    assert np.isfinite(padded).all()


def test_embeddings_are_scaled_rows_of_the_table(small: Params) -> None:
    out = compiled(SMALL, small, sequences(ROWS), 2, capture=("embed", "final"))
    table = np.asarray(small["embedding"]["values"])
    np.testing.assert_allclose(out.taps["embed"], table[np.ravel(ROWS)] * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(out.taps["final"], out.hidden)


def test_tied_logits_are_scaled_products_with_the_table(small: Params) -> None:
    out = compiled(SMALL, small, sequences(ROWS), 2, capture=("embed", "final"))
    wanted = np.asarray(out.hidden) @ np.asarray(small["embedding"]["values"]).T * 0.7
    assert "head" not in small
    np.testing.assert_allclose(out.logits, wanted, atol=1e-5)


def test_untied_logits_are_capped_products_with_the_head(params: Params) -> None:
    out = compiled(MODEL, params, sequences(ROWS), 2)
    products = np.asarray(out.hidden) @ np.asarray(params["head"]["values"]).T
    np.testing.assert_allclose(out.logits, 3 * np.tanh(products * 0.7 / 3), atol=1e-5)


def test_logits_of_chosen_rows_are_those_rows(small: Params) -> None:
    @jax.jit
    def chosen(params: Params, step: Step) -> Array:
        rows = jnp.array([12, 3])
        out, _ = forward(SMALL, params, step, NoCache(2), LocalComm(), kernel_set(), rows=rows)
        return out.logits

    every = logits(small, ROWS, SMALL).reshape(2 * LENGTH, -1)
    np.testing.assert_allclose(chosen(small, sequences(ROWS)), every[[12, 3]], atol=1e-6)


def edited(params: Params, edit: Mapping[str, Callable[[Array], Array]]) -> Array:
    @jax.jit
    def run(params: Params, step: Step) -> Array:
        taps = Taps(edit=edit)
        out, _ = forward(SMALL, params, step, NoCache(2), LocalComm(), kernel_set(), taps=taps)
        return out.logits

    return run(params, sequences(ROWS))


def test_an_edited_residual_is_what_later_layers_see(small: Params) -> None:
    # Every token's residual becomes the same, so every token gets the same logits.
    found = edited(small, {"layers.0.resid": lambda x: jnp.zeros_like(x).at[:, 0].set(8.0)})
    scale = float(small["final_norm"]["scale"][0])
    # Mean square 64 / 8: the norm leaves sqrt(8), in the first feature.
    wanted = np.asarray(small["embedding"]["values"])[:, 0] * 8**0.5 * scale * 0.7
    np.testing.assert_allclose(found, np.tile(wanted, (2 * LENGTH, 1)), rtol=1e-5)


def test_names_that_no_layer_has_are_refused(small: Params) -> None:
    with pytest.raises(UsageError, match=r"^edit=layers\.1\.resid names no activation"):
        edited(small, {"layers.1.resid": jnp.negative})
    with pytest.raises(UsageError, match=r"^capture=layers\.0\.norm names no activation; .*final"):
        compiled(SMALL, small, sequences(ROWS), 2, capture=("layers.0.norm",))


def test_every_block_and_both_ends_can_be_captured() -> None:
    step = sequences(ROWS)
    out = jax.eval_shape(
        lambda params: compiled(MODEL, params, step, 2, capture=("*",)), MODEL.abstract_params()
    )
    names = ("attention_probs", "attention", "mlp", "resid")
    parts = [f"layers.{i}.{name}" for i in range(4) for name in names]
    assert list(out.taps) == sorted(["input", "embed", *parts, "final", "logits"])
    wide = [x.shape for name, x in out.taps.items() if not name.endswith(("_probs", "logits"))]
    assert set(wide) == {(2 * LENGTH, 8)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_come_from_declarations_alone(dtype: str) -> None:
    model = Model(MIXED, Declare.best("cpu", dtype))
    out = jax.eval_shape(
        lambda params: compiled(model, params, sequences(ROWS), 2), model.abstract_params()
    )
    assert (out.logits.shape, out.logits.dtype) == ((2 * LENGTH, 19), jnp.float32)
    assert (out.hidden.shape, out.hidden.dtype) == ((2 * LENGTH, 8), jnp.dtype(dtype))


def test_the_gradient_is_the_slope() -> None:
    model = Model(replace(MIXED, layers=(POST_NORMED,)), Declare())
    params = random_params(model.module())
    step, targets = sequences(ROWS), jnp.asarray(ROWS).ravel()

    @jax.jit
    @jax.value_and_grad
    def loss(params: Params) -> Array:
        scores = jax.nn.log_softmax(compiled(model, params, step, 2).logits)
        return -jnp.mean(jnp.take_along_axis(scores, targets[:, None], axis=1))

    _, gradient = loss(params)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]
    assert all(np.abs(leaf).max() > 0 for leaf in leaves)
    size = float(np.sqrt(sum((leaf**2).sum() for leaf in leaves)))

    def moved(by: float) -> float:
        value, _ = loss(jax.tree.map(lambda p, g: p + by / size * g, params, gradient))
        return float(value)

    assert (moved(0.01) - moved(-0.01)) / 0.02 == pytest.approx(size, rel=0.01)


def test_sequences_spread_over_devices_give_what_one_device_gives(small: Params) -> None:
    rows = np.random.default_rng(8).integers(0, 19, (8, 4)).tolist()
    step = sequences(rows)

    def shard(params: Params, step: Step) -> Array:
        out, _ = forward(SMALL, params, step, NoCache(1), LocalComm(), kernel_set())
        return out.logits

    mesh, over = Mesh(jax.devices(), ("x",)), PartitionSpec("x")
    replicated = jax.tree.map(lambda _: PartitionSpec(), small)
    spread = jax.shard_map(shard, mesh=mesh, in_specs=(replicated, over), out_specs=over)
    found = np.asarray(jax.jit(spread)(small, step))
    np.testing.assert_allclose(found.reshape(8, 4, -1), logits(small, rows, SMALL), atol=1e-6)


@dataclass(frozen=True)
class Recording(LocalComm):
    """Writes down what passes through it."""

    seen: list[tuple[str, ...]] = field(default_factory=list, hash=False)

    def move(self, x: Array, source: Stage, target: Stage) -> Array:
        self.seen.append((source, target))
        return x

    def contract(self, x: Array, source: Stage, values: Array, dim: int, product: Product) -> Array:
        self.seen.append((source, Stage.CONTRACTED))
        return super().contract(x, source, values, dim, product)

    def distribute(self, parts: Sequence[Part]) -> list[Array]:
        self.seen.append(tuple(part.target for part in parts))
        return [part.x for part in parts]


def test_stages_of_a_block_follow_each_other() -> None:
    comm, step = Recording(), sequences(ROWS)

    def run(params: Params) -> Output:
        return forward(SMALL, params, step, NoCache(2), comm, kernel_set())[0]

    jax.eval_shape(run, SMALL.abstract_params())
    out = [(Stage.PRODUCED, Stage.RESIDUAL)]
    assert comm.seen == [
        (Stage.RESIDUAL, Stage.INPUT),
        (Stage.QUERY, Stage.QUERY, Stage.QUERY),
        (Stage.QUERY, Stage.CONTRACTED),
        *out,
        (Stage.RESIDUAL, Stage.INPUT),
        (Stage.HIDDEN, Stage.HIDDEN),
        (Stage.HIDDEN, Stage.CONTRACTED),
        *out,
        (Stage.SCORED, Stage.WHOLE),
    ]


def test_models_are_equal_by_value_and_hold_no_arrays() -> None:
    again = Model(replace(MIXED), Declare())
    assert again == MODEL
    assert hash(again) == hash(MODEL)
    assert again != Model(MIXED, Declare(fuse=True))
    leaves = jax.tree.leaves(MODEL.abstract_params())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_probabilities_are_those_of_attention_and_an_edit_of_them_changes_it(
    params: Params,
) -> None:
    names = ("layers.*.attention_probs", "layers.*.attention")
    out = compiled(MODEL, params, sequences(ROWS), 2, capture=names)
    for index, layer in enumerate(MIXED.layers):
        probs = out.taps[f"layers.{index}.attention_probs"]
        assert probs.shape == (2, layer.attention.num_heads, LENGTH, LENGTH)
        np.testing.assert_allclose(jnp.sum(probs, axis=-1), 1, atol=1e-5)
        assert not jnp.triu(probs, 1).any()

    @partial(jax.jit, static_argnames="change")
    def run(step: Step, change: Callable[[Array], Array]) -> Output:
        taps = Taps(names, {"layers.*.attention_probs": change})
        return forward(MODEL, params, step, NoCache(2), LocalComm(), kernel_set(), taps=taps)[0]

    same = run(sequences(ROWS), lambda x: x + 0)
    np.testing.assert_allclose(same.logits, out.logits, atol=1e-5)
    spread = run(sequences(ROWS), lambda x: jnp.tril(jnp.ones_like(x)) / LENGTH)
    assert not np.allclose(spread.logits, out.logits, atol=1e-3)
