"""Every layout on every mesh computes what one device computes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from jaxserve.config import Quantization
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Ring
from jaxserve.partitioning.mesh import MeshPlan
from jaxserve.partitioning.padding import Padding

from .equality import FAMILIES, MESHES, PAIRS, Case, error, on_mesh, one_device, serves

pytestmark = pytest.mark.usefixtures("compile_fast")

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


def test_weights_that_lie_apart_give_the_same() -> None:
    case = Case("llama", (2, 2, 2), Ffn.WG_X, Ffn.WS2D, Heads.HEADS, fuse=False)
    assert error(case) < LIMIT


@pytest.mark.parametrize(
    ("family", "mesh", "ring"),
    [
        ("llama", (2, 2, 2), Ring.ONE_WAY),
        ("palm", (8, 1, 1), Ring.LOW_LATENCY),
        ("falcon", (3, 2, 1), Ring.BIDIRECTIONAL),
    ],
    ids=str,
)
def test_products_beside_their_communication_give_the_same(family, mesh, ring) -> None:
    assert error(Case(family, mesh, Ffn.WS2D, Ffn.WS2D, Heads.HEADS, overlap=ring)) < LIMIT


@pytest.mark.parametrize("heads", [Heads.HEADS, Heads.BATCH], ids=str)
def test_activations_may_go_in_a_narrower_type(heads) -> None:
    case = Case("llama", (2, 2, 2), Ffn.WS2D, Ffn.WS2D, heads)
    assert error(replace(case, wire="float32")) == error(case)
    assert 100 * LIMIT < error(replace(case, wire="bfloat16")) < 0.05


@pytest.mark.parametrize(
    ("family", "mesh", "pair", "heads"),
    [
        ("llama", (1, 2, 4), PAIRS[0], Heads.HEADS),
        ("falcon", (2, 2, 2), PAIRS[1], Heads.BATCH),
        ("gemma2", (2, 2, 2), (Ffn.WG_XYZ, Ffn.WS2D), Heads.HEADS_BATCH),
        ("palm", (3, 2, 1), (Ffn.WG_XY, Ffn.WG_X), Heads.HEADS),
        ("alibi", (8, 1, 1), (Ffn.WG_X, Ffn.WG_XY), Heads.HEADS),
        ("experts", (2, 2, 2), (Ffn.WG_XY, Ffn.WS2D), Heads.HEADS_BATCH),
    ],
    ids=str,
)
def test_weights_of_int8_give_the_logits_of_one_device(family, mesh, pair, heads) -> None:
    prefill, decode = pair
    assert error(Case(family, mesh, prefill, decode, heads, quantize=Quantization.INT8)) < LIMIT


def test_each_device_rounds_its_part_of_a_row() -> None:
    case = Case("llama", (2, 2, 2), *PAIRS[1], Heads.HEADS, quantize=Quantization.W8A8)
    wanted = one_device(case.family, 8, case.quantize)[0]
    error = np.max(np.abs(on_mesh(case)[0] - wanted)) / np.max(np.abs(wanted))
    assert LIMIT < error < 0.1  # finer parts, other rounding


def test_rows_that_stay_whole_are_rounded_as_on_one_device() -> None:
    case = Case("alibi", (8, 1, 1), Ffn.WG_X, Ffn.WG_XY, Heads.HEADS, quantize=Quantization.W8A8)
    assert error(case) < LIMIT


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


SIXTEEN = """
import json
from tests.partitioning.equality import Case, Ffn, Heads, error

cases = [
    Case("llama", (2, 2, 4), Ffn.WG_XY, Ffn.WS2D, Heads.HEADS),
    Case("palm", (4, 2, 2), Ffn.WG_XYZ, Ffn.WS2D, Heads.BATCH),
    Case("falcon", (16, 1, 1), Ffn.WS1D, Ffn.WS1D, Heads.HEADS_BATCH),
]
print(json.dumps([error(case) for case in cases]))
"""


@pytest.mark.slow
def test_sixteen_devices_give_the_logits_of_one() -> None:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=16", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", SIXTEEN],
        cwd=root,
        env=os.environ | flags,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 3
    assert max(errors) < LIMIT, errors
