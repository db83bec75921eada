"""The table of tuned sizes: where each comes from, and that its kernel keeps to its registers."""

import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE: dict[str, list[dict[str, Any]]] = tomllib.loads(
    (ROOT / "pallas_kernels" / "tuning.toml").read_text()
)
ROWS = [(op, row) for op, rows in TABLE.items() for row in rows]
TARGETS = {"paged_attention": ("of_hbm_time", 0.8), "int8_matmul": ("over_roofline", 1.15)}


def spills_known(op: str, row: dict[str, Any]) -> bool:
    """Returns whether no size was found that keeps to the registers; `docs/kernels.md` says so."""
    if op == "int8_matmul":
        return row["rows"] == 256
    return row["pages"] == "int8" or row["model"] == "falcon-7b"


def named(op: str, row: dict[str, Any]) -> str:
    return " ".join(str(row.get(key, "")) for key in ("chip", "model", "mode", "rows"))


@pytest.mark.parametrize(("op", "row"), ROWS, ids=[named(*pair) for pair in ROWS])
def test_tuned_sizes_keep_to_the_registers_and_say_where_they_come_from(
    op: str, row: dict[str, Any]
) -> None:
    assert row["spills"] == 0 or spills_known(op, row)
    assert row["origin"].startswith("compiler-estimated jax")
    assert TARGETS[op][0] in row


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU's compiler, is not installed: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize(("op", "row"), ROWS, ids=[named(*pair) for pair in ROWS])
def test_the_compiler_still_says_the_same(
    op: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    cycles = importlib.import_module("tpu_cycles")
    kept = ("chip", "heads", "kv_heads", "head_dim", "pages", "keys", "mode", "rows", "inputs")
    case = {name: row[name] for name in (*kept, "channels", "tile") if name in row}
    assert cycles.estimate({"kernel": op, **case})["spills"] == row["spills"]
    sys.modules.pop("tpu_cycles", None)
