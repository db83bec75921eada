"""What is added to a model so that it divides, and that it adds nothing to the results."""

from dataclasses import replace

import numpy as np
import pytest

from jaxserve.config import AttentionSpec
from jaxserve.errors import UsageError
from jaxserve.layers.decoder import Model
from jaxserve.layers.param import Declare
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan
from jaxserve.partitioning.padding import Padding

from .equality import FAMILIES, Case, logits_alone, one_device


def padding(x: int, y: int, z: int, *phases: PhaseLayout) -> Padding:
    return Padding(phases or (PhaseLayout(Ffn.WS2D, Heads.HEADS),), MeshPlan(x, y, z).sizes)


@pytest.mark.parametrize(
    ("mesh", "heads", "expected"),
    [
        ((2, 2, 2), (8, 2), (8, 2)),  # 8 devices take a head each
        ((2, 2, 2), (16, 16), (16, 16)),
        ((4, 4, 4), (48, 1), (64, 1)),  # PaLM 540B on 64 chips
        ((2, 2, 2), (12, 4), (16, 4)),  # groups of 3 become groups of 4
        ((2, 2, 2), (6, 2), (8, 2)),
        ((2, 2, 2), (7, 7), (8, 8)),  # multi-head: keys and values too
        ((2, 2, 2), (4, 4), (8, 8)),
        ((3, 2, 1), (64, 8), (96, 12)),  # 8 and 6 do not divide: neither must be cut
        ((1, 2, 2), (6, 3), (8, 4)),
        ((4, 4, 4), (71, 1), (128, 1)),
    ],
)
def test_heads_are_padded_within_their_groups(mesh, heads, expected) -> None:
    found = padding(*mesh).heads(*heads)
    assert found == expected
    assert padding(*mesh).heads(*found) == found


@pytest.mark.parametrize("heads", [(12, 4), (64, 8), (6, 3), (5, 1), (7, 7), (30, 5)])
@pytest.mark.parametrize("mesh", [(2, 2, 2), (3, 2, 1), (1, 2, 4), (5, 1, 2), (4, 4, 4)])
def test_no_device_has_heads_of_two_broken_groups(mesh, heads) -> None:
    num_heads, num_kv_heads = padding(*mesh).heads(*heads)
    devices = int(np.prod(mesh))
    own, group = num_heads // devices, num_heads // num_kv_heads
    assert num_heads % devices == 0
    assert own % group == 0 or group % own == 0
    assert group >= heads[0] // heads[1]
    assert num_kv_heads >= heads[1]


def test_attention_by_sequence_needs_heads_for_the_weights_alone() -> None:
    assert padding(2, 2, 2, PhaseLayout(Ffn.WS2D, Heads.BATCH)).heads(6, 2) == (8, 2)
    assert padding(8, 1, 1, PhaseLayout(Ffn.WS2D, Heads.BATCH)).heads(6, 2) == (6, 2)
    assert padding(8, 1, 1, PhaseLayout(Ffn.WS1D, Heads.BATCH)).heads(6, 2) == (8, 2)


def test_the_sizes_serve_both_phases() -> None:
    gathered, stationary = (PhaseLayout(ffn, Heads.HEADS) for ffn in (Ffn.WG_XYZ, Ffn.WS2D))
    assert padding(2, 2, 2, gathered).ffn(50) == 52
    assert padding(2, 2, 2, gathered, stationary).ffn(50) == 56
    assert padding(2, 2, 2, stationary).vocab(97) == 100
    assert padding(2, 2, 2, PhaseLayout(Ffn.WS1D, Heads.HEADS)).vocab(97) == 104


def test_attention_keeps_everything_but_the_counts() -> None:
    spec = AttentionSpec(6, 2, 8, scale=0.3, window=5)
    assert padding(2, 2, 2).attention(spec) == replace(spec, num_heads=8)


def test_the_width_is_refused_with_what_would_do() -> None:
    config = FAMILIES["llama"]
    with pytest.raises(UsageError) as caught:
        padding(5, 1, 2).check(config)
    assert str(caught.value) == (
        "embed_dim=48 does not divide over x=5, and the width is not padded; use a mesh with x in "
        "{1, 2, 3, 4, 6, 8, 12, 16, 24, 48}"
    )
    with pytest.raises(UsageError, match=r"x\*y\*z=32"):
        padding(8, 2, 2).check(config)
    padding(3, 2, 1).check(config)
    # Where tokens are cut instead, the width need not be.
    padding(8, 2, 2, PhaseLayout(Ffn.WG_XYZ, Heads.BATCH)).check(config)


@pytest.mark.parametrize("mesh", [(2, 2, 2), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_model_has_the_logits_of_its_own(family: str, mesh) -> None:
    case = Case(family, mesh, Ffn.WS2D, Ffn.WS2D, Heads.HEADS)
    plain = one_device(family, 4)
    declare = Declare(padding=Padding(case.phases, MeshPlan(*mesh).sizes))
    padded = logits_alone(Model(FAMILIES[family], declare), family, 4)
    assert padded.shape == plain.shape
    assert np.max(np.abs(padded - plain)) < 1e-6 * np.max(np.abs(plain))
