"""What is derived once for all batches is what is derived for each."""

import pytest

from jaxserve.models.named import named_config
from jaxserve.partitioning.cost import Pass, Where, step_collectives, totals
from jaxserve.partitioning.layout import Ffn, Heads, PhaseLayout, Stage
from jaxserve.partitioning.traffic import Traffic
from jaxserve.partitioning.work import Share

CUBE = {"x": 4, "y": 2, "z": 4}


@pytest.mark.parametrize("heads", [Heads.HEADS, Heads.BATCH, Heads.SEQUENCE])
@pytest.mark.parametrize("ffn", [Ffn.WS1D, Ffn.WS2D, Ffn.WG_XY])
@pytest.mark.parametrize("model", ["palm-540b", "gemma-2-2b"])
def test_a_line_through_two_steps_meets_a_third(model: str, ffn: Ffn, heads: Heads):
    phase = PhaseLayout(ffn, heads)
    config = Share.of(named_config(model), phase, CUBE).config
    turns = config.num_layers // len(config.pattern)
    wanted: dict[tuple[str, tuple[str, ...], str, Where], float] = {}
    step = Pass(4096, 128, "bfloat16", Stage.SAMPLED)
    for key, size in totals(step_collectives(config, phase, CUBE, step)).items():
        wanted[key] = size * (1 if key[3] is Where.ENDS else turns)
    found: dict[tuple[str, tuple[str, ...], str, Where], float] = {}
    for flow in Traffic.of(config, phase, CUBE).flows:
        size = flow.per_token * 4096 + flow.per_row * 128 + flow.weights * 2
        key = flow.kind, flow.axes, flow.dtype, flow.where
        found[key] = found.get(key, 0) + size
    assert found == wanted


def test_only_gathered_weights_stay_the_same():
    for ffn in Ffn:
        phase = PhaseLayout(ffn, Heads.BATCH)
        config = Share.of(named_config("palm-8b"), phase, CUBE).config
        gathers = any(flow.gathers_weights for flow in Traffic.of(config, phase, CUBE).flows)
        assert gathers == phase.gathers
