"""Parts of models that few families have, on meshes, against one device.

Norms behind sums and of heads, learned positions, embeddings of another width, clipped
projections, a head of unit rows, key heads that vary from layer to layer, experts.
"""

from itertools import product

import pytest

from jaxserve.errors import UsageError
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan
from jaxserve.partitioning.padding import Padding

from .equality import MESHES, PAIRS, PARTS, Case, error, serves

pytestmark = pytest.mark.usefixtures("compile_fast")

LIMIT = 1e-5
"""Of the largest logit, in float32."""

FEW = [
    ((2, 2, 2), Ffn.WS2D, Ffn.WS2D, Heads.HEADS_BATCH),
    ((1, 2, 4), Ffn.WS1D, Ffn.WS1D, Heads.HEADS),
    ((2, 2, 2), Ffn.WG_XY, Ffn.WS2D, Heads.HEADS),
]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(name, *choice), marks=pytest.mark.slow if number else ())
        for name in PARTS
        for number, choice in enumerate(FEW)
    ],
    ids=str,
)
def test_logits_are_those_of_one_device(case: Case) -> None:
    assert error(case) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_layers_that_repeat_in_one_loop_give_the_same(name: str) -> None:
    case = Case(name, (2, 2, 2), Ffn.WS2D, Ffn.WS2D, Heads.HEADS_BATCH, stack=True)
    assert error(case) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "heads"),
    [case for case in product(PARTS, MESHES, Heads) if serves(*case)],
    ids=str,
)
def test_every_layout_gives_the_logits_of_one_device(name, mesh, heads) -> None:
    for pair in PAIRS:
        case = Case(name, mesh, *pair, heads)
        assert error(case) < LIMIT, case


def test_a_table_of_another_width_must_divide_as_the_width_does() -> None:
    plan = MeshPlan(16, 1, 1)
    padding = Padding((PhaseLayout(Ffn.WS2D, Heads.HEADS),), plan.sizes)
    with pytest.raises(UsageError, match=r"embed_dim=48 with table_dim=24 does not divide.*x=16"):
        padding.check(PARTS["opt"])
