"""The committed table of compiled communication is of the code that is here."""

import json
import math

import pytest

from benchmarks.collectives import FFN, HEADS, MODELS, RESULTS, SLICES, Row, key, named, sent_by
from jaxserve.partitioning.cost import totals

ROWS = json.loads(RESULTS.read_text())["rows"]


def test_every_row_was_compiled() -> None:
    wanted = math.prod(map(len, (SLICES, MODELS, ("decode", "prefill"), FFN, HEADS)))
    assert len({key(row) for row in ROWS}) == len(ROWS) == wanted
    assert all("versions" in row for row in ROWS)


@pytest.mark.parametrize("name", SLICES)
def test_what_was_predicted_is_predicted_still(name: str) -> None:
    for row in ROWS:
        if row["slice"] == name:
            now = named(totals(sent_by(Row(*key(row)))))
            assert row["full_tensor_bytes"] == now, key(row)
            assert row["exact"] is (row["full_tensor_bytes_compiled"] == now), key(row)
