"""A comparison with this machine becomes a chip whose estimates are what was measured."""

from pathlib import Path
from typing import Any

import pytest

from jaxserve import planner
from jaxserve.errors import UsageError
from jaxserve.planner.ingest import ingested, read_comparison

from .test_calibrate import MADE


def fields(**changes: Any) -> dict[str, Any]:
    terms = [
        {"name": "MLP in", "kind": "product", "estimated_s": 1e-3, "measured_s": 3e-3},
        {"name": "MLP out", "kind": "product", "estimated_s": 1e-3, "measured_s": 1e-3},
        {"name": "2 x all-gather", "kind": "collective", "estimated_s": 2e-3, "measured_s": 1e-3},
        {"name": "the whole step", "kind": "step", "estimated_s": 4e-3, "measured_s": 9e-3},
    ]
    return {"num_layers": 4, "calibration": MADE.fields(), "terms": terms} | changes


def test_rates_are_scaled_by_what_was_measured():
    found = ingested(fields(), "mine")
    assert found.matmul == ((1, 0.5e9), (512, 0.5e11))
    assert found.read == ((1 << 20, 0.5e9), (1 << 28, 2e9))
    assert found.link == pytest.approx(2 * MADE.link)
    assert found.layer_s == pytest.approx(4e-3 / 4)


def test_the_estimate_of_a_decode_step_becomes_what_it_took():
    more = [
        # Estimated by the rates of products, which were half as fast.
        {"name": "attention", "kind": "attention", "estimated_s": 5e-4, "measured_s": 9e-3},
        {"name": "layers", "kind": "layers", "estimated_s": 1e-3, "measured_s": None},
        {"name": "host", "kind": "host", "estimated_s": 4e-5, "measured_s": 1e-3},
    ]
    prefill = {"name": "MLP in", "kind": "product", "estimated_s": 0.0, "measured_s": 0.0}
    terms = [*fields()["terms"], *more, prefill | {"phase": "prefill"}]
    found = ingested(fields(terms=terms), "mine")
    assert found.host_s == 1e-3
    assert found.layer_s == pytest.approx((9e-3 - 5e-3 - 1e-3 - 1e-3) / 4)
    assert "host_s = [0.001, " in found.text()


def test_terms_that_take_longer_alone_leave_nothing_for_the_layers():
    whole = {"name": "the whole step", "kind": "step", "estimated_s": 4e-3, "measured_s": 1e-3}
    assert ingested(fields(terms=[*fields()["terms"][:3], whole]), "mine").layer_s == 0


def test_estimates_take_the_layers_time_of_the_chip(tmp_path: Path):
    path = tmp_path / "mine.toml"
    ingested(fields(), "mine").write(path)
    found = planner.estimate("tiny", "mine:4", batch=8, context=128, hardware=path)
    (layers,) = (term for term in found.estimate.terms if term.part == "fixed")
    assert float(layers.seconds) == pytest.approx(1e-3 * layers.amount)
    assert layers.origin == "measured"


def test_the_time_between_steps_is_the_chips(tmp_path: Path):
    path = tmp_path / "mine.toml"
    host = {"name": "host", "kind": "host", "estimated_s": 4e-5, "measured_s": 2e-3}
    ingested(fields(terms=[*fields()["terms"], host]), "mine").write(path)
    found = planner.estimate("tiny", "mine:4", batch=8, context=128, hardware=path)
    (term,) = (term for term in found.estimate.terms if term.part == "host")
    assert (term.seconds, term.origin) == (2e-3, "measured")


def test_what_is_no_comparison_is_refused(tmp_path: Path):
    path = tmp_path / "x.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_comparison(path)
    path.write_text("{}")
    with pytest.raises(UsageError, match="write one with jaxserve bench --against"):
        ingested(read_comparison(path), "mine")
