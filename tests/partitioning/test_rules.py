"""From logical axes to places on a mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxserve.errors import ConfigError, UsageError
from jaxserve.partitioning.rules import WEIGHTS, Rules, make_mesh


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("ffn", "embed"), (64, 48), PartitionSpec(("y", "z"), "x")),
        (("embed", "ffn"), (48, 64), PartitionSpec("x", ("y", "z"))),
        (("heads", "head", "embed"), (8, 10, 48), PartitionSpec(("y", "z"), None, "x")),
        (("embed",), (48,), PartitionSpec("x")),
        (("kv_heads", "head", "embed"), (4, 10, 48), PartitionSpec(("y", "z"), None, "x")),
        (("kv_heads", "head", "embed"), (2, 10, 48), PartitionSpec(None, None, "x")),
        (("fused", "embed"), (160, 48), PartitionSpec(None, "x")),
        (("vocab", "embed"), (104, 48), PartitionSpec(("y", "z"), "x")),
    ],
)
def test_weights_lie_width_over_x_and_the_rest_over_yz(axes, shape, expected):
    assert WEIGHTS.spec(axes, shape, make_mesh(2, 2, 2)) == expected


def test_axes_of_one_device_are_left_out():
    assert WEIGHTS.spec(("ffn", "embed"), (64, 48), make_mesh(1, 2, 1)) == PartitionSpec("y", None)


def test_each_device_holds_its_part():
    array = np.arange(64 * 48).reshape(64, 48)
    mesh = make_mesh(2, 2, 2)
    placed = jax.device_put(array, WEIGHTS.on(mesh)(("ffn", "embed"), array.shape))
    for shard in placed.addressable_shards:
        x, y, z = (int(i) for i in np.argwhere(mesh.devices == shard.device)[0])
        row, column = (2 * y + z) * 16, x * 24
        expected = array[row : row + 16, column : column + 24]
        np.testing.assert_array_equal(np.asarray(shard.data), expected)


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(UsageError) as caught:
        WEIGHTS.spec(("heads", "head", "embed"), (12, 4, 48), make_mesh(1, 2, 4))
    assert str(caught.value) == (
        "heads=12 does not divide over y*z=8; use a mesh with y*z in {1, 2, 3, 4, 6, 12}"
    )


def test_an_axis_without_a_rule_is_refused():
    with pytest.raises(ConfigError, match="'experts' has no rule"):
        WEIGHTS.spec(("experts",), (4,), make_mesh())


def test_two_axes_cannot_share_a_mesh_axis():
    rules = Rules({"a": ("x", "y"), "b": ("y",)})
    with pytest.raises(ConfigError, match="mesh axis 'y'"):
        rules.spec(("a", "b"), (4, 4), make_mesh(2, 2, 1))


def test_the_same_size_and_shape_must_match():
    with pytest.raises(ValueError, match="zip"):
        WEIGHTS.spec(("embed",), (4, 4), make_mesh())


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -1, 1)])
def test_a_mesh_has_positive_sizes(sizes):
    with pytest.raises(UsageError, match="positive"):
        make_mesh(*sizes)


def test_too_few_devices_are_counted():
    with pytest.raises(UsageError, match="needs 16 devices, found 8"):
        make_mesh(4, 2, 2)
    with pytest.raises(UsageError, match="needs 2 devices, found 1"):
        make_mesh(2, devices=jax.devices()[:1])


def test_a_mesh_takes_the_first_devices():
    mesh = make_mesh(1, 2, 2)
    assert mesh.axis_names == ("x", "y", "z")
    assert list(mesh.devices.flat) == jax.devices()[:4]
