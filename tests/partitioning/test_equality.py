"""Every layout on every mesh computes what one device computes."""

from itertools import combinations, product

import pytest

from jaxserve.partitioning.layout import Heads, PhaseLayout
from jaxserve.partitioning.mesh import MeshPlan
from jaxserve.partitioning.padding import Padding

from .equality import FAMILIES, MESHES, PAIRS, Case, error, serves

LIMIT = 1e-5
"""Of the largest logit, in float32."""


def every_case() -> list[Case]:
    cases = product(FAMILIES, MESHES, PAIRS, Heads)
    return [
        Case(family, mesh, *pair, heads)
        for family, mesh, pair, heads in cases
        if serves(family, mesh, heads)
    ]


def pairs_of(case: Case) -> set[object]:
    """Returns the pairs of choices that a case tests together."""
    chosen = {
        "family": case.family,
        "mesh": case.mesh,
        "prefill": case.prefill,
        "decode": case.decode,
        "heads": case.heads,
    }
    return set(combinations(chosen.items(), 2))


def pairwise(cases: list[Case]) -> list[Case]:
    """Returns few cases in which every two choices that can meet do meet."""
    open_pairs = set().union(*map(pairs_of, cases))
    found: list[Case] = []
    while open_pairs:
        best = max(cases, key=lambda case: len(pairs_of(case) & open_pairs))
        open_pairs -= pairs_of(best)
        found.append(best)
    return found


@pytest.mark.parametrize("case", pairwise(every_case()), ids=str)
def test_logits_are_those_of_one_device(case: Case) -> None:
    assert error(case) < LIMIT


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_that_repeat_in_one_loop_give_the_same(family: str) -> None:
    first, second = PAIRS[-1][0], PAIRS[1][0]
    assert error(Case(family, (2, 2, 2), first, second, Heads.HEADS_BATCH, stack=True)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mesh", "heads"),
    [case for case in product(FAMILIES, MESHES, Heads) if serves(*case)],
    ids=str,
)
def test_every_pair_of_layouts_gives_the_logits_of_one_device(family, mesh, heads) -> None:
    # Under one padding for all pairs each layout is compiled once.
    gathered = [pair for pair in PAIRS if pair[0] != PAIRS[0][0]]
    for pairs in (PAIRS[:1], gathered):
        phases = tuple(dict.fromkeys(PhaseLayout(ffn, heads) for pair in pairs for ffn in pair))
        padding = Padding(phases, MeshPlan(*mesh).sizes)
        for pair in pairs:
            case = Case(family, mesh, *pair, heads, padding=padding)
            assert error(case) < LIMIT, case
